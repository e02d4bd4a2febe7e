"""LoRA: where its factors go, how they start, and the layers that have those of several clients.

Legend: K clients, N rows of a client, R rank, I input width, O output width. A module y = x W gains
scaling * x A^T B^T with A (R, I), B (O, R), scaling = alpha / R (Hu et al. 2022, section 4.1), or alpha / sqrt(R)
if it is rank-stabilised (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA").
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpeat_ray.config import LoraConfig
from fedpeat_ray.errors import ConfigError, ModelError
from fedpeat_ray.models.foundation import block_list_names, is_sharded, linear_widths
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.seeding import derive_seed
from fedpeat_ray.trainable.part import Part, StackedLayer, is_within


@dataclass(frozen=True)
class Lora(Part):
    """LoRA on named linear modules of one model: (name, I, O) each."""

    modules: tuple[tuple[str, int, int], ...]
    rank: int
    alpha: float
    fan_in_fan_out: bool
    rank_stabilized: bool = False

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / its root."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]  # a property elsewhere
        """The factors as a flat vector: A (R, I) then B (O, R), module by module."""
        names, shapes = [], []
        for name, width_in, width_out in self.modules:
            names += [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
            shapes += [(self.rank, width_in), (width_out, self.rank)]
        return Layout(tuple(names), tuple(shapes))

    def within(self, block_list: str, blocks: Container[int]) -> Lora:
        """The part of it that lies in some blocks, or in none of the list."""
        return replace(self, modules=tuple(m for m in self.modules if is_within(m[0], block_list, blocks)))

    def init(self, seed: int) -> Tensor:
        """PEFT's start, flat float32: A uniform in +-1/sqrt(I) (Kaiming with a = sqrt 5), B zero."""
        tensors = {}
        for name, width_in, width_out in self.modules:
            rng = torch.Generator().manual_seed(derive_seed(seed, f"lora init {name}"))
            bound = width_in**-0.5
            tensors[f"{name}.lora_A.weight"] = torch.empty(self.rank, width_in).uniform_(-bound, bound, generator=rng)
            tensors[f"{name}.lora_B.weight"] = torch.zeros(width_out, self.rank)
        return self.layout.flatten(tensors)

    def layers(self, model: PreTrainedModel, called: bool = False) -> dict[str, StackedLayer]:
        """A linear layer with factors for each that it is on."""
        kind = CalledLoraLinear if called or is_sharded(model) else StackedLoraLinear
        layers: dict[str, StackedLayer] = {}
        for name, _, _ in self.modules:
            layers[name] = kind(model.get_submodule(name), self.scaling)
            layers[name].names = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
        return layers


def find_lora(model: PreTrainedModel, config: LoraConfig) -> Lora:
    """The linear layers of the model's blocks that the configuration names (all, if it names none).

    Raises ConfigError if a name or a block's number fits nothing, ModelError if the blocks have no linear layer.
    """
    prefixes = tuple(f"{name}." for name in block_list_names(model))
    linears = linear_layers(model, prefixes)
    if config.blocks:
        numbers = range(model.config.num_hidden_layers)
        for block in config.blocks:
            if block not in numbers:
                raise ConfigError.of("lora.blocks", block, f"numbers of blocks of this model, 0 to {len(numbers) - 1}")
        within = tuple(f"{prefix}{block}." for prefix in prefixes for block in config.blocks)
        linears = {name: module for name, module in linears.items() if name.startswith(within)}
    for target in config.targets:
        if not any(fits(name, target) for name in linears):
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ConfigError.of("lora.targets", target, f"linear layers of this model: {', '.join(known)}")
    chosen = {
        name: module
        for name, module in linears.items()
        if not config.targets or any(fits(name, target) for target in config.targets)
    }
    if not chosen:
        raise ModelError(f"{type(model).__name__} has no linear layers in {prefixes[0][:-1]}")
    widths = tuple((name, *linear_widths(module)) for name, module in chosen.items())
    transposed = any(isinstance(module, Conv1D) for module in chosen.values())
    return Lora(widths, config.rank, config.alpha, transposed, config.rank_stabilized)


def linear_layers(model: PreTrainedModel, prefix: str | tuple[str, ...]) -> dict[str, nn.Module]:
    """Those that LoRA can be in, below a name."""
    return {n: m for n, m in model.named_modules() if n.startswith(prefix) and isinstance(m, nn.Linear | Conv1D)}


def fits(name: str, target: str) -> bool:
    """Whether a target, as PEFT takes it, means a module of this name."""
    return name == target or name.endswith("." + target)


class StackedLoraLinear(StackedLayer):
    """A frozen linear layer in which every client of the batch has its own low-rank update."""

    def __init__(self, frozen: nn.Module, scaling: float):
        super().__init__(frozen)
        self.weight_IO = frozen.weight if isinstance(frozen, Conv1D) else frozen.weight.T
        self.bias_O = frozen.bias
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        a_KRI, b_KOR = self.tensors
        x_KNI = x.reshape(len(a_KRI), -1, x.shape[-1])
        y_KNO = _StackedLora.apply(x_KNI, self.weight_IO, self.bias_O, a_KRI, b_KOR, self.scaling)
        return y_KNO.view(*x.shape[:-1], -1)


class CalledLoraLinear(StackedLayer):
    """The same through a call of the frozen layer, for layers whose weights are only there while they are called."""

    def __init__(self, frozen: nn.Module, scaling: float):
        super().__init__(frozen)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        a_KRI, b_KOR = self.tensors
        h_KNR = torch.bmm(x.reshape(len(a_KRI), -1, x.shape[-1]), a_KRI.transpose(1, 2))
        y_KNO = torch.bmm(h_KNR, b_KOR.transpose(1, 2)) * self.scaling
        return self.frozen(x) + y_KNO.view(*x.shape[:-1], -1)


class _StackedLora(torch.autograd.Function):
    """y = x W + b + scaling * x A^T B^T, written out: the low-rank part is added in place, both ways."""

    @staticmethod
    def forward(ctx, x_KNI, weight_IO, bias_O, a_KRI, b_KOR, scaling):
        rows = x_KNI.flatten(0, 1)
        y = rows @ weight_IO if bias_O is None else torch.addmm(bias_O, rows, weight_IO)
        y_KNO = y.view(*x_KNI.shape[:2], -1)
        h_KNR = torch.bmm(x_KNI, a_KRI.transpose(1, 2))
        y_KNO.baddbmm_(h_KNR, b_KOR.transpose(1, 2), alpha=scaling)
        ctx.save_for_backward(x_KNI, weight_IO, a_KRI, b_KOR, h_KNR)
        ctx.scaling = scaling
        return y_KNO

    @staticmethod
    def backward(ctx, grad_KNO):  # type: ignore[override]  # torch annotates any number of gradients
        x_KNI, weight_IO, a_KRI, b_KOR, h_KNR = ctx.saved_tensors
        grad_h_KNR = torch.bmm(grad_KNO, b_KOR).mul_(ctx.scaling)
        grad_b_KOR = torch.bmm(grad_KNO.transpose(1, 2), h_KNR).mul_(ctx.scaling)
        grad_a_KRI = torch.bmm(grad_h_KNR.transpose(1, 2), x_KNI)
        grad_x_KNI = None
        if ctx.needs_input_grad[0]:
            grad_x_KNI = (grad_KNO.flatten(0, 1) @ weight_IO.T).view(x_KNI.shape)
            grad_x_KNI.baddbmm_(grad_h_KNR, a_KRI)
        return grad_x_KNI, None, None, grad_a_KRI, grad_b_KOR, None
