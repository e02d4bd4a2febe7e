"""Going on with a run: by one process at a time, with what the run began with, and with nothing left of its end."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_runs
from rich.console import Console
from safetensors.torch import load_file, save_file
from whole_runs import assert_same_bits, events, summary

from analysis.report import write_report
from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.aggregation.server_optimizer import ServerState
from fedpeat_ray.config import AvailabilityConfig, DistilConfig, FleetConfig
from fedpeat_ray.errors import ConfigError, RunDirError
from fedpeat_ray.runtime import run_lock, run_log
from fedpeat_ray.runtime.checkpoint import Facts, load_checkpoint, save_checkpoint
from fedpeat_ray.runtime.progress import Progress, print_summary
from fedpeat_ray.runtime.run_lock import only_writer
from fedpeat_ray.runtime.run_log import RunLog, last_round, read_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(gpt2_dir: Path, text_dir: Path, tmp_path: Path) -> SimulationConfig:
    """Two rounds on text of the test's own."""
    shutil.copytree(text_dir, tmp_path / "text")
    return whole_runs.tiny(gpt2_dir, tmp_path / "text", algorithm="fed-peft", rounds=2, data={"public_name": None})


@pytest.fixture
def resume(tiny: SimulationConfig):
    """Goes on with a run of the tiny configuration, some settings changed."""
    return lambda directory, **changes: Simulation(whole_runs.changed(tiny, resume=directory, **changes)).run()


def edit(path: Path, **changes: Any) -> None:
    """Change what a JSON file says, by key; None takes a key away."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


# One process at a time


@contextmanager
def another_process_holds(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes the run directory, until it is killed."""
    code = (  # without all that the package loads
        "import pathlib, sys, types; sys.modules['fedpeat_ray'] = package = types.ModuleType('fedpeat_ray')\n"
        "package.__path__ = ['fedpeat_ray']; from fedpeat_ray.runtime.run_lock import only_writer\n"
        "with only_writer(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command, pipe = [sys.executable, "-c", code, str(directory)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_run_that_another_process_writes_is_neither_resumed_nor_begun_until_that_process_is_gone(
    run, resume, tiny, tmp_path
):
    directory = run()
    before = summary(directory)
    with another_process_holds(directory) as process:
        said = re.escape(f"{directory} is being written by process {process.pid} on {os.uname().nodename}")
        with pytest.raises(RunDirError, match=said):
            resume(directory)
        assert summary(directory) == before and not events(directory)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resume(directory, rounds=3)
    assert summary(directory)["rounds"] == 3
    with another_process_holds(tmp_path / "new"), pytest.raises(RunDirError, match="is being written by process"):
        Simulation(dataclasses.replace(tiny, out=tmp_path / "new")).run()


def test_the_lock_lasts_as_long_as_the_run(run, tiny, tmp_path, monkeypatch):
    refused = []

    def then_try_to_resume(write: Any) -> Any:
        def wrapped(log: RunLog, *arguments: Any) -> None:
            write(log, *arguments)
            with pytest.raises(RunDirError, match=f"process {os.getpid()} on "):
                Simulation(dataclasses.replace(tiny, resume=log.directory)).run()
            refused.append(log.directory)

        return wrapped

    for name in ("write_round", "write_summary"):
        monkeypatch.setattr(RunLog, name, then_try_to_resume(getattr(RunLog, name)))
    run()
    assert refused == [tmp_path / "run"] * 3, "two rounds and the summary"
    with only_writer(tmp_path / "run"):
        pass


def test_where_the_file_system_has_no_locks_the_run_says_so_and_goes_on(run, monkeypatch, capsys):
    def unsupported(*_: Any) -> None:
        raise OSError(run_lock.errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "flock", unsupported)
    run()
    assert capsys.readouterr().out.count("has no locks") == 1


# With what the run began with


def test_other_text_under_the_same_name_is_refused(run, resume, tiny, tmp_path):
    directory = run()
    was = read_config(directory)["data_digest"]
    with (tmp_path / "text" / "harbour.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(RunDirError, match=rf"cannot be resumed: data_digest was {was[:12]}.*now it is (?!{was[:12]})"):
        resume(directory, rounds=3)
    assert summary(directory)["rounds"] == 2, "a refusal touches nothing"


def test_another_model_under_the_same_name_is_refused(run, resume, gpt2_dir, tmp_path):
    model = shutil.copytree(gpt2_dir, tmp_path / "model")
    directory, weights = run(foundation={"name": str(model)}), model / "model.safetensors"
    edit(model / "config.json", layer_norm_epsilon=1e-4)
    with pytest.raises(RunDirError, match="foundation_sha256 was"):
        resume(directory, foundation={"name": str(model)})
    shutil.copy(gpt2_dir / "config.json", model)
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(RunDirError, match="foundation_sha256 was"):
        resume(directory, foundation={"name": str(model)})


def test_another_trace_of_availability_is_refused(run, resume, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("device_id,start_s,stop_s\n" + "".join(f"{device_id},0,1e9\n" for device_id in range(14)))
    fleet = FleetConfig(num_devices=14, availability=AvailabilityConfig(kind="trace", trace=trace))
    directory = run(fleet=fleet)
    trace.write_text(trace.read_text() + "13,2e9,3e9\n")
    with pytest.raises(RunDirError, match="trace_sha256 was"):
        resume(directory, fleet=fleet)


def test_tiers_of_one_s_own_are_in_the_log_and_another_file_of_them_is_refused(run, resume, tmp_path, capsys):
    tiers = tmp_path / "tiers.toml"
    tiers.write_text("[kiosk]\nlike = 'laptop'\n['gate [/way] $x$']\nlike = 'edge-gpu'\n[unused]\nlike = 'sbc'\n")
    fleet = FleetConfig(num_devices=14, tiers=tiers, tier_shares={"kiosk": 1, "gate [/way] $x$": 1})
    directory = run(fleet=fleet)
    assert "gate [/way] $x$" in capsys.readouterr().out
    assert set(whole_runs.table(directory, "clients")["tier"]) == {"kiosk", "gate [/way] $x$"}
    was = read_config(directory)
    assert was["config"]["fleet"]["tiers"] == str(tiers)
    assert was["resolved"]["tiers"] == ["kiosk", "gate [/way] $x$", "unused"]
    assert write_report([directory]).exists()
    resume(directory, rounds=3, fleet=fleet)
    tiers.write_text(tiers.read_text() + "# as it was, and a word\n")
    with pytest.raises(RunDirError, match=f"tiers_sha256 was {was['resolved']['tiers_sha256'][:12]}"):
        resume(directory, rounds=3, fleet=fleet)


def test_emulators_distilled_anew_with_other_bits_are_refused(run, resume, deep_gpt2_dir, public_dir):
    text = str(public_dir)
    distil = DistilConfig(steps=2, batch_size=2, sequence_length=16)
    peat: dict[str, Any] = {"algorithm": "fed-peat", "foundation": {"name": str(deep_gpt2_dir)}}
    peat |= {"emulator": {"first": 1, "last": 1, "shares": (0.4,), "distil": distil}, "data": {"public_name": text}}
    directory = run(**peat)
    level, _ = read_config(directory)["resolved"]["levels"]
    assert level["weights_sha256"] and len(level["weights_sha256"]) == 64
    edit(directory / "config.json", resolved={"levels": [level | {"weights_sha256": "0" * 64}]})
    with pytest.raises(RunDirError, match="weights_sha256 of level 1 was 000000000000"):
        resume(directory, **peat)
    edit(directory / "config.json", resolved={"levels": [level | {"weights_sha256": None, "blocks": [0, 3, 6]}]})
    with pytest.raises(RunDirError, match=re.escape("blocks of level 1 was [0, 3, 6]")):
        resume(directory, **peat)


def test_public_text_counts_where_rounds_read_it(run, resume, deep_gpt2_dir, public_dir, tmp_path):
    public = shutil.copytree(public_dir, tmp_path / "public")
    emulator: dict[str, Any] = {"first": 1, "last": 1, "shares": (0.4,), "weights": "foundation"}
    emulator |= {"distil": DistilConfig(sequence_length=16)}
    changes = {
        "algorithm": "fed-peat",
        "foundation": {"name": str(deep_gpt2_dir)},
        "data": {"public_name": str(public)},
    }
    without = run("without", emulator=emulator, **changes)
    taught = run("taught", emulator=emulator | {"server_steps": 1}, **changes)
    next(public.glob("*.jsonl")).unlink()
    resume(without, emulator=emulator, **changes)
    with pytest.raises(RunDirError, match="public_digest was"):
        resume(taught, emulator=emulator | {"server_steps": 1}, **changes)


def test_other_versions_are_refused_unless_the_person_accepts_them_and_then_logged(run, resume):
    directory = run()
    versions = read_config(directory)["versions"]
    edit(directory / "config.json", versions=versions | {"torch": "1.0", "pandas": "1.0"})
    with pytest.raises(
        RunDirError, match=f"torch was 1.0 when the run began, now it is {re.escape(versions['torch'])}"
    ):
        resume(directory)
    resume(directory, accept_changes=True, rounds=3)
    (changed,) = events(directory, "changed")
    assert changed["versions"] == {"torch": ["1.0", versions["torch"]]}
    assert not read_config(directory)["config"]["accept_changes"], "to be said each time"
    with pytest.raises(ConfigError, match="accept_changes = True is not allowed"):
        Simulation(SimulationConfig(accept_changes=True))


def test_another_commit_is_logged(run, resume):
    directory = run()
    edit(directory / "config.json", git={"commit": "0" * 40, "dirty": False})
    resume(directory)
    assert [event["commit"][0] for event in events(directory, "changed")] == ["0" * 40] * (ROOT / ".git").exists()


def test_a_run_that_noted_less_than_runs_do_now_still_goes_on(run, resume):
    one, two = run("one", rounds=3, evaluation={"every": 1}), run("two", evaluation={"every": 1})
    edit(two / "config.json", data_digest=None, versions=None, git=None, resolved=None)
    (facts,) = two.glob("checkpoints/*/facts.json")
    edit(facts, wall_s=None)
    resume(two, rounds=3, evaluation={"every": 1})
    assert_same_bits(one, two)
    edit(two / "config.json", config=read_config(two)["config"] | {"colour": "red"})
    with pytest.raises(RunDirError, match=r"config.json is of another version: colour = 'red'"):
        resume(two)


def test_rounds_may_only_grow(run, resume):
    directory = run(rounds=3, checkpoint_every=10)
    shutil.rmtree(directory / "checkpoints" / "00003")
    for fewer in (1, 2):
        with pytest.raises(ConfigError, match=f"rounds = {fewer} is not allowed: at least 3"):
            resume(directory, rounds=fewer, checkpoint_every=10)
    assert read_config(directory)["config"]["rounds"] == 3


# With nothing left of its end


def test_a_resumed_run_has_no_adapter_and_no_summary_before_its_new_end_and_no_rests(run, resume, monkeypatch):
    directory = run()
    (directory / "rounds" / ".00003.parquet.0123456789abcdef.tmp").touch()
    (directory / "checkpoints" / ".00003.0123456789abcdef.tmp").mkdir()
    write, seen = RunLog.write_round, []

    def look(log: RunLog, *arguments: Any) -> None:
        seen.extend(sorted(path.name for path in directory.iterdir() if path.name in ("adapter", "summary.json")))
        write(log, *arguments)

    monkeypatch.setattr(RunLog, "write_round", look)
    resume(directory, rounds=3)
    assert seen == []
    assert not list(directory.rglob("*.tmp"))


def test_an_adapter_that_could_not_be_written_whole_is_not_there(run, tmp_path, monkeypatch):
    from fedpeat_ray.algorithms.fed_peft import FedPEFT

    save = FedPEFT.save

    def save_half(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(FedPEFT, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "run" / "adapter").exists() and not list((tmp_path / "run").glob(".*.tmp"))


def test_the_last_checkpoint_is_the_one_of_the_highest_round(tmp_path):
    state = ServerState(torch.zeros(1), {}, {})
    save_checkpoint(tmp_path, state, Facts(99_999, 1.0, 1))
    kept = tmp_path / "checkpoints" / "99999"
    shutil.copytree(kept, tmp_path / "kept")
    save_checkpoint(tmp_path, state, Facts(100_000, 1.0, 1))
    shutil.copytree(tmp_path / "kept", kept)  # as if the process had ended before the older one was removed
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1].round == 100_000
    save_checkpoint(tmp_path, state, Facts(100_001, 1.0, 1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["100001"]
    for round in (99_999, 100_000):
        (tmp_path / "rounds").mkdir(exist_ok=True)
        (tmp_path / "rounds" / f"{round:05d}.parquet").touch()
    assert last_round(tmp_path) == 100_000 and last_round(tmp_path / "none") == 0


def test_wall_time_is_that_of_all_parts(run, resume):
    directory = run()
    (facts,) = directory.glob("checkpoints/*/facts.json")
    assert 0 < json.loads(facts.read_text())["wall_s"] <= json.loads((directory / "summary.json").read_text())["wall_s"]
    edit(facts, wall_s=1e6)
    resume(directory, rounds=3)
    assert 1e6 < json.loads((directory / "summary.json").read_text())["wall_s"] < 1.1e6


def test_a_run_directory_is_where_the_person_was_whatever_the_process_does_next(tiny, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    begun = Simulation(dataclasses.replace(tiny, out=Path("run")))
    monkeypatch.chdir(tmp_path / "there")
    begun.run()
    assert begun.directory == tmp_path / "here" / "run" and (tmp_path / "here" / "run" / "summary.json").exists()
    monkeypatch.chdir(tmp_path / "here")
    resumed = Simulation(dataclasses.replace(tiny, resume=Path("run"), rounds=3))
    monkeypatch.chdir(tmp_path / "there")
    assert resumed.run()["rounds"] == 3 and resumed.directory == tmp_path / "here" / "run"
    assert not list((tmp_path / "there").iterdir())


# What is said


def test_the_run_directory_is_told_before_the_first_round(run, tmp_path, capsys):
    run()
    lines = capsys.readouterr().out.splitlines()
    assert not {"starting hosts", "tuning centrally, for comparison"} & {*lines}, "stages that do nothing"
    assert lines.index(f"run directory: {tmp_path / 'run'}") < min(
        i for i, line in enumerate(lines) if line.split()[:1] == ["round"]
    )


NASTY = "[/old] [bold]$x_{$ :warning: \\"


def test_names_are_printed_as_they_are():
    for terminal in (False, True):
        out = io.StringIO()
        with Progress(1, console=Console(file=out, force_terminal=terminal, width=200)) as progress:
            progress.stage(f"loading {NASTY}")
            progress.say(f"run directory: {NASTY}")
        assert f"run directory: {NASTY}" in out.getvalue() and f"loading {NASTY}" in out.getvalue()
    result = {"algorithm": NASTY, "rounds": 1, "virtual_s": 1.0, "energy_j": 1.0, "wall_s": 5.0, "num_dropped": 0}
    result |= {"download_bytes": 1000, "upload_bytes": 0, "num_completed": 1, "drop_reasons": {NASTY: 2}}
    result |= {"perplexity": {"zero_shot": 61.2, "tuned": 31.4}, "token_accuracy": {"zero_shot": 0.25, "tuned": 0.3}}
    out = io.StringIO()
    print_summary(result, Console(file=out, width=120))
    assert out.getvalue().count(NASTY) == 2


def test_versions_that_compute_are_among_those_written_down():
    assert set(run_log.COMPUTING) < set(run_log.PACKAGES)
