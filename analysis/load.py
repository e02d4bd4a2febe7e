"""A run directory as pandas tables."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

Frame = Any  # a pandas DataFrame: under pandas's own annotations most honest uses fail a type check


_CALLED_NOW = {"upper_bound": "centralised"}  # in the summaries of older runs
_MEASURED_ONCE = ("perplexity", "token_accuracy")  # by older runs


SHARES = ("accuracy", "exact_match", "precision", "recall", "f1")
"""How the names of metrics end that are shares, to be read in percent."""


class NotARunError(ValueError):
    """A directory holds no run that can be read."""


@dataclass(frozen=True)
class Metric:
    """What a task is judged by; runs of older versions do not say, and mean perplexity."""

    name: str = "perplexity"
    higher_is_better: bool = False

    @property
    def words(self) -> str:
        """As a person writes it: macro F1."""
        return " ".join("F1" if word == "f1" else word for word in self.name.split("_"))

    @property
    def title(self) -> str:
        """The same where a line begins with it."""
        return self.words[:1].upper() + self.words[1:]

    @property
    def is_share(self) -> bool:
        """Whether its values are shares, from 0 to 1."""
        return self.name.endswith(SHARES)

    @property
    def is_perplexity(self) -> bool:
        return self.name == "perplexity"

    def written(self, value: float) -> str:
        """A value of it: a share in percent."""
        if self.is_share:
            return f"{value:.1%}"
        return f"{value:.2f}" if self.is_perplexity else f"{value:.4g}"


@dataclass(frozen=True, repr=False)
class Run:
    """What one run wrote down; `docs/run_log.md` describes every column."""

    directory: Path
    config: dict[str, Any]
    """config.json: `config` (the settings), `resolved`, `versions`, `git`, `hardware`, ..."""
    rounds: Frame
    """One row a round, sorted; empty if none is finished. What was logged as `figures` has a column `figures.NAME` a
    name, and so have `metrics` and `device_metrics`. `score` and `device_score` are those of them that the task is
    judged by."""
    clients: Frame
    """One row a (round, device), sorted; the clients of finished rounds."""
    summary: dict[str, Any] | None
    """summary.json; None while the run is unfinished."""
    events: Frame
    """Columns `time`, `kind`, and one a fact; empty if nothing happened."""

    def __repr__(self) -> str:
        state = "finished" if self.summary else "unfinished"
        about = f"{self.settings.get('algorithm')}, {len(self.rounds)} of {self.settings.get('rounds')} rounds, {state}"
        return f"<Run {self.name}: {about}>"

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by dotted path, e.g. settings["fleet.num_devices"]."""
        return flatten(self.config.get("config", {}))

    @property
    def levels(self) -> dict[int, int]:
        """Blocks that the emulator of each level has, the foundation's last; empty for a run without emulators."""
        levels = (self.config.get("resolved") or {}).get("levels") or ()
        return {level["level"]: len(level["blocks"]) for level in levels}

    @property
    def metric(self) -> Metric:
        """What `scores`, and `score` in `rounds`, are values of."""
        return _metric(self.config, self.summary)

    @property
    def scores(self) -> dict[str, Any]:
        """What summary.json says of the metric; empty while the run is unfinished."""
        return self._of_summary("scores") or self.perplexity

    @property
    def perplexity(self) -> dict[str, Any]:
        """The same of perplexity, which every task has: exp of the mean loss a label."""
        return self._of_summary("perplexity")

    def _of_summary(self, key: str) -> dict[str, Any]:
        values = (self.summary or {}).get(key) or {}
        return {_CALLED_NOW.get(name) or name: value for name, value in values.items()}

    @property
    def metrics(self) -> dict[str, tuple[float | None, float | None]]:
        """All that the task measures, by name: zero-shot and tuned, or as of the last round that was evaluated."""
        summary = self.summary or {}
        older = {name: summary.get(name) or {} for name in _MEASURED_ONCE if name in summary}
        metrics = summary.get("metrics") or {
            when: {name: values.get(when) for name, values in older.items()} for when in ("zero_shot", "tuned")
        }
        before, after = metrics["zero_shot"], metrics["tuned"]
        of_rounds = self.rounds.filter(regex=r"^metrics\.").rename(columns=lambda name: name.removeprefix("metrics."))
        last = {name: last_of(values) for name, values in of_rounds.items()}
        return {
            name: (before.get(name), after.get(name) if self.summary else last.get(name))
            for name in dict.fromkeys([self.metric.name, *before, *after, *last])
        }

    @property
    def on_devices(self) -> dict[str, tuple[float | None, float | None]]:
        """Score (zero-shot, tuned) of what devices train, if that is not the model itself: of every pair
        `X_zero_shot`, `X_tuned`; where it has levels, of each, the highest last."""
        found = {}
        for name in _pairs(self.scores):
            before, after = (self.scores[f"{name}_{when}"] for when in ("zero_shot", "tuned"))
            words = name.replace("_", " ")
            if isinstance(before, dict):
                levels = sorted(before.keys() | after.keys(), key=lambda level: (len(level), level))
                found |= {f"{words} of level {level}": (before.get(level), after.get(level)) for level in levels}
            else:
                found[f"{words} model"] = (before, after)
        return found

    @property
    def other_scores(self) -> dict[str, float | None]:
        """The numbers under names that are neither the model's, before and after, nor of what devices train."""
        pairs = {f"{name}_{when}" for name in _pairs(self.scores) for when in ("zero_shot", "tuned")}
        known = {"zero_shot", "tuned", "centralised"} | pairs
        numbers = {name: value for name, value in self.scores.items() if isinstance(value, int | float | None)}
        return {name: value for name, value in numbers.items() if name not in known}

    @property
    def tuned_by(self) -> list[str]:
        """Names of those that are of the tuned model: they say how it came about. They have its perplexity; two
        accuracies may well be equal by chance."""
        values = self.perplexity
        return [name for name in self.other_scores if name in values and values[name] == values.get("tuned")]


def load_run(directory: str | Path) -> Run:
    """Read a run directory, finished or not; raises NotARunError if it holds none."""
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise NotARunError(f"{directory} is no directory")
    if not (directory / "config.json").exists():
        raise NotARunError(f"{directory} holds no run: it has no config.json")
    config, summary = _json(directory / "config.json"), directory / "summary.json"
    ended = _json(summary) if summary.exists() else None
    rounds, clients = _table(directory / "rounds"), _table(directory / "clients")
    if rounds.empty:
        clients = clients.head(0)
    else:  # clients are written before their round: without its row, a round is not finished
        rounds = _with_columns(rounds.sort_values("round", ignore_index=True), _metric(config, ended))
        clients = clients[clients["round"].isin(rounds["round"])]
        clients = clients.sort_values(["round", "device_id"], ignore_index=True)
        clients = clients if "group" in clients else clients.assign(group=None)
    return Run(
        directory=directory,
        config=config,
        rounds=rounds,
        clients=clients,
        summary=ended,
        events=_events(directory / "events.jsonl"),
    )


def last_of(series: Any) -> float | None:
    """The last value that there is."""
    values = series.dropna()
    return float(values.iloc[-1]) if len(values) else None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted paths."""
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _metric(config: dict[str, Any], summary: dict[str, Any] | None) -> Metric:
    said = (summary or {}).get("metric") or (config.get("resolved") or {}).get("metric")
    return Metric(said["name"], said["higher_is_better"]) if said else Metric()


def _pairs(scores: dict[str, Any]) -> list[str]:
    names = [name.removesuffix("_zero_shot") for name in scores if name.endswith("_zero_shot")]
    return [name for name in names if f"{name}_tuned" in scores]


def _with_columns(rounds: Frame, metric: Metric) -> Frame:
    """With a column a name of what was measured and logged, those of the metric, and with none skipped in rounds that
    do not say."""
    maps = ("metrics", "device_metrics", "figures")
    rounds = rounds.reindex(columns=list(dict.fromkeys([*rounds, "num_skipped", *maps])))
    rounds["num_skipped"] = rounds["num_skipped"].fillna(0).astype("int32")
    for name in maps:
        of_rounds = [dict(values) if isinstance(values, list) else {} for values in rounds.pop(name)]
        if name != "figures" and metric.is_perplexity:  # older rounds have columns instead
            prefix = name.removesuffix("metrics")
            columns = {f"{prefix}{of}": of for of in _MEASURED_ONCE if f"{prefix}{of}" in rounds}
            older = rounds[list(columns)].rename(columns=columns).to_dict("records")
            of_rounds = [values or before for values, before in zip(of_rounds, older, strict=True)]
        rounds = rounds.join(pd.DataFrame(of_rounds, rounds.index, dtype=float).add_prefix(f"{name}."))
    for prefix in ("", "device_"):
        rounds[f"{prefix}score"] = rounds.get(f"{prefix}metrics.{metric.name}", math.nan)
    return rounds


def _table(folder: Path) -> Frame:
    """All parts of a table as one; a column that some of them lack is null there."""
    parts = sorted(folder.glob("[0-9]*.parquet"))
    if not parts:
        return pd.DataFrame()
    try:
        return pd.read_parquet(folder, schema=pa.unify_schemas([pq.read_schema(part) for part in parts]))
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise NotARunError(f"{folder} cannot be read: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotARunError(f"{path} cannot be read: {error}") from error


def _events(path: Path) -> Frame:
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:  # a line cut off by a crash
            continue
    return pd.DataFrame(records) if records else pd.DataFrame(columns=["time", "kind"])
