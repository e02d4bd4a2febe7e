"""The command `fedpeat`: what it has, how runs are listed from their directories, and how one is followed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import whole_runs

from fedpeat_ray import Simulation
from fedpeat_ray.__main__ import COMMANDS, main
from fedpeat_ray.commands import watch
from fedpeat_ray.errors import RunDirError
from fedpeat_ray.runtime import run_lock
from fedpeat_ray.runtime.run_lock import LOCK, is_held, only_writer
from fedpeat_ray.runtime.run_log import RunLog
from fedpeat_ray.runtime.run_state import state_of

ROOT = Path(__file__).parents[2]
SUMMARY = "summary.json"


@pytest.fixture(scope="module")
def original(gpt2_dir: Path, text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three rounds, of which the second and the third were evaluated."""
    directory = tmp_path_factory.mktemp("original") / "run"
    config = whole_runs.tiny(gpt2_dir, text_dir, algorithm="fed-peft", out=directory, evaluation={"every": 2})
    Simulation(config).run()
    return directory


@pytest.fixture
def finished(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(original, tmp_path / "runs" / "finished"))


@pytest.fixture
def interrupted(finished: Path) -> Path:
    """The same without a summary."""
    (finished / SUMMARY).unlink()
    return finished.rename(finished.with_name("interrupted"))


@pytest.fixture
def failed(finished: Path) -> Path:
    """The same with one that says why nothing came out."""
    summary = json.loads((finished / SUMMARY).read_text())
    (finished / SUMMARY).write_text(json.dumps(summary | {"failure": "no update was used"}))
    return finished.rename(finished.with_name("failed"))


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def listed(out: str) -> list[list[str]]:
    """The rows of the table of runs, in words of at least two spaces' distance."""
    lines = out.split("─ \n", 1)[1].splitlines()
    return [[word.strip() for word in line.split("  ") if word.strip()] for line in lines if line.strip()]


def test_a_finished_run_has_the_figures_of_its_summary(original):
    run, summary = state_of(original), json.loads((original / SUMMARY).read_text())
    assert (run.state, run.algorithm, run.last_round, run.num_rounds) == ("finished", "fed-peft", 3, 3)
    assert run.score == summary["perplexity"]["tuned"]
    assert (run.virtual_s, run.wall_s) == (summary["virtual_s"], summary["wall_s"])
    assert run.last_round_at == (original / "rounds" / "00003.parquet").stat().st_mtime


def test_a_run_that_is_not_finished_has_the_figures_of_its_rounds(interrupted):
    (interrupted / "rounds" / "00003.parquet").unlink()
    run, rounds = state_of(interrupted), pq.read_table(interrupted / "rounds").sort_by("round")
    assert (run.state, run.last_round, run.num_rounds) == ("interrupted", 2, 3)
    assert run.score == rounds["perplexity"].to_pylist()[1] is not None
    assert run.virtual_s == rounds["virtual_s"].to_pylist()[1]
    assert run.wall_s == pytest.approx(sum(rounds["wall_s"].to_pylist()))
    (interrupted / "rounds" / "00002.parquet").unlink()
    assert state_of(interrupted).score is None, "the first round is not evaluated"


def test_runs_are_listed_with_the_metric_of_their_task(original, tmp_path, capsys):
    summary = json.loads((original / SUMMARY).read_text())
    summary |= {"metric": {"name": "accuracy", "higher_is_better": True}, "scores": {"tuned": 0.727}}
    for name in ("one", "two"):
        shutil.copytree(original, tmp_path / "runs" / name)
        (tmp_path / "runs" / name / SUMMARY).write_text(json.dumps(summary))
    assert main(["runs", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out and out.count("72.7%") == 2 and "perplexity" not in out
    (tmp_path / "runs" / "two" / SUMMARY).unlink()
    assert main(["runs", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "score" in out and "accuracy 72.7%" in out and "perplexity " in out


def test_states_are_told_by_lock_and_summary(finished):
    summary = (finished / SUMMARY).read_text()
    assert state_of(finished).state == "finished"
    with only_writer(finished):  # to give it more rounds
        assert state_of(finished).state == "running"
    (finished / SUMMARY).unlink()
    with only_writer(finished):
        assert state_of(finished).state == "running"
    assert state_of(finished).state == "interrupted"
    (finished / LOCK).unlink()  # of an older version, or a copy without hidden files
    assert state_of(finished).state == "interrupted"
    (finished / SUMMARY).write_text(json.dumps(json.loads(summary) | {"failure": "nobody came"}))
    assert state_of(finished).state == "failed"


def test_without_locks_a_run_without_a_summary_is_unfinished(finished, no_locks, capsys):
    assert state_of(finished).state == "finished"
    (finished / SUMMARY).unlink()
    assert state_of(finished).state == "unfinished"
    assert main(["runs", str(finished.parent)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("unfinished: running or interrupted")


def test_who_looks_writes_nothing(interrupted, capsys):
    def everything() -> dict[Path, tuple[int, int]]:
        found = {path: path.stat() for path in (interrupted, *interrupted.rglob("*"))}
        return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in found.items()}

    before = everything()
    assert main(["runs", str(interrupted)]) == 0
    assert main(["watch", str(interrupted)]) == 1
    assert everything() == before


def test_a_writer_is_not_refused_for_somebody_who_looks(finished, monkeypatch):
    looking = (finished / LOCK).open("rb")
    fcntl.flock(looking, fcntl.LOCK_SH)
    with monkeypatch.context() as patch:
        patch.setattr(run_lock, "time", types.SimpleNamespace(sleep=lambda _: looking.close()))
        with only_writer(finished) as has_locks:
            assert has_locks and is_held(finished)
    assert not is_held(finished)


def test_a_second_writer_is_refused_as_ever(finished):
    with only_writer(finished), pytest.raises(RunDirError, match=f"being written by process {os.getpid()}"):
        only_writer(finished).__enter__()


def test_runs_are_listed_by_age_also_those_of_sweeps(finished, monkeypatch, capsys):
    folder = finished.parent
    shutil.copytree(finished, folder / "sweep" / "rank 4")
    shutil.copytree(finished, folder / "deep" / "er" / "still")
    (folder / "a file").touch()
    (folder / "a model").mkdir()
    (folder / "a model" / "config.json").write_text("{}")
    config = json.loads((finished / "config.json").read_text())
    (folder / "sweep" / "rank 4" / "config.json").write_text(json.dumps(config | {"created": "2020-01-01"}))
    monkeypatch.setenv("FEDPEAT_RUNS", str(folder))
    assert main(["runs"]) == 0
    by_default = capsys.readouterr().out
    assert f"runs in {folder}" in by_default
    rows = listed(by_default)
    assert [row[:4] for row in rows] == [
        ["sweep/rank 4", "fed-peft", "finished", "3/3"],
        ["finished", "fed-peft", "finished", "3/3"],
    ]
    assert rows[0][-1].endswith("ago")
    assert main(["runs", str(finished), str(folder / "sweep"), str(finished)]) == 0
    out = capsys.readouterr().out
    assert {f"runs in {folder}", f"runs in {folder / 'sweep'}"} <= set(out.splitlines())
    assert out.count(" 3/3 ") == 2, "no run is listed twice"


def test_folders_without_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FEDPEAT_RUNS", str(tmp_path / "none"))
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == f"no runs yet: {tmp_path / 'none'} is not there\n"
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'} cannot be read: No such file or directory\n"


def _no_config(run: Path) -> None:
    (run / "config.json").unlink()


def _broken_config(run: Path) -> None:
    (run / "config.json").write_text('{"config": {"rou')


def _other_config(run: Path) -> None:
    (run / "config.json").write_text('{"config": {"rounds": "many", "algorithm": 3, "foundation": []}, "created": 5}')


def _list_for_config(run: Path) -> None:
    (run / "config.json").write_text("[]")


def _broken_row(run: Path) -> None:
    (run / "rounds" / "00002.parquet").write_bytes(b"PAR1 and no more")


def _stray_file(run: Path) -> None:
    shutil.copy(run / "rounds" / "00002.parquet", run / "rounds" / "00002 (copy).parquet")


def _no_rounds(run: Path) -> None:
    shutil.rmtree(run / "rounds")
    (run / "rounds").mkdir()


def _half_an_event(run: Path) -> None:
    (run / "events.jsonl").write_text('{"time": "yesterday", "kind": "x"}\n[]\n{"kind": "y"}\n{"time": "2026-')


def _older_columns(run: Path) -> None:
    part = run / "rounds" / "00001.parquet"
    pq.write_table(pq.read_table(part, partitioning=None).drop_columns(["num_skipped", "figures"]), part)


HALF_WRITTEN = (
    _no_config,
    _broken_config,
    _other_config,
    _list_for_config,
    _broken_row,
    _stray_file,
    _no_rounds,
    _half_an_event,
    _older_columns,
)


@pytest.mark.parametrize("damage", HALF_WRITTEN, ids=lambda damage: damage.__name__[1:])
def test_half_written_and_older_directories_are_listed_and_followed(damage, interrupted, capsys):
    damage(interrupted)
    assert main(["runs", str(interrupted.parent)]) == 0
    ((name, _, state, *_),) = listed(capsys.readouterr().out)
    assert (name, state) == ("interrupted", "interrupted")
    assert main(["watch", str(interrupted)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("interrupted: ") and not err


def test_a_finished_run_is_said_as_it_said_itself(gpt2_dir, text_dir, tmp_path, capsys):
    config = whole_runs.tiny(gpt2_dir, text_dir, algorithm="fed-peft", out=tmp_path / "run", evaluation={"every": 2})
    Simulation(config).run()
    own = capsys.readouterr().out.splitlines()
    assert main(["watch", str(tmp_path / "run")]) == 0
    head, directory, *lines = capsys.readouterr().out.splitlines()
    assert head == f"fed-peft on {gpt2_dir}, 3 rounds: finished" and directory in own
    start = next(number for number, line in enumerate(own) if line.startswith("   round  perplexity"))
    rounds = [line for line in lines if line.strip().startswith(("round", "1/", "2/", "3/"))]
    assert rounds == own[start : start + 4] and len(rounds) == 4
    assert any("perplexity, zero-shot" in line for line in lines)


class Writer:
    """What a run does while it is followed: a step whenever the follower waits."""

    def __init__(self, log: RunLog, source: Path, monkeypatch: pytest.MonkeyPatch):
        self.log, self._source = log, source
        self.steps: Iterator[Any] = iter(())
        monkeypatch.setattr(watch, "time", types.SimpleNamespace(sleep=lambda _: next(self.steps)))

    def round(self, number: int) -> None:
        """Complete a round."""
        (row,) = pq.read_table(self._source / "rounds" / "00002.parquet", partitioning=None).to_pylist()
        self.log.write_round(number, row | {"round": number, "figures": dict(row["figures"])}, [])

    def finish(self, **more: Any) -> None:
        """Write the summary."""
        self.log.write_summary(json.loads((self._source / SUMMARY).read_text()) | more)


@pytest.fixture
def writer(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Writer:
    """Of a run of three rounds that has written nothing but its configuration."""
    config = json.loads((original / "config.json").read_text())["config"]
    return Writer(RunLog.create(tmp_path / "live", config), original, monkeypatch)


def said(out: str) -> list[str]:
    """Rounds by number and events by kind, in order; the last line, if it is about the end."""
    words = (line.split()[0] for line in out.splitlines()[2:] if line.strip())
    return [word.rstrip(":") for word in words if "/" in word or word.endswith(":")]


def test_rounds_and_events_come_as_they_are_written(writer, capsys):
    def steps() -> Iterator[None]:
        with only_writer(writer.log.directory):
            writer.round(1)
            yield
            assert said(capsys.readouterr().out) == ["1/3"]
            yield
            assert capsys.readouterr().out == "", "nothing is said twice"
            writer.log.event("host_lost", batch=3, device_ids=list(range(99)), error="the actor\ndied")
            yield
            (line,) = capsys.readouterr().out.splitlines()
            assert line.startswith("host_lost: batch 3, device_ids [0, 1, 2,") and line.endswith("error the actor died")
            with (writer.log.directory / "events.jsonl").open("a") as file:
                file.write('{"time": "2026-01-01T00:00:00+00:00", "ki')
                file.flush()
                writer.round(2)
                yield
                assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["2/3"]
                file.write('nd": "nodes", "count": 2}\n')
            writer.round(3)
            yield
            lines = capsys.readouterr().out.splitlines()
            assert lines[0] == "nodes: count 2" and lines[1].split()[0] == "3/3"
            writer.finish(warnings=["it got worse"])
            yield
            assert capsys.readouterr().out == "", "the lock is still held"
        yield

    writer.steps = steps()
    next(writer.steps)
    assert main(["watch", str(writer.log.directory)]) == 0
    out, err = capsys.readouterr()
    assert "warning: it got worse" in out and "perplexity, zero-shot" in out and not err
    assert not list(writer.steps), "the run ended later than the follower"


def test_a_run_that_goes_on_from_a_checkpoint_says_its_rounds_again(writer, capsys):
    def steps() -> Iterator[None]:
        writer.round(1)
        writer.round(2)
        with only_writer(writer.log.directory):
            yield
            config = json.loads((writer.log.directory / "config.json").read_text())["config"]
            RunLog.resume(writer.log.directory, config | {"rounds": 5}).truncate_after(1)
            yield
            writer.round(2)
            yield
        yield

    writer.steps = steps()
    next(writer.steps)
    assert main(["watch", str(writer.log.directory)]) == 1
    out = capsys.readouterr().out
    assert said(out) == ["1/3", "2/3", "resumed", "2/5", "interrupted"]
    assert out.splitlines()[-1] == (
        f"interrupted: 2 of 5 rounds are complete in {writer.log.directory}; "
        f"go on with: python -m fedpeat_ray run --resume {writer.log.directory}"
    )


def test_without_locks_a_run_is_followed_until_it_has_a_summary(writer, no_locks, capsys):
    def steps() -> Iterator[None]:
        writer.round(1)
        yield
        writer.finish()
        yield

    writer.steps = steps()
    (writer.log.directory / LOCK).touch()
    assert main(["watch", str(writer.log.directory)]) == 0
    out = capsys.readouterr().out
    assert "no locks tell whether it is running" in out and said(out) == ["1/3"]


def test_a_run_without_a_result_ends_with_its_reason(failed, capsys):
    assert main(["watch", str(failed)]) == 2
    out, err = capsys.readouterr()
    assert err == "error: no update was used\n" and "perplexity, zero-shot" in out


def test_what_holds_no_run_is_refused_in_one_line(tmp_path, capsys):
    for directory in (tmp_path, tmp_path / "none"):
        assert main(["watch", str(directory)]) == 2
        assert capsys.readouterr() == ("", f"error: {directory} holds no run\n")


def test_ctrl_c_ends_the_following_and_nothing_else(writer, capsys):
    def steps() -> Iterator[None]:
        writer.round(1)
        raise KeyboardInterrupt
        yield

    writer.steps = steps()
    with only_writer(writer.log.directory):
        assert main(["watch", str(writer.log.directory)]) == 130
    assert capsys.readouterr().err == ""


def test_listing_and_following_load_nothing_that_computes(original):
    code = f"import sys; from fedpeat_ray.__main__ import main; main(['runs', {str(original)!r}]); "
    code += f"main(['watch', {str(original)!r}]); "
    code += "print([m for m in ('torch', 'transformers', 'ray', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_table_of_commands(capsys, monkeypatch):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS) and shown.count("\n  ") == len(COMMANDS)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/fedpeat"])
    assert main() == 2 and capsys.readouterr().out.startswith("usage: fedpeat COMMAND")
    assert main(["rnu"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no command 'rnu': one of run, plan,")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m fedpeat_ray {name} ")


def test_report_is_that_of_analysis(original, monkeypatch, capsys):
    monkeypatch.setattr("analysis.__main__.write_report", lambda directories, *_: directories[0] / "page")
    assert main(["report", str(original)]) == 0
    assert capsys.readouterr().out == f"{original / 'page'}\n"
    assert main(["report", "runs.html"]) == 2
    assert capsys.readouterr().err == "error: report needs at least one run directory\n"


@pytest.mark.parametrize("script", ["fedpeat", "__main__.py"])
def test_an_interrupted_run_names_the_command_that_was_used(script, gpt2_dir, text_dir, tmp_path, monkeypatch, capsys):
    write: Callable[..., None] = RunLog.write_round

    def stop(log: RunLog, round: int, *rows: Any) -> None:
        if round == 2:
            raise KeyboardInterrupt
        write(log, round, *rows)

    monkeypatch.setattr(RunLog, "write_round", stop)
    monkeypatch.setattr(sys, "argv", [script])
    words = f"run --algorithm fed-peft --foundation.name {gpt2_dir} --data.name {text_dir} --hosts.backend serial"
    words += " --rounds 2 --cohort-size 4 --client-batch-size 4 --fleet.num-devices 14 --local.max-steps 1"
    words += " --local.sequence-length 32 --evaluation.sequence-length 32 --evaluation.num-sequences 4"
    assert main([*words.split(), "--out", str(tmp_path / "run")]) == 130
    called = {"fedpeat": "fedpeat", "__main__.py": "python -m fedpeat_ray"}[script]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"; go on with: {called} run --resume {tmp_path / 'run'}")
