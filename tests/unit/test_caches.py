"""What is cached is found again only by all that it depends on, and only if it still is what was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from whole_runs import assert_same_bits, changed, summary
from whole_runs import tiny as tiny_config

from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.config import EmulatorConfig, LoraConfig
from fedpeat_ray.emulators import workshop as making
from fedpeat_ray.emulators.ladder import build_ladder
from fedpeat_ray.emulators.workshop import Workshop
from fedpeat_ray.errors import RunDirError
from fedpeat_ray.files import file_sha256, kept_sha256, user_cache_dir, written_with_hash
from fedpeat_ray.models import arithmetic
from fedpeat_ray.models.arithmetic import arithmetic_key
from fedpeat_ray.models.foundation import load, prepare
from fedpeat_ray.runtime.run_log import read_config
from fedpeat_ray.trainable.lora import find_lora
from fedpeat_ray.training.adapters import StackedAdapter
from fedpeat_ray.training.map_clients import Call, MapClients

DISTILLED = {"weights": "elastic", "first": 1, "last": 1, "shares": (0.6,)}


@pytest.fixture
def tiny(deep_gpt2_dir, text_dir, monkeypatch, tmp_path) -> SimulationConfig:
    """FedPEAT with distilled emulators, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = tiny_config(deep_gpt2_dir, text_dir, algorithm="fed-peat", rounds=1, emulator=DISTILLED)
    distil = {"steps": 2, "batch_size": 2, "sequence_length": 16}
    return SimulationConfig.from_dict(
        config.to_dict() | {"emulator": config.to_dict()["emulator"] | {"distil": distil}}
    )


@pytest.fixture
def distillations(monkeypatch) -> list[int]:
    """One entry for each time that something is distilled."""
    calls, whole = [], making.distil
    monkeypatch.setattr(making, "distil", lambda *args: calls.append(1) or whole(*args))
    return calls


def with_values(directory: Path, to: Path, **values: object) -> Path:
    """A copy of a model with other values in its configuration."""
    shutil.copytree(directory, to)
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return to


def damage(path: Path) -> None:
    """Change one byte at the end: the file is as long as before, and can be read."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))


def test_a_cached_file_is_kept_only_as_it_was_written(tmp_path):
    path = tmp_path / "deep" / "file"
    assert kept_sha256(path) is None
    with written_with_hash(path) as part:
        part.write_bytes(b"content")
    assert kept_sha256(path) == file_sha256(path)
    damage(path)
    assert kept_sha256(path) is None
    with pytest.raises(RuntimeError), written_with_hash(path):
        raise RuntimeError
    path.unlink()
    assert kept_sha256(path) is None


def test_models_that_differ_in_their_configuration_alone_have_different_digests(gpt2_dir, tmp_path):
    one = prepare(str(gpt2_dir), "float32")
    other = prepare(str(with_values(gpt2_dir, tmp_path / "heads", n_head=4)), "float32")
    saved_elsewhere = {"transformers_version": "5.0.0", "_name_or_path": "somewhere"}
    same = prepare(str(with_values(gpt2_dir, tmp_path / "same", **saved_elsewhere)), "float32")
    assert file_sha256(one.weights) == file_sha256(other.weights)
    assert one.digest != other.digest and one.digest == same.digest


def test_damaged_weights_in_the_cache_are_written_again(gpt2_dir, tmp_path):
    one = prepare(str(gpt2_dir), "float32", tmp_path)
    before = one.weights.read_bytes()
    damage(one.weights)
    assert prepare(str(gpt2_dir), "float32", tmp_path) == one
    assert one.weights.read_bytes() == before


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (torch, "__version__", "9.9"),
        (transformers, "__version__", "9.9"),
        (arithmetic, "CACHE_VERSION", 0),
        (torch, "get_num_threads", lambda: 99),
        (torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER"),
    ],
)
def test_the_key_of_results_tells_apart_what_their_last_bits_depend_on(module, name, value, monkeypatch):
    key = arithmetic_key()
    assert arithmetic_key() == key == json.loads(json.dumps(key))
    monkeypatch.setattr(module, name, value)
    assert arithmetic_key() != key


def test_emulators_of_another_instruction_set_or_model_are_not_used(run, tiny, distillations, monkeypatch, tmp_path):
    run("one")
    run("again")
    assert len(distillations) == 1
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    run("elsewhere")
    assert len(distillations) == 2
    heads = with_values(Path(tiny.foundation.name), tmp_path / "four heads", n_head=4)
    run("heads", foundation={"name": str(heads)})
    assert len(distillations) == 3


@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_run_directory_has_the_hash_of_each_emulator_and_a_damaged_one_is_made_again(
    run, tiny, distillations, eight_bit
):
    emulator = DISTILLED | {"eight_bit": eight_bit}
    one = run("one", emulator=emulator)
    level, foundation = read_config(one)["resolved"]["levels"]
    path = user_cache_dir() / level["weights"]
    assert level["weights_sha256"] == file_sha256(path) and foundation["weights_sha256"] is None
    damage(path)
    assert_same_bits(one, run("again", emulator=emulator))
    assert file_sha256(path) == level["weights_sha256"]
    assert len(distillations) == (1 if eight_bit else 2)


def test_a_run_is_resumed_with_the_emulators_it_had_or_not_at_all(run, tiny):
    directory = run()
    path = directory / "config.json"
    config = json.loads(path.read_text())
    level = config["resolved"]["levels"][0]
    level["weights_sha256"], now = "0" * 64, level["weights_sha256"]
    path.write_text(json.dumps(config))
    with pytest.raises(
        RunDirError, match=f"weights_sha256 of level 1 was 0{{12}}… when the run began, now it is {now[:12]}"
    ):
        Simulation(changed(tiny, resume=directory, rounds=2)).run()
    level["weights_sha256"] = now
    config["resolved"]["foundation_sha256"] = "0" * 64
    path.write_text(json.dumps(config))
    with pytest.raises(RunDirError, match="foundation_sha256 was 0{12}…"):
        Simulation(changed(tiny, resume=directory, rounds=2)).run()


def test_the_central_reference_is_cached_by_configuration_too_and_a_damaged_one_is_made_again(run, tiny, tmp_path):
    changes = {"algorithm": "fed-peft", "evaluation": {"centralised": True}}
    one = summary(run("one", **changes))
    (path,) = user_cache_dir().glob("centralised-*.json")
    path.write_text('{"perplexity": 1.0}')
    assert summary(run("again", **changes)) == one
    heads = with_values(Path(tiny.foundation.name), tmp_path / "four heads", n_head=4)
    other = summary(run("heads", **changes, foundation={"name": str(heads)}))
    assert other["perplexity"]["centralised"] != one["perplexity"]["centralised"]


def test_shipped_emulators_are_found_whatever_the_machine(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    foundation, config = prepare("pydoc-base", "bfloat16"), EmulatorConfig()
    model = load(foundation)
    ladder = build_ladder(model, config)
    adapter = StackedAdapter(find_lora(model, LoraConfig()))
    workshop = Workshop(foundation, foundation.digest, config, adapter, None, True, Path())

    class Nobody(MapClients):
        def run(self, call: Call) -> Any:
            pytest.fail("nothing is to be made")

    furnished = workshop.furnish(ladder, Nobody(), lambda *_: pytest.fail("no step is to be made"))
    (path,) = furnished.files
    assert path.parent == foundation.config_dir / "emulators" and kept_sha256(path)
