"""Models of every family for the task each is made for: three blocks of random weights, written to disk, and documents
for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tiny_models import _ALL, END, FAMILIES, VOCABULARY, write_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from fedpeat_ray import SimulationConfig
from fedpeat_ray.config import (
    DataConfig,
    EvaluationConfig,
    FleetConfig,
    FoundationConfig,
    HostsConfig,
    LocalConfig,
    LoraConfig,
    PartitionConfig,
    PeftConfig,
    WatchConfig,
)
from fedpeat_ray.data.hub import Document
from fedpeat_ray.data.images import Picture

CLASSES = ("boat", "cart", "sled")
RATE, STEPS = 0.01, 3
_BERT = {**FAMILIES["Roberta"], "is_decoder": False, "num_hidden_layers": 3, "hidden_size": 32}
_VIT = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 32, "num_hidden_layers": 3}
_VIT |= {"num_attention_heads": 2, "intermediate_size": 48}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 2, "decoder_start_token_id": 0}
_T5 |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": END, "dropout_rate": 0.0}

MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "gpt2": ("GPT2", AutoModelForCausalLM, FAMILIES["GPT2"] | {"n_layer": 3}),
    "llama": ("Llama", AutoModelForCausalLM, FAMILIES["Llama"] | {"num_hidden_layers": 3}),
    "bert": ("Bert", AutoModelForMaskedLM, _BERT),
    "roberta": ("Roberta", AutoModelForMaskedLM, _BERT),
    "t5": ("T5", AutoModelForSeq2SeqLM, _T5),
    "vit": ("ViT", AutoModelForImageClassification, _VIT),
}
"""By family: the configuration's class, what it is pre-trained as, and its settings."""

CASES = {
    "gpt2": ("gpt2", "language-modelling"),
    "llama": ("llama", "language-modelling"),
    "gpt2 classifier": ("gpt2", "classification"),
    "llama classifier": ("llama", "classification"),
    "bert": ("bert", "classification"),
    "roberta": ("roberta", "classification"),
    "roberta masked": ("roberta", "masked-language-modelling"),
    "t5": ("t5", "sequence-to-sequence"),
    "vit": ("vit", "images"),
}
"""A family and a task, by a name."""


def write_family_for_tasks(directory: Path, family: str, num_blocks: int = 3) -> Path:
    """A model of one of these families, with a tokenizer of bytes that has a mask."""
    name, kind, settings = MODELS[family]
    values = _ALL | settings if family != "vit" else settings
    values |= {key: num_blocks for key in ("n_layer", "num_hidden_layers", "num_layers") if key in values}
    config = getattr(transformers, f"{name}Config")(**values)
    write_model(directory, kind.from_config, config)
    if family in ("bert", "roberta"):
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(3)
        tokenizer.save_pretrained(directory)
    return directory


def documents(config: DataConfig) -> list[Document]:
    """Texts of three classes, each with words of its own, and of different lengths."""
    rng = np.random.default_rng(0)
    words = {"boat": "sail mast tide", "cart": "wheel axle horse", "sled": "snow rope hill"}
    found = []
    for i in range(90):
        label = CLASSES[i % 3]
        text = " ".join(rng.choice(words[label].split(), int(rng.integers(2, 9))))
        found.append(Document(f"{text} {i}", f"source {i % 4}", label))
    return found


def public_documents(config: DataConfig) -> list[Document]:
    """Texts of a server: of no class."""
    rng = np.random.default_rng(1)
    return [Document(f"{' '.join(rng.choice(['mill', 'well', 'gate'], 7))} {i}", "server") for i in range(60)]


def pictures(config: DataConfig, seed: int = 0) -> list[Picture]:
    """Images of three classes, which differ in where they are bright."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(90):
        pixels = rng.integers(0, 90, (8, 8))
        pixels[:, 3 * (i % 3) : 3 * (i % 3) + 2] += 140
        found.append(Picture(pixels.astype(np.uint8), CLASSES[i % 3], f"source {i % 4}", str(i)))
    return found


def public_pictures(config: DataConfig) -> list[Picture]:
    """Images of a server, of no class; the first of them is a device's, too."""
    mine, *others = pictures(config, seed=1)
    return [pictures(config)[0], mine._replace(label=""), *others]


def data_for(task: str) -> str:
    """data.name of a task's documents."""
    return f"{__file__}:{'pictures' if task == 'images' else 'documents'}"


def public_data_for(task: str) -> str:
    """data.public_name for a task."""
    return f"{__file__}:public_{'pictures' if task == 'images' else 'documents'}"


def tiny_task(families: Mapping[str, Path], case: str, dtype: str = "float64", **changes: Any) -> SimulationConfig:
    """A round of four of eight devices, with a few texts, or images, of three classes each."""
    family, task = CASES[case]
    settings = SimulationConfig(
        task=task,
        algorithm="fed-peft",
        rounds=1,
        cohort_size=4,
        client_batch_size=3,
        lora=LoraConfig(rank=2, alpha=3.0),
        peft=PeftConfig(num_tokens=3, adapter_width=4),
        local=LocalConfig(sequence_length=20, max_steps=STEPS, batch_size=4, learning_rate=RATE, weight_decay=0.1),
        foundation=FoundationConfig(str(families[family]), dtype=dtype),  # type: ignore[arg-type]  # one of its names
        data=DataConfig(data_for(task), partition=PartitionConfig(documents_per_device=7)),
        fleet=FleetConfig(num_devices=8),
        evaluation=EvaluationConfig(num_sequences=9, sequence_length=20, centralised=False),
        hosts=HostsConfig(backend="serial"),
        watch=WatchConfig(tensorboard=False),
    )
    return dataclasses.replace(settings, **changes)
