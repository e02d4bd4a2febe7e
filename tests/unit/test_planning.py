"""Plans: their figures are those of the run, and they need no weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import whole_runs

from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.__main__ import main
from fedpeat_ray.config import DataConfig, FoundationConfig, ProxyConfig
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.models.foundation import load, prepare
from fedpeat_ray.models.sketch import KNOWN, sketched
from fedpeat_ray.planning import SUMS, by_tier, plan

COSTS = ("virtual_s", "num_completed", "num_dropped", "num_skipped", "num_tokens", *SUMS, "server_memory_bytes")
EMULATORS = {"emulator": whole_runs.ENDS, "cohort_size": 4}


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "fed-peft"},
        {"algorithm": "fed-avg"},
        {"algorithm": "fed-peat", **EMULATORS},
        {
            "algorithm": "fed-peat",
            "emulator": dataclasses.replace(
                whole_runs.ENDS, realign_every=2, server_steps=1, eight_bit=False, weights="elastic"
            ),
            "control": {"kind": "greedy-by-time", "candidates": 12},
            "deadline_s": 500.0,
        },
        {"algorithm": "fed-pt", "proxy": {"steps": 2, "batch_size": 2, "sequence_length": 16}},
    ],
    ids=["fed-peft", "fed-avg", "fed-peat", "fed-peat with everything", "fed-pt"],
)
def test_what_a_plan_says_is_what_the_run_logs(
    settings: dict[str, Any], deep_gpt2_dir: Path, gpt2_dir: Path, text_dir: Path, public_dir: Path, tmp_path: Path
) -> None:
    if "proxy" in settings:
        settings = settings | {"proxy": ProxyConfig(small=str(gpt2_dir), **settings["proxy"])}
    config = whole_runs.tiny(deep_gpt2_dir, text_dir, **settings)
    planned = plan(config, calibrate=False)
    Simulation(dataclasses.replace(config, out=tmp_path / "run")).run()
    rounds, clients = (pd.read_parquet(tmp_path / "run" / name) for name in ("rounds", "clients"))
    for name in COSTS:
        assert [row[name] for row in planned["rounds"]] == rounds[name].to_list(), name
    assert planned["run"]["download_bytes"] == rounds["download_bytes"].sum()
    assert planned["tiers"] == by_tier({str(name): clients[name].to_numpy() for name in clients})
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]
    assert planned["fits"] == resolved["fits"]
    assert planned["model"]["payload_bytes"] == resolved["payload_bytes"]
    assert json.loads(json.dumps(planned)) == planned


def test_a_configuration_alone_is_enough(deep_gpt2_dir: Path, text_dir: Path, tmp_path: Path) -> None:
    shutil.copy(deep_gpt2_dir / "config.json", tmp_path)
    whole, alone = (
        plan(whole_runs.tiny(directory, text_dir, algorithm="fed-peat", **EMULATORS), calibrate=False)
        for directory in (deep_gpt2_dir, tmp_path)
    )
    assert alone["fits"] == whole["fits"]
    assert alone["model"] | {"name": ""} == whole["model"] | {"name": ""}
    with pytest.raises(ConfigError, match=r"foundation\.name = 'nothing'"):
        sketched("nothing", "float32")


def test_a_sketch_has_the_tensors_of_the_model(model_dir: Path) -> None:
    real, sketch = prepare(str(model_dir), "float32"), sketched(str(model_dir), "float32")
    assert dict(sketch.shapes) == dict(real.shapes)
    assert sum(np.prod(shape) for _, shape in sketch.shapes.values()) == sum(p.numel() for p in load(real).parameters())


@pytest.mark.parametrize(
    ("name", "algorithm", "billions"),
    [("llama-7b", "fed-peft", 6.74), ("llama-2-70b", "fed-peat", 68.98), ("llama-2-70b", "fed-avg", 68.98)],
)
def test_large_models_are_planned_without_weights(
    name: str, algorithm: str, billions: float, text_dir: Path, public_dir: Path
) -> None:
    data = DataConfig(str(text_dir), public_name=str(public_dir))
    config = SimulationConfig(algorithm=algorithm, rounds=2, foundation=FoundationConfig(name), data=data)
    found = plan(config, 1, calibrate=False)
    assert found["model"]["num_parameters"] == pytest.approx(billions * 1e9, rel=1e-3)
    assert len(found["rounds"]) == 1
    assert found["run"]["virtual_s"] == 2 * found["rounds"][0]["virtual_s"]
    if algorithm == "fed-avg":
        assert found["fits"]["shares"]["all"] == {"model": 0.0}  # nobody can take part


def test_known_sizes_are_the_published_ones() -> None:
    sizes = {name: sum(int(np.prod(shape)) for _, shape in sketched(name, "float32").shapes.values()) for name in KNOWN}
    published = {
        "gpt2": 124_439_808,
        "gpt2-xl": 1_557_611_200,
        "opt-1.3b": 1_315_758_080,
        "tinyllama-1.1b": 1_100_048_384,
        "llama-7b": 6_738_415_616,
        "llama-13b": 13_015_864_320,
        "llama-2-70b": 68_976_648_192,
    }
    assert sizes == published


def test_the_command_shows_tables_and_writes_all_figures(
    gpt2_dir: Path, text_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    words = ["--algorithm", "fed-peft", "--foundation.name", str(gpt2_dir), "--data.name", str(text_dir)]
    words += ["--local.sequence-length", "32", "--evaluation.sequence-length", "32", "--cohort-size", "4"]
    assert main(["plan", *words, "--hosts.backend", "serial", "--json-file", str(file)]) == 0
    out = capsys.readouterr().out
    assert "devices that have the memory" in out
    assert "rank 16" in out
    assert "wall time here" in out
    found = json.loads(file.read_text())
    assert found["wall"]["total"] > found["wall"]["training"] > 0
    assert len(found["rounds"]) == 10


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lr", "1"], "there is no --lr: did you mean --local.learning-rate?"),
        (["--plan-rounds", "0"], "plan_rounds = 0 is not allowed"),
        (["--rounds", "0"], "rounds = 0 is not allowed"),
    ],
)
def test_wrong_settings_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert says in capsys.readouterr().err
