"""A run whose process is killed goes on from its last checkpoint, and ends with the same bits."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import dies_at
import pytest
from processes import Known, forked, living
from whole_runs import assert_same_bits, events

from workloads.large_scale import main

pytestmark = pytest.mark.usefixtures("no_reports")
PATIENT = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's own: without the rest they end after a minute


@pytest.mark.parametrize(
    ("ending", "checkpoint", "rounds"),
    [
        pytest.param("checkpoints/00000", [], [], marks=pytest.mark.full),
        ("rounds/00003.parquet", ["00002"], ["00001.parquet", "00002.parquet"]),
        ("checkpoints/00004", ["00002"], [f"0000{round}.parquet" for round in range(1, 5)]),
        pytest.param(
            *("summary.json", ["00004"], [f"0000{round}.parquet" for round in range(1, 5)]), marks=pytest.mark.full
        ),
    ],
    ids=["before the first checkpoint", "between the parts of a round", "in a checkpoint", "before the summary"],
)
def test_a_killed_run_that_is_resumed_gives_the_bits_of_one_never_interrupted(
    ending, checkpoint, rounds, tiny_arguments, uninterrupted, tmp_path
):
    run = tmp_path / "run"
    _run_and_die(ending, tiny_arguments("--out", run), tmp_path / "log")
    assert _visible(run / "checkpoints") == checkpoint and _visible(run / "rounds") == rounds
    assert not (run / "summary.json").exists()
    assert main(["--resume", str(run)]) == 0
    assert_same_bits(uninterrupted, run)
    assert len(events(run, "resumed")) == 1


def test_a_killed_run_on_ray_of_its_own_was_on_loopback_leaves_no_process_and_resumes_to_the_same_bits(
    tiny_arguments, uninterrupted, tmp_path
):
    run = tmp_path / "run"
    command_line = tiny_arguments("--out", run, "--hosts.backend", "ray", "--hosts.num-hosts", 1)
    children = _run_and_die("rounds/00004.parquet", command_line, tmp_path / "log")
    assert {"raylet", "gcs_server", "ray::Host"} <= {process.name for process in children}
    listening = [line.split(maxsplit=2)[1:] for line in _lines(tmp_path / "log", "listens: ")]
    assert {"raylet", "gcs_server"} <= {name for _, name in listening}
    assert {address.removeprefix("::ffff:") for address, _ in listening} == {"127.0.0.1"}
    assert not living([process for process in children if process.name not in PATIENT])
    assert main(["--resume", str(run), "--hosts.backend", "serial"]) == 0
    assert_same_bits(uninterrupted, run)


def test_a_finished_run_can_be_given_more_rounds(tiny_arguments, uninterrupted, tmp_path):
    run = tmp_path / "run"
    assert main(tiny_arguments("--out", run, "--rounds", 2)) == 0
    assert main(["--resume", str(run), "--rounds", "4"]) == 0
    assert_same_bits(uninterrupted, run)


def test_rounds_that_were_logged_after_the_checkpoint_are_taken_back(tiny_arguments, uninterrupted, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(tiny_arguments("--out", whole, "--rounds", 2)) == 0
    shutil.copytree(whole, killed)
    (killed / "summary.json").unlink()
    for part in ("rounds/00003.parquet", "clients/00003.parquet", "clients/00004.parquet"):
        shutil.copy(uninterrupted / part, killed / part)
    assert main(["--resume", str(killed), "--rounds", "2"]) == 0
    assert_same_bits(whole, killed)


def _run_and_die(ending: str, arguments: list[str], log: Path) -> list[Known]:
    """A run killed just before the file or folder appears; returns the processes it had below it."""
    status = forked(log, log, dies_at.run, ending, signal.SIGKILL, arguments)
    assert status == -signal.SIGKILL, log.read_text()
    return [Known.parse(line.removeprefix("child: ")) for line in _lines(log, "child: ")]


def _lines(log: Path, beginning: str) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith(beginning)]


def _visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))
