"""What tests share: tiny models and a page of text, written to disk, and caches of their own."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the libraries are imported

from tiny_models import END, VOCABULARY, write_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session", autouse=True)
def _caches_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that an earlier session cached is read, and nothing is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2: Conv1D layers with biases, learned positions, a tied head, dropout in its configuration."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=END, eos_token_id=END
    )
    return write_model(tmp_path_factory.mktemp("gpt2"), GPT2LMHeadModel, config)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA: linear layers without biases, grouped queries, rotary positions, a head of its own."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=END,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    return write_model(tmp_path_factory.mktemp("llama"), LlamaForCausalLM, config)


@pytest.fixture(params=["gpt2", "llama"])
def model_dir(request: pytest.FixtureRequest) -> Path:
    """Each of the two."""
    return request.getfixturevalue(f"{request.param}_dir")


@pytest.fixture(scope="session")
def deep_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven blocks: one at each end to tune, and five between to leave out."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=7, n_head=2, bos_token_id=END, eos_token_id=END
    )
    return write_model(tmp_path_factory.mktemp("deep_gpt2"), GPT2LMHeadModel, config)


@pytest.fixture(scope="session")
def deep_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of LLaMA, its head tied."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=END,
        eos_token_id=END,
        tie_word_embeddings=True,
    )
    return write_model(tmp_path_factory.mktemp("deep_llama"), LlamaForCausalLM, config)


@pytest.fixture(params=["gpt2", "llama"])
def deep_dir(request: pytest.FixtureRequest) -> Path:
    """Each of these two."""
    return request.getfixturevalue(f"deep_{request.param}_dir")


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of JSON lines, 20 short documents each, every file with words of its own; `public_dir` is beside."""
    directory = tmp_path_factory.mktemp("texts")
    _write_text(
        directory / "private",
        harbour="ship rope tide anchor gull mast sail wind",
        kitchen="pan salt bread oven knife butter onion broth",
        workshop="saw plane nail bench glue clamp chisel oak",
    )
    _write_text(
        directory / "public",
        garden="seed soil rake leaf hedge spade rain moss",
        library="page shelf ink index spine map atlas folio",
        station="rail clock bell track signal porter ticket engine",
    )
    return directory / "private"


@pytest.fixture(scope="session")
def public_dir(text_dir: Path) -> Path:
    """The same for a server: other words."""
    return text_dir.with_name("public")


def _write_text(directory: Path, **vocabularies: str) -> None:
    directory.mkdir()
    rng = random.Random(0)
    for source, words in vocabularies.items():
        texts = [f"{source} {i}: " + " ".join(rng.choices(words.split(), k=rng.randint(4, 16))) for i in range(20)]
        (directory / f"{source}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
