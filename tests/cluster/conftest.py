"""Clusters of two pretend machines (machines.py)."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Machine, two_machines
from tiny_runs import REPOSITORY


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Of a name so short that sockets may lie in it."""
    with tempfile.TemporaryDirectory(prefix="two", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def machines(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two that share this machine's files."""
    with two_machines(folder) as both:
        yield both


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of who works there: this Python, and no cluster that he knows of."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FEDPEAT_", "SLURM_"))}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}:/usr/sbin"
    return {**kept, "PATH": path, "PYTHONPATH": str(REPOSITORY), "RAY_prestart_worker_first_driver": "0"}
