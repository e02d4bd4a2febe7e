"""The command line: what is wrong is said in one line before anything is trained or written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from processes import forked, living, naming
from tiny_runs import REPOSITORY, main_at

from fedpeat_ray.config import HostsConfig
from fedpeat_ray.runtime import host_pool, ray_hosts
from workloads.large_scale import main


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where runs would go that do not say where."""
    monkeypatch.setenv("FEDPEAT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def refusal(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    """Runs a command line that must be refused; returns the line that says why. Hosts may start meanwhile, and end."""
    pools: list[str] = []

    class Pool:
        about = "Ray at nowhere"

        def __init__(self, config: HostsConfig, last_words: object):
            pools.append("began")

        def start(self, config: HostsConfig) -> None:
            pass

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            pools.append("ended")

    def started(*_: object, **__: object) -> None:
        pytest.fail("hosts were given something to hold")

    def refuse(arguments: list[str]) -> str:
        monkeypatch.setattr(host_pool, "HostPool", Pool)
        monkeypatch.setattr(ray_hosts.RayHosts, "__init__", started)
        monkeypatch.setattr(ray, "init", started)
        assert main([*arguments, "--hosts.backend", "ray"]) == 2
        assert not runs.exists()
        assert pools in ([], ["began", "ended"])
        pools.clear()
        return _one_line(capfd.readouterr().err)

    return refuse


@pytest.mark.parametrize(
    ("wrong", "field", "allowed"),
    [
        (("--cohort-size", 51), "cohort_size = 51", "at most fleet.num_devices = 50"),
        (("--rounds", 0), "rounds = 0", "at least 1"),
        (("--data.partition.alpha", -0.5), "data.partition.alpha = -0.5", "above 0"),
        (("--local.learning-rate", "nan"), "local.learning_rate = nan", "finite"),
        (("--client-batch-size", 0), "client_batch_size = 0", "at least 1"),
        (("--local.sequence-length", 65), "local.sequence_length = 65", "at most 64"),
        (("--evaluation.sequence-length", 65), "evaluation.sequence_length = 65", "at most 64"),
        (("--data.text-column", "body"), "data.text_column = 'body'", "text"),
        (("--lora.targets", "no_such_module"), "lora.targets", "c_attn"),
        (("--fleet.tier-shares", 1, 2), "fleet.tier_shares = '1'", "NAME=SHARE"),
        (("--fleet.tier-shares", "phone=1"), "fleet.tier_shares = 'phone'", "phone-low"),
        (("--fleet.tiers", "/no/file.toml"), "fleet.tiers", "/no/file.toml"),
        (("--fleet.availability.kind", "trace"), "fleet.availability.trace", "a CSV file"),
        (("--fleet.availability.kind", "trace", "--fleet.availability.trace", "/no/file.csv"), "trace", "/no/file.csv"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_setting_that_cannot_be_used_is_refused_with_what_is_allowed(wrong, field, allowed, refusal, tiny_arguments):
    line = refusal(tiny_arguments(*wrong))
    assert field in line and allowed in line


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, "is a directory without a file to read"),
        (lambda path: (path / "a.jsonl").write_text('{"text": "one"'), "cannot be read"),
        (lambda path: (path / "a.jsonl").write_text('{"text": ""}\n'), "has no text"),
        (lambda path: (path / "a.jsonl").write_text('{"text": 5}\n'), "must be string"),
        (lambda path: (path / "a.txt").write_text("one document"), "nothing left to train on"),
    ],
    ids=["empty directory", "broken file", "no text", "numbers", "one document"],
)
def test_text_that_cannot_be_read_is_refused(write, said, refusal, tiny_arguments, tmp_path):
    (tmp_path / "text").mkdir()
    write(tmp_path / "text")
    assert said in refusal(tiny_arguments("--data.name", tmp_path / "text"))


def test_a_directory_that_is_no_model_is_refused(refusal, tiny_arguments, tmp_path):
    (tmp_path / "model").mkdir()
    assert "foundation.name" in refusal(tiny_arguments("--foundation.name", tmp_path / "model"))
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "holds no tokenizer" in refusal(tiny_arguments("--foundation.name", tmp_path / "model"))


def test_the_directory_of_another_run_is_refused(refusal, tiny_arguments, uninterrupted):
    before = _contents(uninterrupted)
    assert "holds another run" in refusal(tiny_arguments("--out", uninterrupted))
    assert _contents(uninterrupted) == before


def test_a_directory_that_another_run_has_just_claimed_is_refused(refusal, tiny_arguments, tmp_path):
    (tmp_path / "run" / "rounds").mkdir(parents=True)
    assert "holds another run" in refusal(tiny_arguments("--out", tmp_path / "run"))


def test_a_file_in_the_place_of_the_run_directory_is_refused(refusal, tiny_arguments, tmp_path):
    (tmp_path / "file").write_text("here first")
    assert f"{tmp_path / 'file'} is no directory" in refusal(tiny_arguments("--out", tmp_path / "file"))


@pytest.mark.parametrize("form", [("--resume", "{}"), ("--resume={}",)], ids=["two words", "one word"])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        (("--seed", "5"), "seed = 5 is not allowed: 0, as in the run that is resumed"),
        (("--lora.rank", "4"), "lora.rank = 4 is not allowed: 2, as in the run that is resumed"),
        (("--rounds", "3"), "rounds = 3 is not allowed: at least 4"),
        (("--out", "elsewhere"), "out = 'elsewhere' is not allowed: unset together with resume"),
    ],
    ids=["seed", "rank", "fewer rounds", "out"],
)
def test_a_run_is_not_resumed_with_another_configuration(form, other, said, refusal, uninterrupted):
    before = _contents(uninterrupted)
    assert said in refusal([*(word.format(uninterrupted) for word in form), *other])
    assert _contents(uninterrupted) == before


def test_a_directory_that_holds_no_run_is_not_resumed(refusal, tmp_path):
    assert f"{tmp_path} holds no run" in refusal(["--resume", str(tmp_path)])
    assert f"{tmp_path / 'none'} holds no run" in refusal(["--resume", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
    (tmp_path / "config.json").write_text("{")
    assert "is no JSON" in refusal(["--resume", str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    assert "has no configuration" in refusal(["--resume", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps({"config": {"colour": "red"}}))
    assert "colour" in refusal(["--resume", str(tmp_path)])


def test_a_number_that_is_none_ends_with_a_non_zero_exit(runs, capfd):
    with pytest.raises(SystemExit) as ended:
        main(["--rounds", "abc"])
    assert ended.value.code == 2 and "--rounds" in capfd.readouterr().err
    assert not runs.exists()


@pytest.mark.parametrize(
    ("field", "name", "backend"),
    [
        pytest.param("foundation.name", "nobody/no-such-model", "ray", marks=pytest.mark.full),
        ("data.name", "nobody/no-such-text", "serial"),
    ],
)
def test_a_name_that_the_hub_does_not_give_ends_all_processes(
    field, name, backend, tiny_arguments, short_folder, tmp_path
):
    places = {"RAY_TMPDIR": str(short_folder), "FEDPEAT_RUNS": str(tmp_path / "runs")}
    out, error = tmp_path / "out", tmp_path / "error"
    hosts = ("--hosts.num-hosts", 1) if backend == "ray" else ()
    arguments = tiny_arguments(f"--{field}", name, "--hosts.backend", backend, *hosts)
    assert forked(out, error, main_at, tmp_path, places, arguments) == 2
    assert f"{field} = '{name}'" in _one_line(error.read_text())
    assert not (tmp_path / "runs").exists()
    assert bool(list(short_folder.iterdir())) == (backend == "ray"), "whether Ray was started"
    assert not living(naming(short_folder)), "what was started has ended"


def test_a_good_run_ends_with_its_directory_and_a_report(runs, tiny_arguments, capfd):
    assert main(tiny_arguments("--rounds", 2)) == 0
    *_, report_line, last = capfd.readouterr().out.splitlines()
    directory = Path(last)
    assert directory.is_absolute() and directory.parent == runs
    assert report_line == f"report: {directory / 'report.html'}"
    assert (directory / "report.html").stat().st_size > 10_000
    (directory / "report.html").unlink()
    command = [sys.executable, "-m", "analysis", "report", str(directory)]
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and again.stdout.split() == [str(directory / "report.html")]
    assert (directory / "report.html").stat().st_size > 10_000


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for that of a socket."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    yield folder
    shutil.rmtree(folder)


def _one_line(error: str) -> str:
    """The line that tells what is wrong: the only one of its kind, the last, and no traceback."""
    lines = error.splitlines()
    assert lines and lines[-1].startswith("error: "), error
    assert not any(line.startswith(("error: ", "Traceback")) for line in lines[:-1]), error
    return lines[-1]


def _contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
