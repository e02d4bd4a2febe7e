"""Reports: readable from a run directory alone, self-contained, and not upset by what a run lacks."""

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sweeps import sweep

from analysis import __main__ as command_line
from analysis import figures, load_runs, report
from analysis.compare import ComparisonError, Group, Groups, group_runs, short_names
from analysis.load import Metric, NotARunError, Run, load_run
from analysis.report import SECTIONS, render, write_report
from analysis.tables import describe, outcome
from fedpeat_ray.config import FleetConfig, LoraConfig, SimulationConfig
from fedpeat_ray.records import DEADLINE, MEMORY, SKIPPED, UNAVAILABLE
from fedpeat_ray.runtime.run_log import RunLog

TIERS = ("laptop", "phone", "sbc")
SUMMED = ("download_bytes", "emulator_bytes", "upload_bytes", "energy_j", "flops")
LEVELS = [{"level": level, "blocks": list(range(2 + 3 * level))} for level in (1, 2, 3)]
ACCURACY = {"name": "accuracy", "higher_is_better": True}
ROOT = Path(__file__).parents[2]


def client(round: int, device_id: int, reason: str | None, emulators: bool = False, skipped: bool = False) -> dict:
    """Numbers that differ by device; a device that was never asked has no times."""
    if skipped:
        row = {name: value and 0 for name, value in client(round, device_id, UNAVAILABLE).items()}
        about = {"round": round, "device_id": device_id, "tier": TIERS[device_id % 3], "memory_cap_bytes": 60_000_000}
        return row | about | {"group": f"user {device_id}", "outcome": SKIPPED, "drop_reason": None}
    asked = reason not in (UNAVAILABLE, MEMORY)
    return {
        "round": round,
        "device_id": device_id,
        "tier": TIERS[device_id % 3],
        "group": f"user {device_id}",
        "outcome": "dropped" if reason else "completed",
        "drop_reason": reason,
        "level": 1 + device_id // 3 % 2 if emulators else None,
        "emulator_age": 0 if emulators else None,
        "lora_rank": 8,
        "num_steps": 4,
        "num_examples": 8,
        "num_tokens": 512,
        "download_bytes": 80_000 if asked else 0,
        "emulator_bytes": 60_000 if asked and emulators else 0,
        "upload_bytes": 0 if reason else 80_000,
        "download_s": 1.0 + device_id % 5 if asked else None,
        "compute_s": 4.0 * (1 + device_id % 3) if asked else None,
        "upload_s": 2.0 + device_id % 4 if asked else None,
        "energy_j": 10.0 + device_id if asked else 0.0,
        "flops": 1e10 if asked else 0.0,
        "memory_bytes": 70_000_000,
        "memory_cap_bytes": 60_000_000 * (1 + (2 - device_id) % 3),
        "train_loss": None if reason else 3.0,
        "wall_train_s": None if reason else 0.2,
    }


def with_resolved(directory: Path, **facts) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"resolved": config["resolved"] | facts}))
    return directory


def write_run(
    directory: Path,
    *,
    config: SimulationConfig | None = None,
    rounds: int = 3,
    dropouts: bool = True,
    empty_round: int | None = None,
    finished: bool = True,
    emulators: bool = False,
    skipped: Sequence[int] = (),
    logged: Callable[[int], dict[str, Any]] = lambda round: {},
    classes: bool = False,
    **summary,
) -> Path:
    """A run directory; that of a classification with `classes`, otherwise as one of an older version."""
    algorithm = "fed-peat" if emulators else "fed-peft"
    config = config or SimulationConfig(algorithm=algorithm, rounds=rounds)
    config = dataclasses.replace(config, fleet=FleetConfig(2000))
    other_on_devices = emulators or config.algorithm == "fed-pt"
    resolved: dict[str, Any] = ({"levels": LEVELS} if emulators else {}) | ({"metric": ACCURACY} if classes else {})
    log = RunLog.create(directory, config.to_dict(), resolved, data_digest="abc")
    for round in range(1, rounds + 1):
        reasons = [(None, DEADLINE, None, UNAVAILABLE, None, MEMORY)[id % 6] if dropouts else None for id in range(9)]
        reasons = [UNAVAILABLE] * 9 if round == empty_round else reasons
        clients = [client(round, id, reasons[id], emulators, id in skipped) for id in range(9)]
        completed = sum(row["outcome"] == "completed" for row in clients)
        row = {"round": round, "virtual_s": 20.0 * round, "num_completed": completed}
        row |= {"num_dropped": 9 - completed - len(skipped), "num_skipped": len(skipped), "figures": logged(round)}
        row |= {"num_tokens": 512 * completed, "train_loss": 3.0 if completed else math.nan, "token_accuracy": 0.3}
        row |= {name: sum(row[name] for row in clients) for name in SUMMED}
        row |= {"perplexity": 60.0 - 5 * round if completed else None}
        row |= {"device_perplexity": 80.0 - 5 * round if completed and other_on_devices else None}
        if classes and completed:
            measured = {"accuracy": 0.1 + 0.2 * round, "macro_f1": 0.2 * round}
            on_devices = {"accuracy": 0.05 + 0.2 * round} if other_on_devices else {}
            row |= {"metrics": measured, "device_metrics": on_devices}
        row |= {"server_flops": 0.0, "server_memory_bytes": 0}
        log.write_round(round, row | {"wall_train_s": 1.0, "wall_eval_s": 0.5, "wall_s": 1.6}, clients)
    if finished:
        tuned = 60.0 - 5 * rounds
        perplexity: dict[str, Any] = {"zero_shot": 60.0, "tuned": tuned, "centralised": 30.0}
        if emulators:
            perplexity |= {"plug_in": tuned, "emulator_zero_shot": {"1": 150.0, "2": 80.0}}
            perplexity |= {"emulator_tuned": {"1": 90.0, "2": 65.0}}
            summary = {"privacy_gap": 65.0 - tuned, **summary}
        written = {"algorithm": algorithm, "perplexity": perplexity, "gap_closed": 0.5, "wall_s": 6.0}
        written |= {"token_accuracy": {"zero_shot": 0.25, "tuned": 0.3}}
        if classes:
            scores: dict[str, Any] = {"zero_shot": 0.1, "tuned": 0.1 + 0.2 * rounds, "centralised": 0.9}
            if emulators:
                scores |= {"plug_in": scores["tuned"], "emulator_zero_shot": {"1": 0.05, "2": 0.08}}
                scores |= {"emulator_tuned": {"1": 0.4, "2": 0.65}}
            measured = {"zero_shot": {"accuracy": 0.1, "macro_f1": 0.02}}
            measured |= {"tuned": {"accuracy": scores["tuned"], "macro_f1": 0.2 * rounds}}
            written |= {"metric": ACCURACY, "scores": scores, "metrics": measured}
        log.write_summary(written | summary)
    return directory


def without_new_columns(directory: Path, *rounds: int) -> Path:
    """As an older version wrote these rounds."""
    for round in rounds:
        later = {"rounds": ["num_skipped", "figures", "emulator_bytes", "device_perplexity"], "clients": ["group"]}
        for folder, columns in later.items():
            part = directory / folder / f"{round:05d}.parquet"
            pq.write_table(pq.read_table(part).drop_columns(columns), part)
    return directory


ALL = {section.title for section in SECTIONS if section.only_if is None}
EMULATORS = {"Quality by emulator level", "Levels in use"}
LOGGED = {"Logged by the algorithm"}


LAYOUT_ENGINE = Figure.get_layout_engine
pytestmark = pytest.mark.usefixtures("small_images")


def page_without_figures(*directories: Path) -> str:
    """For its words: figures are most of the work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_image", lambda *_: None)
        return render(group_runs([load_run(directory) for directory in directories]))


def case(value: object) -> str:
    """What a case is called: the same in every process, in which sets have orders of their own."""
    return str(sorted(value) if isinstance(value, set) else value)


def shown(page: str) -> set[str]:
    """Titles of the sections that have a figure."""
    return set(re.findall(r'<img alt="([^"]*)"', page))


class Links(HTMLParser):
    """Collects tags and what they point to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.targets: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_load_run(tmp_path):
    run = load_run(write_run(tmp_path / "run"))
    assert list(run.rounds["round"]) == [1, 2, 3]
    assert list(run.clients["device_id"]) == list(range(9)) * 3
    assert run.summary is not None and run.summary["gap_closed"] == 0.5
    assert run.settings["fleet.num_devices"] == 2000
    assert run.events.empty


def test_what_was_logged_is_a_column_a_name(tmp_path):
    def logged(round: int) -> dict[str, float]:
        return {1: {"a": 1, "b c.d": 0.5}, 2: {}, 3: {"late": -2.0, "a": math.nan}}[round]

    rounds = load_run(write_run(tmp_path / "run", logged=logged)).rounds
    found = rounds.filter(like="figures")
    assert {name: found[name].fillna(99).tolist() for name in found} == {
        "figures.a": [1.0, 99, 99],
        "figures.b c.d": [0.5, 99, 99],
        "figures.late": [99, 99, -2.0],
    }
    assert set(found.dtypes) == {np.dtype(float)}
    assert load_run(write_run(tmp_path / "none")).rounds.filter(like="figures").columns.empty


@pytest.mark.parametrize("older", [(1, 2), (3,), (1, 2, 3)], ids=str)
def test_rounds_of_an_older_version_are_read(tmp_path, older):
    directory = write_run(tmp_path / "run", skipped=[4, 8], logged=lambda round: {"pace": round / 2})
    run = load_run(without_new_columns(directory, *older))
    new = [round for round in (1, 2, 3) if round not in older]
    assert run.rounds["num_skipped"].tolist() == [2 if round in new else 0 for round in (1, 2, 3)]
    assert "figures" not in run.rounds
    assert run.clients["group"].notna().tolist() == [round in new for round in (1, 2, 3) for _ in range(9)]
    if new:
        assert run.rounds.set_index("round")["figures.pace"].dropna().to_dict() == {n: n / 2 for n in new}
    assert shown(render(group_runs([run]))) == ALL | (LOGGED if new else set())


def test_a_round_without_its_row_is_not_finished(tmp_path):
    directory = write_run(tmp_path / "run", finished=False)
    (directory / "rounds" / "00003.parquet").unlink()
    run = load_run(directory)
    assert set(run.clients["round"]) == {1, 2}
    assert run.summary is None


def test_events_survive_a_cut_off_line(tmp_path):
    directory = write_run(tmp_path / "run")
    RunLog(directory).event("host lost", host=1, devices=[3, 5])
    with open(directory / "events.jsonl", "a") as file:
        file.write('{"time": "2026')
    assert load_run(directory).events[["kind", "devices"]].to_dict("records") == [
        {"kind": "host lost", "devices": [3, 5]}
    ]


def test_what_is_no_run(tmp_path):
    with pytest.raises(NotARunError, match="no directory"):
        load_run(tmp_path / "missing")
    with pytest.raises(NotARunError, match="has no config"):
        load_run(tmp_path)
    broken = write_run(tmp_path / "broken")
    (broken / "clients" / "00002.parquet").write_bytes(b"no parquet")
    with pytest.raises(NotARunError, match="clients"):
        load_run(broken)
    RunLog.create(tmp_path / "fresh", {})
    with pytest.raises(NotARunError, match="no finished round"):
        write_report([tmp_path / "fresh"])


def test_report_is_one_self_contained_page(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "get_layout_engine", LAYOUT_ENGINE)
    directory = write_run(tmp_path / "run", config=SimulationConfig(seed=11))
    RunLog(directory).event("host lost", error="<script>alert(1)</script>")
    path = write_report([directory])
    page = path.read_text(encoding="utf-8")
    links = Links(page)
    assert path == directory / "report.html"
    assert shown(page) == ALL and len(links.targets) == len(ALL)
    assert all(target.startswith("data:image/png;base64,") for target in links.targets)
    assert not links.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import", page)
    for text in ("Perplexity went from 60.00 to 45.00", "50% of the way", "2,000 devices", "seed 11", "host lost"):
        assert text in page
    assert "nan" not in re.sub("<[^>]*>", " ", page).lower().split()


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("run", "missing"),
    [
        ({"dropouts": False}, {"Who drops out, and why"}),
        ({"rounds": 1}, set()),
        ({"perplexity": {"zero_shot": 60.0, "tuned": 50.0, "centralised": None}, "gap_closed": None}, set()),
        ({"empty_round": 2, "finished": False}, set()),
        ({"rounds": 1, "empty_round": 1, "finished": False}, ALL - {"Who drops out, and why", "Memory"}),
    ],
    ids=case,
)
def test_runs_that_lack_something(tmp_path, run, missing):
    page = render(group_runs([load_run(write_run(tmp_path / "run", **run))]))
    assert shown(page) == ALL - missing
    assert all(section.nothing in page for section in SECTIONS if section.title in missing)


def test_a_non_finite_summary_reads_as_missing(tmp_path):
    perplexity = {"zero_shot": 60.0, "tuned": math.nan, "centralised": math.inf}
    page = render(group_runs([load_run(write_run(tmp_path / "run", perplexity=perplexity, gap_closed=math.nan))]))
    assert shown(page) == ALL
    assert "Perplexity after the last round is 45.00." in page


def test_a_run_with_emulators_has_their_figures_and_numbers(tmp_path):
    run = load_run(write_run(tmp_path / "run", emulators=True))
    assert run.levels == {1: 5, 2: 8, 3: 11}
    page = render(group_runs([run]))
    assert shown(page) == ALL | EMULATORS == ALL | {"Quality by emulator level", "Levels in use"}
    assert "from 60.00 to 45.00 with the adapter plugged into the foundation, which is 50%" in page
    assert "the largest emulator on devices has 65.00, a privacy gap of 20.00." in page
    rows = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', page))
    assert rows["Perplexity, zero-shot"] == "60.00" and rows["Perplexity, tuned centrally"] == "30.00"
    assert rows["Perplexity, emulator of level 1"] == "150.00 → 90.00"
    assert rows["Perplexity, emulator of level 2"] == "80.00 → 65.00"
    assert "Perplexity, emulator of level 3" not in rows, "devices do not get the foundation"
    assert rows["Perplexity, tuned"] == "45.00 (plug-in)" and rows["Privacy gap"] == "20.00"
    assert rows["Sent to devices"] == "1.68 MB (1.26 MB emulators)"


def test_a_classification_is_spoken_of_in_its_own_metric(tmp_path):
    run = load_run(write_run(tmp_path / "run", classes=True))
    assert run.metric == Metric("accuracy", higher_is_better=True)
    assert run.scores["tuned"] == pytest.approx(0.7) and run.perplexity["tuned"] == 45.0
    assert run.rounds["score"].tolist() == run.rounds["metrics.accuracy"].tolist() == pytest.approx([0.3, 0.5, 0.7])
    assert run.rounds["metrics.macro_f1"].tolist() == pytest.approx([0.2, 0.4, 0.6])
    page = render(group_runs([run]))
    assert shown(page) == ALL and "accuracy (higher is better)" in page
    assert "Accuracy went from 10.0% to 70.0%, which is 50% of the way to tuning centrally (90.0%)." in page
    rows = rows_of(run.directory)
    assert rows["Accuracy, zero-shot"] == ["10.0%"] and rows["Accuracy, tuned centrally"] == ["90.0%"]
    assert rows["Accuracy"] == ["10.0% → 70.0%"] and rows["Macro F1"] == ["2.0% → 60.0%"]
    assert "perplexity" not in re.sub("<[^>]*>", " ", page).lower().split("where it comes from")[0]
    (axes,) = figure_of(figures.quality_over_rounds, run.directory)
    assert axes.get_ylabel() == "accuracy" and axes.get_yscale() == "linear"
    assert axes.yaxis.get_major_formatter()(0.5) == "50%" and ([0, 1, 2, 3], [0.1, 0.3, 0.5, 0.7]) in [
        (x, pytest.approx(y)) for x, y in lines(axes)
    ]


def test_an_unfinished_classification_knows_its_metric(tmp_path):
    run = load_run(write_run(tmp_path / "run", classes=True, finished=False, empty_round=2))
    assert run.metric.higher_is_better and run.scores == {}
    assert outcome(Group((run,))) == "Accuracy so far is 70.0%."
    rows = rows_of(run.directory)
    assert rows["Accuracy, tuned"] == ["70.0%"] and rows["Macro F1"] == ["– → 60.0%"]


def test_emulators_of_a_classification(tmp_path):
    directory = write_run(tmp_path / "run", classes=True, emulators=True)
    page, rows = page_without_figures(directory), rows_of(directory)
    assert rows["Accuracy, emulator of level 2"] == ["8.0% → 65.0%"] and rows["Accuracy, tuned"] == ["70.0% (plug-in)"]
    assert rows["Privacy gap, in perplexity"] == ["20.00"]
    assert "emulator on devices has 65.0%, a privacy gap of 20.00 in perplexity." in page
    (axes,) = figure_of(figures.quality_by_level, directory)
    assert axes.get_ylabel() == "accuracy" and axes.get_yscale() == "linear", "12-fold, yet no perplexity"
    assert lines(axes)[1] == ([5, 8], [0.4, 0.65])
    (axes,) = figure_of(figures.quality_over_rounds, directory)
    assert len([line for line in lines(axes) if len(line[0]) > 2]) == 2, "the model, and the one on devices"


def test_that_an_accuracy_equals_that_of_the_tuned_model_says_nothing(tmp_path):
    perplexity = {"zero_shot": 60.0, "tuned": 45.0, "of_the_median": 46.0, "plug_in": 45.0}
    scores = {"zero_shot": 0.1, "tuned": 0.5, "of_the_median": 0.5, "plug_in": 0.5}
    run = load_run(write_run(tmp_path / "run", classes=True, perplexity=perplexity, scores=scores))
    assert run.tuned_by == ["plug_in"] and rows_of(run.directory)["Accuracy, of the median"] == ["50.0%"]


def test_runs_of_different_metrics_never_share_an_axis(tmp_path):
    old, new = write_run(tmp_path / "old", emulators=True), write_run(tmp_path / "new", classes=True, emulators=True)
    for plot, labels in (
        (figures.quality_over_rounds, ["perplexity", "accuracy"]),
        (figures.quality_over_costs, ["perplexity", "", "accuracy", ""]),
        (figures.quality_by_level, ["perplexity", "accuracy"]),
    ):
        panels = figure_of(plot, old, new)
        assert [axes.get_ylabel() for axes in panels] == labels
        share = [max(y for _, ys in lines(axes) for y in ys) < 1 for axes in panels]
        assert share == [index >= len(labels) / 2 for index in range(len(labels))]
    rows, page = rows_of(old, new), render(group_runs([load_run(old), load_run(new)]))
    assert rows["Perplexity, tuned"] == ["45.00 (plug-in)", "–"] and rows["Accuracy, tuned"] == ["–", "70.0% (plug-in)"]
    assert rows["Token accuracy"] == ["25.0% → 30.0%", "–"] and rows["Macro F1"] == ["–", "2.0% → 60.0%"]
    assert "perplexity (lower is better) and accuracy (higher is better)" in page


@pytest.mark.parametrize("measured", [True, False])
def test_runs_of_older_versions_have_the_columns_of_what_was_measured(tmp_path, measured):
    directory = write_run(tmp_path / "run", emulators=True, empty_round=2)
    if not measured:
        for part in (directory / "rounds").glob("*.parquet"):
            pq.write_table(pq.read_table(part).drop_columns(["metrics", "device_metrics"]), part)
    run = load_run(directory)
    assert run.metric == Metric("perplexity", higher_is_better=False) and run.scores == run.perplexity
    assert run.rounds["score"].fillna(0).tolist() == [55, 0, 45]
    assert run.rounds["device_score"].fillna(0).tolist() == [75, 0, 65]
    assert run.rounds["metrics.token_accuracy"].tolist() == [0.3] * 3
    assert run.metrics == {"perplexity": (60, 45), "token_accuracy": (0.25, 0.3)}


def test_metrics_are_written_as_people_write_them():
    written = {name: Metric(name).written(0.1234567) for name in ("macro_f1", "exact_match", "perplexity", "bits")}
    assert written == {"macro_f1": "12.3%", "exact_match": "12.3%", "perplexity": "0.12", "bits": "0.1235"}
    assert Metric("macro_f1").title == "Macro F1" and Metric("exact_match").words == "exact match"


def test_a_run_with_emulators_beside_one_without(tmp_path):
    with_, without = write_run(tmp_path / "a", emulators=True), write_run(tmp_path / "b")
    for order in ((with_, without), (without, with_)):
        page = render(group_runs([load_run(directory) for directory in order]))
        assert shown(page) == ALL | EMULATORS
        titles = re.findall(r'<th scope="row">(.*?)</th>', page)
        first, tuned = titles.index("Perplexity, zero-shot"), titles.index("Perplexity, tuned")
        assert titles[first + 1 : tuned] == ["Perplexity, emulator of level 1", "Perplexity, emulator of level 2"]


SMALL = {"zero_shot": 60.0, "tuned": 45.0, "small_zero_shot": 80.0, "small_tuned": 65.0, "proxy_tuned": 45.0}


def test_a_run_with_a_small_model_has_its_numbers_and_its_path(tmp_path):
    directory = write_run(tmp_path / "run", config=SimulationConfig(algorithm="fed-pt"), perplexity=SMALL)
    page = render(group_runs([load_run(directory)]))
    assert shown(page) == ALL
    assert "from 60.00 to 45.00 with the foundation steered by the small model. " in page
    assert "The small model alone went from 80.00 to 65.00." in page
    rows = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', page))
    assert rows["Perplexity, small model"] == "80.00 → 65.00"
    assert rows["Perplexity, tuned"] == "45.00 (steered)"
    assert not {"Privacy gap", "Perplexity, emulator of level 1"} & rows.keys()
    (axes,) = figure_of(figures.quality_over_rounds, directory)
    paths = [line for line in lines(axes) if len(line[0]) > 2]
    assert paths == [([0.0, 1.0, 2.0, 3.0], [80.0, 75.0, 70.0, 65.0]), ([0.0, 1.0, 2.0, 3.0], [60.0, 55.0, 50.0, 45.0])]


def test_what_devices_train_is_any_pair_of_scores(tmp_path):
    perplexity = {"zero_shot": 60.0, "tuned": 45.0, "centralised": None, "lone_tuned": 50.0, "lone_zero_shot_": 1.0}
    perplexity |= {"sparse_twin_zero_shot": 70.0, "sparse_twin_tuned": None, "note": "many", "of": {"a": 1.0}}
    perplexity |= {"slice_zero_shot": {"10": 90.0, "9": 91.0}, "slice_tuned": {"9": 80.0, "11": 79.0}}
    run = load_run(write_run(tmp_path / "run", perplexity=perplexity))
    assert list(run.on_devices.items()) == [
        ("sparse twin model", (70.0, None)),
        ("slice of level 9", (91.0, 80.0)),
        ("slice of level 10", (90.0, None)),
        ("slice of level 11", (None, 79.0)),
    ]
    assert run.other_scores == {"lone_tuned": 50.0, "lone_zero_shot_": 1.0}


def rows_of(*directories: Path) -> dict[str, list[str]]:
    """The rows of the tables of a report, by their name."""
    page = page_without_figures(*directories)
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page)
    return {name: re.findall("<td>(.*?)</td>", values) for name, values in rows}


def test_perplexities_that_nobody_knows_are_key_figures(tmp_path):
    perplexity = {"zero_shot": 60.0, "tuned": 45.0, "with_a_twist": 45.0, "plug_in": 46.5, "of_the_median": 50.0}
    directory = write_run(tmp_path / "run", perplexity=perplexity)
    rows = rows_of(directory)
    assert rows["Perplexity, tuned"] == ["45.00 (with a twist)"]
    assert rows["Perplexity, of the median"] == ["50.00"] and rows["Perplexity, plug-in"] == ["46.50"]
    assert "Perplexity went from 60.00 to 45.00 (with a twist)" in page_without_figures(directory)
    both = rows_of(write_run(tmp_path / "other"), directory)
    assert both["Perplexity, of the median"] == ["–", "50.00"]
    names = list(both)
    assert names[names.index("Perplexity, tuned") + 1] == "Perplexity, plug-in"


def test_figures_that_the_algorithm_sums_up_are_key_figures(tmp_path):
    numbers = {"levels_raised": 3, "final rate": 0.00025, "<b>": 12345.678, "gone": math.nan, "million": 1e6}
    rows = rows_of(write_run(tmp_path / "run", figures=numbers))
    assert {name: rows[name] for name in ("Levels raised", "Final rate", "&lt;b&gt;", "Gone", "Million")} == {
        "Levels raised": ["3"],
        "Final rate": ["0.00025"],
        "&lt;b&gt;": ["12,345.68"],
        "Gone": ["–"],
        "Million": ["1,000,000"],
    }


def test_a_figure_does_not_hide_another_of_its_name(tmp_path):
    page = page_without_figures(write_run(tmp_path / "run", figures={"rounds": 77}))
    assert re.findall(r'<th scope="row">Rounds</th><td>(.*?)</td>', page) == ["77", "3"]


def test_skipped_devices_are_told_from_dropped_ones(tmp_path):
    none, some = write_run(tmp_path / "none"), write_run(tmp_path / "some", skipped=[2, 4])
    assert "Devices skipped" not in rows_of(none)
    rows = rows_of(none, some)
    assert rows["Devices skipped"] == ["–", "6"] and rows["Updates used"] == ["15", "9"]
    (axes,) = figure_of(figures.dropouts_by_tier, some)
    assert sum(np.sum([bar.get_width() for bar in bars]) for bars in axes.containers) == pytest.approx(300)
    assert legend_of(figures.dropouts_by_tier, some) == ["unavailable", "memory", "deadline", "skipped", "completed"]
    assert legend_of(figures.dropouts_by_tier, none) == ["unavailable", "memory", "deadline", "completed"]
    only = write_run(tmp_path / "only", skipped=[2, 4], dropouts=False)
    assert legend_of(figures.dropouts_by_tier, only) == ["skipped", "completed"]
    (axes,) = figure_of(figures.memory_by_tier, only)
    assert min(x for xs, _ in lines(axes) for x in xs) >= 60, "a skipped device needs no memory: it has no task"


def test_levels_are_shown_wherever_devices_have_them(tmp_path):
    directory = with_resolved(write_run(tmp_path / "run", emulators=True), levels=[])
    page = render(group_runs([load_run(directory)]))
    assert shown(page) == ALL | {"Levels in use"}
    assert rows_of(directory)["Sent to devices"] == ["1.68 MB (1.26 MB emulators)"]


SHAPES: dict[str, Callable[[int, int], float]] = {
    "falling": lambda round, i: math.exp(-round / 4) * 10 ** (i - 4),
    "constant": lambda round, i: float(i - 1),
    "gaps": lambda round, i: math.nan if round % 5 > 1 else 1.5 * round,
    "never": lambda round, i: math.inf if round % 2 else math.nan,
}


@pytest.mark.parametrize("rounds", sweep([1, 3, 60], quick=[3], full=[60]))
@pytest.mark.parametrize("num_names", sweep([1, 4, 5, 12], quick=[1, 5]))
def test_the_figure_of_what_was_logged_has_a_panel_a_name(tmp_path, num_names, rounds):
    def logged(round: int) -> dict[str, float]:
        kinds = list(SHAPES)[:3]
        return {f"{kinds[i % 3]}_{i}": SHAPES[kinds[i % 3]](round, i) for i in range(num_names)}

    directory = write_run(
        tmp_path / "run", rounds=rounds, logged=lambda n: logged(n) | {"never": SHAPES["never"](n, 0)}
    )
    panels = [axes for axes in figure_of(figures.logged_over_rounds, directory) if axes.get_visible()]
    names = [f"{name} {i}" for i, name in enumerate([*list(SHAPES)[:3]] * 4)][:num_names]
    assert [title(axes).partition(" (10")[0] for axes in panels] == names
    for axes in panels:
        assert [line for line in lines(axes) if np.isfinite(line[1]).any()]
        assert 1 <= len(axes.get_yticklabels()) <= 6 and all(tick == int(tick) for tick in axes.get_xticks())
    runs = group_runs([load_run(directory)])
    if num_names == 12:  # the other figures have nothing to do with names
        assert shown(render(runs)) == ALL | LOGGED
    assert figures.draw(figures.logged_over_rounds, runs, io.BytesIO())


def test_what_was_logged_is_drawn_for_each_run_that_has_it(tmp_path):
    one = write_run(tmp_path / "one", logged=lambda round: {"pace": 2.0 * round, "$x_{$": 3e7 * round})
    two = write_run(tmp_path / "two", logged=lambda round: {"pace": 5.0 * round, "other": 7.0})
    pace, dollars, other = (axes for axes in figure_of(figures.logged_over_rounds, one, two))
    assert [y for _, y in lines(pace)] == [[2.0, 4.0, 6.0], [5.0, 10.0, 15.0]]
    assert [y for _, y in lines(dollars)] == [[30.0, 60.0, 90.0]] and title(dollars) == "$x {$ (10⁶)"
    assert [y for _, y in lines(other)] == [[7.0, 7.0, 7.0]]
    assert lines(dollars)[0][0] == [1.0, 2.0, 3.0]
    colours = [[line.get_color() for line in axes.get_lines()] for axes in (pace, dollars, other)]
    assert colours[0] == [*colours[1], *colours[2]]
    assert legend_of(figures.logged_over_rounds, one, two) == ["one", "two"]
    assert shown(render(group_runs([load_run(one), load_run(two)]))) == ALL | LOGGED


def test_nothing_that_was_logged_is_a_number(tmp_path):
    page = render(group_runs([load_run(write_run(tmp_path / "run", logged=lambda round: {"odd": math.nan}))]))
    assert shown(page) == ALL and "Nothing that was logged is a finite number." in page


NOT_FINITE = {"zero_shot": 60.0, "tuned": 50.0, "emulator_zero_shot": {"1": 90.0, "2": math.inf}}
NOT_FINITE |= {"emulator_tuned": {"1": math.nan, "2": math.nan}}


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("run", "missing"),
    [
        ({"finished": False}, {"Quality by tier", "Quality by emulator level"}),
        ({"empty_round": 2}, set()),
        (
            {"rounds": 1, "empty_round": 1},
            (ALL | EMULATORS) - {"Who drops out, and why", "Memory", "Quality by tier", "Quality by emulator level"},
        ),
        ({"perplexity": {"zero_shot": 60.0, "tuned": 50.0}}, {"Quality by emulator level"}),
        ({"perplexity": NOT_FINITE, "privacy_gap": math.nan}, set()),
    ],
    ids=case,
)
def test_runs_with_emulators_that_lack_something(tmp_path, run, missing):
    page = render(group_runs([load_run(write_run(tmp_path / "run", emulators=True, **run))]))
    assert shown(page) == (ALL | EMULATORS) - missing
    assert all(section.nothing in page for section in SECTIONS if section.title in missing)


def figure_of(plot: Callable[[Groups], Figure | None], *directories: Path) -> list[Axes]:
    """The panels of a figure of some runs."""
    figure = plot(group_runs([load_run(directory) for directory in directories]))
    assert figure is not None
    return figure.axes


def legend_of(plot: Callable[[Groups], Figure | None], *directories: Path) -> list[str]:
    """What the legend of a figure of some runs says."""
    figure = plot(group_runs([load_run(directory) for directory in directories]))
    assert figure is not None
    return [text.get_text() for text in figure.legends[0].get_texts()]


def title(axes: Axes) -> str:
    return axes.get_title("left") or axes.get_title()


def lines(axes: Axes) -> list[tuple[list[float], list[float]]]:
    """x and y of every line."""
    xy = [(line.get_xdata(), line.get_ydata()) for line in axes.get_lines()]
    return [(np.asarray(x, float).tolist(), np.asarray(y, float).tolist()) for x, y in xy]


def test_the_figure_of_levels_has_two_paths_and_three_levels_of_the_foundation(tmp_path):
    (axes,) = figure_of(figures.quality_by_level, write_run(tmp_path / "run", emulators=True))
    before, after, *foundation = lines(axes)
    assert before == ([5, 8], [150, 80]) and after == ([5, 8], [90, 65])
    assert [y for _, y in foundation] == [[60, 60], [45, 45], [30, 30]]
    assert "11" in axes.get_xlabel()


def test_levels_in_use_are_shares_of_the_completed_and_bytes_are_those_of_the_round(tmp_path):
    directory = write_run(tmp_path / "run", emulators=True, empty_round=2)
    levels, sent = figure_of(figures.levels_in_use, directory)
    bars = [[bar.get_height() for bar in bars] for bars in levels.containers]
    completed = load_run(directory).clients.query("round == 1 and outcome == 'completed'")["level"]
    share = (completed == 1).mean() * 100
    assert share == 80 and bars == [pytest.approx([share, 0, share]), pytest.approx([100 - share, 0, 100 - share])]
    rounds = load_run(directory).rounds
    stacked = np.sum([[bar.get_height() for bar in bars] for bars in sent.containers], axis=0)
    assert stacked == pytest.approx((rounds["download_bytes"] + rounds["upload_bytes"]) / 1e6)
    assert [bar.get_height() for bar in sent.containers[0]] == pytest.approx(rounds["emulator_bytes"] / 1e6)


@pytest.mark.parametrize("emulators", [True, False])
def test_quality_over_rounds_has_a_path_of_the_largest_emulator(tmp_path, emulators):
    (axes,) = figure_of(figures.quality_over_rounds, write_run(tmp_path / "run", emulators=emulators))
    paths = [line for line in lines(axes) if len(line[0]) > 2]
    own = ([0.0, 1.0, 2.0, 3.0], [60.0, 55.0, 50.0, 45.0])
    assert paths == ([([0.0, 1.0, 2.0, 3.0], [80.0, 75.0, 70.0, 65.0])] if emulators else []) + [own]


def test_several_runs_side_by_side(tmp_path):
    first = write_run(tmp_path / "a", config=SimulationConfig(rounds=3))
    second = write_run(tmp_path / "b", config=SimulationConfig(rounds=3, lora=LoraConfig(rank=16)), finished=False)
    third = write_run(tmp_path / "c", config=SimulationConfig(rounds=3, lora=LoraConfig(rank=4)), dropouts=False)
    runs = group_runs([load_run(path) for path in (first, second, third)])
    assert list(runs) == ["rank 8", "rank 16 (unfinished)", "rank 4"]
    page = write_report([first, second, third], tmp_path / "new" / "out.html").read_text(encoding="utf-8")
    assert shown(page) == ALL
    assert "Report of 3 runs" in page and "rank 16 (unfinished)" in page and "What differs" in page
    assert "several seeds" not in page


def made(name: str, failure: str | None = None, finished: bool = True, **settings: Any) -> Run:
    """A run of which only its settings matter, each by its dotted path with two underscores for a dot."""
    config = {"algorithm": "fed-peft", "seed": 0} | {path.replace("__", "."): to for path, to in settings.items()}
    summary = {"failure": failure} if finished else None
    empty = pd.DataFrame({"round": [1]})
    return Run(Path("/runs") / name, {"config": config}, empty, empty, summary, pd.DataFrame())


def grouped(*runs: Run, each: bool = False) -> dict[str, list[str]]:
    """Names of the runs of each group, by label."""
    return {label: [run.name for run in group.runs] for label, group in group_runs(runs, each).items()}


def test_runs_that_differ_in_their_seed_and_in_how_they_are_computed_are_a_group():
    elsewhere: Any = {"hosts__backend": "ray", "client_batch_size": 8, "checkpoint_every": 1, "trace": "t.json"}
    elsewhere |= {"watch__tensorboard": False, "watch__wandb": "tuning"}
    runs = [made("a", seed=10, lora__rank=4), made("b", lora__rank=8), made("c", seed=9, lora__rank=4, **elsewhere)]
    assert grouped(*runs) == {"rank 4 (2 seeds)": ["c", "a"], "rank 8": ["b"]}
    assert grouped(*runs, each=True) == {"rank 4, seed 10": ["a"], "rank 8": ["b"], "rank 4, seed 9": ["c"]}
    assert grouped(*runs[::2]) == {"2 seeds": ["c", "a"]}
    assert grouped(*runs[::2], each=True) == {"seed 10": ["a"], "seed 9": ["c"]}
    threads = [made("a", seed=0, hosts__num_threads=1), made("b", seed=1, hosts__num_threads=2)]
    assert grouped(*threads) == {"num threads 1": ["a"], "num threads 2": ["b"]}


def test_a_run_that_does_not_stand_for_its_setting_stands_by_itself():
    done = [made(f"s{seed}", seed=seed) for seed in (0, 1)]
    going_on, failed = made("s2", seed=2, finished=False), made("s3", seed=3, failure="no update was used")
    labels = {"2 seeds": ["s0", "s1"], "seed 2 (unfinished)": ["s2"], "seed 3 (failed)": ["s3"]}
    assert grouped(*done, going_on, failed) == labels
    other = made("other", seed=2, lora__rank=4)
    with_another = {
        "rank unset (2 seeds)": ["s0", "s1"],
        "rank unset, seed 2 (unfinished)": ["s2"],
        "rank 4": ["other"],
    }
    assert grouped(*done, going_on, other) == with_another
    again = {"rank unset, seed 0": ["s0"], "runs/s1": ["s1"], "once more/s1": ["s1"], "rank 4": ["other"]}
    assert grouped(*done, made("once more/s1", seed=1), other) == again, "a seed again says nothing of other seeds"


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        (
            [{"algorithm": "fed-avg", "local__learning_rate": 5e-4}, {"local__learning_rate": 2e-3}],
            ["fed-avg", "fed-peft"],
        ),
        (
            [{"algorithm": "fed-avg"}, {"control__kind": "fixed"}, {"control__kind": "learned"}],
            ["fed-avg", "fed-peft, control fixed", "fed-peft, control learned"],
        ),
        (
            [{"lora__rank": rank, "data__partition__alpha": alpha} for rank in (4, 8) for alpha in (0.1, 1.0)],
            ["rank 4, alpha 0.1", "rank 4, alpha 1", "rank 8, alpha 0.1", "rank 8, alpha 1"],
        ),
        (
            [{"lora__alpha": a, "data__partition__alpha": b} for a, b in ((8, 1), (8, 2), (16, 1))],
            ["lora alpha 8, partition alpha 1", "lora alpha 8, partition alpha 2", "lora alpha 16"],
        ),
        ([{"emulator__distil__seed": 0}, {"emulator__distil__seed": 1}], ["distil seed 0", "distil seed 1"]),
        ([{"algorithm": "here/my_file.py:Cooling"}, {"algorithm": "my_file.py:Warming"}], ["Cooling", "Warming"]),
        ([{"data__name": "/long/way/to/texts/"}, {"data__name": "python_docs"}], ["data texts/", "data python_docs"]),
        (
            [{"foundation__name": "/a/gpt2"}, {"foundation__name": "/b/gpt2"}],
            ["foundation a/gpt2", "foundation b/gpt2"],
        ),
        ([{"deadline_s": 9.0}, {"deadline_s": None}], ["deadline 9 s", "deadline s unset"]),
        ([{"emulator__eight_bit": True}, {"emulator__eight_bit": False}], ["eight bit", "no eight bit"]),
        ([{"lora__targets": ["c_attn", "c_fc"]}, {"lora__targets": []}], ["targets c_attn c_fc", "targets unset"]),
        ([{"data__name": "x" * 60}, {"data__name": "y"}], ["run 0", "data y"]),
        ([{}, {}], ["run 0", "run 1"]),
    ],
    ids=case,
)
def test_labels_say_what_differs_in_few_words(settings, labels):
    runs = [made(f"run {index}", **values) for index, values in enumerate(settings)]
    assert list(group_runs(runs)) == labels
    several = [made(f"{run.name} again", seed=1, **values) for run, values in zip(runs, settings, strict=True)]
    if settings != [{}, {}]:
        assert list(group_runs([*runs, *several])) == [f"{label} (2 seeds)" for label in labels]


def test_labels_by_hand():
    runs = [made("a", lora__rank=4), made("b", lora__rank=8), made("c", lora__rank=8, seed=1)]
    assert list(group_runs(runs[:1])) == ["this run"]
    assert list(group_runs(runs, labels=["small", "large"])) == ["small", "large (2 seeds)"]
    needed = "2 needed, in this order for: rank 4, rank 8 \\(2 seeds\\)"
    with pytest.raises(ComparisonError, match=f"labels: 3 given, {needed}"):
        group_runs(runs, labels=["x", "y", "z"])
    with pytest.raises(ComparisonError, match="labels: two are the same"):
        group_runs(runs, each=True, labels=["x", "x", "y"])
    with pytest.raises(ComparisonError, match="/runs/a is given twice"):
        group_runs([*runs, runs[0]])


def test_short_names():
    assert short_names(["/a/x/run", "/b/x/run", "/b/other"], "/") == ["a/x/run", "b/x/run", "other"]
    assert short_names(["lora.rank"], ".", taken=["rank"]) == ["lora.rank"]
    assert short_names(["a", "a/a"], "/") == ["a", "a/a"]


def three_seeds(folder: Path, **run: Any) -> list[Path]:
    """Runs of two settings: of ranks 8 (seeds 0 to 2) and 4 (seed 0), with perplexities of their own."""
    directories = []
    for rank, seed in ((8, 0), (8, 1), (8, 2), (4, 0)):
        config = SimulationConfig(algorithm="fed-peft", rounds=3, seed=seed, lora=LoraConfig(rank=rank))
        perplexity = {"zero_shot": 60.0, "tuned": 45.0 + seed, "centralised": None}
        directory = folder / f"rank{rank}-{seed}"
        about: dict[str, Any] = {"dropouts": seed > 0, **run}
        directories.append(write_run(directory, config=config, perplexity=perplexity, gap_closed=None, **about))
    return directories


def test_of_several_seeds_tables_have_the_mean_and_the_range(tmp_path):
    directories = three_seeds(tmp_path)
    rows, page = rows_of(*directories), page_without_figures(*directories)
    assert rows["Perplexity, tuned"] == ["46.00 (45.00 to 47.00)", "45.00"]
    assert rows["Perplexity, zero-shot"] == ["60.00", "60.00"]
    assert rows["Updates used"] == ["19 (15 to 27)", "27"]
    assert rows["Devices dropped"] == ["8 (0 to 12; deadline 4, unavailable 2, memory 2)", "0"]
    assert rows["lora.rank"] == ["8", "4"] and rows["seed"] == ["0; 1; 2", "0"]
    assert "Perplexity went from 60.00 to 46.00 (45.00 to 47.00)." in page
    assert "3 runs with seeds 0, 1, 2." in page and "Runs of one setting under several seeds" in page
    assert "Not only the seed differs" not in page
    config = json.loads((directories[1] / "config.json").read_text())
    (directories[1] / "config.json").write_text(json.dumps(config | {"data_digest": "other"}))
    assert "Not only the seed differs between these runs: the text they read." in page_without_figures(*directories)


def test_of_several_seeds_figures_have_the_mean_and_the_range(tmp_path):
    directories = three_seeds(tmp_path, logged=lambda round: {"pace": 2.0 * round})
    for place, higher in zip(directories, (0.0, 3.0, 6.0, 0.0), strict=True):
        for part in (place / "rounds").glob("*.parquet"):
            table = pq.read_table(part)
            column = pa.array([table["perplexity"][0].as_py() + higher])
            pq.write_table(table.set_column(table.column_names.index("perplexity"), "perplexity", column), part)
    (axes,) = figure_of(figures.quality_over_rounds, *directories)
    paths = [line for line in axes.get_lines() if np.size(line.get_xdata()) > 2]
    assert [np.asarray(line.get_ydata()).tolist() for line in paths] == [[60, 58, 53, 48], [60, 55, 50, 45]]
    (band,) = axes.collections
    at_the_end = [y for x, y in np.asarray(band.get_paths()[0].vertices).tolist() if x == 3]
    assert min(at_the_end) == 45 and max(at_the_end) == 51
    (pace,) = figure_of(figures.logged_over_rounds, *directories)
    assert [line.get_color() for line in pace.get_lines()] == [line.get_color() for line in paths]
    assert legend_of(figures.quality_over_rounds, *directories)[:3] == [
        "rank 8 (3 seeds)",
        "rank 4",
        "range over seeds",
    ]
    of_three, of_one = (
        sum(bar.get_width() for bars in axes.containers for bar in bars)
        for axes in figure_of(figures.energy_by_tier, *directories)
    )
    each = [load_run(directory).clients["energy_j"].sum() for directory in directories]
    assert of_three == pytest.approx(np.mean(each[:3])) and of_one == pytest.approx(each[3])


def test_every_figure_takes_several_seeds(tmp_path):
    configs = [SimulationConfig(rounds=3, seed=seed) for seed in (0, 1)]
    runs = [write_run(tmp_path / f"{config.seed}", config=config, emulators=True) for config in configs]
    groups = group_runs([load_run(run) for run in runs])
    drawn = [section.title for section in SECTIONS if section.plot(groups)]
    assert list(groups) == ["2 seeds"] and set(drawn) == ALL | EMULATORS


def test_lines_of_many_groups_differ():
    groups = group_runs([made(f"{rank}", lora__rank=rank) for rank in range(9)])
    looks = [tuple(look.values()) for look in figures._looks(groups)]
    assert len(set(looks)) == 9


def test_the_rounds_of_several_runs_are_one_table(tmp_path):
    table = load_runs(three_seeds(tmp_path, logged=lambda round: {"pace": 1.0}))
    assert list(table)[:6] == ["run", "algorithm", "seed", "rank", "round", "virtual_s"] and len(table) == 12
    assert table.groupby(["algorithm", "rank", "round"]).perplexity.mean().loc["fed-peft", 4, 3] == 45
    assert list(table["run"].unique()) == ["rank8-0", "rank8-1", "rank8-2", "rank4-0"] and "figures.pace" in table
    assert load_runs([]).empty


def test_where_a_report_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "render", lambda groups: ", ".join(groups))
    one, two = (write_run(tmp_path / "runs" / name, rounds=1) for name in ("one", "two/run"))
    assert write_report([one]) == one / "report.html"
    assert write_report([one, two]) == tmp_path / "runs" / "comparison.html"
    inside = write_run(two / "inside", rounds=1)
    assert write_report([two, inside]) == tmp_path / "runs" / "two" / "comparison.html"
    monkeypatch.chdir(one)
    assert write_report([Path(), Path("../two/run")]) == tmp_path / "runs" / "comparison.html"
    assert write_report([two, inside], tmp_path / "new" / "page.html", labels=["a", "b"]).read_text() == "a, b"
    monkeypatch.setattr(report.os.path, "commonpath", lambda paths: "/")
    with pytest.raises(ComparisonError, match="no folder in common: --out"):
        write_report([one, two])


def test_a_run_is_described_in_words(tmp_path):
    directory = write_run(tmp_path / "run", finished=False, config=SimulationConfig(algorithm="fed-peft", rounds=12))
    assert describe(Group((load_run(directory),))).startswith("fed-peft, tuning pydoc-base"), "as of older runs"
    with_resolved(directory, algorithm={"name": "FedPEFT", "about": None})
    assert describe(Group((load_run(directory),))).startswith("FedPEFT, tuning pydoc-base")
    with_resolved(directory, algorithm={"name": "FedPEFT", "about": "federated LoRA: devices send adapters"})
    text = describe(Group((load_run(directory),)))
    assert text.startswith("FedPEFT (federated LoRA: devices send adapters), tuning")
    assert "tuning pydoc-base on python_docs" in text
    assert "unfinished: 3 of 12 rounds so far" in text


def test_how_far_the_memory_is_known_is_said(tmp_path):
    directory = write_run(tmp_path / "run")
    assert "Memory model" not in page_without_figures(directory)  # of a run from before it was logged
    for known, words in (("tested family", "within 10 % of what PyTorch"), ("estimate", "an estimate: this family")):
        page = page_without_figures(with_resolved(directory, memory_model=known))
        assert "Memory model" in page and words in page


def test_command_line(tmp_path, monkeypatch, capsys):
    directory = write_run(tmp_path / "run", rounds=1)
    out = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["analysis", "report", str(directory), "--out", str(out)])
    assert command_line.main() == 0
    assert out.exists() and capsys.readouterr().out.strip() == str(out)
    monkeypatch.setattr(sys, "argv", ["analysis", "report", str(tmp_path)])
    assert command_line.main() == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no run: it has no config.json\n"


def test_command_line_of_several_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "render", lambda groups: ", ".join(groups))
    config = SimulationConfig(algorithm="fed-peft", rounds=1)
    runs = [
        str(write_run(tmp_path / f"{seed}", rounds=1, config=dataclasses.replace(config, seed=seed))) for seed in (0, 1)
    ]
    page = tmp_path / "comparison.html"
    for words, labels in (
        ([], "2 seeds"),
        ([str(page)], "2 seeds"),  # as runs/* gives, once it is there
        (["--each"], "seed 0, seed 1"),
        (["--labels", "both"], "both (2 seeds)"),
    ):
        monkeypatch.setattr(sys, "argv", ["analysis", "report", *runs, *words])
        assert command_line.main() == 0 and capsys.readouterr().out.strip() == str(page)
        assert page.read_text() == labels
    RunLog.create(tmp_path / "fresh", {})
    for words, error in (
        (["--labels", "a", "b", "c"], "labels: 3 given, 1 needed, in this order for: 2 seeds"),
        ([runs[0]], f"{runs[0]} is given twice"),
        ([str(tmp_path / "fresh")], f"{tmp_path / 'fresh'} has no finished round yet"),
        ([str(tmp_path / "none")], f"{tmp_path / 'none'} is no directory"),
    ):
        monkeypatch.setattr(sys, "argv", ["analysis", "report", *runs, *words])
        assert command_line.main() == 2 and capsys.readouterr().err == f"error: {error}\n"


def test_analysis_runs_without_the_engine():
    engine = "{name.partition('.')[0] for name in sys.modules} & {'fedpeat_ray', 'ray', 'torch'}"
    code = f"import sys, analysis.__main__; sys.exit(bool({engine}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_examples_of_the_docs_run(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "NAME")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "run_log.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    for example in examples:
        exec(example, names)
    assert len(examples) == 6
    assert len(names["slowest"]) == 3


def test_time_units_read_well():
    assert [figures.time_unit(seconds)[1] for seconds in (0, 179, 180, 11_000, 1e6)] == ["s", "s", "min", "h", "days"]


def test_names_with_dollars_brackets_and_braces_are_drawn_as_they_are(tmp_path):
    names = ("$x_{$ one", "[old] $\\frac two$")
    for emulators in (False, True):
        runs = [load_run(write_run(tmp_path / f"{emulators}" / name, emulators=emulators)) for name in names]
        labelled = group_runs(runs)
        assert set(labelled) == set(names)
        render(labelled)


def test_the_package_gives_what_reads_a_run():
    import analysis

    assert analysis.load_run is load_run and {"load_run", "load_runs", "Run", "NotARunError"} <= set(analysis.__all__)
    code = "import sys, analysis; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", "figures are loaded where they are drawn"
