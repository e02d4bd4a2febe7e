"""The wheel: all files of both packages are in it, and it runs where there is no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedpeat_ray", "analysis")
SETTINGS = """
    --algorithm fed-peft --rounds 1 --cohort-size 4 --client-batch-size 4 --fleet.num-devices 14 --hosts.backend serial
    --local.max-steps 1 --local.sequence-length 32 --data.partition.documents-per-device 4
    --evaluation.sequence-length 32 --evaluation.num-sequences 4 --evaluation.no-centralised
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel is built from, in a folder of its own: a build writes there, and reads what earlier ones left."""
    folder = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def python(code: str, *words: str, at: Path, environment: Mapping[str, str] | None = None) -> str:
    """Standard output of a piece of Python."""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder: Path) -> set[Path]:
    """All of both packages."""
    found = (path for package in PACKAGES for path in (folder / package).rglob("*") if path.is_file())
    return {path.relative_to(folder) for path in found}


def test_every_file_of_the_packages_goes_into_the_wheel(source, tmp_path):
    python("import setuptools; setuptools.setup()", "build_py", "--build-lib", str(tmp_path), at=source)
    assert files(tmp_path) == files(source)
    for some in ("models/embedded/pydoc-base/emulators", "control/shipped/policy.json", "commands/run.py"):
        assert (tmp_path / "fedpeat_ray" / some).exists()


@pytest.mark.full
def test_the_wheel_runs_in_an_empty_folder(source, tmp_path, text_dir):
    wheel = python("from setuptools.build_meta import build_wheel; print(build_wheel('.'))", at=source).splitlines()[-1]
    site, home, empty = (tmp_path / name for name in ("site", "home", "empty"))
    with zipfile.ZipFile(source / wheel) as archive:
        archive.extractall(site)
    (scripts,) = site.glob("*.dist-info/entry_points.txt")
    assert "fedpeat = fedpeat_ray.__main__:main" in scripts.read_text()
    home.mkdir()
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "FEDPEAT_RUNS"}
    environment |= {"PYTHONPATH": str(site), "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    words = [*SETTINGS.split(), "--data.name", str(text_dir)]
    code = "import sys; from fedpeat_ray.__main__ import main; sys.exit(main())"
    out = python(code, "run", *words, at=empty, environment=environment)
    directory = Path(out.splitlines()[-1])
    assert directory.parent == home / "fedpeat_runs" and (directory / "report.html").stat().st_size > 10_000
    assert json.loads((directory / "config.json").read_text())["git"] is None, "it was not the checkout that ran"
    assert str(directory.name) in python(code, "runs", at=empty, environment=environment)
    assert not list(empty.iterdir())
