"""Peak memory of a device that trains, term by term, as an equation of the model's shape.

What is modelled is the plain loop: a decoder-only transformer of transformers with fused attention and no key-value
cache, dropout 0, no gradient checkpointing, `model(input_ids, labels=labels).loss.backward()`, `optimizer.step()`,
`optimizer.zero_grad()`. Trained are all weights, or of all blocks, or of an emulator's adapter blocks, one of: LoRA
by PEFT on every linear layer, the biases (those of norms too), all weights; what is frozen has requires_grad False.

    peak = weights + adapter + optimizer state + the most that a step adds to them

The terms follow from what PyTorch's autograd keeps for the backward pass, counted tensor by tensor as in Korthikanti
et al. 2022, section 4.1 (there for dropout and unfused attention), and the moments at which the sum of all tensors
can be greatest: while the backward pass crosses like blocks, activations go and gradients come linearly, so the
sum is greatest at one end of them. `tests/parity/test_memory_model.py` holds the result to what PyTorch allocates,
within 10 %.

Two families are told apart by `gated_mlp`: GPT-2 (LayerNorm, one projection for queries, keys and values, an MLP with
one activation) and LLaMA (RMSNorm, three projections, rotary positions, a gated MLP). Heads have width / num_heads
features. Not counted: the allocator's rounding and fragmentation, the framework itself, and, as they are small, token
ids, buffers and rotary tables. Other kernels need more: unfused attention keeps a probability for each pair of tokens
and head, `gelu_new` (eight kernels for what `gelu_pytorch_tanh` does in one) what lies between them, and AdamW with
`foreach`, PyTorch's default on GPUs, roots for all tensors at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np

Figure = int | np.ndarray
"""One number for all devices, or an int64 array (N,) with one a device."""

_FLOAT32 = 4


@dataclass(frozen=True)
class ModelShape:
    """What the memory and cost models need to know about a decoder-only transformer."""

    num_blocks: int
    width: int
    """Features of the residual stream."""
    num_heads: int
    """Heads of the queries."""
    num_kv_heads: int
    """Heads of the keys and values; fewer than num_heads with grouped queries."""
    mlp_width: int
    """Features between the MLP's layers."""
    gated_mlp: bool
    """Three linear layers in the MLP, as in LLaMA, instead of two."""
    vocabulary: int
    """Tokens in the vocabulary."""
    num_positions: int
    """Rows of the table of learnt positions; 0: none (rotary)."""
    bias: bool
    """Whether the linear layers of a block have biases."""
    weight_bytes: int
    """Bytes of an element of the frozen weights, and so of the activations."""
    num_parameters: int
    """Elements of all weights, shared ones once."""
    block_parameters: int
    """Elements of the weights of one block."""

    @property
    def key_width(self) -> int:
        """Features of the keys, and of the values, of all heads."""
        return self.width // self.num_heads * self.num_kv_heads

    @property
    def tied_head(self) -> bool:
        """Whether the output layer is the token embedding: besides blocks and positions there is room for one only."""
        tables = self.num_parameters - self.num_blocks * self.block_parameters - self.num_positions * self.width
        return tables < 2 * self.vocabulary * self.width


@dataclass(frozen=True)
class Memory:
    """Memory of a device in bytes, each a number or an array (N,)."""

    weights_bytes: Figure
    """The model, with what is trained of its own weights."""
    adapter_bytes: Figure
    """LoRA factors; 0 if weights of the model itself are trained."""
    optimizer_bytes: Figure
    """State kept between steps."""
    gradients_bytes: Figure
    """Gradients of all that is trained, complete at the end of the backward pass."""
    activations_bytes: Figure
    """What the forward pass keeps for the backward pass, without the logits."""
    step_bytes: Figure
    """The most that a step adds to weights, adapter and optimizer state."""

    @property
    def peak_bytes(self) -> Figure:
        """The device needs this much."""
        return self.weights_bytes + self.adapter_bytes + self.optimizer_bytes + self.step_bytes


def lora_parameters(shape: ModelShape, rank: Figure, num_blocks: Figure | None = None) -> Figure:
    """Elements of LoRA factors of the given rank on every linear layer: rank * (inputs + outputs) each."""
    D, K, M = shape.width, shape.key_width, shape.mlp_width
    # q, o, k and v, or c_attn and c_proj; then gate, up and down, or c_fc and c_proj.
    attention = 2 * (D + D) + 2 * (D + K) if shape.gated_mlp else (D + D + 2 * K) + (D + D)
    mlp = (3 if shape.gated_mlp else 2) * (D + M)
    return rank * (attention + mlp) * (shape.num_blocks if num_blocks is None else num_blocks)


def bias_parameters(shape: ModelShape, num_blocks: Figure | None = None) -> Figure:
    """Elements of the biases of the blocks: what is left besides matrices and the gains of the two norms."""
    D, K, M = shape.width, shape.key_width, shape.mlp_width
    matrices = 2 * D * D + 2 * D * K + (3 if shape.gated_mlp else 2) * D * M
    per_block = shape.block_parameters - matrices - 2 * D
    return per_block * (shape.num_blocks if num_blocks is None else num_blocks)


def training_memory(
    shape: ModelShape,
    *,
    batch_size: Figure,
    sequence_length: Figure,
    trainable: Literal["all", "lora", "bias", "blocks"],
    lora_rank: Figure = 0,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    num_blocks: Figure | None = None,
    adapter_blocks: tuple[int, int] | None = None,
    frozen_block_bytes: Figure | None = None,
) -> Memory:
    """Peak memory of a training step on `batch_size` sequences of `sequence_length` tokens.

    `trainable`: "all" weights; or of the adapter blocks only, "lora" factors (`lora_rank` counts here only; LoRA on
    some of the linear layers needs less than is said here), their own "bias" vectors, or all weights of the "blocks".
    `num_blocks` is the depth of an emulator of the model, adapter blocks included (default: all its blocks).
    `adapter_blocks` are the (first, last) of these blocks, default all; those between them are frozen. If there are
    first ones, gradients pass through the frozen blocks, which then keep what they need for that, else they keep
    nothing. `frozen_block_bytes` is the size of one frozen block (default: its elements in `weight_bytes`); a smaller
    one is of compressed matrices, of which one at a time is unpacked, forward and again backward.
    SGD is without momentum.

    Shapes: batch_size, sequence_length, lora_rank, num_blocks and frozen_block_bytes are numbers or arrays (N,), and
    so is every figure of the result that depends on them.
    """
    assert trainable != "lora" or np.all(np.asarray(lora_rank) > 0), "LoRA needs a rank"
    assert trainable != "all" or adapter_blocks is None, "all weights are more than those of adapter blocks"
    lora = trainable == "lora"
    rank = lora_rank if lora else 0
    blocks = shape.num_blocks if num_blocks is None else num_blocks
    first, last = (0, blocks) if adapter_blocks is None else adapter_blocks
    frozen = blocks - first - last
    assert np.all(np.asarray(frozen) >= 0), "more adapter blocks than blocks"
    assert np.all(np.asarray(first + last) > 0), "no adapter blocks"
    tokens = batch_size * sequence_length
    # LoRA factors, their gradients, and the loss are in float32 even where the model is in half precision.
    wide = max(_FLOAT32, shape.weight_bytes)
    tuned = wide if lora else shape.weight_bytes

    full_block = shape.block_parameters * shape.weight_bytes
    frozen_block = full_block if frozen_block_bytes is None else frozen_block_bytes
    weights = (
        (shape.num_parameters - shape.num_blocks * shape.block_parameters) * shape.weight_bytes
        + (first + last) * full_block
        + frozen * frozen_block
    )
    adapter = lora_parameters(shape, rank, first + last) * wide
    block_parameters = {
        "lora": lora_parameters(shape, rank, num_blocks=1),
        "bias": bias_parameters(shape, num_blocks=1),
    }.get(trainable, shape.block_parameters)
    block_gradients = block_parameters * tuned
    gradients = weights if trainable == "all" else (first + last) * block_gradients
    state = {"adamw": 2, "sgd": 0}[optimizer] * gradients  # AdamW: first and second moment

    frozen_norm, norm, last_norm, first_norm = _norm_bytes(shape, trainable)
    crossing = _crossing_bytes(shape)
    block = tokens * (2 * norm + crossing + (0 if trainable == "bias" else _input_bytes(shape, lora, rank)))
    crossed = frozen * (tokens * (2 * frozen_norm + crossing)) if first else 0
    activations = (first + last) * block + crossed + tokens * (last_norm - norm + first_norm)

    logits = tokens * shape.vocabulary * wide
    embedding = shape.vocabulary * shape.width * tuned if trainable == "all" else 0
    # The largest tensor that is trained in a block.
    if trainable == "bias":
        largest = max(shape.mlp_width, shape.width + 2 * shape.key_width) * tuned
    else:
        largest = (rank if lora else shape.width) * shape.mlp_width * tuned
    # Backward through a frozen MLP's last layer and what it reads: two gradients as wide as the layer's input, or
    # three with a gate (its product's and both factors'). Beside them the gradient of the residual stream.
    through = tokens * ((3 if shape.gated_mlp else 2) * shape.mlp_width + shape.width) * shape.weight_bytes
    # Through a trained one: LoRA's gradient, the frozen branch's and their sum, each as wide as the layer's input,
    # which is given up; if weights are trained one gradient and, a step on, that of the activation, or of both
    # factors of a gate. Beside them the gradients of the residual stream and of the layer's weights.
    mlp = tokens * ((2 if lora or shape.gated_mlp else 1) * shape.mlp_width + shape.width) * tuned + largest
    if trainable == "bias":
        mlp = through + largest
    unpacked = _largest_matrix(shape) * shape.weight_bytes * (frozen_block < full_block)

    moments = (
        # The loss, backward: log-probabilities, their gradient, and that of the logits.
        activations + 3 * logits,
        # The output layer, backward: the gradients of the logits and of its weights.
        activations + logits + embedding,
        # The last block, backward: no activations of other blocks are given up yet.
        (last > 0) * (activations + mlp + embedding),
        # The first of the last adapter blocks, backward: the gradients of those behind it are there.
        (last > 0) * ((first + 1) * block + crossed + mlp + gradients - (first + 1) * block_gradients),
        # The last frozen block, backward if gradients pass, else forward.
        (frozen > 0) * (first * block + crossed + through + unpacked + (last * block_gradients if first else 0)),
        # The last of the first adapter blocks, backward.
        (first > 0) * (first * block + mlp + last * block_gradients),
        # The first block, backward: only its own activations are left, and the gradients of all but itself are there.
        (first > 0) * (block + mlp + gradients - block_gradients),
        # The token embedding, backward: the output layer's gradient waits for the embedding's, and their sum is new.
        gradients + (2 * embedding if shape.tied_head else 0),
        # AdamW, tensor by tensor: the root of the second moment, and the root with its bias corrected.
        gradients + (2 * np.maximum(embedding, largest) if optimizer == "adamw" else 0),
    )
    return Memory(weights, adapter, state, gradients, activations, step_bytes=reduce(np.maximum, moments))


def _norm_bytes(shape: ModelShape, trainable: str) -> tuple[int, int, int, int]:
    """Bytes a token that a norm keeps: in a frozen block, in a trained one, before the output layer, and the first.

    The output of a block's norm is the input of a linear layer and counted there.
    """
    D, all_trained = shape.width, trainable == "all"
    if shape.gated_mlp:  # RMSNorm: its input in float32, the factor, and for the gain's gradient the scaled input
        frozen, gain = (D + 1) * _FLOAT32, D * shape.weight_bytes
    else:  # LayerNorm: its input, mean and deviation
        frozen, gain = (D + 2) * shape.weight_bytes, 0
    norm = frozen + (gain if trainable in ("all", "blocks") else 0)
    # A trained output layer keeps its input for its weights' gradient, a frozen one does not.
    last = norm + D * shape.weight_bytes if all_trained else frozen
    # Unless embeddings are trained, what the first trained block reads needs no gradient: its first norm keeps only
    # what is for its own; LayerNorm does not tell these apart.
    nothing = trainable == "lora" or (shape.gated_mlp and not all_trained)
    return frozen, norm, last, norm - frozen if nothing else norm


def _crossing_bytes(shape: ModelShape) -> int:
    """Bytes a token that a block keeps for the gradients that pass through it, its two norms aside."""
    D, K, M = shape.width, shape.key_width, shape.mlp_width
    # Attention: queries, keys, values, output, and for each head the logarithm of the softmax's sum.
    attention = (2 * D + 2 * K) * shape.weight_bytes + shape.num_heads * _FLOAT32
    # The MLP's activation keeps its input; a gate also the activation, and what it is multiplied with.
    return attention + (3 if shape.gated_mlp else 1) * M * shape.weight_bytes


def _input_bytes(shape: ModelShape, lora: bool, rank: Figure) -> Figure:
    """Bytes a token that a block keeps besides for the gradients of its weights or LoRA factors."""
    D, M, held = shape.width, shape.mlp_width, shape.weight_bytes
    tuned = max(_FLOAT32, held) if lora else held
    # What is trained in a linear layer (weights or factor A) keeps the layer's input. Layers that read the same input
    # share it, and attention's output is kept already; but each layer keeps a copy of its own if PEFT has to cast it.
    copied = tuned != held
    readers = 5 if copied and shape.gated_mlp else 2  # q, k, v, gate and up, or else c_attn and c_fc
    inputs = (readers * D + M + (D if copied else 0)) * tuned
    # Factor B keeps the output of factor A.
    between = (7 if shape.gated_mlp else 4) * rank * tuned if lora else 0
    return inputs + between


def _largest_matrix(shape: ModelShape) -> int:
    """Elements of a block's largest matrix: of the MLP, or GPT-2's for queries, keys and values."""
    return shape.width * max(shape.mlp_width, shape.width + (0 if shape.gated_mlp else 2 * shape.key_width))
