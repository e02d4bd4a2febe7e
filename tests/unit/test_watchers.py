"""Those who are shown a run: what they show of it, also when it is resumed, and that none of them ends it."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import whole_runs
from tensorboardX.proto import event_pb2
from whole_runs import assert_same_bits, events

from fedpeat_ray import Simulation, SimulationConfig, WatchConfig
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.records import DROP_REASONS, ROUND_COLUMNS
from fedpeat_ray.runtime.checkpoint import save_checkpoint
from fedpeat_ray.runtime.run_log import read_config
from fedpeat_ray.runtime.watchers import ray_metrics, scalars
from fedpeat_ray.runtime.watchers.tensorboard import TensorBoard
from fedpeat_ray.runtime.watchers.watchers import Watchers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename

ROOT = Path(__file__).parents[2]
FAKE_WANDB = """
import json, pathlib
def init(**arguments): return Run(arguments)
class Run:
    def __init__(self, arguments):
        self.path, self.summary = pathlib.Path(arguments["dir"]) / "said.jsonl", self
        self.say("init", arguments)
    def log(self, values, step): self.say("log", {"step": step, **values})
    def update(self, values): self.say("summary", values)
    def finish(self, exit_code): self.say("finish", exit_code)
    def say(self, *words):
        with self.path.open("a") as file: file.write(json.dumps(words) + "\\n")
"""


@pytest.fixture
def tiny(gpt2_dir: Path, text_dir: Path) -> SimulationConfig:
    """Four rounds, of which every other is judged and remembered."""
    settings: dict[str, Any] = {"rounds": 4, "checkpoint_every": 2, "evaluation": {"every": 2}}
    return whole_runs.tiny(gpt2_dir, text_dir, algorithm="fed-peft", data={"public_name": None}, **settings)


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of that name, which writes down what it is told beside its run."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(folder)
    for name in ("wandb", "fedpeat_ray.runtime.watchers.weights_and_biases"):  # neither is left for another test
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)


class Told:
    """In place of a gauge or a counter of Ray: writes down what it is told."""

    def __init__(self, name: str, about: str, tag_keys: tuple[str, ...]):
        self.told: list[tuple[float, dict[str, str]]] = []

    def set_default_tags(self, tags: dict[str, str]) -> Told:
        return self

    def set(self, value: float | None, tags: dict[str, str] | None = None) -> None:
        self.told += [] if value is None else [(value, tags or {})]

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value > 0
        self.told.append((value, tags or {}))


def on_file(path: Path) -> Iterator[Any]:
    """The events of a file: a length, its checksum, an event and its checksum, and so on."""
    data = path.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        yield event_pb2.Event.FromString(data[12 : 12 + size])  # type: ignore[attr-defined]  # made when it is loaded
        data = data[16 + size :]


def shown(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: steps and values by tag; where a file starts, later steps of older ones go."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for path in sorted((directory / "tensorboard").iterdir()):
        for event in on_file(path):
            if event.HasField("session_log"):
                found |= {tag: [(step, x) for step, x in of if step < event.step] for tag, of in found.items()}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found[value.tag].append((event.step, value.simple_value))
    return found


def logged(directory: Path, column: str) -> list[tuple[int, float]]:
    """The same of the run log."""
    rounds = pd.read_parquet(directory / "rounds").dropna(subset=column)
    return [(row["round"], float(np.float32(row[column]))) for _, row in rounds.iterrows()]


def assert_shows_the_run(directory: Path) -> None:
    """Every column with every round once."""
    on_board = shown(directory)
    for group, names in scalars.GROUPS.items():
        for name in names:
            assert on_board.get(f"{group}/{name}", []) == logged(directory, name), name
    clients = pd.read_parquet(directory / "clients")
    for reason in DROP_REASONS:
        number = (clients["drop_reason"] == reason).groupby(clients["round"]).sum()
        assert on_board[f"dropped/{reason}"] == [*number.items()]


def test_every_column_of_the_rounds_table_has_its_group():
    grouped = sorted(name for names in scalars.GROUPS.values() for name in names)
    assert sorted([*grouped, "round", *scalars.MAPS]) == sorted(column.name for column in ROUND_COLUMNS)


def test_tensorboard_is_shown_what_the_run_log_has(run):
    directory = run()
    assert_shows_the_run(directory)
    on_board = shown(directory)
    assert [step for step, _ in on_board["quality/perplexity"]] == [2, 4], "rounds without evaluation have none"
    summary = json.loads((directory / "summary.json").read_text())
    assert on_board["result/perplexity/tuned"] == [(4, np.float32(summary["perplexity"]["tuned"]))]
    assert "result/perplexity/centralised" not in on_board  # null
    (file,) = (directory / "tensorboard").iterdir()
    settings = next(value for event in on_file(file) for value in event.summary.value)
    assert settings.tag == "_hparams_/session_start_info" and b"lora.rank" in settings.metadata.plugin_data.content
    assert not (directory / "events.jsonl").exists()


@pytest.mark.parametrize("stopped_in", [2, 4], ids=["before a checkpoint", "after one"])
def test_a_run_that_goes_on_shows_every_round_once(run, tiny, tmp_path, monkeypatch, stopped_in):
    def stop(directory: Path, state: Any, facts: Any) -> Any:
        if facts.round == stopped_in:  # the round is shown already
            raise KeyboardInterrupt
        return save_checkpoint(directory, state, facts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fedpeat_ray.simulation.save_checkpoint", stop)
        run()
    directory = tmp_path / "run"
    assert [step for step, _ in shown(directory)["wall/wall_s"]] == [*range(1, stopped_in + 1)]
    Simulation(whole_runs.changed(tiny, resume=directory)).run()
    assert_shows_the_run(directory)
    Simulation(whole_runs.changed(tiny, resume=directory, rounds=5)).run()
    assert_shows_the_run(directory)
    assert [step for step, _ in shown(directory)["result/perplexity/tuned"]] == [4, 5]


def test_watching_is_no_part_of_a_result(run, tiny):
    watched, alone = run("watched"), run("alone", watch=WatchConfig(tensorboard=False))
    assert not (alone / "tensorboard").exists()
    assert_same_bits(watched, alone)
    resumed = {"resume": alone, "rounds": 5, "watch": WatchConfig()}  # begun without, and now with
    Simulation(whole_runs.changed(tiny, **resumed)).run()
    assert [step for step, _ in shown(alone)["wall/wall_s"]] == [5]


class _Fails:
    """A watcher that does what it is told, until a round."""

    def __init__(self, until: int = 0):
        self.until, self.seen = until, []

    def round(self, row: Any, clients: Any) -> None:
        self.seen.append(row["round"])
        if row["round"] == self.until:
            raise OSError(28, "No space left on device")

    def summary(self, summary: Any) -> None:
        self.seen.append("summary")

    def close(self) -> None:
        self.seen.append("closed")


def test_a_watcher_that_fails_is_told_of_once_and_left_out():
    told, fails, other = [], _Fails(until=2), _Fails()

    def never() -> Any:
        raise RuntimeError("no server")

    with Watchers({"a": lambda: fails, "b": never, "c": lambda: other}, lambda *what: told.append(what)) as watchers:
        for number in (1, 2, 3):
            watchers.round({"round": number}, {})
        watchers.summary({})
    assert [(name, type(error)) for name, error in told] == [("b", RuntimeError), ("a", OSError)]
    assert fails.seen == [1, 2] and other.seen == [1, 2, 3, "summary", "closed"]


def test_a_run_goes_on_without_a_watcher_and_says_so(run, monkeypatch, capsys):
    def full(self: Any, row: Any, clients: Any) -> None:
        raise OSError(28, "No space left on device")

    undisturbed = run("undisturbed")
    monkeypatch.setattr(TensorBoard, "round", full)
    capsys.readouterr()
    directory = run("on a full disk")
    assert_same_bits(undisturbed, directory)
    (event,) = events(directory)
    assert event["kind"] == "watcher_failed" and event["watcher"] == "TensorBoard"
    assert event["error"] == "OSError(28, 'No space left on device')"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert said == [f"warning: TensorBoard is left out from here on: {event['error']}"]


def test_what_is_stopped_is_closed():
    watcher = _Fails()
    with pytest.raises(KeyboardInterrupt), Watchers({"a": lambda: watcher}, lambda *_: None):
        raise KeyboardInterrupt
    assert watcher.seen == ["closed"]


def test_wandb_is_told_of_settings_rounds_and_results(run, tiny, wandb):
    directory = run(watch=WatchConfig(wandb="tuning"))
    Simulation(whole_runs.changed(tiny, resume=directory, rounds=5, watch=WatchConfig(wandb="tuning"))).run()
    said = [json.loads(line) for line in (directory / "said.jsonl").read_text().splitlines()]
    assert [word for word, _ in said] == ["init", *["log"] * 4, "summary", "finish", "init", "log", "summary", "finish"]
    first, again = (facts for word, facts in said if word == "init")
    assert first["project"] == "tuning" and first["name"] == "run" and first["config"]["lora"]["rank"] == 2
    assert first["id"] == again["id"] and re.fullmatch(r"[0-9a-f]{16}", first["id"]) and first["resume"] == "allow"
    rounds = pd.read_parquet(directory / "rounds")
    of_rounds = [facts for word, facts in said if word == "log"]
    assert [facts["step"] for facts in of_rounds] == rounds["round"].tolist()
    assert [facts["costs/virtual_s"] for facts in of_rounds] == rounds["virtual_s"].tolist()
    summary = json.loads((directory / "summary.json").read_text())
    results = [facts for word, facts in said if word == "summary"][-1]
    assert results["adapter_sha256"] == summary["adapter_sha256"]
    assert results["result/perplexity/tuned"] == summary["perplexity"]["tuned"]
    assert [facts for word, facts in said if word == "finish"] == [0, 0]
    assert read_config(directory)["config"]["watch"] == {"tensorboard": True, "wandb": "tuning"}


def test_wandb_is_told_that_a_run_was_stopped(run, wandb, tmp_path, monkeypatch):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedpeat_ray.simulation.Progress.round", stop)
    with pytest.raises(KeyboardInterrupt):
        run(watch=WatchConfig(wandb="tuning"))
    assert json.loads((tmp_path / "run" / "said.jsonl").read_text().splitlines()[-1]) == ["finish", 1]


def test_wandb_that_is_not_installed_is_refused(tiny, tmp_path, monkeypatch):
    config = whole_runs.changed(tiny, watch=WatchConfig(wandb="tuning"))
    (tmp_path / "wandb").mkdir()  # what W&B leaves behind where it is used is no module
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="watch.wandb = 'tuning' is not allowed: unset where wandb is not installed"):
        Simulation(config)


def test_ray_is_told_of_what_is_there(monkeypatch):
    for kind in ("Gauge", "Counter"):
        monkeypatch.setattr(ray_metrics, kind, Told)
    watcher: Any = ray_metrics.RayMetrics("run", "fed-peft")
    row = {"round": 1, "perplexity": None, "train_loss": None, "virtual_s": 2.5, "num_completed": 0}
    row |= {"wall_train_s": 0.0, "download_bytes": 7, "upload_bytes": 0, "energy_j": 0.0, "metrics": {}}
    watcher.round(row, {"outcome": np.array(["dropped"] * 2), "drop_reason": np.array(["link"] * 2, dtype=object)})
    row |= {"round": 2, "perplexity": 9.0, "num_completed": 1, "wall_train_s": 0.5, "download_bytes": 3}
    row |= {"metrics": {"accuracy": 0.5, "macro_f1": 0.4}}
    watcher.round(row, {"outcome": np.array(["completed"]), "drop_reason": np.array([None], dtype=object)})
    told = {name: [value for value, _ in metric.told] for name, metric in (watcher._gauges | watcher._counters).items()}
    assert {name.removeprefix("fedpeat_"): values for name, values in told.items() if values} == {
        "round": [1, 2],
        "perplexity": [9.0],
        "virtual_seconds": [2.5, 2.5],
        "clients_per_second": [2.0],
        "download_bytes": [7, 3],
    }
    fates = [({"outcome": "dropped", "drop_reason": "link"}, 2), ({"outcome": "completed", "drop_reason": ""}, 1)]
    assert watcher._metric.told == [(0.5, {"metric": "accuracy"}), (0.4, {"metric": "macro_f1"})]
    assert watcher._clients.told == [(number, tags) for tags, number in fates]


def test_the_grafana_dashboard_shows_what_there_is():
    board = json.loads((ROOT / "cluster/watching/grafana_dashboard.json").read_text())
    counters = [ray_metrics.CLIENTS, *ray_metrics.COUNTERS]
    ours = {f"ray_{name}" for name in (*ray_metrics.GAUGES, ray_metrics.METRIC)} | {
        f"ray_{name}_total" for name in counters
    }
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert set(re.findall(r"ray_\w+", variables["run"]["query"])) <= ours
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    asked = set()
    for panel in panels:
        assert panel["title"] and panel["description"] and panel["targets"]
        for part in (panel, *panel["targets"], variables["run"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            names = set(re.findall(r"ray_\w+", target["expr"]))
            assert names and ('run=~"$run"' in target["expr"] or names == {"ray_actors"})
            asked |= names
    assert asked == ours | {"ray_actors"}, "Ray's own gauge of actors tells of hosts"
