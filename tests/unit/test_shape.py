"""What a training step holds, read off a step without data: of models that are never loaded, and of odd families."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sweeps import sweep
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, BloomConfig, GPT2Config, LlamaConfig, MixtralConfig, T5Config

from fedpeat_ray.fleet.memory import POWERS, ModelShape, Trainable, training_memory
from fedpeat_ray.models.architecture import TARGET_LENGTH
from fedpeat_ray.models.foundation import empty
from fedpeat_ray.trainable import shape as shapes
from fedpeat_ray.trainable.shape import model_shape

LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
DETERMINISTIC: Any = torch.utils.deterministic
TINY: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 101}


def shape_of(config, weight_bytes: int = 4) -> ModelShape:
    return model_shape(empty(config.to_json_string()), weight_bytes)


def memory(shape: ModelShape, **settings) -> int:
    sizes: dict[str, Any] = {"batch_size": 2, "sequence_length": 16, "trainable": "lora", "lora_rank": 4}
    return int(training_memory(shape, **(sizes | settings)).peak_bytes)


def test_a_model_of_70_billion_weights_is_never_in_memory():
    shape = shape_of(LLAMA_70B, 2)
    assert round(shape.num_parameters / 1e9, 1) == 70.6
    blocks = {"num_blocks": 24, "adapter_blocks": (2, 2)}
    assert 2 * 70.6e9 < memory(shape) < 2 * 70.6e9 + 12e9
    assert 0.3 < memory(shape, **blocks) / memory(shape) < 0.33


class HowEmptied(TorchFunctionMode):
    """Remembers whether PyTorch wrote to tensors that were asked for empty."""

    def __init__(self) -> None:
        self.filled: list[bool] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.empty:
            self.filled.append(DETERMINISTIC.fill_uninitialized_memory)
        return func(*args, **(kwargs or {}))


def test_nor_where_deterministic_algorithms_are_asked_for(monkeypatch):
    """As they are by RLlib; then PyTorch writes to every tensor, and 70 billion weights have been in memory."""
    monkeypatch.setattr(DETERMINISTIC, "fill_uninitialized_memory", True)
    with HowEmptied() as how:
        empty(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=101, n_positions=64).to_json_string())
    assert how.filled and not any(how.filled)
    assert DETERMINISTIC.fill_uninitialized_memory


def test_a_token_meets_some_of_the_experts():
    few, all_of_them = (
        shape_of(MixtralConfig(**TINY, intermediate_size=64, num_local_experts=8, num_experts_per_tok=n))
        for n in (2, 8)
    )
    expert = 3 * 32 * 64
    assert few.block_parameters == all_of_them.block_parameters == all_of_them.used_parameters
    assert few.used_parameters == few.block_parameters - 6 * expert
    assert memory(few) < memory(all_of_them)


def test_the_kernels_that_the_simulation_runs_on_do_not_count():
    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=101, n_positions=64)
    model = empty(config.to_json_string())
    model.config._attn_implementation = "eager"
    eager = model_shape(model, 4)
    model.config._attn_implementation = "sdpa"
    assert eager == model_shape(model, 4)


def test_length_counts_squared_only_where_scores_are_kept():
    """Gemma 2 caps the scores of attention, for which no fused kernel is there."""
    pairs = POWERS.index((1, 2, 0))
    gemma = AutoConfig.for_model("gemma2", **TINY, intermediate_size=64, num_key_value_heads=2, head_dim=16)
    llama = LlamaConfig(**TINY, intermediate_size=64, num_key_value_heads=2)
    assert shape_of(gemma).steps["lora"].trained.kept[pairs] >= 4 * 4 * 2
    assert shape_of(llama).steps["lora"].trained.kept[pairs] == 0


IMAGES = AutoConfig.for_model(
    "vit",
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=32,
    patch_size=8,
    num_labels=5,
    architectures=["ViTForImageClassification"],
)


def test_images_have_the_tokens_that_their_size_says():
    shape, (block, tokens) = shape_of(IMAGES), (4 * 32 * 32 + 2 * 32 * 48, 17)
    assert shape.used_parameters == shape.block_parameters == block + (4 + 1 + 2) * 32 + 48 + 2 * 32
    assert (shape.head_parameters, shape.output_products, shape.task_head_parameters) == (0, 5 * 32, 5 * 33)
    assert (shape.input_products, shape.attention_width) == (16 * 32 * 3 * 8 * 8, 32)
    memories = [memory(shape, sequence_length=length) for length in (tokens, 1000)]
    assert memories[0] == memories[1]  # nothing grows with length
    prompts = [
        memory(shape, sequence_length=tokens, trainable="prompt", part_size=n, trained_elements=96 * n + 165)
        for n in (1, 20)
    ]
    assert prompts[0] < prompts[1]


def test_a_head_alone_needs_neither_activations_nor_gradients_of_blocks():
    shape = shape_of(IMAGES)
    head, lora = (
        training_memory(shape, batch_size=2, sequence_length=17, trainable=kind, lora_rank=4)
        for kind in ("head", "lora")
    )
    assert (head.activations_bytes, head.adapter_bytes, head.gradients_bytes) == (0, 0, 4 * 5 * 33)
    assert lora.gradients_bytes == lora.adapter_bytes + 4 * 5 * 33
    assert head.peak_bytes < lora.peak_bytes


def test_a_decoder_counts_as_what_is_behind_the_blocks():
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "vocab_size": 101}
    kind = "T5ForConditionalGeneration"
    shape = shape_of(T5Config(**sizes, num_layers=3, num_decoder_layers=5, architectures=[kind]))
    assert (shape.num_blocks, shape.lora_features) == (3, 4 * 64 + 2 * 80)
    assert shape.decoder_features == 5 * (8 * 64 + 2 * 80)
    assert shape.head_parameters == 5 * (2 * 32 * 32 + 2 * TARGET_LENGTH * 32)  # keys and values, and attention to them


def test_what_was_asked_before_makes_no_difference():
    config = LlamaConfig(**TINY, intermediate_size=64)
    before = shape_of(config).steps["lora"]
    shapes._step.cache_clear()
    shape_of(config).steps["blocks"]
    assert shape_of(config).steps["lora"] == before


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neox", "falcon", "qwen2_moe", "olmo2"])
def test_other_families_are_run_too(model_type, monkeypatch):
    monkeypatch.setattr(shapes, "_llama_like", lambda *_: SimpleNamespace(to_json_string=lambda: "none"))
    shape = shape_of(AutoConfig.for_model(model_type, **TINY))
    assert memory(shape) > 4 * shape.num_parameters


@pytest.mark.parametrize("failing", sweep(["all", "lora"], quick=["lora"]))
def test_a_step_that_cannot_be_run_counts_as_that_of_a_llama(monkeypatch, failing):
    note_step = shapes._note_step

    def refuses(config_json: str, weight_bytes: int, trainable: Trainable, **kwargs):
        if "bloom" in config_json and trainable == failing:
            raise RuntimeError("needs data")
        return note_step(config_json, weight_bytes, trainable, **kwargs)

    shapes._step.cache_clear()
    monkeypatch.setattr(shapes, "_note_step", refuses)
    shape = shape_of(BloomConfig(**TINY))
    biased: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
    llama = shape_of(LlamaConfig(**TINY, intermediate_size=128, tie_word_embeddings=True, **biased))
    assert [kind for kind in shape.steps if shape.steps[kind] == llama.steps[kind]] == [failing]
    monkeypatch.setattr(shapes, "TESTED_FAMILIES", ("bloom",))
    with pytest.raises(RuntimeError, match="needs data"):
        print(shape_of(BloomConfig(**TINY)).steps["lora"])
    shapes._step.cache_clear()


def test_nothing_is_drawn():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    shapes._step.cache_clear()
    print(shape_of(LlamaConfig(**TINY, intermediate_size=64)).steps["lora"])
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("powers", [(1, 1, 0), (1, 2, 0), (0, 0, 1), (1, 1, 1), (0, 0, 0)])
def test_sizes_are_told_by_the_primes_that_divide_them(powers):
    primes = (29, 31, 37)
    terms = shapes._Trace(primes, []).terms(12 * math.prod(p**power for p, power in zip(primes, powers, strict=True)))
    assert terms[POWERS.index(powers)] == terms.sum() == 12
