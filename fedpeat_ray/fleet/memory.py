"""Peak memory of a device that trains, term by term, as an equation of the model's shape.

What is modelled is the plain loop: a decoder-only transformer of transformers with fused attention and no key-value
cache, all weights or LoRA by PEFT on every linear layer of the blocks, dropout 0, no gradient checkpointing,
`model(input_ids, labels=labels).loss.backward()`, `optimizer.step()`, `optimizer.zero_grad()`.

    peak = weights + adapter + optimizer state + the most that a step adds to them

The terms follow from what PyTorch's autograd keeps for the backward pass, counted tensor by tensor as in Korthikanti
et al. 2022, section 4.1 (there for dropout and unfused attention), and the moments at which the sum of all tensors
can be greatest. `tests/parity/test_memory_model.py` holds the result to what PyTorch allocates, within 10 %.

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
    """The model; frozen, unless all of it is trained."""
    adapter_bytes: Figure
    """LoRA factors; 0 if all weights are trained."""
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


def training_memory(
    shape: ModelShape,
    *,
    batch_size: Figure,
    sequence_length: Figure,
    trainable: Literal["all", "lora"],
    lora_rank: Figure = 0,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    num_blocks: Figure | None = None,
) -> Memory:
    """Peak memory of a training step on `batch_size` sequences of `sequence_length` tokens.

    `lora_rank` counts with "lora" only; LoRA on some of the linear layers needs less than is said here.
    `num_blocks` is the depth of an emulator of the model (default: all its blocks). SGD is without momentum.

    Shapes: batch_size, sequence_length, lora_rank and num_blocks are numbers or arrays (N,), and so is every
    figure of the result that depends on them.
    """
    assert trainable == "all" or np.all(np.asarray(lora_rank) > 0), "LoRA needs a rank"
    lora = trainable == "lora"
    rank = lora_rank if lora else 0
    blocks = shape.num_blocks if num_blocks is None else num_blocks
    tokens = batch_size * sequence_length
    # LoRA factors, their gradients, and the loss are in float32 even where the model is in half precision.
    wide = max(_FLOAT32, shape.weight_bytes)
    tuned = wide if lora else shape.weight_bytes

    weights = (shape.num_parameters - (shape.num_blocks - blocks) * shape.block_parameters) * shape.weight_bytes
    adapter = lora_parameters(shape, rank, blocks) * wide
    gradients = adapter if lora else weights
    block_gradients = (lora_parameters(shape, rank, num_blocks=1) if lora else shape.block_parameters) * tuned
    state = {"adamw": 2, "sgd": 0}[optimizer] * gradients  # AdamW: first and second moment

    norm, last_norm = _norm_bytes(shape, lora)
    block = tokens * (2 * norm + _block_bytes(shape, lora, rank))
    # With LoRA the input of the first block needs no gradient, hence its first norm keeps nothing.
    activations = blocks * block + tokens * (last_norm - (norm if lora else 0))

    logits = tokens * shape.vocabulary * wide
    embedding = 0 if lora else shape.vocabulary * shape.width * tuned
    projection = (rank if lora else shape.width) * shape.mlp_width * tuned
    # Backward through the MLP's last layer: LoRA's gradient, the frozen branch's and their sum, each as wide as the
    # layer's input, which is given up; without LoRA one gradient and, a step on, that of the activation, or of both
    # factors of a gate. Beside them the gradients of the residual stream and of the layer's weights.
    mlp = tokens * ((2 if lora or shape.gated_mlp else 1) * shape.mlp_width + shape.width) * tuned + projection

    moments = (
        # The loss, backward: log-probabilities, their gradient, and that of the logits.
        activations + 3 * logits,
        # The output layer, backward: the gradients of the logits and of its weights.
        activations + logits + embedding,
        # The last block, backward: no activations of other blocks are given up yet.
        activations + mlp + embedding,
        # The first block, backward: only its own activations are left, and the gradients of all but itself are there.
        block + mlp + gradients - block_gradients,
        # The token embedding, backward: the output layer's gradient waits for the embedding's, and their sum is new.
        gradients + (2 * embedding if shape.tied_head else 0),
        # AdamW, tensor by tensor: the root of the second moment, and the root with its bias corrected.
        gradients + (2 * np.maximum(embedding, projection) if optimizer == "adamw" else 0),
    )
    return Memory(weights, adapter, state, gradients, activations, step_bytes=reduce(np.maximum, moments))


def _norm_bytes(shape: ModelShape, lora: bool) -> tuple[int, int]:
    """Bytes a token that a norm of a block, and the last one before the output layer, keep.

    The output of a block's norm is the input of a linear layer and counted there.
    """
    D = shape.width
    if shape.gated_mlp:  # RMSNorm: its input in float32, the factor, and for the gain's gradient the scaled input
        norm = (D + 1) * _FLOAT32 + (0 if lora else D * shape.weight_bytes)
    else:  # LayerNorm: its input, mean and deviation
        norm = (D + 2) * shape.weight_bytes
    # A trained output layer keeps its input for its weights' gradient, a frozen one does not.
    return norm, norm + (0 if lora else D * shape.weight_bytes)


def _block_bytes(shape: ModelShape, lora: bool, rank: Figure) -> Figure:
    """Bytes a token that a block keeps for the backward pass, its two norms aside."""
    D, K, M = shape.width, shape.key_width, shape.mlp_width
    held = shape.weight_bytes
    tuned = max(_FLOAT32, held) if lora else held
    # Attention: queries, keys, values, output, and for each head the logarithm of the softmax's sum.
    attention = (2 * D + 2 * K) * held + shape.num_heads * _FLOAT32
    # The MLP's activation keeps its input; a gate also the activation, and what it is multiplied with.
    mlp = (3 if shape.gated_mlp else 1) * M * held
    # What is trained in a linear layer (weights or factor A) keeps the layer's input. Layers that read the same input
    # share it, and attention's output is kept already; but each layer keeps a copy of its own if PEFT has to cast it.
    copied = tuned != held
    readers = 5 if copied and shape.gated_mlp else 2  # q, k, v, gate and up, or else c_attn and c_fc
    inputs = (readers * D + M + (D if copied else 0)) * tuned
    # Factor B keeps the output of factor A.
    between = (7 if shape.gated_mlp else 4) * rank * tuned if lora else 0
    return attention + mlp + inputs + between
