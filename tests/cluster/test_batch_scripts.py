"""The batch scripts for Slurm, read by shellcheck."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import REPOSITORY


@pytest.mark.parametrize("script", sorted((REPOSITORY / "cluster").rglob("*.sbatch")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in_a_batch_script(script):
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
