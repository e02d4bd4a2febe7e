"""Learned tokens: in front of a text (prompt tuning, Lester et al. 2021), before the patches of an image in every
block (VPT-deep, Jia et al. 2022), or as keys and values of every block (prefix tuning, Li and Liang 2021).

Legend: K clients, B rows of all clients, T tokens, M learned tokens, D model width, L blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from fedpeat_ray.errors import ConfigError
from fedpeat_ray.models.architecture import reads_left_to_right
from fedpeat_ray.models.foundation import Foundation, block_list_name
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.models.traits import reads_tokens
from fedpeat_ray.seeding import derive_seed, generator
from fedpeat_ray.trainable.part import Part, SetTensors, StackedLayer, is_within

_DEVIATION = 0.02  # of the start where there is no better one


@dataclass(frozen=True)
class Prompt(Part):
    """Learned embeddings that the model reads beside those of a text: in front of it, or behind the first token where
    that stands for the whole (models that read both ways). What comes out at their places is left out."""

    num_tokens: int
    width: int
    first: int
    """Tokens of the text before them."""
    foundation: Foundation
    embeddings: str
    """Name of the table of embeddings."""

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]  # a property elsewhere
        """As PEFT has it: (M, D)."""
        return Layout(("prompt_embeddings",), ((self.num_tokens, self.width),))

    def init(self, seed: int) -> Tensor:
        """The embeddings of some tokens of the vocabulary."""
        with safe_open(self.foundation.weights, framework="pt") as file:
            table = file.get_slice(self.embeddings)
            chosen = generator(seed, "prompt init").integers(table.get_shape()[0], size=self.num_tokens)
            return torch.cat([table[int(i) : int(i) + 1].flatten() for i in chosen])

    @contextlib.contextmanager
    def stacked(self, model: PreTrainedModel, called: bool = False) -> Iterator[SetTensors]:
        """Around what reads the text: embeddings take the place of token ids, and no one behind sees more tokens."""
        reads = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        embed: Any = model.get_input_embeddings()
        given: list[Tensor] = []

        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            tokens_BT = args[0] if args else kwargs["input_ids"]
            text_BTD, mask_BT = embed(tokens_BT), kwargs.get("attention_mask")
            prompt_BMD = given[0].repeat_interleave(len(tokens_BT) // len(given[0]), dim=0)
            inputs = _between(text_BTD, prompt_BMD.to(text_BTD.dtype), self.first)
            if mask_BT is not None:
                ones = mask_BT.new_ones(len(mask_BT), self.num_tokens)
                kwargs = kwargs | {"attention_mask": torch.cat([ones, mask_BT], dim=1)}
            return (), kwargs | {"input_ids": None, "inputs_embeds": inputs}

        def after(_: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
            out.last_hidden_state = _without(out.last_hidden_state, self.first, self.num_tokens)
            return out

        hooks = [
            reads.register_forward_pre_hook(before, with_kwargs=True),
            reads.register_forward_hook(after, with_kwargs=True),
        ]

        def set_tensors(theta_KP: Tensor) -> None:
            given[:] = [theta_KP.view(-1, self.num_tokens, self.width)]

        try:
            yield set_tensors
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class DeepPrompt(Part):
    """Learned tokens of every block of a model that reads both ways without a mask, new ones in each."""

    num_tokens: int
    width: int
    blocks: tuple[str, ...]
    """Names of the blocks."""

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]  # a property elsewhere
        """(M, D) a block."""
        names = tuple(f"{block}.prompt" for block in self.blocks)
        return Layout(names, ((self.num_tokens, self.width),) * len(names))

    def init(self, seed: int) -> Tensor:
        """Small random numbers."""
        rng = torch.Generator().manual_seed(derive_seed(seed, "prompt init"))
        return torch.empty(self.layout.num_elements).normal_(0, _DEVIATION, generator=rng)

    def within(self, block_list: str, blocks: Container[int]) -> DeepPrompt:
        """Those of some blocks."""
        return replace(self, blocks=tuple(name for name in self.blocks if is_within(name, block_list, blocks)))

    def layers(self, model: PreTrainedModel, called: bool = False) -> dict[str, StackedLayer]:
        """The block, with tokens put in before it and taken out behind it."""
        return {name: PromptedBlock(name, model.get_submodule(name), self.num_tokens) for name in self.blocks}


class PromptedBlock(StackedLayer):
    """A frozen block that reads learned tokens of each client behind the first token."""

    def __init__(self, name: str, frozen: nn.Module, num_tokens: int):
        super().__init__(frozen)
        self.names = (f"{name}.prompt",)
        self.num_tokens = num_tokens

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        (prompt_KMD,) = self.tensors
        prompt_BMD = prompt_KMD.repeat_interleave(len(hidden_states) // len(prompt_KMD), dim=0)
        out = self.frozen(_between(hidden_states, prompt_BMD, 1), *args, **kwargs)
        if isinstance(out, tuple):
            return (_without(out[0], 1, self.num_tokens), *out[1:])
        return _without(out, 1, self.num_tokens)


@dataclass(frozen=True)
class Prefix(Part):
    """Learned keys and values that every block of a causal model attends to, as if they were of tokens before."""

    num_tokens: int
    num_blocks: int
    num_heads: int
    """Of keys and values."""
    head_width: int

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]  # a property elsewhere
        """As PEFT has it: (M, 2 L D), keys and values of one block after another."""
        width = 2 * self.num_blocks * self.num_heads * self.head_width
        return Layout(("prompt_embeddings",), ((self.num_tokens, width),))

    def init(self, seed: int) -> Tensor:
        """Small random numbers."""
        rng = torch.Generator().manual_seed(derive_seed(seed, "prefix init"))
        return torch.empty(self.layout.num_elements).normal_(0, _DEVIATION, generator=rng)

    @contextlib.contextmanager
    def stacked(self, model: PreTrainedModel, called: bool = False) -> Iterator[SetTensors]:
        """As a key-value cache that is there before a text is read."""
        given: list[Tensor] = []

        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            tokens_BT = args[0] if args else kwargs["input_ids"]
            rows = len(tokens_BT) // len(given[0])
            cache = DynamicCache()
            for i in range(self.num_blocks):
                keys, values = (given[0][:, :, 2 * i + j].transpose(1, 2).repeat_interleave(rows, 0) for j in (0, 1))
                cache.update(keys, values, i)
            mask_BT = kwargs.get("attention_mask")
            if mask_BT is not None:
                ones = mask_BT.new_ones(len(mask_BT), self.num_tokens)
                kwargs = kwargs | {"attention_mask": torch.cat([ones, mask_BT], dim=1)}
            return (), kwargs | {"input_ids": tokens_BT, "past_key_values": cache}

        hook = model.base_model.register_forward_pre_hook(before, with_kwargs=True)
        shape = (-1, self.num_tokens, 2 * self.num_blocks, self.num_heads, self.head_width)

        def set_tensors(theta_KP: Tensor) -> None:
            given[:] = [theta_KP.view(shape)]

        try:
            yield set_tensors
        finally:
            hook.remove()


def _between(text_BTD: Tensor, prompt_BMD: Tensor, first: int) -> Tensor:
    return torch.cat([text_BTD[:, :first], prompt_BMD, text_BTD[:, first:]], dim=1)


def _without(hidden_BTD: Tensor, first: int, num_tokens: int) -> Tensor:
    return torch.cat([hidden_BTD[:, :first], hidden_BTD[:, first + num_tokens :]], dim=1)


def find_prompt(model: PreTrainedModel, foundation: Foundation, num_tokens: int) -> Prompt | DeepPrompt:
    """Learned tokens for a text, or in every block for an image."""
    width = model.config.hidden_size
    if not reads_tokens(model):
        name = block_list_name(model)
        return DeepPrompt(num_tokens, width, tuple(f"{name}.{i}" for i in range(model.config.num_hidden_layers)))
    table = model.get_input_embeddings().get_parameter("weight")
    (embeddings,) = [name for name, parameter in model.named_parameters() if parameter is table]
    first = 0 if reads_left_to_right(model.config) or model.config.is_encoder_decoder else 1
    return Prompt(num_tokens, table.shape[1], first, foundation, embeddings)


def find_prefix(model: PreTrainedModel, num_tokens: int) -> Prefix:
    """Raises ConfigError for a model that has no keys and values of tokens before."""
    if not reads_tokens(model) or not reads_left_to_right(model.config):
        allowed = f"another one, as {type(model).__name__} has no key-value cache of what it reads"
        raise ConfigError.of("peft.module", "prefix", allowed)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Prefix(num_tokens, config.num_hidden_layers, heads, width)
