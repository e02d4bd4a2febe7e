"""Models from directories: the same numbers as transformers', shared between processes without harm."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, ViTConfig, ViTModel

from fedpeat_ray.config import DataConfig
from fedpeat_ray.data.corpus import load_corpus
from fedpeat_ray.errors import ConfigError, ModelError
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.foundation import Foundation, load, load_backbone, load_tokenizer, prepare, weights_layout
from fedpeat_ray.trainable.shape import model_shape

TOKENS = torch.arange(60).view(3, 20)


def copy_of(directory: Path, to: Path, *without: str) -> Path:
    return Path(shutil.copytree(directory, to / "copy", ignore=shutil.ignore_patterns(*without)))


def plain(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """As transformers loads it, with the attention that is taken here."""
    kind = {} if torch.cuda.is_available() else {"attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **kind).eval()


def assert_same_function(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """The weights as they are, calculated with in float64: in float32 the machine has a say in what is summed how.

    LLaMA's norms and softmax stay in float32: sums in another order can tip such a rounding, 2**-24 of a number
    near 1, and what follows in two blocks makes of it no more than 2**4 times.
    """
    logits, expected = (model.double()(input_ids=TOKENS).logits for model in (ours, theirs))
    torch.testing.assert_close(logits, expected, rtol=0, atol=2**-20)


@pytest.fixture
def foundation(model_dir) -> Foundation:
    return prepare(str(model_dir), "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_are_those_of_transformers(model_dir, dtype):
    ours = load_backbone(prepare(str(model_dir), dtype))
    theirs = plain(model_dir, getattr(torch, dtype))
    assert ours.exact is ours.training and type(ours.exact) is type(theirs)
    assert theirs(input_ids=TOKENS).logits.dtype == ours.exact(input_ids=TOKENS).logits.dtype == getattr(torch, dtype)
    assert_same_function(ours.exact, theirs)


def test_in_bfloat16_only_the_training_copy_is_rounded_and_only_its_weights(model_dir):
    ours = load_backbone(prepare(str(model_dir), "bfloat16"))
    assert {p.dtype for p in ours.exact.parameters()} == {torch.float32}
    assert {p.dtype for p in ours.training.parameters()} == {torch.bfloat16}
    assert_same_function(ours.exact, plain(model_dir, torch.float32))
    rounded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, attn_implementation="eager").eval()
    buffers = dict(ours.training.named_buffers())
    for name, buffer in rounded.named_buffers():  # such as rotary frequencies, which bfloat16 would put out of step
        assert buffers[name].dtype == buffer.dtype and buffers[name].equal(buffer), name
    for name, weight in rounded.named_parameters():
        assert ours.training.get_parameter(name).equal(weight), name


def test_models_are_frozen_ready_to_evaluate_and_keep_no_cache(foundation):
    model = load(foundation)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.config.use_cache is False


def test_tied_weights_are_stored_once_and_tied_again(gpt2_dir, llama_dir):
    for directory, tied in ((gpt2_dir, True), (llama_dir, False)):
        model = load(prepare(str(directory), "float32"))
        head, words = model.get_output_embeddings(), model.get_input_embeddings()
        assert (head.weight is words.weight) == tied  # type: ignore[union-attr]
        names = weights_layout(model).names
        assert ("lm_head.weight" in names) != tied
        assert weights_layout(model).num_elements == sum(p.numel() for p in model.parameters())


def test_a_write_to_one_load_is_seen_by_no_other_and_not_by_the_file(foundation):
    before = foundation.weights.read_bytes()
    one, other = load(foundation), load(foundation)
    name = next(name for name, _ in one.named_parameters())
    kept = other.get_parameter(name).clone()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.fill_(7.0)
    assert other.get_parameter(name).equal(kept)
    assert load(foundation).get_parameter(name).equal(kept)
    assert foundation.weights.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_weights_are_mapped_not_read(foundation):
    model = load(foundation)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if foundation.weights.name in line]
    assert mapped and all(" r" in line and line.split()[1].endswith("p") for line in mapped), "private"
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
    for parameter in model.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in spans)


def test_the_weights_are_written_once_and_again_when_the_model_changes(model_dir, tmp_path):
    directory, cache = copy_of(model_dir, tmp_path), tmp_path / "cache"
    one = prepare(str(directory), "float32", cache)
    stamp = one.weights.stat().st_mtime_ns
    assert prepare(str(directory), "float32", cache) == one
    assert prepare(str(directory), "bfloat16", cache).weights == one.weights, "the exact weights are the same"
    assert one.weights.stat().st_mtime_ns == stamp
    assert prepare(str(directory), "float64", cache).weights != one.weights
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(directory)
    changed = prepare(str(directory), "float32", cache)
    assert changed.weights != one.weights and changed.digest != one.digest
    assert len(list(cache.glob("*.safetensors"))) == 3


def test_a_sharded_model_is_read_whole(model_dir, foundation, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert prepare(str(tmp_path), "float32").digest == foundation.digest


@pytest.mark.parametrize("name", ["no-such-model", "no/such/model", "pydoc-large", "/no/such/directory"])
def test_a_name_that_nobody_knows_is_refused_with_those_that_are_there(name):
    with pytest.raises(ConfigError) as caught:
        prepare(name, "float32")
    assert str(caught.value).startswith(
        f"foundation.name = {name!r} is not allowed: pydoc-base, pydoc-small, pydoc-roberta, glyph-vit, a local"
    )


def test_a_directory_that_is_no_model_is_refused(gpt2_dir, tmp_path):
    with pytest.raises(ConfigError, match="a directory with config.json"):
        prepare(str(tmp_path), "float32")
    directory = copy_of(gpt2_dir, tmp_path, "*.safetensors")
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds no safetensors file"):
        prepare(str(directory), "float32")


def test_a_model_of_pictures_and_one_of_an_unknown_kind_are_refused(tmp_path):
    small = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=8,
        patch_size=8,
        pooler_output_size=8,
    )
    ViTModel(small).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for model_type in ("vit", "of-tomorrow"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": model_type}))
        with pytest.raises(
            ModelError, match="foundation.name = .*(is no causal language model|knows no models of type 'of-tomorrow')"
        ) as caught:
            prepare(str(tmp_path), "float32")
        assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused(gpt2_dir, tmp_path):
    directory = copy_of(gpt2_dir, tmp_path)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="foundation.name"):
        prepare(str(directory), "float32")


def test_the_tokenizer_reads_every_byte(model_dir):
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.is_fast and tokenizer.eos_token_id == 256
    ids = tokenizer("Käse, 2 €\n", add_special_tokens=False)["input_ids"]
    assert len(ids) == len("Käse, 2 €\n".encode()) and tokenizer.decode(ids) == "Käse, 2 €\n"


def test_a_directory_without_a_tokenizer_is_refused(model_dir, tmp_path):
    directory = copy_of(model_dir, tmp_path, "tokenizer*")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(directory)


def test_a_tokenizer_without_an_end_of_text_is_refused(gpt2_dir, tmp_path):
    directory = copy_of(gpt2_dir, tmp_path)
    tokenizer = load_tokenizer(directory)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    with pytest.raises(ModelError, match="has no end-of-text token"):
        load_tokenizer(directory)


def test_a_slow_tokenizer_is_refused(gpt2_dir, text_dir, monkeypatch):
    tokenizer = load_tokenizer(gpt2_dir)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ModelError, match="must be a fast one"):
        load_corpus(DataConfig(str(text_dir)), tokenizer)


def test_the_shape_of_a_model_is_what_it_is(gpt2_dir, llama_dir):
    gpt2, llama = (load(prepare(str(directory), "float32")) for directory in (gpt2_dir, llama_dir))
    one, two = model_shape(gpt2, 4), model_shape(llama, 2)
    matrices, wide = 12 * 32 * 32, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert (one.num_blocks, one.block_parameters, one.block_biases) == (2, matrices + 13 * 32, 11 * 32)
    assert (two.num_blocks, two.block_parameters, two.block_biases) == (2, wide + 2 * 32, 0)
    assert (one.lora_features, one.largest_matrix) == (32 * (4 + 2 + 5 + 5), 32 * 128)
    assert (two.lora_features, two.largest_matrix) == (2 * 64 + 2 * 48 + 3 * 80, 32 * 48)
    assert one.used_parameters == one.block_parameters and two.used_parameters == two.block_parameters
    assert one.head_parameters == two.head_parameters == 257 * 32
    assert one.attention_width == two.attention_width == 32
    parts = {"ia3", "houlsby", "prompt", "prefix"}
    assert set(one.steps) == {"all", "lora", "bias", "blocks"} | parts
    assert set(two.steps) == {"all", "lora", "blocks"} | parts
    assert foundations.max_positions(gpt2) == foundations.max_positions(llama) == 64
    assert one.num_parameters == sum(p.numel() for p in gpt2.parameters()) and two.weight_bytes == 2


def test_weights_are_saved_without_a_word_of_other_libraries(gpt2_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    foundation = prepare(str(gpt2_dir), "float32")
    layout = weights_layout(load(foundation))
    capfd.readouterr()
    foundations.save_weights(tmp_path, foundation, layout, torch.zeros(layout.num_elements))
    assert "accelerator" not in "".join(capfd.readouterr())
    assert os.environ["DS_ACCELERATOR"] == ("cuda" if torch.cuda.is_available() else "cpu")
