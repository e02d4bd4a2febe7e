"""Which class of transformers a model is: what it is pre-trained as, and what a task puts on top of it.

Both are part of the configuration (`architectures`, `id2label`), so whoever has that can build the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from fedpeat_ray.errors import ModelError

_LIKE = {"AutoModelForCausalLM": "causal language model", "AutoModelForSeq2SeqLM": "encoder with a decoder"}


@dataclass(frozen=True)
class Head:
    """What a task asks of a model."""

    auto: str = "AutoModelForCausalLM"
    """The class of transformers that finds the model's own for the task."""
    labels: tuple[str, ...] = ()
    """Classes to tell apart: the model has an output for each, which is new where it was pre-trained for others."""


CAUSAL = Head()
"""What a language model is."""

TARGET_LENGTH = 16
"""Most tokens that an encoder with a decoder is to write; what is longer is cut off."""


def with_head(config_json: str, head: Head, end_token: int | None = None) -> str:
    """The configuration of the model for a task; unchanged if it is that already.

    `end_token` pads sequences of a model that has no padding. Raises ModelError for a family that is not made for it.
    """
    values = json.loads(config_json)
    changes: dict[str, Any] = {"architectures": [class_for(configuration(config_json), head).__name__]}
    if head.labels:
        changes["id2label"] = {str(i): label for i, label in enumerate(head.labels)}
        changes["label2id"] = {label: i for i, label in enumerate(head.labels)}
        changes["problem_type"] = "single_label_classification"
        if values.get("pad_token_id") is None and end_token is not None:
            changes["pad_token_id"] = end_token
    return config_json if changes.items() <= values.items() else json.dumps(values | changes)


def class_for(config: PretrainedConfig, head: Head) -> type[PreTrainedModel]:
    """The class that a task needs of a family. Raises ModelError if there is none."""
    auto = getattr(transformers, head.auto)
    try:
        found = auto._model_mapping[type(config)]
    except KeyError:
        kind = _LIKE.get(head.auto, f"model that transformers has an {head.auto} of")
        raise ModelError(f"a model of type {config.model_type!r} is no {kind}") from None
    return found[0] if isinstance(found, tuple) else found


def configuration(config_json: str) -> PretrainedConfig:
    """The configuration that config.json holds. Raises ModelError for a type that transformers does not know."""
    values = json.loads(config_json, object_hook=_float_of)
    kind = values.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **values)
    except (ValueError, KeyError) as error:
        raise ModelError(f"transformers {transformers.__version__} knows no models of type {kind!r}") from error


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a configuration names; a causal language model if it names none, or one without outputs."""
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        has_outputs = "For" in name or name.endswith("LMHeadModel")
        if has_outputs and isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return kind
    return class_for(config, CAUSAL)


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Whether it is to be a language model that reads from left to right."""
    return type(model).__name__ in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether it is to tell texts, or images, apart: what it has on top is new, and trained."""
    classes = (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    )
    names = [name for mapping in classes for found in mapping.values() for name in _names(found)]
    return type(model).__name__ in names


def reads_left_to_right(config: PretrainedConfig) -> bool:
    """Whether tokens of such a model see those before them only, whatever is on top of it."""
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config.model_type not in masked


def _names(found: str | tuple[str, ...]) -> tuple[str, ...]:
    return (found,) if isinstance(found, str) else found


def _float_of(value: dict) -> Any:
    """How transformers writes infinity, which JSON has no word for: {"__float__": "Infinity"}."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
