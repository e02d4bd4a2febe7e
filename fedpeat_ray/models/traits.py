"""What a model does that its configuration does not say: found out by asking it about a few tokens.

Configurations name the same thing in many ways, and an architecture may scale, cap or shift anything
anywhere. What training here takes for granted is therefore tried on each model when it is first seen.

Legend: B sequences, T tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedpeat_ray.errors import ModelError
from fedpeat_ray.models.architecture import is_causal_lm
from fedpeat_ray.seeding import generator

NO_LIMIT = sys.maxsize
TOLERANCE = 2.0**-15
"""Of the largest logit: 256 roundings of float32, which some models compute in whatever their weights are, against
what one token, or the wrong client's adapter, does to logits: 2**-11 of them even in a model of tiny random weights."""
NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads")
_LIMITS = ("max_position_embeddings", "max_seq_len", "n_positions")
_SHAPE = (2, 6)  # sequences and tokens that a model is asked about


@dataclass(frozen=True)
class Traits:
    """Of one model."""

    plain_head: bool
    """Logits are the last hidden states times the output layer, and nothing else."""
    max_positions: int
    """Longest sequence it can read; NO_LIMIT where there is none."""


def examine(model: PreTrainedModel) -> Traits:
    """Ask the model, or its first blocks. Raises ModelError for a language model that is not causal, and for one whose
    outputs are not finite."""
    name, inputs = type(model).__name__, some_inputs(model, *_SHAPE)
    shorter = {key: value[:, :-1] for key, value in inputs.items()} if reads_tokens(model) else inputs
    with torch.no_grad(), _looked_up() as rows:
        logits = model(**inputs).logits
    with torch.no_grad(), _looked_up() as rows_of_shorter:
        logits_of_shorter = model(**shorter).logits
    if not logits.isfinite().all():
        raise ModelError(f"{name} gives logits that are not finite")
    if not reads_tokens(model):
        return Traits(False, NO_LIMIT)
    if is_causal_lm(model) and (logits[:, :-1] - logits_of_shorter).abs().max() > TOLERANCE * logits.abs().max():
        raise ModelError(f"{name} is not causal: a token changes the logits of those before it")
    tokens = model.get_input_embeddings().get_parameter("weight")
    limits = []
    for table, (last, num_rows, width) in rows.items():  # of the width of the model: not of biases by distance
        if table != id(tokens) and width >= tokens.shape[1] and last == rows_of_shorter[table][0] + 1:
            limits.append(num_rows - (last + 1 - _SHAPE[1]))
    plain = is_causal_lm(model) and _has_plain_head(model, inputs["input_ids"], logits)
    return Traits(plain, min([configured_positions(model), *limits]))


def reads_tokens(model: PreTrainedModel) -> bool:
    """Whether it reads text."""
    return model.main_input_name == "input_ids"


def some_inputs(model: PreTrainedModel, num_rows: int, length: int) -> dict[str, Tensor]:
    """What the model can be tried on: random tokens of a length, or images."""
    if not reads_tokens(model):
        side = getattr(model.config, "image_size", None)
        if not isinstance(side, int):
            raise ModelError(f"{type(model).__name__} reads neither text nor images of one size")
        rng = torch.Generator().manual_seed(0)
        dtype = next(model.parameters()).dtype
        shape = (num_rows, model.config.num_channels, side, side)
        return {model.main_input_name: torch.empty(shape, dtype=dtype).normal_(generator=rng)}
    tokens = some_tokens(model, num_rows, length)
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})


def check_configuration(model: PreTrainedModel) -> None:
    """Raise ModelError for a model that is no transformer with blocks of attention."""
    needed = (*NEEDED, *(("vocab_size",) if reads_tokens(model) else ()))
    missing = [name for name in needed if getattr(model.config, name, None) is None]
    if missing:
        known = "only transformers whose blocks have attention can be tuned"
        raise ModelError(f"{type(model).__name__} has no {missing[0]} in its configuration: {known}")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, setting: str) -> None:
    """Raise ModelError if the tokenizer has a token that the model cannot read or write."""
    last, rows = max(tokenizer.get_vocab().values()), num_tokens(model)
    if last >= rows:
        raise ModelError(f"{setting}: its tokenizer has tokens up to number {last}, its weights are for {rows} tokens")


def num_tokens(model: PreTrainedModel) -> int:
    """How many tokens the model can both read and write."""
    head = model.get_output_embeddings()
    layers = [model.get_input_embeddings(), *([head] if head is not None else [])]
    return min(layer.get_parameter("weight").shape[0] for layer in layers)


def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output layer, if it is a matrix without a bias."""
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Linear) and head.bias is None else None


def configured_positions(model: PreTrainedModel) -> int:
    """Longest sequence by the configuration, under any of the names that it has there."""
    found = [value for name in _LIMITS if (value := getattr(model.config, name, None)) and value > 0]
    return found[0] if found else NO_LIMIT


def some_tokens(model: PreTrainedModel, num_rows: int, length: int) -> Tensor:
    """Random tokens (rows, length) for trying something; falling in each row, none twice and none that is padding."""
    rng = generator(0, "tokens to try a model on")
    padding = getattr(model.config, "pad_token_id", None)
    known = [token for token in range(num_tokens(model)) if token != padding]
    draws = [sorted(rng.choice(known, length, replace=False).tolist(), reverse=True) for _ in range(num_rows)]
    return torch.tensor(draws)


def _has_plain_head(model: PreTrainedModel, tokens_BT: Tensor, logits_BTV: Tensor) -> bool:
    """Whether the logits are those of the linear head, up to the rounding of sums over D and of the result."""
    head = linear_head(model)
    with torch.no_grad():
        hidden = getattr(model.base_model(input_ids=tokens_BT, use_cache=False), "last_hidden_state", None)
        if head is None or hidden is None or hidden.shape[-1] != head.weight.shape[1]:
            return False
        hidden_BTD = hidden.to(head.weight.dtype)
        fast_BTV = hidden_BTD @ head.weight.T
        if fast_BTV.shape != logits_BTV.shape:
            return False
        # Two sums of D products, each off by at most D roundings of its largest partial sum (Higham 2002, section 3.1)
        sums = hidden_BTD.abs() @ head.weight.T.abs()
        bound = 2 * head.weight.shape[1] * torch.finfo(fast_BTV.dtype).eps * sums
        bound += torch.finfo(logits_BTV.dtype).eps * fast_BTV.abs()
        return bool(((fast_BTV - logits_BTV).abs() <= bound).all())


@contextmanager
def _looked_up() -> Iterator[Mapping[int, tuple[int, int, int]]]:
    """Gives {id of a table: (largest row that was looked up, number of rows, of columns)}, filled while it is open."""
    rows: dict[int, tuple[int, int, int]] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.embedding:
                asked, table = args[0], args[1]
                before, *_ = rows.get(id(table), (-1, 0, 0))
                rows[id(table)] = (max(before, int(asked.max())), *table.shape)
            return func(*args, **(kwargs or {}))

    with Watch():
        yield rows
