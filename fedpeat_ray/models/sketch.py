"""Models of which there is the configuration alone: enough to know what they would cost, for a plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from fedpeat_ray.models import weight_files
from fedpeat_ray.models.architecture import CAUSAL, Head, with_head
from fedpeat_ray.models.foundation import EMBEDDED, Foundation, empty, model_digest, model_dir, tensors_of
from fedpeat_ray.models.traits import check_configuration

KNOWN: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
    },
    "tinyllama-1.1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama-7b": {"model_type": "llama", "max_position_embeddings": 2048},
    "llama-13b": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 2048,
    },
    "llama-2-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
}
"""Sizes of published models, where they differ from the defaults of their family in transformers."""


@dataclass(frozen=True)
class Sketch(Foundation):
    """A model without weights: no process can load it."""

    @cached_property
    def shapes(self) -> weight_files.Shapes:  # type: ignore[override]
        """What a file of its weights would have."""
        tensors = tensors_of(empty(self.config_json, self.exact_dtype))
        return {name: (self.exact_dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def sketched(name: str, training_dtype: str, field: str = "foundation.name", head: Head = CAUSAL) -> Sketch:
    """A model by one of the names in KNOWN, or by its config.json: embedded, in a directory, or on Hugging Face.

    Raises ConfigError, of the setting `field`, if there is none; ModelError for one that cannot be tuned here.
    """
    if name in KNOWN:
        values = dict(KNOWN[name])
        directory = model_dir(EMBEDDED[0])  # for a tokenizer
        text = AutoConfig.for_model(values.pop("model_type"), **values).to_json_string()
    else:
        directory = model_dir(name, field, weights=False)
        text = (directory / "config.json").read_text()
    text = with_head(text, head)
    check_configuration(empty(text))
    return Sketch(name, directory, text, Path(name), training_dtype, model_digest("none", text))
