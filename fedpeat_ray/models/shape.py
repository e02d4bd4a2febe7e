"""The shape of a model for the memory and cost models: its sizes, and what a training step of it holds.

Nothing is computed and nothing allocated: a model of the same configuration with a few blocks is run on the meta
device, where tensors have sizes and no data. Batch size, length and rank are prime numbers that divide none of the
model's own sizes, so how often each divides a tensor's size tells how the tensor grows with it. All numbers that
follow are whole and do not depend on the machine.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpeat_ray.fleet.memory import POWERS, BlockTerms, ModelShape, StepTerms, Terms, Trainable
from fedpeat_ray.models.architecture import is_causal_lm, model_class
from fedpeat_ray.models.foundation import block_list_name

TESTED_FAMILIES = ("gpt2", "llama", "qwen3", "gemma2", "mixtral", "phi3", "opt")
"""Model types whose memory is held to PyTorch's by tests/parity/test_memory_model.py."""

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_PRIMES = [n for n in range(29, 500) if all(n % m for m in range(2, n))]
_aten = torch.ops.aten
# Products of matrices, by the number of the operand whose last dimension is summed over.
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.bmm: 0, _aten.baddbmm: 1, _aten._grouped_mm: 0}
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu


def memory_model(config_json: str) -> str:
    """How far the memory of a model is known: "tested family" (within 10 % of PyTorch's) or "estimate"."""
    return "tested family" if json.loads(config_json)["model_type"] in TESTED_FAMILIES else "estimate"


def model_shape(model: PreTrainedModel, weight_bytes: int) -> ModelShape:
    """What the memory and cost models need to know about a decoder-only model, held in `weight_bytes` an element.

    The model may be without memory for its parameters. Its blocks are taken to be like the first one. A model whose
    step cannot be run without data counts as a LLaMA of the same widths.
    """
    config = model.config
    block = next(model.get_submodule(block_list_name(model)).children())
    weights = dict(block.named_parameters())
    linears = [module.get_parameter("weight") for module in block.modules() if isinstance(module, nn.Linear | Conv1D)]
    block_parameters = sum(weight.numel() for weight in weights.values())
    known = config.model_type in TESTED_FAMILIES and is_causal_lm(model)
    stand_in = None if known else _llama_like(config, weights).to_json_string()
    steps = _Steps(config.to_json_string(), stand_in, weight_bytes)
    flops = steps.flops
    tokens, pairs = POWERS.index((1, 1, 0)), POWERS.index((1, 2, 0))
    products = flops["forward 1"][tokens] // 2  # the weights that a token is multiplied with
    return ModelShape(
        num_blocks=config.num_hidden_layers,
        weight_bytes=weight_bytes,
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        block_parameters=block_parameters,
        block_biases=sum(weight.numel() for name, weight in weights.items() if name.endswith("bias")),
        used_parameters=block_parameters - sum(w.numel() for w in weights.values() if w.ndim > 1) + products,
        head_parameters=flops["head"][tokens] // 2,
        attention_width=flops["forward 1"][pairs] // 4,
        lora_features=sum(sum(weight.shape) for weight in linears),
        largest_matrix=max(weight.numel() for weight in weights.values() if weight.ndim == 2),
        steps=steps,
    )


@dataclass(frozen=True)
class _Steps(Mapping[Trainable, StepTerms]):
    """What a step holds, by what is trained; each is run when it is first asked for."""

    config_json: str
    stand_in: str | None
    """Configuration of the model to run where the model's own step cannot be; None: it can."""
    weight_bytes: int

    def __getitem__(self, trainable: Trainable) -> StepTerms:
        terms = _step(self.config_json, self.stand_in, self.weight_bytes, trainable)[0]
        if terms is None:
            raise KeyError(trainable)
        return terms

    def __iter__(self) -> Iterator[Trainable]:
        kinds: tuple[Trainable, ...] = ("all", "lora", "bias", "blocks")
        return (trainable for trainable in kinds if trainable in self)

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def flops(self) -> dict[str, Terms]:
        """Operations of matrix products, by the part of a step with all weights."""
        return _step(self.config_json, self.stand_in, self.weight_bytes, "all")[1]


@functools.lru_cache(maxsize=128)
def _step(
    config_json: str, stand_in: str | None, weight_bytes: int, trainable: Trainable
) -> tuple[StepTerms | None, dict[str, Terms]]:
    """What a step holds, None if there is nothing to train, and the operations of its parts."""
    try:
        if trainable == "all":
            notes = _note_step(config_json, weight_bytes, trainable, depth=2, trained=(0, 1))
            terms = _step_terms(notes, first=0, other=1, crossed=1)
        else:  # a frozen block that keeps nothing, a trained one, a frozen one that gradients pass, a trained one
            notes = _note_step(config_json, weight_bytes, trainable, depth=4, trained=(1, 3))
            terms = _step_terms(notes, first=1, other=3, crossed=2) if notes.largest.any() else None
    except Exception:  # whatever a family's own code does not do without data
        if stand_in is None:
            raise
        return _step(stand_in, None, weight_bytes, trainable)
    return terms, {part: _plain(flops) for part, flops in notes.flops.items()}


@dataclass(frozen=True)
class _Notes:
    """A step of a small model. The coefficients of POWERS are the last dimension of all arrays."""

    moments: dict[str, np.ndarray]
    """Bytes that the step holds, moment by moment, by part: "early", "forward 0" and so on, "head" (forward), "loss"
    (backward, the output layer too), "backward 3" and so on, and "end"."""
    flops: dict[str, np.ndarray]
    """Operations of matrix products, by part."""
    gradients: list[np.ndarray]
    """Bytes of the gradients of each block's weights."""
    largest: np.ndarray
    """Bytes of the largest tensor that is trained."""


def _step_terms(notes: _Notes, first: int, other: int, crossed: int) -> StepTerms:
    """By the numbers of blocks: the first that is trained, another one, and a frozen one behind the first."""
    start = {part: moments[0] for part, moments in notes.moments.items()}
    numbers = range(first, len(notes.gradients))
    ends = {number: f"backward {number - 1}" if number > first else "end" for number in numbers}
    # The backward pass of a block gives up what the forward pass kept, and leaves gradients.
    kept = {i: start[f"backward {i}"] - start[ends[i]] + notes.gradients[i] for i in numbers}
    none = np.zeros(len(POWERS), np.int64)
    all_kept = sum(kept.values(), none)
    behind = start[f"backward {numbers[-1]}"] - all_kept

    def block(number: int) -> BlockTerms:
        before = sum((kept[i] for i in numbers if i < number), none)
        left = sum((notes.gradients[i] for i in numbers if i > number), none)
        return BlockTerms(
            kept=_plain(kept[number]),
            forward=_greatest(notes.moments[f"forward {number}"] - start[f"forward {first}"] - before),
            backward=_greatest(notes.moments[f"backward {number}"] - behind - before - left),
            left=_plain(notes.gradients[number]),
        )

    early = [notes.moments["early"], *(notes.moments[f"forward {number}"] for number in range(first))]
    return StepTerms(
        early=_greatest(np.concatenate(early)),
        start=_plain(start[f"forward {first}"]),
        first=block(first),
        trained=block(other),
        crossed=block(crossed),
        head=_greatest(np.concatenate([notes.moments["head"], notes.moments["loss"]]) - all_kept),
        behind=_plain(behind),
        end=_greatest(notes.moments["end"] - sum((notes.gradients[i] for i in numbers), none)),
        largest=_plain(notes.largest),
    )


def _note_step(config_json: str, weight_bytes: int, trainable: Trainable, depth: int, trained: Sequence[int]) -> _Notes:
    """Run a step of a model of `depth` blocks that trains some of these, or with "all" everything."""
    config = _with_depth(json.loads(config_json), depth)
    with torch.device("meta"):
        model = model_class(config)._from_config(config, dtype=_DTYPES[weight_bytes])
    model.eval().requires_grad_(trainable == "all")
    model.loss_type = "ForCausalLM"  # what is taken anyway, without a warning
    blocks = list(model.get_submodule(block_list_name(model)).children())
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    primes = [n for n in _PRIMES if all(size % n for size in sizes)][:3]
    batch_size, length, rank = primes
    for number in trained:
        if trainable == "lora":
            _add_lora(blocks[number], rank)
        else:
            for name, parameter in blocks[number].named_parameters():
                parameter.requires_grad_(trainable != "bias" or name.endswith("bias"))
    trace = _Trace(primes, [*model.parameters(), *model.buffers()])
    gradients = [trace.total(p for p in block.parameters() if p.requires_grad) for block in blocks]
    largest = max((p.nbytes for p in model.parameters() if p.requires_grad), default=0)
    if largest:
        tokens = torch.empty(batch_size, length, dtype=torch.long, device="meta")
        _mark_parts(blocks, trace)
        with _no_collection(), _FusedAttention(), trace:
            loss = model(input_ids=tokens, labels=tokens).loss
            trace.begin("loss")
            loss.backward()
            if trainable != "all":
                trace.begin("end")
    return _Notes({n: np.array(m) for n, m in trace.moments.items()}, trace.flops, gradients, trace.terms(largest))


class _Trace(TorchDispatchMode):
    """Notes, part by part of a step, what it has allocated and not yet given up after every operation."""

    def __init__(self, primes: Sequence[int], before: list[Tensor]):
        super().__init__()
        self.moments: dict[str, list[np.ndarray]] = {}
        self.flops: dict[str, np.ndarray] = {}
        self._primes = primes
        self._live = np.zeros(len(POWERS), np.int64)
        self._before = [tensor.untyped_storage() for tensor in before]  # held, so that no other gets their address
        self._storages: dict[int, Any] = {storage._cdata: None for storage in self._before}
        self.begin("early")

    def begin(self, part: str) -> None:
        """The next part of the step begins."""
        self._part = part
        self.moments[part] = [self._live.copy()]
        self.flops[part] = np.zeros(len(POWERS), np.int64)

    def terms(self, size: int) -> np.ndarray:
        """A size as the coefficient of one of POWERS, shape (POWERS,)."""
        powers = []
        for prime, most in zip(self._primes, np.max(POWERS, axis=0), strict=True):
            power = 0
            while size and power < most and size % prime == 0:
                size, power = size // prime, power + 1
            powers.append(power)
        terms = np.zeros(len(POWERS), np.int64)
        terms[POWERS.index(tuple(powers))] = size
        return terms

    def total(self, tensors: Iterable[Tensor]) -> np.ndarray:
        """Bytes of all of them."""
        return sum((self.terms(tensor.nbytes) for tensor in tensors), np.zeros(len(POWERS), np.int64))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation, kwargs = func.overloadpacket, kwargs or {}
        if operation is _aten._local_scalar_dense:
            return True  # asked whether positions are in order, as they are
        result = _grouped_mm(*args, **kwargs) if operation is _aten._grouped_mm else func(*args, **kwargs)
        if operation in _PRODUCTS:
            self.flops[self._part] += self.terms(2 * result.numel() * args[_PRODUCTS[operation]].shape[-1])
        elif operation is _ATTENTION:  # queries by keys, and by values
            query, key, value = args[:3]
            self.flops[self._part] += self.terms(
                2 * query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
            )
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        terms = self.terms(storage.nbytes())

        def give_up(_: Any) -> None:
            del self._storages[key]
            self._live -= terms

        self._storages[key] = weakref.ref(storage, give_up)
        self._live += terms
        self.moments[self._part].append(self._live.copy())


class _FusedAttention(TorchFunctionMode):
    """The fused kernel as on other devices: the meta device would take attention apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value = args  # and the rest by name, as transformers calls it
            mask, causal = kwargs.get("attn_mask"), kwargs.get("is_causal", False)
            if query.shape[-1] == value.shape[-1] and not (mask is not None and mask.requires_grad):
                mask = mask.to(query.dtype) if mask is not None and mask.dtype == torch.bool else mask
                return _ATTENTION(query, key, value, 0.0, causal, attn_mask=mask, scale=kwargs.get("scale"))[0]
        return func(*args, **(kwargs or {}))


def _grouped_mm(one: Tensor, two: Tensor, offs: Tensor, bias: None = None, out_dtype: None = None) -> Tensor:
    """An empty result, of any type: experts' (rows, outputs), or the gradient of all their weights.

    PyTorch's own function for the meta device knows bfloat16 only.
    """
    if two.dim() == 3:
        return one.new_empty(one.shape[0], two.shape[2])
    return one.new_empty(offs.shape[0], one.shape[0], two.shape[1])


def _mark_parts(blocks: list[nn.Module], trace: _Trace) -> None:
    """Have a trace told when the forward pass, and the backward pass, comes to each block, and leaves the last one."""

    def enter(number: int, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == 0 and hidden.requires_grad:
            hidden.register_hook(lambda _: trace.begin("end"))
        trace.begin(f"forward {number}")

    def leave(number: int, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: trace.begin(f"backward {number}"))
        if number == len(blocks) - 1:
            trace.begin("head")

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, args, kwargs, i=i: enter(i, args, kwargs), with_kwargs=True)
        block.register_forward_hook(lambda _, args, output, i=i: leave(i, output))


def _add_lora(block: nn.Module, rank: int) -> None:
    """LoRA on every linear layer, held and computed as PEFT does."""
    for layer in block.modules():
        if isinstance(layer, nn.Linear | Conv1D):
            rows, columns = layer.weight.shape
            width_in, width_out = (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            layer.lora_A = nn.Parameter(torch.empty(rank, width_in, dtype=dtype, device="meta"))
            layer.lora_B = nn.Parameter(torch.empty(width_out, rank, dtype=dtype, device="meta"))
            layer.register_forward_hook(_adapted)


def _adapted(layer: nn.Module, args: tuple[Tensor], result: Tensor) -> Tensor:
    factor_A, factor_B = layer.get_parameter("lora_A"), layer.get_parameter("lora_B")
    x = args[0].to(factor_A.dtype)
    return (result + nn.functional.linear(nn.functional.linear(x, factor_A), factor_B) * 2.0).to(result.dtype)


def _with_depth(values: dict[str, Any], depth: int) -> PretrainedConfig:
    """The configuration of a model of so many blocks, with the attention that its family has by default."""
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    by_block = {
        name: v for name, v in vars(config).items() if isinstance(v, list) and len(v) == config.num_hidden_layers
    }
    config.num_hidden_layers = depth
    for name, entries in by_block.items():  # kinds of layers and the like
        setattr(config, name, [entries[i % len(entries)] for i in range(depth)])
    config.use_cache = False
    return config


def _llama_like(config: PretrainedConfig, weights: Iterable[str]) -> LlamaConfig:
    """A LLaMA of the same widths; `weights` are the names of a block's."""
    heads, biased = config.num_attention_heads, any(name.endswith("bias") for name in weights)
    return LlamaConfig(
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=config.hidden_size // heads,
        vocab_size=getattr(config, "vocab_size", config.num_labels),
        tie_word_embeddings=getattr(config, "tie_word_embeddings", False),
        attention_bias=biased,
        mlp_bias=biased,
    )


def _plain(terms: np.ndarray) -> Terms:
    return tuple(map(int, terms))


def _greatest(moments: np.ndarray) -> tuple[Terms, ...]:
    """Those moments (M, POWERS) that no other one exceeds or equals in every coefficient."""
    moments = np.unique(moments, axis=0)
    exceeded = (moments[:, None] <= moments).all(-1).sum(1) > 1  # each is not less than itself
    return tuple(map(_plain, moments[~exceeded]))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Memory is given up when the last reference goes, not whenever the collector happens to run."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
