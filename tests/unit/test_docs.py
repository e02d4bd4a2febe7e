"""The documentation is held to the code: its figures, its links, and every block of code in it.

Python blocks run as they stand, those of a page one after the other, in a folder of their own. One thing is put in:
where they name a run (`runs/NAME`, `runs/fed-peat-…`), the directory of a tiny one. Commands of the shell are parsed
by what they call and not run; DIR and OTHER_DIR stand for that directory, too.
"""

from __future__ import annotations

import functools
import inspect
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import tyro
import whole_runs
from ray.scripts.scripts import cli as ray_command
from sweeps import sweep

from fedpeat_ray import Simulation
from fedpeat_ray import __main__ as commands
from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.control_training import TrainConfig, begun
from fedpeat_ray.data import python_docs
from fedpeat_ray.fleet.tiers import TIERS
from fedpeat_ray.settings import get

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
ENVIRONMENT = re.compile(r"[A-Z_]+=\S*")


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture(scope="module")
def tiny_run(text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the embedded foundation, which the pages name, as small as can be."""
    directory = tmp_path_factory.mktemp("docs") / "run"
    small: dict[str, Any] = {
        "rounds": 1,
        "cohort_size": 2,
        "local": {"max_steps": 1},
        "evaluation": {"num_sequences": 2},
    }
    peat = {"algorithm": "fed-peat", "emulator": {"weights": "foundation"}, "lora": {"rank": 8}}
    config = whole_runs.tiny(Path("pydoc-base"), text_dir, out=directory)
    Simulation(whole_runs.changed(config, **small, **peat)).run()
    return directory


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename
@pytest.mark.parametrize("page", sweep(WITH_PYTHON, quick=[page for page in WITH_PYTHON if page != "README.md"]))
def test_python_in_the_documentation_runs(page, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDPEAT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    roots = python_docs._roots()
    small = {"stdlib": roots["stdlib"] / "asyncio", "networkx": roots["networkx"] / "algorithms"}
    monkeypatch.setattr(python_docs, "_roots", lambda: small)
    namespace: dict[str, Any] = {}
    for code in blocks(page, "python"):
        exec(compile(re.sub(r"runs/(NAME|fed-peat-…)", str(tiny_run), code), page, "exec"), namespace)


class Parsed(Exception):
    """A command line was understood; nothing is to be run."""


def parse_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script, or the package, read its command line, and stop there."""
    cli = tyro.cli

    def only_parse(kind: Any, **options: Any) -> None:
        if inspect.isfunction(kind):  # what a command does

            @functools.wraps(kind)
            def understood(*_: Any, **__: Any) -> None:
                raise Parsed

            cli(understood, **options)
        config = cli(kind, **options)
        if isinstance(config, SimulationConfig):
            config.validate()
        raise Parsed

    monkeypatch.setattr(tyro, "cli", only_parse)
    if words[:2] == ["-m", "fedpeat_ray"]:
        sys.exit(commands.main(words[2:]))
    assert words[0].startswith("workloads/"), words
    monkeypatch.setattr("sys.argv", words)
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def parse_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise something if a command does not exist or does not take these words."""
    words = words[1:] if words[0] == "export" else words
    while words and ENVIRONMENT.fullmatch(words[0]):
        words = words[1:]
    match words:
        case []:
            pass
        case ["make", *targets]:
            if shutil.which("make"):
                subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
        case ["ray", *rest]:
            command: click.Command = ray_command
            while isinstance(command, click.Group):
                command = command.commands[rest.pop(0)]
            command.make_context("ray", rest.copy())
            if "--" in rest:  # what a job runs
                parse_command(rest[rest.index("--") + 1 :], monkeypatch)
        case [("fedpeat" | ".venv/bin/fedpeat"), *rest]:
            parse_command(["python", "-m", "fedpeat_ray", *rest], monkeypatch)
        case [("python" | ".venv/bin/python"), *rest]:
            with monkeypatch.context() as patch, pytest.raises((Parsed, SystemExit)) as ended:
                parse_python(rest, patch)
            if isinstance(ended.value, SystemExit):
                assert ended.value.code == 0 and "--help" in rest, f"{rest} is not understood"
        case _:
            raise AssertionError(f"nobody has said how to check {shlex.join(words)!r}")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_commands_in_the_documentation_are_understood(page, tiny_run, tmp_path, monkeypatch):
    training = begun(TrainConfig(out=tmp_path))
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            directory = training if "train_controller.py" in line else tiny_run
            words = shlex.split(re.sub(r"\b(OTHER_)?DIR\b", str(directory), line), comments=True)
            if words:
                parse_command(words, monkeypatch)


@pytest.mark.parametrize(
    "wrong",
    [
        "python workloads/large_scale.py --no-such-flag 1",
        "python workloads/large_scale.py --rounds 0",
        "python workloads/compare_algorithms.py --rounds many",
        "python workloads/none.py",
        "python -m fedpeat_ray generate",
        "fedpeat watch",
        "fedpeat runs --no-such-flag",
        "fedpeat none",
        "make nothing",
        "ray start --no-such-flag",
        "ray none",
        "rm -r runs",
    ],
)
def test_commands_that_are_wrong_are_found(wrong, monkeypatch):
    with pytest.raises((SystemExit, Exception)) as found:
        parse_command(wrong.split(), monkeypatch)
    assert not isinstance(found.value, Parsed)


def test_every_block_of_code_is_python_or_shell_or_says_no_language():
    for page in PAGES:
        assert set(re.findall(r"^```(\w+)$", (ROOT / page).read_text(), re.M)) <= {"python", "sh"}, page


def test_the_table_of_tiers_has_the_figures_of_the_code():
    rows = (ROOT / "docs/fleet.md").read_text().splitlines()
    for tier in TIERS:
        figures = (
            tier.share, tier.float32_flops_per_s / 1e9, tier.float16_flops_per_s / 1e9, tier.memory_cap_bytes / 2**20,
            tier.gpu_fraction, tier.downlink_bytes_per_s * 8e-6, tier.uplink_bytes_per_s * 8e-6,
            tier.compute_power_w, tier.radio_power_w,
        )  # fmt: skip
        row = f"| {tier.name} | {tier.description} | " + " | ".join(f"{figure:g}" for figure in figures) + " |"
        assert row in rows
        assert f"- **{tier.name}**: {tier.sources}" in rows


def test_the_file_map_of_the_readme_is_the_tree():
    tree = README.split("```\nfedpeat_ray/\n")[1].split("```")[0]
    named = set(re.findall(r"^ {2}(\w+)/ ", tree, re.M)) | set(re.findall(r"(\w+)\.py", tree))
    package = ROOT / "fedpeat_ray"
    there = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    there |= {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert named == there
    for folder in re.findall(r"^(\w+)/ ", tree, re.M):
        assert (ROOT / folder).is_dir()


def test_links_of_the_documentation_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "LOG.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/cluster.md", "docs/foundation.md", "LOG.md"])
def test_flags_in_the_documentation_exist(page):
    config = SimulationConfig()
    for line in (ROOT / page).read_text().splitlines():
        if "large_scale.py" in line:
            for flag in re.findall(r"--([a-z][\w.-]*)", line.split("large_scale.py", 1)[1]):
                if flag != "help":
                    get(config, re.sub(r"(^|\.)no-", r"\1", flag).replace("-", "_"))
