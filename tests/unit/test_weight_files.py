"""Weight files written tensor by tensor: the bytes of safetensors' own, and their size without any data."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedpeat_ray.errors import ModelError
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models import weight_files
from fedpeat_ray.models.foundation import prepare

DTYPES = [torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16]
DTYPES += [torch.int16, torch.int8, torch.uint8, torch.bool]


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    values = torch.arange(2.0 * max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()]
    return (values - 3).view(shape).to(dtype)


def shapes_of(tensors: dict[str, Tensor]) -> weight_files.Shapes:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def assert_same_file(tensors: dict[str, Tensor], directory: Path) -> None:
    save_file(tensors, directory / "theirs")
    asked = []
    weight_files.write(directory / "ours", shapes_of(tensors), lambda name: asked.append(name) or tensors[name])
    assert (directory / "ours").read_bytes() == (directory / "theirs").read_bytes()
    assert weight_files.num_bytes(shapes_of(tensors)) == (directory / "theirs").stat().st_size
    assert asked == weight_files.order(shapes_of(tensors)) and sorted(asked) == sorted(tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_are_those_of_safetensors(dtype, tmp_path):
    assert_same_file({"b": some(dtype, 3, 5), "a": some(dtype, 7), "c.weight": some(dtype, 2, 1, 4)}, tmp_path)


def test_tensors_of_mixed_types_in_any_order_with_any_name_and_shape(tmp_path):
    names = ["w.10", "w.9", "W", 'quo"te', "tab\t", "back\\slash", "Übung", "日", "😀", ""]
    rng = random.Random(0)
    for _ in range(20):
        tensors = {}
        for name in rng.sample(names, rng.randint(0, len(names))):
            shape = rng.choices([0, 1, 2, 3], k=rng.randint(0, 3))
            tensors[name] = some(rng.choice(DTYPES), *shape)
        assert_same_file(tensors, tmp_path)


def test_tensors_that_do_not_lie_in_order_in_memory_are_written_in_order(tmp_path):
    tensors = {"t": some(torch.float32, 4, 6).T, "s": some(torch.bfloat16, 6, 4)[::2]}
    weight_files.write(tmp_path / "ours", shapes_of(tensors), tensors.__getitem__)
    loaded = load_file(tmp_path / "ours")
    assert all(loaded[name].equal(tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("other", [some(torch.float32, 3, 2), some(torch.float64, 2, 3)], ids=["shape", "type"])
def test_a_tensor_that_is_not_what_was_announced_is_refused(other, tmp_path):
    with pytest.raises(ValueError, match="^w is .*, not "):
        weight_files.write(tmp_path / "ours", {"w": (torch.float32, (2, 3))}, lambda name: other)


def test_one_tensor_is_read(tmp_path):
    tensors = {"a": some(torch.bfloat16, 3), "b": some(torch.float32, 2, 2)}
    save_file(tensors, tmp_path / "file")
    for name, tensor in tensors.items():
        read = weight_files.read(tmp_path / "file", name)
        assert read.dtype == tensor.dtype and read.equal(tensor)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def source(request, model_dir, tmp_path) -> Path:
    """A model in several files, of this type."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=request.param)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_model_is_converted_tensor_by_tensor_to_the_bytes_of_a_whole_one(source, dtype, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(foundations, "_started", None)
        streamed = prepare(str(source), dtype, tmp_path / "streamed")
    monkeypatch.setattr(foundations, "_files_of_tensors", lambda config_json, source: None)
    whole = prepare(str(source), dtype, tmp_path / "whole")
    assert streamed.weights.read_bytes() == whole.weights.read_bytes()
    assert streamed.digest == whole.digest and streamed.weights.name == whole.weights.name


@pytest.mark.parametrize("change", ["other name", "one more", "one missing", "twice", "integers"])
def test_files_that_are_not_just_the_model_are_left_to_transformers(change, gpt2_dir, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text((gpt2_dir / "config.json").read_text())
    state = load_file(gpt2_dir / "model.safetensors")
    if change == "other name":  # as in the oldest files of GPT-2
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    elif change == "one more":
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    elif change == "one missing":
        del state["transformer.h.1.mlp.c_fc.bias"]
    elif change == "integers":
        state["transformer.ln_f.bias"] = state["transformer.ln_f.bias"].to(torch.int32)
    else:
        save_file({"transformer.ln_f.bias": state["transformer.ln_f.bias"]}, tmp_path / "more.safetensors")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    asked = []
    whole = foundations._started
    monkeypatch.setattr(foundations, "_started", lambda *arguments: asked.append(1) or whole(*arguments))
    if change == "one missing":
        with pytest.raises(ModelError, match=r"has no weights for transformer.h.1.mlp.c_fc.bias"):
            prepare(str(tmp_path), "float32", tmp_path / "cache")
        return
    prepared = prepare(str(tmp_path), "float32", tmp_path / "cache")
    assert asked
    if change in ("other name", "one more", "twice"):
        assert prepared.digest == prepare(str(gpt2_dir), "float32", tmp_path / "cache").digest
