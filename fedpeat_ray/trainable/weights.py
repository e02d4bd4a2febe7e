"""Tensors of the foundation itself, a copy for each client: biases, and the head that a task puts on a model.

Legend: K clients, N rows of a client, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Collection, Container
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpeat_ray.errors import ConfigError, ModelError
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.trainable.part import Part, StackedLayer, is_within, read_weights, rows_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_WITH_BIAS = (nn.Linear, Conv1D, nn.LayerNorm, *_CONVOLUTIONS)


@dataclass(frozen=True)
class Bias(Part):
    """Every bias of the model but the head's (BitFit, Ben Zaken et al. 2022), or those of some blocks."""

    layout: Layout
    foundation: Foundation

    def init(self, seed: int) -> Tensor:
        """The foundation's own."""
        return read_weights(self.foundation, self.layout)

    def within(self, block_list: str, blocks: Container[int]) -> Bias:
        """Those in some blocks, and those in none."""
        return replace(self, layout=within_blocks(self.layout, block_list, blocks))

    def layers(self, model: PreTrainedModel, called: bool = False) -> dict[str, StackedLayer]:
        """A layer whose bias is added afterwards for each."""
        names = [name.removesuffix(".bias") for name in self.layout.names]
        return {name: StackedBias(name, model.get_submodule(name)) for name in names}


class StackedBias(StackedLayer):
    """A frozen layer whose bias each client has of its own."""

    def __init__(self, name: str, frozen: nn.Module):
        super().__init__(frozen)
        self.names = (f"{name}.bias",)
        self.none = {"bias": torch.zeros_like(frozen.get_parameter("bias"))}

    def forward(self, x: Tensor) -> Tensor:
        (bias_KO,) = self.tensors
        y = functional_call(self.frozen, self.none, (x,))
        spread = (1,) * (y.dim() - 2)
        in_place = bias_KO.repeat_interleave(len(y) // len(bias_KO), dim=0)
        if isinstance(self.frozen, _CONVOLUTIONS):
            return y + in_place.view(len(y), -1, *spread)
        return y + in_place.view(len(y), *spread, -1)


@dataclass(frozen=True)
class TaskHead(Part):
    """All that is on top of the pre-trained model for a task: linear layers, each client with its own."""

    layout: Layout
    foundation: Foundation

    def init(self, seed: int) -> Tensor:
        """The foundation's own, random where it was pre-trained for something else."""
        return read_weights(self.foundation, self.layout)

    def layers(self, model: PreTrainedModel, called: bool = False) -> dict[str, StackedLayer]:
        """A linear layer for each."""
        names = dict.fromkeys(name.rpartition(".")[0] for name in self.layout.names)
        return {name: StackedLinear(name, model.get_submodule(name)) for name in names}

    @property
    def modules(self) -> list[str]:
        """Names of the modules that PEFT is to save whole."""
        return [*dict.fromkeys(name.split(".")[0] for name in self.layout.names)]


class StackedLinear(StackedLayer):
    """A linear layer of which each client has its own."""

    def __init__(self, name: str, linear: nn.Module):
        super().__init__(linear)
        self.names = tuple(f"{name}.{parameter}" for parameter, _ in linear.named_parameters())

    def forward(self, x: Tensor) -> Tensor:
        weight_KOI, *bias = self.tensors
        y_KNO = torch.bmm(rows_of(x, len(weight_KOI)), weight_KOI.transpose(1, 2))
        return (y_KNO + bias[0].unsqueeze(1) if bias else y_KNO).view(*x.shape[:-1], -1)


def find_bias(
    model: PreTrainedModel,
    foundation: Foundation,
    setting: str,
    blocks: tuple[str, Collection[int]] | None = None,
) -> Bias:
    """The biases of the model, or of (list of blocks, numbers). Raises ConfigError, of a setting, where there are none,
    or not of layers that are known."""
    prefixes = None if blocks is None else tuple(f"{blocks[0]}.{i}." for i in blocks[1])
    head = {name for name, _ in head_parameters(model)}
    found = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and name not in head and (prefixes is None or name.startswith(prefixes))
    }
    kinds = {name: model.get_submodule(name.removesuffix(".bias")) for name in found}
    odd = sorted({type(module).__name__ for module in kinds.values() if not isinstance(module, _WITH_BIAS)})
    if odd or not found:
        why = f"biases in layers of a kind of its own ({odd[0]})" if odd else "no biases"
        raise ConfigError.of(setting, "bias", f"another one, as {type(model).__name__} has {why}")
    return Bias(Layout(tuple(found), tuple(found.values())), foundation)


def find_head(model: PreTrainedModel, foundation: Foundation) -> TaskHead:
    """All that is not in the pre-trained model. Raises ModelError where that is more than linear layers, or nothing."""
    found = dict(head_parameters(model))
    for name in found:
        if not isinstance(module := model.get_submodule(name.rpartition(".")[0]), nn.Linear):
            raise ModelError(f"the head of {type(model).__name__} has a {type(module).__name__}: linear layers only")
    if not found:
        raise ModelError(f"{type(model).__name__} has no head of its own")
    return TaskHead(Layout(tuple(found), tuple(tuple(p.shape) for p in found.values())), foundation)


def head_parameters(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """Parameters outside of the pre-trained model, where that is a part of this one."""
    inside = f"{model.base_model_prefix}."
    named = list(model.named_parameters())
    return [item for item in named if not item[0].startswith(inside)] if model.base_model is not model else []


def within_blocks(layout: Layout, block_list: str, blocks: Container[int]) -> Layout:
    """The tensors in some blocks, and those in none."""
    return layout.part([name for name in layout.names if is_within(name, block_list, blocks)])[0]
