"""`ray job submit` of a checkout, as the README says it, to a cluster of one node."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import below, living
from tiny_runs import REPOSITORY, assert_same_bits

RAY = str(Path(sys.executable).parent / "ray")
Submit = Callable[[list[str]], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the cluster and of those who submit: one token, and no way to this checkout but the upload."""
    token = tmp_path_factory.mktemp("auth") / "token"
    token.write_text(secrets.token_hex(32))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@pytest.fixture(scope="module")
def dashboard(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of this module's own."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: names of sockets have an end
    gcs, dashboard, agent, agent_rpc, client, metrics = _free_ports(6)
    command = [
        *(RAY, "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--port={gcs}", f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_rpc}"),
        *(f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"),
        f"--object-store-memory={128 * 2**20}",
    ]
    head = subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert head.stdout is not None
    try:
        said = []
        for line in head.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("".join(said))
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        started = below(head.pid)
        head.send_signal(signal.SIGTERM)  # it ends what it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.communicate(timeout=60)
        left = living(started, timeout_s=30)
        for process in left:
            os.kill(process.process_id, signal.SIGKILL)
        head.kill()
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, "ray start left processes behind"


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
    ended = submit(tiny_arguments("--hosts.backend", "ray"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (directory,) = (tmp_path / "runs").iterdir()
    assert str(directory) in ended.stdout.splitlines()
    assert_same_bits(uninterrupted, directory)
    assert (directory / "report.html").exists()
    assert [path.name for path in (checkout / "runs").iterdir()] == ["large"]


def test_a_submitted_run_that_is_refused_fails_with_the_line_that_says_why(submit, tiny_arguments, tmp_path):
    ended = submit(tiny_arguments("--cohort-size", 51, "--hosts.backend", "ray"))
    assert ended.returncode != 0
    lines = {line for line in ended.stdout.splitlines() if "error: " in line}  # Ray shows the end of the log again
    assert lines == {"error: cohort_size = 51 is not allowed: at most fleet.num_devices = 50"}
    assert "Traceback" not in ended.stdout
    assert not (tmp_path / "runs").exists()


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
