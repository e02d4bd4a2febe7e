"""Peak memory of a device that trains, from what one training step of the model was seen to hold.

What is modelled is the plain loop: a transformer of transformers, with what its task puts on top of it, with the
attention that it has by default (fused, if the family has it) and no key-value cache, dropout 0, no gradient
checkpointing, `model(**inputs, labels=labels).loss.backward()`, `optimizer.step()`, `optimizer.zero_grad()`. Trained
are all weights, or of all blocks, or of an emulator's adapter blocks, one of: LoRA by PEFT on every linear layer, the
biases (those of norms too), all weights; or another small part of the whole model (`trainable/`); what is frozen has
requires_grad False. A classifier's own head is always trained. Of an encoder with a decoder the blocks are those of
the encoder: the decoder comes behind the blocks, like an output layer, and LoRA is in all of it.

    peak = weights + adapter + optimizer state + the most that a step adds to them

`trainable/shape.py` runs the step of a model of a few blocks without data and notes all that is held at every moment,
as a sum of products of batch size, length and a third size, such as LoRA's rank. Here these sums are put together for
any depth. Blocks that play the same part are alike, so while the backward pass crosses them, activations go and
gradients come linearly, and the sum is greatest at one end of them. `tests/parity/test_memory_model.py` holds the
result to what PyTorch allocates, within 10 %.

Of T5, whose blocks share a bias of attention that the first one has, all blocks count as if each had one: trained
"blocks" of it are an estimate (0.91 to 1.01 of what a step adds, where it was tried).

Not counted: the allocator's rounding and fragmentation, the framework itself, what a kernel needs within itself, and,
as they are small, buffers. Sequences are taken to be no longer than a sliding window of the model. Other kernels need
more: unfused attention keeps a probability for each pair of tokens and head, and AdamW with `foreach`, PyTorch's
default on GPUs, roots for all tensors at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np

Figure = int | np.ndarray
"""One number for all devices, or an int64 array (N,) with one a device."""

Trainable = Literal["all", "lora", "bias", "blocks", "head", "ia3", "houlsby", "prompt", "prefix"]
"""What is trained: all weights, or of the adapter blocks LoRA, the biases or all weights; or another small part."""

POWERS = tuple(itertools.product((0, 1), (0, 1, 2), (0, 1)))
"""In the products that bytes are a sum of, of batch size, of tokens in the blocks, and of a third size: LoRA's rank,
the width of bottlenecks, or with learned tokens (which the blocks see too, or attend to) the tokens without them."""

Terms = tuple[int, ...]
"""Bytes for any sizes: a coefficient for each of POWERS."""

WHOLE: tuple[Trainable, ...] = ("all", "ia3", "houlsby", "prompt", "prefix")
"""What is trained of whole models only, not of emulators."""

SIZED: tuple[Trainable, ...] = ("houlsby", "prompt", "prefix")
"""What there may be more or less of: width of bottlenecks, learned tokens."""

_FLOAT32 = 4


@dataclass(frozen=True)
class BlockTerms:
    """What a training step of one block holds."""

    kept: Terms
    """Kept by the forward pass for the backward pass."""
    forward: tuple[Terms, ...]
    """Moments of the forward pass, beside what was there before it."""
    backward: tuple[Terms, ...]
    """Moments of the backward pass, beside the same and the gradients of what comes behind the block."""
    left: Terms
    """What the backward pass adds for good: gradients of weights."""


@dataclass(frozen=True)
class StepTerms:
    """What a training step holds, in the order of time."""

    early: tuple[Terms, ...]
    """Moments before the first block that is trained: embeddings, and frozen blocks that keep nothing."""
    start: Terms
    """There when the first block that is trained starts."""
    first: BlockTerms
    """The first block that is trained."""
    trained: BlockTerms
    """Any other one."""
    crossed: BlockTerms
    """A frozen block that gradients pass through."""
    head: tuple[Terms, ...]
    """Moments from the last block's output to that output's gradient, beside what blocks keep."""
    behind: Terms
    """There with that gradient, beside what blocks keep."""
    end: tuple[Terms, ...]
    """Moments after the first block's backward pass, beside what blocks left: of the embedding, if that is trained."""
    largest: Terms
    """The largest tensor that is trained."""


@dataclass(frozen=True)
class ModelShape:
    """What the memory and cost models need to know about a transformer of like blocks."""

    num_blocks: int
    weight_bytes: int
    """Bytes of an element of the frozen weights."""
    num_parameters: int
    """Elements of all weights, shared ones once."""
    block_parameters: int
    """Elements of the weights of one block."""
    block_biases: int
    """Those of its biases, of norms too."""
    used_parameters: int
    """Elements of the weights of one block that a token meets: of experts, only those that it is sent to."""
    head_parameters: int
    """Elements of the weights of the output layer."""
    attention_width: int
    """Features of the queries, and of the values, of all heads."""
    lora_features: int
    """Inputs and outputs of the linear layers of one block, all together."""
    largest_matrix: int
    """Elements of the largest matrix of one block."""
    steps: Mapping[Trainable, StepTerms]
    """What a training step holds; missing is what the model has nothing for, such as "bias" where there are none."""
    task_head_parameters: int = 0
    """Elements of a classifier's head, which is always trained."""
    decoder_features: int = 0
    """Inputs and outputs of the linear layers of all blocks of a decoder that is behind an encoder, all together."""
    input_products: int = 0
    """Multiplications for a whole sequence before the blocks, such as those of an image's patches."""
    output_products: int = 0
    """The same behind the blocks, beside those of each token (`head_parameters`): a classifier's, a decoder's."""


@dataclass(frozen=True)
class Memory:
    """Memory of a device in bytes, each a number or an array (N,)."""

    weights_bytes: Figure
    """The model, with what is trained of its own weights."""
    adapter_bytes: Figure
    """LoRA factors, or what else was put into the model; 0 if weights of the model itself are trained."""
    optimizer_bytes: Figure
    """State kept between steps."""
    gradients_bytes: Figure
    """Gradients of all that is trained, complete at the end of the backward pass."""
    activations_bytes: Figure
    """What the blocks keep of the forward pass for the backward pass."""
    step_bytes: Figure
    """The most that a step adds to weights, adapter and optimizer state."""

    @property
    def peak_bytes(self) -> Figure:
        """The device needs this much."""
        return self.weights_bytes + self.adapter_bytes + self.optimizer_bytes + self.step_bytes


def lora_parameters(shape: ModelShape, rank: Figure, num_blocks: Figure | None = None) -> Figure:
    """Elements of LoRA factors of the given rank on every linear layer: rank * (inputs + outputs) each; in all of a
    decoder behind the blocks too."""
    blocks = shape.num_blocks if num_blocks is None else num_blocks
    return rank * (shape.lora_features * blocks + shape.decoder_features)


def bias_parameters(shape: ModelShape, num_blocks: Figure | None = None) -> Figure:
    """Elements of the biases of the blocks."""
    return shape.block_biases * (shape.num_blocks if num_blocks is None else num_blocks)


def training_memory(
    shape: ModelShape,
    *,
    batch_size: Figure,
    sequence_length: Figure,
    trainable: Trainable,
    lora_rank: Figure = 0,
    part_size: Figure = 0,
    trained_elements: Figure | None = None,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    num_blocks: Figure | None = None,
    adapter_blocks: tuple[int, int] | None = None,
    frozen_block_bytes: Figure | None = None,
) -> Memory:
    """Peak memory of a training step on `batch_size` sequences of `sequence_length` tokens.

    `trainable`: "all" weights; or of the adapter blocks only, "lora" factors (`lora_rank` counts here only; LoRA on
    some of the linear layers needs less than is said here), their own "bias" vectors, or all weights of the "blocks";
    or of a whole model the small parts of `trainable/`, "head" (which comes with all others, too), "ia3", "houlsby"
    (two a block; one needs less), "prompt" and "prefix". `part_size` is the width of Houlsby's bottlenecks, or the
    number of learned tokens; `sequence_length` is without these. `trained_elements` are all that are trained, the
    head's among them (default: what `shape` says of LoRA, biases, blocks or head).
    `num_blocks` is the depth of an emulator of the model, adapter blocks included (default: all its blocks).
    `adapter_blocks` are the (first, last) of these blocks, default all; those between them are frozen. If there are
    first ones, gradients pass through the frozen blocks, which then keep what they need for that, else they keep
    nothing. `frozen_block_bytes` is the size of one frozen block (default: its elements in `weight_bytes`); a smaller
    one is of compressed matrices, of which one at a time is unpacked, forward and again backward.
    SGD is without momentum.

    Shapes: batch_size, sequence_length, lora_rank, part_size, trained_elements, num_blocks and frozen_block_bytes are
    numbers or arrays (N,), and
    so is every figure of the result that depends on them.
    """
    assert trainable != "lora" or np.all(np.asarray(lora_rank) > 0), "LoRA needs a rank"
    assert trainable in shape.steps, f"the model has nothing to train by {trainable!r}"
    assert adapter_blocks is None or trainable not in WHOLE, f"{trainable!r} is of whole models"
    assert trainable not in SIZED or np.all(np.asarray(part_size) > 0), f"{trainable!r} needs a size"
    blocks = shape.num_blocks if num_blocks is None else num_blocks
    first, last = (0, blocks) if adapter_blocks is None else adapter_blocks
    frozen = blocks - first - last
    assert np.all(np.asarray(frozen) >= 0), "more adapter blocks than blocks"
    assert np.all(np.asarray(first + last) > 0), "no adapter blocks"

    full_block = shape.block_parameters * shape.weight_bytes
    frozen_block = full_block if frozen_block_bytes is None else frozen_block_bytes
    weights = (
        (shape.num_parameters - shape.num_blocks * shape.block_parameters) * shape.weight_bytes
        + (first + last) * full_block
        + frozen * frozen_block
    )
    head = shape.task_head_parameters
    if trained_elements is None:
        assert trainable == "all" or trainable not in WHOLE, f"how many elements has {trainable!r}?"
        trained_elements = head + {
            "lora": lora_parameters(shape, lora_rank, first + last),
            "bias": bias_parameters(shape, first + last),
            "blocks": (first + last) * shape.block_parameters,
        }.get(trainable, 0)
    # What is put in, and so its gradients, is in float32 even where the model is in half precision.
    own = trainable in ("all", "bias", "blocks", "head")
    adapter = 0 if own else (trained_elements - head) * max(_FLOAT32, shape.weight_bytes)
    gradients = adapter + (trained_elements if own else head) * shape.weight_bytes
    if trainable == "all":
        gradients = weights
    state = {"adamw": 2, "sgd": 0}[optimizer] * gradients  # AdamW: first and second moment

    third = {"lora": lora_rank, "houlsby": part_size, "prompt": sequence_length, "prefix": sequence_length}
    length = sequence_length + (part_size if trainable in ("prompt", "prefix") else 0)
    step, value = shape.steps[trainable], _Value(batch_size, length, third.get(trainable, 0))
    unpacked = shape.largest_matrix * shape.weight_bytes * (frozen_block < full_block)
    # Like blocks in a row: behind the first one that is trained those that are beside it, then what is crossed.
    row: list[tuple[Figure, BlockTerms, Figure]] = [(1, step.first, 0)]
    if adapter_blocks is not None and first:
        row += [(first - 1, step.trained, 0), (frozen, step.crossed, unpacked), (last, step.trained, 0)]
    else:
        row += [(last - 1, step.trained, 0)]
    kept: Figure = 0  # by the blocks before
    left = sum(count * value(block.left) for count, block, _ in row)  # by the blocks behind
    start, behind = value(step.start), value(step.behind)
    moments = [value.most(step.early) + (0 if first else (frozen > 0) * unpacked)]
    for count, block, extra in row:
        keeps, leaves = value(block.kept), value(block.left)
        left = left - count * leaves
        moments.append((count > 0) * (start + kept + (count - 1) * keeps + value.most(block.forward) + extra))
        for num_before in (count - 1, 0):  # the last of them, and the first
            there = behind + kept + num_before * keeps + left + (count - 1 - num_before) * leaves
            moments.append((count > 0) * (there + value.most(block.backward) + extra))
        kept = kept + count * keeps
    moments += [
        kept + value.most(step.head),
        sum(count * value(block.left) for count, block, _ in row) + value.most(step.end),
        # AdamW, tensor by tensor: the root of the second moment, and the root with its bias corrected.
        gradients + (2 * value(step.largest) if optimizer == "adamw" else 0),
    ]
    return Memory(weights, adapter, state, gradients, kept, step_bytes=reduce(np.maximum, moments))


class _Value:
    """The bytes of terms."""

    def __init__(self, batch_size: Figure, length: Figure, third: Figure):
        self.products = [batch_size**i * length**j * third**k for i, j, k in POWERS]

    def __call__(self, terms: Terms) -> Figure:
        return sum(factor * product for factor, product in zip(terms, self.products, strict=True) if factor)

    def most(self, moments: tuple[Terms, ...]) -> Figure:
        """At the greatest of some moments; 0 if there are none."""
        return reduce(np.maximum, [0, *map(self, moments)])
