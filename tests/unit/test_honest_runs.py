"""A run that came to nothing says so: updates and states that are no numbers, rounds that nobody trained in."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_runs
from rich.console import Console
from safetensors.torch import load_file
from whole_runs import events, summary, table

from analysis.report import write_report
from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.aggregation.server_optimizer import UPDATES, accepted, init_server, server_step
from fedpeat_ray.config import AvailabilityConfig, ServerConfig
from fedpeat_ray.errors import RunFailedError
from fedpeat_ray.runtime import verdict
from fedpeat_ray.runtime.progress import print_summary
from fedpeat_ray.training.client_batch import usable
from workloads.large_scale import main

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename


@pytest.fixture
def tiny(deep_gpt2_dir: Path, text_dir: Path) -> SimulationConfig:
    """Two rounds of four of fourteen devices."""
    return whole_runs.tiny(
        deep_gpt2_dir,
        text_dir,
        algorithm="fed-peft",
        rounds=2,
        cohort_size=4,
        data={"public_name": None},
        fleet={"num_devices": 14},
    )


def failed(config: SimulationConfig, directory: Path, **changes: Any) -> str:
    """How a run fails that leaves its summary all the same."""
    with pytest.raises(RunFailedError) as caught:
        Simulation(whole_runs.changed(config, out=directory, **changes)).run()
    assert summary(directory)["failure"] == caught.value.summary["failure"] == str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(next((directory / "checkpoints").glob("*/state.safetensors")))


@pytest.mark.parametrize("algorithm", ["fed-peft", "fed-avg"])
def test_finite_but_huge_updates_are_dropped_and_leave_the_model_alone(tiny, tmp_path, algorithm):
    local = {"max_steps": 1, "learning_rate": 3e37}
    line = failed(tiny, tmp_path / "run", algorithm=algorithm, local=local)
    assert "no update" in line and "non_finite" in line
    result = summary(tmp_path / "run")
    assert result["num_completed"] == 0 and result["drop_reasons"]["non_finite"] >= 4
    assert result["perplexity"]["tuned"] == result["perplexity"]["zero_shot"]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_an_update_is_usable_as_long_as_something_of_its_start_is_left_beside_it():
    start_P = torch.tensor([3.0, 4.0])
    lengths = torch.tensor([0.0, 5.0, 5 * 2.0**24, 5.1 * 2.0**24, 1e200, math.inf, math.nan], dtype=torch.float64)
    delta_KP = torch.stack([lengths, torch.zeros_like(lengths)], dim=1)
    assert usable(delta_KP, start_P).tolist() == [True, True, True, False, False, False, False]
    assert usable(delta_KP, torch.zeros(2)).tolist() == [True, True, False, False, False, False, False]


@pytest.mark.parametrize("config", [ServerConfig(), ServerConfig("yogi"), ServerConfig(momentum=0.9)])
def test_a_state_that_is_not_finite_is_never_accepted(config):
    state = init_server(config, torch.ones(3))
    good = server_step(config, state, torch.full((3,), 0.5, dtype=torch.float64))
    assert accepted(state, good) == (good, None)
    for wrong in (math.nan, math.inf, 1e200):
        bad = server_step(config, state, torch.tensor([0.5, wrong, 0.5], dtype=torch.float64))
        after, refused = accepted(state, bad)
        if config.optimizer == "sgd" or not math.isfinite(wrong):
            assert after is state and refused == UPDATES


@pytest.mark.parametrize("algorithm", ["fed-peft", "fed-avg", "fed-peat"])
def test_a_round_whose_mean_the_server_cannot_take_is_refused_and_told(tiny, tmp_path, algorithm):
    emulator = {"first": 1, "last": 1, "weights": "foundation"}
    server = {"learning_rate": 1e300}
    line = failed(tiny, tmp_path / "run", algorithm=algorithm, server=server, emulator=emulator)
    directory = tmp_path / "run"
    assert "no update" in line
    told = events(directory, "refused")
    assert [(event["round"], event["what"]) for event in told] == [(1, "updates"), (2, "updates")]
    assert all("not finite" in event["why"] for event in told)
    clients, result = table(directory, "clients"), summary(directory)
    assert (clients["outcome"] == "dropped").all() and not clients["upload_bytes"].any()
    assert result["perplexity"]["tuned"] == result["perplexity"]["zero_shot"]
    assert all(tensor.isfinite().all() for tensor in weights(directory).values())


def test_a_distillation_that_diverges_is_refused_and_what_devices_did_is_kept(
    gpt2_dir, deep_llama_dir, text_dir, tmp_path
):
    config = whole_runs.tiny(
        deep_llama_dir,
        text_dir,
        algorithm="fed-pt",
        rounds=1,
        proxy={"small": str(gpt2_dir), "steps": 2, "sequence_length": 32, "learning_rate": 1e38},
        out=tmp_path / "run",
    )
    result = Simulation(config).run()
    assert [(event["round"], event["what"]) for event in events(tmp_path / "run", "refused")] == [(1, "distillation")]
    assert result["num_completed"] == 6 and result["failure"] is None
    assert result["perplexity"]["small_tuned"] < result["perplexity"]["small_zero_shot"]


def test_a_run_that_ends_with_no_number_fails_and_its_summary_stays(tiny, tmp_path):
    line = failed(tiny, tmp_path / "run", server={"learning_rate": 1e30}, evaluation={"every": 1})
    assert "perplexity" in line and "no number" in line and "tuned" in line
    assert summary(tmp_path / "run")["perplexity"]["tuned"] is None


@pytest.mark.usefixtures("small_images")
def test_the_command_line_of_a_run_without_a_result_says_so_in_one_line_and_leaves_all_the_rest(
    gpt2_dir, text_dir, tmp_path, capsys
):
    directory = tmp_path / "run"
    line = f"--algorithm fed-peft --foundation.name {gpt2_dir} --data.name {text_dir} --hosts.backend serial --rounds 2"
    line += (
        " --cohort-size 4 --client-batch-size 4 --fleet.num-devices 14 --local.learning-rate 3e37 --local.max-steps 1"
    )
    line += " --local.sequence-length 32 --evaluation.sequence-length 32 --evaluation.num-sequences 4"
    assert main([*line.split(), "--out", str(directory)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: no update was used in any of 2 rounds") and err.count("\n") == 1
    assert out.rstrip().endswith(str(directory)) and "updates used" in out
    assert (directory / "summary.json").exists() and (directory / "report.html").exists()


def test_a_setting_without_effect_is_said_before_the_run_and_logged_once(tiny, tmp_path, capsys):
    directory = tmp_path / "run"
    changes: dict[str, Any] = {"algorithm": "fed-avg", "local": {"learning_rate": 1e-3}, "rounds": 1}
    Simulation(whole_runs.changed(tiny, out=directory, **changes)).run()
    said = capsys.readouterr().out
    because = "it counts if devices train small parts such as LoRA"
    assert said.startswith(f"warning: client_batch_size = 4 has no effect here: {because}\n")
    assert "warning: lora.rank = 2 has no effect here" in said.split("loading")[0]
    assert [event["setting"] for event in events(directory, "ignored_setting")] == ["client_batch_size", "lora.rank"]
    Simulation(whole_runs.changed(tiny, resume=directory, **(changes | {"rounds": 2}))).run()
    assert len(events(directory, "ignored_setting")) == 2 and "lora.rank" in capsys.readouterr().out
    assert "lora.rank had no effect" in write_report([directory]).read_text()


def test_a_model_that_got_worse_and_rounds_without_updates_are_said_first(tiny, tmp_path):
    directory, trace = tmp_path / "run", tmp_path / "trace.csv"
    trace.write_text("device_id,start_s,stop_s\n" + "".join(f"{device_id},500,1e9\n" for device_id in range(14)))
    fleet = {"num_devices": 14, "availability": AvailabilityConfig(kind="trace", trace=trace)}
    changes: dict[str, Any] = {"algorithm": "fed-avg", "fleet": fleet, "local": {"learning_rate": 1.0}}
    result = Simulation(whole_runs.changed(tiny, out=directory, **changes)).run()
    before, after = result["perplexity"]["zero_shot"], result["perplexity"]["tuned"]
    assert after > before and result["failure"] is None and result["rounds_without_updates"] == 1
    assert result["warnings"] == [
        "no update was used in 1 of 2 rounds",
        f"the tuned model is worse than it was before: perplexity {before:.2f} -> {after:.2f}",
    ]
    assert [event["text"] for event in events(directory, "warning")] == result["warnings"]
    out = io.StringIO()
    print_summary(result, Console(file=out, width=80))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[:2] == [f"warning: {line}" for line in result["warnings"]]
    page = write_report([directory]).read_text()
    assert "No update was used in 1 of 2 rounds." in page.split("Key figures")[0]
    assert "The tuned model is worse than it was before" in page.split("Key figures")[0]


@pytest.mark.parametrize(("higher_is_better", "change"), [(True, "50.0% -> 40.0%"), (False, "40.0% -> 50.0%")])
def test_what_is_worse_depends_on_the_metric(higher_is_better, change):
    before, after = (0.5, 0.4) if higher_is_better else (0.4, 0.5)
    result: dict[str, Any] = {"rounds": 1, "rounds_without_updates": 0}
    result |= {"metric": {"name": "accuracy", "higher_is_better": higher_is_better}}
    worse = {"zero_shot": before, "tuned": after, "small_zero_shot": before, "small_tuned": before}
    better = {"zero_shot": after, "tuned": before}
    perplexity = {"zero_shot": 9.0, "tuned": 8.0}
    assert verdict.warnings(result | {"perplexity": perplexity, "scores": worse}) == [
        f"the tuned model is worse than it was before: accuracy {change}"
    ]
    assert verdict.warnings(result | {"perplexity": perplexity, "scores": better}) == []


def test_a_good_run_has_no_warning(tiny, tmp_path):
    result = Simulation(whole_runs.changed(tiny, out=tmp_path / "run")).run()
    assert result["warnings"] == [] and result["failure"] is None and result["rounds_without_updates"] == 0
    assert 'class="warning"' not in write_report([tmp_path / "run"]).read_text()


def test_a_deadline_that_nobody_makes_is_no_success(tiny, tmp_path):
    line = failed(tiny, tmp_path / "run", deadline_s=1e-3)
    assert "9 deadline" in line
    assert "This run has no result: no update was used" in write_report([tmp_path / "run"]).read_text()
