"""Bottleneck adapters behind the layers that write into the residual stream (Houlsby et al. 2019).

Legend: K clients, N rows of a client, D model width, W bottleneck width.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedpeat_ray.errors import ConfigError
from fedpeat_ray.models.foundation import block_list_names, linear_widths
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.seeding import derive_seed
from fedpeat_ray.trainable.lora import fits, linear_layers
from fedpeat_ray.trainable.part import Part, StackedLayer, is_within, rows_of

_AFTER_ATTENTION = ("attn.c_proj", "o_proj", "attention.output.dense", "SelfAttention.o", "self_attn.out_proj")
_AFTER_FEEDFORWARD = ("mlp.c_proj", "mlp.down_proj", "output.dense", "mlp.fc2", "DenseReluDense.wo", "fc2")


@dataclass(frozen=True)
class Houlsby(Part):
    """y + up(GELU(down(y))) on the outputs y of named linear modules: (name, D) each. Two a block, as in the paper, or
    the one behind the feed-forward layer (Pfeiffer et al. 2021)."""

    modules: tuple[tuple[str, int], ...]
    width: int

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]  # a property elsewhere
        """down (W, D), its bias, up (D, W), its bias, module by module."""
        names, shapes = [], []
        for name, features in self.modules:
            names += _names(name)
            shapes += [(self.width, features), (self.width,), (features, self.width), (features,)]
        return Layout(tuple(names), tuple(shapes))

    def init(self, seed: int) -> Tensor:
        """down normal with deviation 0.01 as in the paper, all else zero: the model is what it was."""
        tensors = {}
        for name, features in self.modules:
            rng = torch.Generator().manual_seed(derive_seed(seed, f"adapter init {name}"))
            down, down_bias, up, up_bias = _names(name)
            tensors[down] = torch.empty(self.width, features).normal_(0, 0.01, generator=rng)
            tensors |= {down_bias: torch.zeros(self.width), up: torch.zeros(features, self.width)}
            tensors[up_bias] = torch.zeros(features)
        return self.layout.flatten(tensors)

    def within(self, block_list: str, blocks: Container[int]) -> Houlsby:
        """What of it is in some blocks, or in none of the list."""
        return replace(self, modules=tuple(m for m in self.modules if is_within(m[0], block_list, blocks)))

    def layers(self, model: PreTrainedModel, called: bool = False) -> dict[str, StackedLayer]:
        """The layer and an adapter for each."""
        return {name: StackedHoulsby(name, model.get_submodule(name)) for name, _ in self.modules}


def _names(module: str) -> list[str]:
    return [f"{module}.adapter.{side}.{kind}" for side in ("down", "up") for kind in ("weight", "bias")]


class StackedHoulsby(StackedLayer):
    """A frozen layer with an adapter of each client behind it."""

    def __init__(self, name: str, frozen: nn.Module):
        super().__init__(frozen)
        self.names = tuple(_names(name))

    def forward(self, x: Tensor) -> Tensor:
        down_KWD, down_bias_KW, up_KDW, up_bias_KD = self.tensors
        y = self.frozen(x)
        y_KND = rows_of(y, len(down_KWD))
        inside_KNW = nn.functional.gelu(torch.baddbmm(down_bias_KW.unsqueeze(1), y_KND, down_KWD.transpose(1, 2)))
        added_KND = torch.baddbmm(up_bias_KD.unsqueeze(1), inside_KNW, up_KDW.transpose(1, 2))
        return (y_KND + added_KND).view(y.shape)


def find_houlsby(model: PreTrainedModel, width: int, both: bool, blocks: Container[int] | None = None) -> Houlsby:
    """The layers that write into the residual stream, of all blocks or of some. Raises ConfigError for a model whose
    layers have other names."""
    targets = (*_AFTER_ATTENTION, *_AFTER_FEEDFORWARD) if both else _AFTER_FEEDFORWARD
    modules = []
    for prefix in (f"{name}." for name in block_list_names(model)):
        for name, layer in linear_layers(model, prefix).items():
            number = int(name.removeprefix(prefix).split(".", 1)[0])
            ends_attention = any(fits(name, target) for target in _AFTER_ATTENTION)
            wanted = any(fits(name, target) for target in targets) and (both or not ends_attention)
            if wanted and (blocks is None or number in blocks):
                modules.append((name, linear_widths(layer)[1]))
    if not modules:
        known = ", ".join((*_AFTER_ATTENTION, *_AFTER_FEEDFORWARD))
        raise ConfigError.of("peft.module", "houlsby", f"another one for {type(model).__name__}: none of {known}")
    return Houlsby(tuple(modules), width)
