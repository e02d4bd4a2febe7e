"""The run directory: whole parts only, strict JSON, one run a directory, docs equal to the schema."""

import io
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.errors import RunDirError
from fedpeat_ray.records import CLIENT_COLUMNS, MEMORY, ROUND_COLUMNS, SKIPPED, Column, arrow_schema
from fedpeat_ray.runtime import run_log
from fedpeat_ray.runtime.metric import Metric
from fedpeat_ray.runtime.progress import Progress, human_bytes, human_seconds, print_summary
from fedpeat_ray.runtime.run_log import RunLog, default_run_dir, read_config

DOCS = Path(__file__).parents[2] / "docs" / "run_log.md"


def round_row(round: int, **values) -> dict:
    row = {column.name: 1 for column in ROUND_COLUMNS} | {"round": round, "perplexity": 40.0 - round, "wall_s": 2.0}
    return row | {"figures": {"top_level": 2.0}, "metrics": {"accuracy": 0.5}, "device_metrics": {}} | values


def client_row(round: int, device_id: int, **values) -> dict:
    row = {column.name: 1 for column in CLIENT_COLUMNS} | {"round": round, "device_id": device_id}
    names = {"tier": "phone", "group": "user 7", "outcome": "completed", "drop_reason": None}
    return row | names | {"level": None} | values


@pytest.fixture
def log(tmp_path) -> RunLog:
    return RunLog.create(tmp_path / "deep" / "run", SimulationConfig().to_dict())


def write_rounds(log: RunLog, num_rounds: int) -> None:
    for round in range(1, num_rounds + 1):
        log.write_round(round, round_row(round), [client_row(round, device_id) for device_id in (3, 5)])


def test_tables_read_back_with_the_schema(log):
    write_rounds(log, 3)
    for folder, columns, num_rows in (("rounds", ROUND_COLUMNS, 3), ("clients", CLIENT_COLUMNS, 6)):
        table = pd.read_parquet(log.directory / folder, dtype_backend="pyarrow")
        assert len(table) == num_rows
        assert {name: dtype.pyarrow_dtype for name, dtype in table.dtypes.items()} == {
            column.name: column.type for column in columns
        }


def test_rows_and_columns_of_clients_give_the_same_bytes(log, tmp_path):
    rows = [client_row(1, 3, train_loss=2.5), client_row(1, 5, outcome="dropped", train_loss=None)]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    columns["train_loss"] = np.array([2.5, np.nan])
    other = RunLog.create(tmp_path / "other", {})
    log.write_round(1, round_row(1), rows)
    other.write_round(1, round_row(1), columns)
    part = Path("clients", "00001.parquet")
    assert (log.directory / part).read_bytes() == (other.directory / part).read_bytes()


def test_nan_and_none_become_null(log):
    log.write_round(1, round_row(1, perplexity=None, train_loss=math.nan), [])
    rounds = pd.read_parquet(log.directory / "rounds", dtype_backend="pyarrow")
    assert rounds[["perplexity", "train_loss"]].isna().to_numpy().all()
    assert pd.read_parquet(log.directory / "clients").empty


@pytest.mark.parametrize("broken", ["missing", "unknown", "other round"])
def test_columns_are_exactly_those_of_the_schema(log, broken):
    row = client_row(1, 3)
    if broken == "missing":
        del row["tier"]
    row |= {"unknown": {"colour": "red"}, "other round": {"round": 2}}.get(broken, {})
    with pytest.raises(AssertionError):
        log.write_round(1, round_row(1), [row])
    with pytest.raises(AssertionError):
        log.write_round(1, round_row(2), [client_row(1, 3)])
    assert not list((log.directory / "rounds").iterdir())


NEW = ("num_skipped", "figures")


@pytest.mark.parametrize("lacking", [(), *((name,) for name in NEW), NEW])
def test_a_round_without_skipped_devices_or_figures_need_not_say_so(log, lacking):
    row = {name: value for name, value in round_row(1).items() if name not in lacking}
    log.write_round(1, row, [])
    rounds = pq.read_table(log.directory / "rounds")
    assert rounds.schema == arrow_schema(ROUND_COLUMNS)
    assert rounds["num_skipped"].to_pylist() == [0 if "num_skipped" in lacking else 1]
    assert rounds["figures"].to_pylist() == [[] if "figures" in lacking else [("top_level", 2.0)]]
    with pytest.raises(AssertionError, match="num_tokens"):
        log.write_round(2, {name: value for name, value in round_row(2).items() if name != "num_tokens"}, [])


def test_figures_are_numbers_of_any_kind_by_name(log):
    figures = {"whole": 3, "numpy": np.float32(0.5), "not a number": math.nan, "huge": math.inf, "none": None}
    log.write_round(1, round_row(1, figures=figures), [])
    written = dict(pq.read_table(log.directory / "rounds")["figures"].to_pylist()[0])
    assert written == {"whole": 3.0, "numpy": 0.5, "not a number": None, "huge": math.inf, "none": None}


def test_a_crash_before_the_move_leaves_what_was_there(log, monkeypatch):
    write_rounds(log, 2)
    before = pd.read_parquet(log.directory / "clients")

    def crash(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process tidies nothing up
        with pytest.raises(KeyboardInterrupt):
            log.write_round(3, round_row(3), [client_row(3, 3)])
        with pytest.raises(KeyboardInterrupt):
            log.write_summary({"rounds": 3})
    assert len(list((log.directory / "clients").iterdir())) == 3, "no hidden file was left: the test tests nothing"
    pd.testing.assert_frame_equal(pd.read_parquet(log.directory / "clients"), before)
    assert not (log.directory / "summary.json").exists()
    write_rounds(RunLog.resume(log.directory, {"seed": 1}), 3)
    assert sorted(path.name for path in (log.directory / "clients").iterdir())[-1] == "00003.parquet"
    assert len(list((log.directory / "clients").iterdir())) == 3


def test_truncate_after_goes_back_to_a_checkpoint(log):
    write_rounds(log, 5)
    log.event("checkpoint", round=3)
    log.write_summary({"rounds": 5})
    log.truncate_after(3)
    assert sorted(pd.read_parquet(log.directory / "rounds")["round"]) == [1, 2, 3]
    assert set(pd.read_parquet(log.directory / "clients")["round"]) == {1, 2, 3}
    assert not (log.directory / "summary.json").exists()
    assert (log.directory / "events.jsonl").exists()


def test_a_directory_holds_one_run(log, tmp_path):
    RunLog.check_free(tmp_path / "free")
    with pytest.raises(RunDirError, match="another run"):
        RunLog.check_free(log.directory)
    with pytest.raises(RunDirError, match="another run"):
        RunLog.create(log.directory, {})
    (tmp_path / "started" / "rounds").mkdir(parents=True)  # another run, just before its config.json
    with pytest.raises(RunDirError, match="another run"):
        RunLog.create(tmp_path / "started", {})
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match="file"):
        RunLog.create(tmp_path / "file" / "run", {})
    RunLog.create(tmp_path, {})  # an existing directory with other things in it is fine


def test_resume_and_read_config_need_a_run(tmp_path):
    with pytest.raises(RunDirError, match="holds no run"):
        read_config(tmp_path)
    with pytest.raises(RunDirError, match="holds no run"):
        RunLog.resume(tmp_path, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunDirError, match="no JSON"):
        read_config(tmp_path)


def test_config_is_complete_and_repeats_the_run(tmp_path):
    config = SimulationConfig(seed=7, out=tmp_path)
    RunLog.create(tmp_path / "run", config.to_dict(), {"num_hosts": 2}, data_digest="ab", gpus=("H200",))
    written = read_config(tmp_path / "run")
    assert SimulationConfig.from_dict(written["config"]) == config
    assert written["resolved"] == {"num_hosts": 2}
    assert written["data_digest"] == "ab"
    assert written["hardware"]["gpus"] == ["H200"]
    assert written["hardware"]["num_cpus"] == os.cpu_count()
    assert set(run_log.PACKAGES) < set(written["versions"])
    assert written["git"] is None or set(written["git"]) == {"commit", "dirty"}


def test_json_is_strict(log):
    log.write_summary({"perplexity": {"tuned": math.nan, "centralised": np.float32("inf")}, "rounds": np.int64(3)})
    log.event("non-finite update", devices=np.array([1, 2]), loss=math.inf, path=Path("a"))
    log.event("retry", host=1)

    def refuse(constant):
        raise AssertionError(constant)

    summary = json.loads((log.directory / "summary.json").read_text(), parse_constant=refuse)
    assert summary == {"perplexity": {"tuned": None, "centralised": None}, "rounds": 3}
    lines = (log.directory / "events.jsonl").read_text().splitlines()
    events = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [event.pop("time")[-6:] for event in events] == ["+00:00", "+00:00"]
    assert events[0] == {"kind": "non-finite update", "devices": [1, 2], "loss": None, "path": "a"}
    assert events[1] == {"kind": "retry", "host": 1}


@pytest.fixture
def no_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDPEAT_RUNS", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("no_environment")
def test_default_run_dir(monkeypatch, tmp_path):
    home = tmp_path / "home" / "fedpeat_runs"
    assert default_run_dir("fed-peft", 3).parent == home
    (tmp_path / ".git").mkdir()
    assert default_run_dir("fed-peft", 3).parent == home
    (tmp_path / "pyproject.toml").touch()
    assert default_run_dir("fed-peft", 3).parent == tmp_path / "runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert default_run_dir("fed-peft", 3).parent == home
    monkeypatch.setenv("FEDPEAT_RUNS", "elsewhere")
    path = default_run_dir("fed-peft", 3)
    assert path.parent == tmp_path / "elsewhere"
    assert pd.Series([path.name]).str.fullmatch(r"fed-peft-\d{8}-\d{6}-seed3").all()


@pytest.mark.usefixtures("no_environment")
def test_default_run_dir_is_free(monkeypatch):
    class Noon(run_log.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 12, 0, 0, tzinfo=tz)

    monkeypatch.setattr(run_log, "datetime", Noon)
    names = []
    for _ in range(3):
        path = default_run_dir("fed-avg", 0)
        path.mkdir(parents=True)
        names.append(path.name)
    assert names == ["fed-avg-20260102-120000-seed0" + suffix for suffix in ("", "-2", "-3")]


def table_lines(columns: tuple[Column, ...]) -> str:
    lines = ["| column | type | unit | meaning |", "|---|---|---|---|"]
    for column in columns:
        meaning = column.meaning.replace("|", "\\|")
        lines.append(f"| `{column.name}` | {column.type} | {column.unit} | {meaning} |")
    return "\n".join(lines)


@pytest.mark.parametrize(("heading", "columns"), [("rounds", ROUND_COLUMNS), ("clients", CLIENT_COLUMNS)])
def test_docs_equal_the_schema(heading, columns):
    section = DOCS.read_text(encoding="utf-8").split(f"\n## `{heading}`\n")[1].split("\n## ")[0]
    assert section.strip() == table_lines(columns)
    assert len(arrow_schema(columns)) == len(columns)


def test_progress_in_a_log_is_one_plain_line_a_round():
    out = io.StringIO()
    with Progress(12, console=Console(file=out)) as progress:
        progress.stage("loading [pydoc-base]")
        progress.round(round_row(1, virtual_s=125.0, download_bytes=1_500_000))
        progress.round(round_row(12, perplexity=None))
    stage, head, first, last = out.getvalue().splitlines()
    assert stage == "loading [pydoc-base]"
    assert head.split() == ["round", "perplexity", "updates", "clock", "down", "up", "took", "left"]
    assert first.split()[:3] == ["1/12", "39.00", "1/2"] and first.endswith("22.0 s")
    assert "2 min 05 s" in first and "1.5 MB" in first
    assert last.split()[:2] == ["12/12", "-"] and len(last) < len(first) == len(head) < 80
    assert out.getvalue().isascii() and "\x1b" not in out.getvalue()


def test_progress_speaks_of_the_metric_of_the_task():
    out = io.StringIO()
    with Progress(2, console=Console(file=out), metric=Metric("exact_match", higher_is_better=True)) as progress:
        progress.round(round_row(1, metrics={"exact_match": 0.125, "perplexity": 3.0}))
        progress.round(round_row(2, metrics=[]))  # as read back from a round that was not evaluated
    head, first, last = out.getvalue().splitlines()
    assert "exact match" in head and "perplexity" not in head
    assert first.split()[1] == "12.5%" and last.split()[1] == "-"
    assert head.index("exact match") + len("exact match") == first.index("12.5%") + len("12.5%")


def test_progress_on_a_terminal_is_live():
    out = io.StringIO()
    with Progress(3, first_round=2, console=Console(file=out, force_terminal=True, width=200)) as progress:
        progress.stage("measuring zero-shot")
        progress.round(round_row(2))
    assert "\x1b" in out.getvalue() and " 2/3 " in out.getvalue()


def test_a_terminal_that_can_show_lines_only_gets_the_stages(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    with Progress(3, console=Console(file=out, force_terminal=True)) as progress:
        progress.stage("starting hosts")
    assert out.getvalue() == "starting hosts\n"


def printed(summary: dict) -> dict[str, str]:
    """The table that `print_summary` prints, by the name of the row."""
    out = io.StringIO()
    print_summary(summary, Console(file=out, width=80))
    assert out.getvalue().isascii()
    lines = [line.strip() for line in out.getvalue().splitlines()[2:] if line.strip()]
    rows = [re.split(r"\s{2,}", line, maxsplit=1) for line in lines]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


SUMMARY: dict = {"algorithm": "mine.py:Mine", "rounds": 1, "virtual_s": 1.0, "energy_j": 1.0, "wall_s": 5.0}
SUMMARY |= {"download_bytes": 9_000_000, "emulator_bytes": 0, "upload_bytes": 0, "num_completed": 4, "num_dropped": 2}
SUMMARY |= {"token_accuracy": {"zero_shot": 0.25, "tuned": 0.3}, "perplexity": {"zero_shot": 41.2, "tuned": 31.4}}


@pytest.mark.parametrize("centralised", [28.4, None])
def test_summary_prints_in_a_log(centralised):
    summary = {"algorithm": "fed-peft", "rounds": 1, "virtual_s": 3700.0, "energy_j": 12_345.0, "wall_s": 5.0}
    summary |= {"download_bytes": 1000, "upload_bytes": 0, "num_completed": 1234, "num_dropped": 2}
    summary |= {"perplexity": {"zero_shot": 61.2, "tuned": 31.4, "centralised": centralised}, "gap_closed": 0.9}
    summary |= {"token_accuracy": {"zero_shot": 0.25, "tuned": None}, "drop_reasons": {"memory": 2}}
    out = io.StringIO()
    print_summary(summary, Console(file=out, width=80))
    text = out.getvalue()
    assert ("28.40" in text) == ("gap" in text) == (centralised is not None)
    assert "25.0% -> -" in text and "12.3 kJ" in text and "1 h 02 min" in text and "\x1b" not in text
    assert "emulator" not in text and "plug-in" not in text and "privacy" not in text


def test_summary_of_emulators_prints_each_level_and_what_the_foundation_alone_gives():
    perplexity = {"zero_shot": 41.2, "tuned": 31.4, "centralised": 28.4, "plug_in": 31.4}
    perplexity |= {"emulator_zero_shot": {"1": 58.4, "2": 47.0}, "emulator_tuned": {"1": 45.1, "2": None}}
    found = {"perplexity": perplexity, "gap_closed": 0.77, "privacy_gap": 13.7, "emulator_bytes": 7_000_000}
    rows = printed(SUMMARY | found)
    assert list(rows.items())[:8] == [
        ("perplexity, zero-shot", "41.20"),
        ("perplexity, emulator of level 1", "58.40 -> 45.10"),
        ("perplexity, emulator of level 2", "47.00 -> -"),
        ("perplexity, plug-in", "31.40"),
        ("perplexity, tuned centrally", "28.40"),
        ("share of the gap closed", "77.0%"),
        ("privacy gap", "13.70"),
        ("token accuracy", "25.0% -> 30.0%"),
    ]
    assert rows["sent to devices"] == "9.0 MB" and rows["of these emulators"] == "7.0 MB"


def test_summary_of_a_classification_speaks_of_accuracy():
    found: dict = {"metric": {"name": "accuracy", "higher_is_better": True}, "gap_closed": 0.5, "privacy_gap": 1.5}
    found |= {"scores": {"zero_shot": 0.1, "tuned": 0.5, "centralised": 0.9, "of_the_median": 0.5, "plug_in": 0.5}}
    found |= {"perplexity": {"zero_shot": 9.0, "tuned": 3.0, "of_the_median": 3.1, "plug_in": 3.0}}
    found |= {"metrics": {"zero_shot": {"accuracy": 0.1, "macro_f1": 0.02}, "tuned": {"accuracy": 0.5}}}
    assert list(printed(SUMMARY | found).items())[:7] == [
        ("accuracy, zero-shot", "10.0%"),
        ("accuracy, plug-in", "50.0%"),
        ("accuracy, of the median", "50.0%"),
        ("accuracy, tuned centrally", "90.0%"),
        ("share of the gap closed", "50.0%"),
        ("privacy gap, in perplexity", "1.50"),
        ("macro F1", "2.0% -> -"),
    ]


def test_summary_of_a_small_model_prints_it_alone():
    perplexity = {"zero_shot": 41.2, "tuned": 31.4, "centralised": None}
    perplexity |= {"small_zero_shot": 80.0, "small_tuned": 65.0, "proxy_tuned": 31.4}
    assert list(printed(SUMMARY | {"perplexity": perplexity}).items())[:4] == [
        ("perplexity, zero-shot", "41.20"),
        ("perplexity, small model alone", "80.00 -> 65.00"),
        ("perplexity, steered", "31.40"),
        ("token accuracy", "25.0% -> 30.0%"),
    ]


@pytest.mark.parametrize("tuned", [math.nan, None])
def test_summary_of_a_result_that_is_no_number_prints(tuned):
    rows = printed(SUMMARY | {"perplexity": {"zero_shot": 41.2, "tuned": tuned, "plug_in": tuned}})
    assert rows["perplexity, plug-in"] == "-" and "perplexity, tuned" not in rows


def test_summary_prints_what_it_does_not_know():
    perplexity = {"zero_shot": 41.2, "tuned": 31.4, "centralised": None, "of_the_median_device": 35.5, "words": "many"}
    perplexity |= {"sparse_twin_zero_shot": 70.0, "sparse_twin_tuned": 60.0, "lone_tuned": 50.0, "plug_in": 33.3}
    perplexity |= {"slice_zero_shot": {"left": 90.0, "right": 91.0}, "slice_tuned": {"left": 80.0}}
    figures = {"levels_raised": 3, "final_rate": 0.00025, "[bold]": 12345.678, "gone": None, "million": 1e6}
    rows = printed(SUMMARY | {"perplexity": perplexity, "figures": figures, "num_skipped": 5})
    assert list(rows.items())[:15] == [
        ("perplexity, zero-shot", "41.20"),
        ("perplexity, sparse twin model alone", "70.00 -> 60.00"),
        ("perplexity, slice of level left", "90.00 -> 80.00"),
        ("perplexity, slice of level right", "91.00 -> -"),
        ("perplexity, tuned", "31.40"),
        ("perplexity, of the median device", "35.50"),
        ("perplexity, lone tuned", "50.00"),
        ("perplexity, plug-in", "33.30"),
        ("levels raised", "3"),
        ("final rate", "0.00025"),
        ("[bold]", "12,345.68"),
        ("gone", "-"),
        ("million", "1,000,000"),
        ("token accuracy", "25.0% -> 30.0%"),
        ("updates used", "4"),
    ]
    assert rows["devices skipped"] == "5"
    assert "devices skipped" not in printed(SUMMARY | {"num_skipped": 0})


def test_totals_sum_up_the_rounds(log):
    write_rounds(log, 3)
    names = ("num_completed", "num_dropped", "num_skipped", "download_bytes", "emulator_bytes", "upload_bytes")
    totals = log.totals()
    assert {name: totals[name] for name in (*names, "energy_j")} == dict.fromkeys((*names, "energy_j"), 3)
    assert sum(totals["drop_reasons"].values()) == 0


@pytest.mark.parametrize("older", [1, 3])
def test_totals_of_a_run_that_an_older_version_began(log, older):
    write_rounds(log, 3)
    for part in sorted((log.directory / "rounds").iterdir())[:older]:
        pq.write_table(pq.read_table(part).drop_columns(list(NEW)), part)
    totals = log.totals()
    assert totals["num_skipped"] == 3 - older and totals["num_completed"] == 3


def test_skipped_devices_are_not_dropped(log):
    clients = [
        client_row(1, 3),
        client_row(1, 4, outcome=SKIPPED),
        client_row(1, 5, outcome="dropped", drop_reason=MEMORY),
    ]
    log.write_round(1, round_row(1), clients)
    assert sum(log.totals()["drop_reasons"].values()) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1.0 kB"), (12_345, "12.3 kB"), (999_600, "1.0 MB"), (4.2e17, "420.0 PB")],
)
def test_human_bytes(value, text):
    assert human_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (math.nan, "-"), (0.25, "0.25 s"), (9.999, "10.0 s"), (59.96, "1 min 00 s"), (245, "4 min 05 s")]
    + [(3599.7, "1 h 00 min"), (11_520, "3 h 12 min"), (86_399, "1 d 00 h"), (190_800, "2 d 05 h")],
)
def test_human_seconds(value, text):
    assert human_seconds(value) == text
