"""Tests that start real processes. One Ray serves all of this folder; those of `own_processes` start their own."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import tiny_runs
import warm_workers

from fedpeat_ray.config import HostsConfig
from fedpeat_ray.runtime.host_pool import HostPool


@pytest.fixture(scope="session", autouse=True)
def _own_places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs go to a folder of this session, and no other cluster is joined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEAT_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setenv("PYTHONPATH", f"{tiny_runs.REPOSITORY}:{Path(__file__).parent}")  # for processes that are started
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_prestart_worker_first_driver", "0")  # no host could be one of these
        patch.setenv("RAY_worker_niceness", "0")  # by default hosts wait for the tests of other workers
        yield


@pytest.fixture
def no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of large_scale.py end without one: to draw it takes longer than a tiny run."""
    monkeypatch.setattr("analysis.report.write_report", lambda directories: directories[0] / "report.html")


@pytest.fixture(scope="session")
def local_ray(_own_places: None) -> Iterator[None]:
    """A Ray of 6 cores, whatever the machine has, which every run of the session joins."""
    folder, pipe = tempfile.TemporaryDirectory(prefix="warm"), subprocess.PIPE  # a socket's name must be short
    words = [warm_workers.__file__, f"{folder.name}/socket"]
    ray.init(
        address="local",
        num_cpus=6,
        object_store_memory=128 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"py_executable": shlex.join([sys.executable, "-S", "-E", *words])},
    )
    with folder, subprocess.Popen([sys.executable, *words], stdin=pipe, stdout=pipe) as forks:
        assert forks.stdout and forks.stdout.readline() == b"listens\n"
        yield
        ray.shutdown()
        forks.communicate()  # its input ends, and so does it


@pytest.fixture(scope="session")
def pool(local_ray: None) -> Iterator[HostPool]:
    """Hosts that runs take turns with."""
    with HostPool(HostsConfig()) as pool:
        yield pool
