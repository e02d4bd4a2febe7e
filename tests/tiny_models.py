"""Models of two blocks with random weights, written to disk: of many families, each with what sets it apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY, END = 257, 256  # every byte, and the end of a text

_ALL: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": END, "eos_token_id": END, "pad_token_id": None}
_LLAMA = _ALL | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_BERT = _ALL | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
_MAMBA_IN_FALCON = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {  # by the name of the class of the configuration
    "GPT2": _ALL | {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "Llama": _LLAMA,
    "Qwen3": _LLAMA | {"head_dim": 8},
    "Phi3": _LLAMA | {"pad_token_id": 0},
    "Gemma2": _LLAMA | {"pad_token_id": 0, "head_dim": 8, "sliding_window": 16},
    "Cohere": _LLAMA | {"pad_token_id": 0},
    "FalconH1": _LLAMA | _MAMBA_IN_FALCON | {"lm_head_multiplier": 0.3},
    "Roberta": _BERT | {"is_decoder": True},
    "OPT": {name: value for name, value in _BERT.items() if name not in ("intermediate_size", "type_vocab_size")}
    | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": _ALL | {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "Mpt": _ALL | {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "Mixtral": _LLAMA | {"num_local_experts": 4},
    "Mamba": _ALL | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def write_family(directory: Path, family: str, **changes: Any) -> Path:
    """A model of one of the families, with some settings changed."""
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family] | changes)
    return write_model(directory, AutoModelForCausalLM.from_config, config)


def write_model(directory: Path, kind: Callable[..., PreTrainedModel], config: PretrainedConfig) -> Path:
    """Random weights of a size that makes every layer matter, biases and norms included, and a tokenizer of bytes."""
    rng = torch.Generator().manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.normal_(centre, 0.15, generator=rng)
    model.save_pretrained(directory)
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE({**alphabet, "<|endoftext|>": END}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(directory)
    return directory
