"""IA3: a factor for each feature of keys, values and the inside of the feed-forward layer (Liu et al. 2022).

Legend: K clients, N rows of a client, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from peft.utils import constants
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpeat_ray.errors import ConfigError
from fedpeat_ray.models.foundation import block_list_names, linear_widths
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.trainable.lora import fits, linear_layers
from fedpeat_ray.trainable.part import Part, StackedLayer, is_within, rows_of

_TARGETS = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING | {"vit": ["k_proj", "v_proj", "mlp.fc2"]}
_FEEDFORWARD = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING | {"vit": ["mlp.fc2"]}


@dataclass(frozen=True)
class IA3(Part):
    """On named linear modules of one model: (name, width, whether it is the input that is scaled) each."""

    modules: tuple[tuple[str, int, bool], ...]
    fan_in_fan_out: bool

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]  # a property elsewhere
        """As PEFT has them: (O, 1) for outputs, (1, I) for inputs."""
        names = tuple(f"{name}.ia3_l" for name, _, _ in self.modules)
        return Layout(
            names, tuple((1, width) if scales_input else (width, 1) for _, width, scales_input in self.modules)
        )

    def init(self, seed: int) -> Tensor:
        """Ones."""
        return torch.ones(self.layout.num_elements)

    def within(self, block_list: str, blocks: Container[int]) -> IA3:
        """What of it is in some blocks, or in none of the list."""
        return replace(self, modules=tuple(m for m in self.modules if is_within(m[0], block_list, blocks)))

    def layers(self, model: PreTrainedModel, called: bool = False) -> dict[str, StackedLayer]:
        """A layer with factors for each."""
        return {name: StackedIA3(name, model.get_submodule(name), feeds) for name, _, feeds in self.modules}


class StackedIA3(StackedLayer):
    """A frozen layer whose inputs, or outputs, each client scales by its own factors."""

    def __init__(self, name: str, frozen: nn.Module, scales_input: bool):
        super().__init__(frozen)
        self.names = (f"{name}.ia3_l",)
        self.scales_input = scales_input

    def forward(self, x: Tensor) -> Tensor:
        factors_KW = self.tensors[0].flatten(1)
        if self.scales_input:
            return self.frozen(_scaled(x, factors_KW))
        return _scaled(self.frozen(x), factors_KW)


def _scaled(x: Tensor, factors_KW: Tensor) -> Tensor:
    return (rows_of(x, len(factors_KW)) * factors_KW.unsqueeze(1)).view(x.shape)


def find_ia3(model: PreTrainedModel, blocks: Container[int] | None = None) -> IA3:
    """The layers that PEFT adapts in this family, of all blocks or of some. Raises ConfigError for a family whose
    layers are not known."""
    family = model.config.model_type
    if family not in _TARGETS:
        known = ", ".join(sorted(_TARGETS))
        raise ConfigError.of("peft.module", "ia3", f"another one for {type(model).__name__}; IA3 knows {known}")
    modules, transposed = [], False
    for prefix in (f"{name}." for name in block_list_names(model)):
        for name, layer in linear_layers(model, prefix).items():
            number = int(name.removeprefix(prefix).split(".", 1)[0])
            if not any(fits(name, target) for target in _TARGETS[family]) or (blocks and number not in blocks):
                continue
            width_in, width_out = linear_widths(layer)
            feeds = any(fits(name, target) for target in _FEEDFORWARD.get(family, ()))
            modules.append((name, width_in if feeds else width_out, feeds))
            transposed |= isinstance(layer, Conv1D)
    return IA3(tuple(modules), transposed)
