"""What is trainable, by its name in the settings."""

from __future__ import annotations

from collections.abc import Callable, Collection

from transformers import PreTrainedModel

from fedpeat_ray.config import PeftConfig, SimulationConfig
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.fleet.memory import Trainable
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.trainable.houlsby import Houlsby, find_houlsby
from fedpeat_ray.trainable.ia3 import IA3, find_ia3
from fedpeat_ray.trainable.lora import Lora
from fedpeat_ray.trainable.part import Part, Parts
from fedpeat_ray.trainable.prompt import DeepPrompt, Prefix, Prompt, find_prefix, find_prompt
from fedpeat_ray.trainable.weights import Bias, TaskHead, find_bias, find_head

_KINDS: dict[type, Trainable] = {
    Lora: "lora",
    Bias: "bias",
    TaskHead: "head",
    IA3: "ia3",
    Houlsby: "houlsby",
    Prompt: "prompt",
    DeepPrompt: "prompt",
    Prefix: "prefix",
}


LEARNING_RATES = {
    "lora": 2e-3,
    "ia3": 1e-2,
    "bias": 2e-3,
    "head": 5e-3,
    "houlsby": 2e-3,
    "prompt": 1e-2,
    "prefix": 1e-2,
    "full": 5e-4,
}
"""What local.learning_rate = auto stands for."""


def find_part(
    config: SimulationConfig, model: PreTrainedModel, foundation: Foundation, has_head: bool, lora: Callable[[], Lora]
) -> Part:
    """The part that `peft.module` names, with the task's head if it has one. Raises ConfigError where the model has not
    what it needs."""
    peft = config.peft
    if peft.module == "head" and not has_head:
        allowed = f"another one, as {type(model).__name__} has no head but its embeddings' (classification has one)"
        raise ConfigError.of("peft.module", "head", allowed)
    own = None if peft.module == "head" else _own(peft, model, foundation, lora)
    parts = [*([own] if own else []), *([find_head(model, foundation)] if has_head else [])]
    return parts[0] if len(parts) == 1 else Parts(tuple(parts))


def with_head(part: Part, model: PreTrainedModel, foundation: Foundation, has_head: bool) -> Part:
    """The part, with the task's head if it has one."""
    return Parts((part, find_head(model, foundation))) if has_head else part


def kind_of(part: Part) -> Trainable:
    """What it counts as for memory and costs."""
    return _KINDS[type(part.parts[0] if isinstance(part, Parts) else part)]


def size_of(part: Part) -> int:
    """Width of bottlenecks, or number of learned tokens; 0 for what has neither."""
    match part.parts[0] if isinstance(part, Parts) else part:
        case Houlsby(width=size) | Prompt(num_tokens=size) | DeepPrompt(num_tokens=size) | Prefix(num_tokens=size):
            return size
        case _:
            return 0


def _own(
    peft: PeftConfig,
    model: PreTrainedModel,
    foundation: Foundation,
    lora: Callable[[], Lora],
    blocks: Collection[int] | None = None,
) -> Part:
    match peft.module:
        case "bias":
            return find_bias(model, foundation, "peft.module")
        case "ia3":
            return find_ia3(model, blocks)
        case "houlsby":
            return find_houlsby(model, peft.adapter_width, peft.adapters == "both", blocks)
        case "prompt":
            return find_prompt(model, foundation, peft.num_tokens)
        case "prefix":
            return find_prefix(model, peft.num_tokens)
        case _:
            return lora()
