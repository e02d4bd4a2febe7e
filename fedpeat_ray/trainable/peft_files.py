"""Trained tensors as files: PEFT directories of what PEFT knows, and safetensors of the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from fedpeat_ray.config import LoraConfig
from fedpeat_ray.errors import ModelError
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.trainable.ia3 import IA3
from fedpeat_ray.trainable.lora import Lora, find_lora
from fedpeat_ray.trainable.part import Part, Parts
from fedpeat_ray.trainable.prompt import Prefix, Prompt
from fedpeat_ray.trainable.weights import TaskHead

_PREFIX = "base_model.model."
_TYPES = {
    peft.TaskType.CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    peft.TaskType.SEQ_CLS: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    peft.TaskType.SEQ_2_SEQ_LM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
WEIGHTS = "weights.safetensors"
"""Tensors by their names in the model, or by ours."""


def peft_config(
    part: Lora | IA3 | Prompt | Prefix,
    kind: str = "GPT2LMHeadModel",
    base_model: str | None = None,
    *,
    head: TaskHead | None = None,
    trainable: bool = False,
) -> peft.PeftConfig:
    """The same in PEFT's words, for a class of models; modules are named in full, so no other layer can match."""
    values: dict[str, Any] = {
        "task_type": _task_type(kind),
        "base_model_name_or_path": base_model,
        "inference_mode": not trainable,
    }
    if isinstance(part, Lora):
        return peft.LoraConfig(
            r=part.rank,
            lora_alpha=part.alpha,  # type: ignore[arg-type]  # PEFT annotates int and divides as float
            use_rslora=part.rank_stabilized,
            lora_dropout=0.0,
            target_modules=[name for name, _, _ in part.modules],
            fan_in_fan_out=part.fan_in_fan_out,
            modules_to_save=head.modules if head else None,
            **values,
        )
    if isinstance(part, IA3):
        return peft.IA3Config(
            target_modules=[name for name, _, _ in part.modules],
            feedforward_modules=[name for name, _, feeds in part.modules if feeds],
            fan_in_fan_out=part.fan_in_fan_out,
            modules_to_save=head.modules if head else None,
            **values,
        )
    if isinstance(part, Prompt):
        return peft.PromptTuningConfig(num_virtual_tokens=part.num_tokens, token_dim=part.width, **values)
    return peft.PrefixTuningConfig(num_virtual_tokens=part.num_tokens, **values)


def save(directory: Path, part: Part, flat: Tensor, base_model: str, kind: str = "GPT2LMHeadModel") -> None:
    """Write a directory that `peft.PeftModel.from_pretrained` reads, or WEIGHTS where PEFT has nothing of the kind.

    PEFT's prompts and prefixes are read differently by models that read both ways or are no language models, so only
    those of causal language models are its own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    own, head = divided(part)
    if isinstance(own, Prompt | Prefix) and not (head is None and _task_type(kind) == peft.TaskType.CAUSAL_LM):
        own = None
    if isinstance(own, Lora | IA3 | Prompt | Prefix):
        peft_config(own, kind, base_model, head=head).save_pretrained(str(directory))
        content = _peft_layout(part.layout).serialize(flat)
        (directory / "adapter_model.safetensors").write_bytes(content)
    else:
        (directory / WEIGHTS).write_bytes(part.layout.serialize(flat))


def load(directory: Path, part: Part) -> Tensor:
    """Read such a directory as a flat vector. Raises ModelError if it is not this part."""
    path = directory / "adapter_model.safetensors"
    own, _ = divided(part)
    if not path.exists():
        path, layout = directory / WEIGHTS, part.layout
    else:
        layout = _peft_layout(part.layout)
        config = json.loads((directory / "adapter_config.json").read_text())
        if isinstance(own, Lora) and (config["r"] != own.rank or config["lora_alpha"] != own.alpha):
            raise ModelError(
                f"{directory} holds LoRA of rank {config['r']} and alpha {config['lora_alpha']}, "
                f"expected rank {own.rank} and alpha {own.alpha}"
            )
    try:
        return layout.flatten(load_file(path))
    except (KeyError, ValueError) as error:
        raise ModelError(f"{directory} does not fit this model: {error}") from error


def divided(part: Part) -> tuple[Part | None, TaskHead | None]:
    """What is trained in the model, and on top of it."""
    parts = part.parts if isinstance(part, Parts) else (part,)
    head = next((one for one in parts if isinstance(one, TaskHead)), None)
    return next((one for one in parts if not isinstance(one, TaskHead)), None), head


def saved_lora(model: PreTrainedModel, directory: Path, config: LoraConfig) -> Lora:
    """The LoRA of a PEFT directory, on the modules it names."""
    lora = find_lora(model, replace(config, targets=(), blocks=()))
    names = set(json.loads((directory / "adapter_config.json").read_text())["target_modules"])
    return replace(lora, modules=tuple(module for module in lora.modules if module[0] in names))


def _task_type(kind: str) -> peft.TaskType | None:
    return next((found for found, names in _TYPES.items() if kind in _flat(names)), None)


def _flat(names: Mapping[str, Any]) -> set[str]:
    return {one for value in names.values() for one in (value if isinstance(value, tuple | list) else (value,))}


def _peft_layout(layout: Layout) -> Layout:
    """Prompts have no prefix."""
    names = tuple(name if name == "prompt_embeddings" else _PREFIX + name for name in layout.names)
    return Layout(names, layout.shapes)
