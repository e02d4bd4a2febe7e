"""`ray job submit` of a checkout, as the README says it, to a cluster of one node."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clusters import RAY, environment_with_token, head
from tiny_runs import REPOSITORY
from whole_runs import assert_same_bits

Submit = Callable[[list[str]], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the cluster and of those who submit: no way to this checkout but the upload."""
    environment = environment_with_token(tmp_path_factory.mktemp("auth"))
    return {name: value for name, value in environment.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def dashboard(environment: dict[str, str]) -> Iterator[str]:
    """The address of a cluster of this module's own."""
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,  # short: so are its sockets
        head(environment, Path(folder), "--num-cpus=2") as (_, dashboard),
    ):
        yield dashboard


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout that has been worked in: what lies in ignored folders is too large to be uploaded."""
    copy = tmp_path_factory.mktemp("checkout") / "fedpeat_ray"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "build", "__pycache__"))
    for ignored in (".git", ".venv", "runs", "build"):
        (copy / ignored).mkdir()
        with (copy / ignored / "large").open("wb") as file:
            file.truncate(2**30)  # takes no room on disk
    return copy


@pytest.fixture
def submit(dashboard: str, environment: dict[str, str], checkout: Path, tmp_path: Path) -> Submit:
    """Submits large_scale.py with these arguments; its runs go to tmp_path."""

    def submit(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        runtime_env = json.dumps({"env_vars": {"FEDPEAT_RUNS": str(tmp_path / "runs")}})
        command = [
            *(RAY, "job", "submit", "--address", dashboard, "--working-dir", ".", "--runtime-env-json", runtime_env),
            *("--", "python", "workloads/large_scale.py", *arguments),
        ]
        return subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=180)

    return submit


def test_a_submitted_run_gives_the_bits_of_a_local_one_and_outlives_the_job(
    submit, tiny_arguments, uninterrupted, checkout, tmp_path
):
    ended = submit(tiny_arguments("--hosts.backend", "ray", "--hosts.num-hosts", 1))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (directory,) = (tmp_path / "runs").iterdir()
    assert str(directory) in ended.stdout.splitlines()
    assert_same_bits(uninterrupted, directory)
    assert (directory / "report.html").exists()
    assert [path.name for path in (checkout / "runs").iterdir()] == ["large"]


@pytest.mark.full
def test_a_submitted_run_that_is_refused_fails_with_the_line_that_says_why(submit, tiny_arguments, tmp_path):
    ended = submit(tiny_arguments("--cohort-size", 51, "--hosts.backend", "ray"))
    assert ended.returncode != 0
    lines = {line for line in ended.stdout.splitlines() if "error: " in line}  # Ray shows the end of the log again
    assert lines == {"error: cohort_size = 51 is not allowed: at most fleet.num_devices = 50"}
    assert "Traceback" not in ended.stdout
    assert not (tmp_path / "runs").exists()
