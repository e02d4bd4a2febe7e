"""Ctrl-C and SIGTERM: one line that says how to go on, a status that says why, and nothing half written."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import dies_at
import pytest
from processes import Known, forked, living
from whole_runs import assert_same_bits

from fedpeat_ray.runtime.run_log import last_round
from workloads.large_scale import main

pytestmark = pytest.mark.usefixtures("no_reports")


def _interrupted(stop: str, ending: str, arguments: list[str], folder: Path) -> tuple[int, list[str], list[str]]:
    """Status, standard output and error of a run that gets a signal just before a file would appear."""
    out, error = folder / "out", folder / "error"
    status = forked(out, error, dies_at.run, ending, signal.Signals[stop], arguments)
    return status, out.read_text().splitlines(), error.read_text().splitlines()


@pytest.mark.parametrize(("stop", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_run_says_how_to_go_on_and_does(stop, status, tiny_arguments, uninterrupted, tmp_path):
    run = tmp_path / "a run"
    code, out, error = _interrupted(stop, "rounds/00003.parquet", tiny_arguments("--out", run), tmp_path)
    command = f"python workloads/large_scale.py --resume {shlex.quote(str(run))}"
    assert code == status
    assert error[-1] == f"interrupted: 2 of 4 rounds are complete in {run}; go on with: {command}"
    assert not any("Traceback" in line for line in error)
    assert f"run directory: {run}" in out
    assert not list(run.rglob("*.tmp")) and not (run / "summary.json").exists()
    assert last_round(run) == 2
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "workloads/large_scale.py") and main(words) == 0
    assert_same_bits(uninterrupted, run)


@pytest.mark.full
@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM"])
def test_hosts_end_with_an_interrupted_run(stop, tiny_arguments, tmp_path):
    run = tmp_path / "run"
    arguments = tiny_arguments("--out", run, "--hosts.backend", "ray", "--hosts.num-hosts", 1)
    code, out, error = _interrupted(stop, "rounds/00002.parquet", arguments, tmp_path)
    assert code == {"SIGINT": 130, "SIGTERM": 143}[stop], error
    assert error[-1].startswith(f"interrupted: 1 of 4 rounds are complete in {run}; ")
    children = [Known.parse(line.removeprefix("child: ")) for line in out if line.startswith("child: ")]
    assert "ray::Host" in {process.name for process in children}
    assert not living([process for process in children if process.name == "ray::Host"])


def test_a_run_that_is_interrupted_before_it_wrote_anything_says_that(monkeypatch, tiny_arguments, tmp_path, capfd):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt  # what Python makes of SIGINT

    monkeypatch.setattr("fedpeat_ray.simulation.prepare", stop)
    assert main(tiny_arguments("--out", tmp_path / "run")) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "interrupted before the run directory was made"
    assert not (tmp_path / "run").exists()
