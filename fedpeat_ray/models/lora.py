"""LoRA factors: where they go, how they start, and as PEFT directories.

Legend: R rank, I input width, O output width. A module y = x W gains scaling * x A^T B^T with
A (R, I), B (O, R), scaling = alpha / R (Hu et al. 2022, section 4.1).
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpeat_ray.config import LoraConfig
from fedpeat_ray.errors import ConfigError, ModelError
from fedpeat_ray.models.foundation import block_list_name, linear_widths
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.seeding import derive_seed

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Lora:
    """LoRA on named linear modules of one model: (name, I, O) each."""

    modules: tuple[tuple[str, int, int], ...]
    rank: int
    alpha: float
    fan_in_fan_out: bool

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @cached_property
    def layout(self) -> Layout:
        """The factors as a flat vector: A (R, I) then B (O, R), module by module."""
        names, shapes = [], []
        for name, width_in, width_out in self.modules:
            names += [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
            shapes += [(self.rank, width_in), (width_out, self.rank)]
        return Layout(tuple(names), tuple(shapes))

    def within(self, block_list: str, blocks: Container[int]) -> Lora:
        """The part of it that lies in some blocks."""
        prefix = block_list + "."
        modules = [m for m in self.modules if int(m[0].removeprefix(prefix).split(".", 1)[0]) in blocks]
        return replace(self, modules=tuple(modules))

    def init(self, seed: int) -> Tensor:
        """PEFT's start, flat float32: A uniform in +-1/sqrt(I) (Kaiming with a = sqrt 5), B zero."""
        tensors = {}
        for name, width_in, width_out in self.modules:
            rng = torch.Generator().manual_seed(derive_seed(seed, f"lora init {name}"))
            bound = width_in**-0.5
            tensors[f"{name}.lora_A.weight"] = torch.empty(self.rank, width_in).uniform_(-bound, bound, generator=rng)
            tensors[f"{name}.lora_B.weight"] = torch.zeros(width_out, self.rank)
        return self.layout.flatten(tensors)


def find_lora(model: PreTrainedModel, config: LoraConfig) -> Lora:
    """The linear layers of the model's blocks that the configuration names (all, if it names none).

    Raises ConfigError if a name or a block's number fits nothing, ModelError if the blocks have no linear layer.
    """
    prefix = block_list_name(model) + "."
    linears = linear_layers(model, prefix)
    if config.blocks:
        numbers = range(model.config.num_hidden_layers)
        for block in config.blocks:
            if block not in numbers:
                raise ConfigError.of("lora.blocks", block, f"numbers of blocks of this model, 0 to {len(numbers) - 1}")
        within = tuple(f"{prefix}{block}." for block in config.blocks)
        linears = {name: module for name, module in linears.items() if name.startswith(within)}
    for target in config.targets:
        if not any(_fits(name, target) for name in linears):
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ConfigError.of("lora.targets", target, f"linear layers of this model: {', '.join(known)}")
    chosen = {
        name: module
        for name, module in linears.items()
        if not config.targets or any(_fits(name, target) for target in config.targets)
    }
    if not chosen:
        raise ModelError(f"{type(model).__name__} has no linear layers in {prefix[:-1]}")
    widths = tuple((name, *linear_widths(module)) for name, module in chosen.items())
    transposed = any(isinstance(module, Conv1D) for module in chosen.values())
    return Lora(widths, config.rank, config.alpha, fan_in_fan_out=transposed)


def linear_layers(model: PreTrainedModel, prefix: str) -> dict[str, nn.Module]:
    """Those that LoRA can be in, below a name."""
    return {n: m for n, m in model.named_modules() if n.startswith(prefix) and isinstance(m, nn.Linear | Conv1D)}


def peft_config(lora: Lora, base_model: str | None, *, trainable: bool = False) -> PeftLoraConfig:
    """The same LoRA in PEFT's words; modules are named in full, so no other layer can match."""
    return PeftLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT annotates int and divides as float
        lora_dropout=0.0,
        target_modules=[name for name, _, _ in lora.modules],
        fan_in_fan_out=lora.fan_in_fan_out,
        inference_mode=not trainable,
    )


def save_adapter(directory: Path, lora: Lora, flat: Tensor, base_model: str) -> None:
    """Write a directory that `peft.PeftModel.from_pretrained` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    peft_config(lora, base_model).save_pretrained(str(directory))
    (directory / "adapter_model.safetensors").write_bytes(_peft_layout(lora).serialize(flat))


def load_adapter(directory: Path, lora: Lora) -> Tensor:
    """Read a PEFT directory as a flat vector. Raises ModelError if it is not this LoRA."""
    config = json.loads((directory / "adapter_config.json").read_text())
    if config["r"] != lora.rank or config["lora_alpha"] != lora.alpha:
        raise ModelError(
            f"{directory} holds LoRA of rank {config['r']} and alpha {config['lora_alpha']}, "
            f"expected rank {lora.rank} and alpha {lora.alpha}"
        )
    try:
        return _peft_layout(lora).flatten(load_file(directory / "adapter_model.safetensors"))
    except (KeyError, ValueError) as error:
        raise ModelError(f"{directory} does not fit this model: {error}") from error


def saved_lora(model: PreTrainedModel, directory: Path, config: LoraConfig) -> Lora:
    """The LoRA of a PEFT directory, on the modules it names."""
    lora = find_lora(model, replace(config, targets=(), blocks=()))
    names = set(json.loads((directory / "adapter_config.json").read_text())["target_modules"])
    return replace(lora, modules=tuple(module for module in lora.modules if module[0] in names))


def _peft_layout(lora: Lora) -> Layout:
    return Layout(tuple(_PEFT_PREFIX + name for name in lora.layout.names), lora.layout.shapes)


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
