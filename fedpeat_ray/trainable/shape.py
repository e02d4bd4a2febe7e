"""The shape of a model for the memory and cost models: its sizes, and what a training step of it holds.

Nothing is computed and nothing allocated: a model of the same class and configuration with a few blocks is run on the
meta device, where tensors have sizes and no data. Batch size, length and rank are prime numbers that divide none of the
model's own sizes, so how often each divides a tensor's size tells how the tensor grows with it. All numbers that
follow are whole and do not depend on the machine.

An image has as many tokens as its model cuts it into: nothing grows with length there. An encoder with a decoder writes
TARGET_LENGTH tokens, and its decoder is run in full behind a few blocks of the encoder.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpeat_ray.errors import ConfigError
from fedpeat_ray.fleet.memory import POWERS, BlockTerms, ModelShape, StepTerms, Terms, Trainable
from fedpeat_ray.models.architecture import (
    CAUSAL,
    TARGET_LENGTH,
    class_for,
    configuration,
    is_causal_lm,
    is_classifier,
    model_class,
)
from fedpeat_ray.models.foundation import Foundation, block_list_name, block_list_names
from fedpeat_ray.models.traits import reads_tokens
from fedpeat_ray.trainable.houlsby import find_houlsby
from fedpeat_ray.trainable.ia3 import find_ia3
from fedpeat_ray.trainable.part import Part, StackedLayer
from fedpeat_ray.trainable.prompt import Prefix, find_prefix, find_prompt
from fedpeat_ray.trainable.weights import head_parameters

TESTED_FAMILIES = ("gpt2", "llama", "qwen3", "gemma2", "mixtral", "phi3", "opt")
"""Model types whose memory as causal language models is held to PyTorch's by tests/parity/test_memory_model.py."""

_WEIGHTS: tuple[Trainable, ...] = ("all", "lora", "bias", "blocks")
_PARTS: tuple[Trainable, ...] = ("ia3", "houlsby", "prompt", "prefix")

TESTED_CLASSES: Mapping[str, tuple[Trainable, ...]] = {
    "GPT2LMHeadModel": _PARTS,
    "LlamaForCausalLM": _PARTS,
    "GPT2ForSequenceClassification": (*_WEIGHTS, "head", *_PARTS),
    "LlamaForSequenceClassification": ("all", "lora", "blocks", "head", *_PARTS),
    "BertForSequenceClassification": (*_WEIGHTS, "head", "ia3", "houlsby", "prompt"),
    "BertForMaskedLM": (*_WEIGHTS, "ia3", "houlsby", "prompt"),
    "RobertaForSequenceClassification": (*_WEIGHTS, "head", "ia3", "houlsby", "prompt"),
    "RobertaForMaskedLM": (*_WEIGHTS, "ia3", "houlsby", "prompt"),
    "T5ForConditionalGeneration": ("all", "lora", "ia3", "houlsby", "prompt"),
    "ViTForImageClassification": (*_WEIGHTS, "head", "ia3", "houlsby", "prompt"),
}
"""Classes of transformers, and what is trained of them, of which the same holds."""

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_WITHOUT_DATA = Foundation("", Path(), "", Path(), "float32", "")  # parts are put into models, and never started
_aten = torch.ops.aten
# Products of matrices, by the number of the operand whose last dimension is summed over.
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.bmm: 0, _aten.baddbmm: 1, _aten._grouped_mm: 0}
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu


def memory_model(config_json: str, trainable: Trainable = "lora") -> str:
    """How far the memory of a model is known: "tested family" (within 10 % of PyTorch's) or "estimate"."""
    config = configuration(config_json)
    name = model_class(config).__name__
    is_causal = config.model_type in TESTED_FAMILIES and name == class_for(config, CAUSAL).__name__
    tested = (is_causal and trainable in _WEIGHTS) or trainable in TESTED_CLASSES.get(name, ())
    return "tested family" if tested else "estimate"


def model_shape(model: PreTrainedModel, weight_bytes: int) -> ModelShape:
    """What the memory and cost models need to know about a model, held in `weight_bytes` an element.

    The model may be without memory for its parameters. Its blocks are taken to be like the first one. A model whose
    step cannot be run without data counts as a LLaMA of the same widths. Of an encoder with a decoder, the blocks are
    the encoder's, and the decoder is part of the head. All terms of an image are without length, and what counts for
    each of its tokens is its own share.
    """
    config = model.config
    config_json = config.to_json_string()
    block = next(model.get_submodule(block_list_name(model)).children())
    weights = dict(block.named_parameters())
    block_parameters = sum(weight.numel() for weight in weights.values())
    known = memory_model(config_json) == "tested family"
    stand_in = None if known else _llama_like(model.config, weights, is_classifier(model)).to_json_string()
    steps = _Steps(config_json, stand_in, weight_bytes)
    products, attention, head, before, behind = _flops(steps.whole)
    decoders = [model.get_submodule(name) for name in block_list_names(model)[1:]]
    return ModelShape(
        num_blocks=config.num_hidden_layers,
        weight_bytes=weight_bytes,
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        block_parameters=block_parameters,
        block_biases=sum(weight.numel() for name, weight in weights.items() if name.endswith("bias")),
        used_parameters=block_parameters - sum(w.numel() for w in weights.values() if w.ndim > 1) + products // 2,
        head_parameters=head // 2,
        attention_width=attention // 4,
        lora_features=_features(block),
        largest_matrix=max(weight.numel() for weight in weights.values() if weight.ndim == 2),
        steps=steps,
        task_head_parameters=sum(p.numel() for _, p in head_parameters(model)) if is_classifier(model) else 0,
        decoder_features=sum(map(_features, decoders)),
        input_products=before // 2,
        output_products=behind // 2,
    )


def _features(module: nn.Module) -> int:
    linears = [inner for inner in module.modules() if isinstance(inner, nn.Linear | Conv1D)]
    return sum(sum(linear.get_parameter("weight").shape) for linear in linears)


def _flops(step: _Step) -> tuple[int, int, int, int, int]:
    """Operations of a forward pass: of a block for a token, for a pair of tokens, of the head for a token, and for a
    whole sequence before and behind the blocks."""
    (once, token, pair), flops = (POWERS.index((1, length, 0)) for length in (0, 1, 2)), step.flops
    if step.num_tokens is None:
        block = flops["forward 1"]
        return block[token], block[pair], flops["head"][token], 0, flops["head"][once]
    of_pairs = step.pair_flops["forward 1"][once]
    products = (flops["forward 1"][once] - of_pairs) // step.num_tokens
    return products, of_pairs // step.num_tokens**2, 0, flops["early"][once], flops["head"][once]


@contextlib.contextmanager
def put_in(part: Part, model: PreTrainedModel) -> Iterator[dict[str, nn.Parameter]]:
    """A part in a model for one client, as plain PyTorch would have it: its tensors, (1, ...) each, by name, are leaves
    of autograd. At the end the model is what it was."""
    like = next(model.parameters())
    named = zip(part.layout.names, part.layout.shapes, strict=True)
    own = {name: nn.Parameter(like.new_zeros(1, *shape)) for name, shape in named}
    with part.stacked(model) as set_tensors:
        layers = [module for module in model.modules() if isinstance(module, StackedLayer)]
        for layer in layers:
            layer.tensors = [own[name] for name in layer.names]
        if not layers:  # hooks around the model, for one tensor
            (tensor,) = own.values()
            set_tensors(tensor)
        yield own


@dataclass(frozen=True)
class _Steps(Mapping[Trainable, StepTerms]):
    """What a step holds, by what is trained; each is run when it is first asked for."""

    config_json: str
    stand_in: str | None
    """Configuration of the model to run where the model's own step cannot be; None: it can."""
    weight_bytes: int

    def __getitem__(self, trainable: Trainable) -> StepTerms:
        terms = _step(self.config_json, self.stand_in, self.weight_bytes, trainable).terms
        if terms is None:
            raise KeyError(trainable)
        return terms

    def __iter__(self) -> Iterator[Trainable]:
        kinds: tuple[Trainable, ...] = get_args(Trainable)
        return (trainable for trainable in kinds if trainable in self)

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def whole(self) -> _Step:
        """A step with all weights."""
        return _step(self.config_json, self.stand_in, self.weight_bytes, "all")


@dataclass(frozen=True)
class _Step:
    terms: StepTerms | None
    """What it holds; None if there is nothing to train."""
    flops: dict[str, Terms]
    """Operations of matrix products, by part."""
    pair_flops: dict[str, Terms]
    """Those of attention among them."""
    num_tokens: int | None
    """Of an image, in the blocks; None for a text, which may have any number."""


@functools.lru_cache(maxsize=128)
def _step(config_json: str, stand_in: str | None, weight_bytes: int, trainable: Trainable) -> _Step:
    try:
        if trainable == "all":
            depth = 3 if configuration(config_json).is_encoder_decoder else 2  # T5's last one is unlike the others
            notes = _note_step(config_json, weight_bytes, trainable, depth=depth, trained=())
            terms = _step_terms(notes, first=0, other=1, crossed=1)
        elif trainable == "head":
            notes = _note_step(config_json, weight_bytes, trainable, depth=2, trained=())
            terms = _head_terms(notes) if notes.moments else None
        elif trainable in ("prompt", "prefix"):  # gradients cross all blocks
            notes = _note_step(config_json, weight_bytes, trainable, depth=2, trained=())
            terms = _step_terms(notes, first=0, other=1, crossed=1)
        else:  # a frozen block that keeps nothing, a trained one, a frozen one that gradients pass, a trained one
            notes = _note_step(config_json, weight_bytes, trainable, depth=4, trained=(1, 3))
            terms = _step_terms(notes, first=1, other=3, crossed=2) if notes.moments else None
    except ConfigError:  # the model has nothing that this could be put into
        return _Step(None, {}, {}, None)
    except Exception:  # whatever a family's own code does not do without data
        if stand_in is None:
            raise
        return _step(stand_in, None, weight_bytes, trainable)
    flops, pair_flops = (
        {part: _plain(values) for part, values in found.items()} for found in (notes.flops, notes.pair_flops)
    )
    return _Step(terms, flops, pair_flops, notes.num_tokens)


@dataclass(frozen=True)
class _Notes:
    """A step of a small model. The coefficients of POWERS are the last dimension of all arrays."""

    moments: dict[str, np.ndarray]
    """Bytes that the step holds, moment by moment, by part: "early", "forward 0" and so on, "head" (forward), "loss"
    (backward, the output layer too), "backward 3" and so on, and "end". Empty if there is nothing to train."""
    flops: dict[str, np.ndarray]
    """Operations of matrix products, by part."""
    pair_flops: dict[str, np.ndarray]
    """Those of attention."""
    num_tokens: int | None
    """Of an image."""
    gradients: list[np.ndarray]
    """Bytes of the gradients of each block's weights, or of what else stays of its backward pass."""
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


def _head_terms(notes: _Notes) -> StepTerms:
    """Of a step that ends at the head: blocks keep nothing, and have no backward pass."""
    none = _plain(np.zeros(len(POWERS), np.int64))
    forward = [moments for part, moments in notes.moments.items() if part.split()[0] in ("early", "forward")]
    head = [notes.moments[part] for part in ("head", "loss", "end")]
    block = BlockTerms(kept=none, forward=(), backward=(), left=none)
    return StepTerms(
        early=_greatest(np.concatenate(forward)),
        start=none,
        first=block,
        trained=block,
        crossed=block,
        head=_greatest(np.concatenate(head)),
        behind=none,
        end=(),
        largest=_plain(notes.largest),
    )


def _note_step(config_json: str, weight_bytes: int, trainable: Trainable, depth: int, trained: Sequence[int]) -> _Notes:
    """Run a step of a model of `depth` blocks that trains some of these, or with "all" everything."""
    config = _with_depth(json.loads(config_json), depth)
    with torch.device("meta"):
        model = model_class(config)._from_config(config, dtype=_DTYPES[weight_bytes])
    model.eval().requires_grad_(trainable == "all")
    if is_causal_lm(model):
        model.loss_type = "ForCausalLM"  # what is taken anyway, without a warning
    else:
        for inner in model.modules():
            if isinstance(inner, PreTrainedModel):  # there are no tokens that could be padding
                vars(inner)["warn_if_padding_and_no_attention_mask"] = lambda *_: None
    if is_classifier(model):
        for _, parameter in head_parameters(model):
            parameter.requires_grad_(True)
    block_list = block_list_name(model)
    sizes = {size for parameter in model.parameters() for size in parameter.shape} | _other_sizes(model)
    batch_size, length, third = itertools.islice(_primes(sizes), 3)
    part, length, in_blocks = _part(model, trainable, sizes, length, third)
    if trainable in ("lora", "bias", "blocks"):
        _train(model, trainable, trained, third)
    if part and trained:
        part = part.within(block_list, trained)
    with put_in(part, model) if part else contextlib.nullcontext({}) as own:
        blocks = list(model.get_submodule(block_list).children())
        of_blocks = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
        for i, found in enumerate(of_blocks):
            found += [p for name, p in own.items() if name.startswith(f"{block_list}.{i}.")]
        other = length if part and in_blocks != length and reads_tokens(model) else third
        trace = _Trace((batch_size, in_blocks, other), [*model.parameters(), *own.values(), *model.buffers()])
        gradients = [trace.total(found) for found in of_blocks]
        if isinstance(part, Prefix):  # those of a block's keys and values stay to the end, where the prefix has its own
            size = 2 * batch_size * in_blocks * part.num_heads * part.head_width * weight_bytes
            gradients = [trace.terms(size) for _ in blocks]
        largest = max((p.nbytes for p in [*model.parameters(), *own.values()] if p.requires_grad), default=0)
        moments: dict[str, np.ndarray] = {}
        if largest and all(gradients[number].any() for number in trained):
            inputs = _inputs(model, batch_size, length)
            _mark_parts(blocks, trace)
            with _no_collection(), _FusedAttention(), trace:
                loss = model(**inputs).loss
                trace.begin("loss")
                loss.backward()
                if "end" not in trace.moments:
                    trace.begin("end")
            moments = {name: np.array(found) for name, found in trace.moments.items()}
    return _Notes(
        moments,
        trace.flops,
        trace.pair_flops,
        None if reads_tokens(model) else trace.num_tokens,
        gradients,
        trace.terms(largest),
    )


def _train(model: PreTrainedModel, trainable: Trainable, numbers: Sequence[int], rank: int) -> None:
    """LoRA, biases or all weights of some blocks; LoRA in all of a decoder too."""
    names = block_list_names(model)
    lists = [list(model.get_submodule(name).children()) for name in names]
    if trainable == "lora":
        for block in [*(lists[0][number] for number in numbers), *itertools.chain(*lists[1:])]:
            _add_lora(block, rank)
        return
    for number in numbers:
        for name, parameter in lists[0][number].named_parameters():
            parameter.requires_grad_(trainable != "bias" or name.endswith("bias"))


def _part(
    model: PreTrainedModel, trainable: Trainable, sizes: set[int], length: int, third: int
) -> tuple[Part | None, int, int]:
    """The part to put in, if it is one, with the tokens of a text and those that its blocks see, or attend to."""
    match trainable:
        case "ia3":
            return find_ia3(model), length, length
        case "houlsby":
            return find_houlsby(model, third, both=True), length, length
        case "prefix":
            return find_prefix(model, third - length), length, third
        case "prompt" if reads_tokens(model):
            return find_prompt(model, _WITHOUT_DATA, third - length), length, third
        case "prompt":
            num_tokens = (model.config.image_size // model.config.patch_size) ** 2 + 1
            in_blocks = next(prime for prime in _primes(sizes) if prime > num_tokens)
            return find_prompt(model, _WITHOUT_DATA, in_blocks - num_tokens), length, in_blocks
        case _:
            return None, length, length


def _inputs(model: PreTrainedModel, batch_size: int, length: int) -> dict[str, Tensor]:
    """What the model is called with: a text, or images, and labels of its task."""
    config = model.config
    shapes: dict[str, tuple[int, ...]] = {"labels": (batch_size,)}
    if reads_tokens(model):
        shapes |= {"input_ids": (batch_size, length)}
    else:
        shapes |= {"pixel_values": (batch_size, config.num_channels, config.image_size, config.image_size)}
    if not is_classifier(model):
        shapes["labels"] = (batch_size, TARGET_LENGTH if config.is_encoder_decoder else length)
    tokens = {name: torch.empty(shape, dtype=torch.long, device="meta") for name, shape in shapes.items()}
    if "pixel_values" in tokens:
        tokens["pixel_values"] = tokens["pixel_values"].to(model.dtype)
    return tokens


def _other_sizes(model: PreTrainedModel) -> set[int]:
    """That are not those of parameters."""
    side, patch = (getattr(model.config, name, None) for name in ("image_size", "patch_size"))
    if not isinstance(side, int) or not isinstance(patch, int):
        return {TARGET_LENGTH} if model.config.is_encoder_decoder else set()
    return {side, side // patch, (side // patch) ** 2, (side // patch) ** 2 + 1}


def _primes(sizes: set[int]) -> Iterator[int]:
    """Those above 28 that divide none of some sizes."""
    primes = (n for n in itertools.count(29) if all(n % m for m in range(2, math.isqrt(n) + 1)))
    return (n for n in primes if all(size % n for size in sizes))


class _Trace(TorchDispatchMode):
    """Notes, part by part of a step, what it has allocated and not yet given up after every operation."""

    def __init__(self, primes: Sequence[int], before: list[Tensor]):
        super().__init__()
        self.moments: dict[str, list[np.ndarray]] = {}
        self.flops: dict[str, np.ndarray] = {}
        self.pair_flops: dict[str, np.ndarray] = {}
        self.num_tokens: int | None = None
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
        self.pair_flops[part] = np.zeros(len(POWERS), np.int64)

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
        flops = 0
        if operation in _PRODUCTS:
            flops = 2 * result.numel() * args[_PRODUCTS[operation]].shape[-1]
        elif operation is _aten.convolution:
            flops = 2 * result.numel() * args[1][0].numel()
        elif operation is _ATTENTION:  # queries by keys, and by values
            query, key, value = args[:3]
            flops = 2 * query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        if flops:
            self.flops[self._part] += self.terms(flops)
        if operation in (_ATTENTION, _aten.bmm, _aten.baddbmm):
            self.pair_flops[self._part] += self.terms(flops)
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
        if number == 0:
            trace.num_tokens = hidden.shape[1]
            if hidden.requires_grad:
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
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # a classifier looks for it, and a decoder starts with it
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    by_block = {
        name: v for name, v in vars(config).items() if isinstance(v, list) and len(v) == config.num_hidden_layers
    }
    config.num_hidden_layers = depth
    for name, entries in by_block.items():  # kinds of layers and the like
        setattr(config, name, [entries[i % len(entries)] for i in range(depth)])
    config.use_cache = False
    return config


def _llama_like(config: PretrainedConfig, weights: Iterable[str], classifies: bool) -> LlamaConfig:
    """A LLaMA of the same widths, a language model or a classifier; `weights` are the names of a block's."""
    heads, biased = config.num_attention_heads, any(name.endswith("bias") for name in weights)
    kind: dict[str, Any] = {}
    if classifies:
        kind = {"architectures": ["LlamaForSequenceClassification"], "num_labels": config.num_labels}
    return LlamaConfig(
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=config.hidden_size // heads,
        vocab_size=getattr(config, "vocab_size", None) or config.num_labels or 1,
        tie_word_embeddings=getattr(config, "tie_word_embeddings", False),
        attention_bias=biased,
        mlp_bias=biased,
        **kind,
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
