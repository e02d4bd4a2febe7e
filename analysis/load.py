"""A run directory as pandas tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

Frame = Any  # a pandas DataFrame: under pandas's own annotations most honest uses fail a type check


_CALLED_NOW = {"upper_bound": "centralised"}  # in the summaries of older runs


class NotARunError(ValueError):
    """A directory holds no run that can be read."""


@dataclass(frozen=True, repr=False)
class Run:
    """What one run wrote down; `docs/run_log.md` describes every column."""

    directory: Path
    config: dict[str, Any]
    """config.json: `config` (the settings), `resolved`, `versions`, `git`, `hardware`, ..."""
    rounds: Frame
    """One row a round, sorted; empty if none is finished. What was logged as `figures` has a column `figures.NAME` a
    name."""
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
    def perplexity(self) -> dict[str, Any]:
        """What summary.json says of it; empty while the run is unfinished."""
        values = (self.summary or {}).get("perplexity") or {}
        return {_CALLED_NOW.get(name) or name: value for name, value in values.items()}

    @property
    def on_devices(self) -> dict[str, tuple[float | None, float | None]]:
        """Perplexity (zero-shot, tuned) of what devices train, if that is not the model itself: of every pair
        `X_zero_shot`, `X_tuned`; where it has levels, of each, the highest last."""
        found = {}
        for name in _pairs(self.perplexity):
            before, after = (self.perplexity[f"{name}_{when}"] for when in ("zero_shot", "tuned"))
            words = name.replace("_", " ")
            if isinstance(before, dict):
                levels = sorted(before.keys() | after.keys(), key=lambda level: (len(level), level))
                found |= {f"{words} of level {level}": (before.get(level), after.get(level)) for level in levels}
            else:
                found[f"{words} model"] = (before, after)
        return found

    @property
    def other_perplexities(self) -> dict[str, float | None]:
        """The numbers under names that are neither the model's, before and after, nor of what devices train."""
        pairs = {f"{name}_{when}" for name in _pairs(self.perplexity) for when in ("zero_shot", "tuned")}
        known = {"zero_shot", "tuned", "centralised"} | pairs
        numbers = {name: value for name, value in self.perplexity.items() if isinstance(value, int | float | None)}
        return {name: value for name, value in numbers.items() if name not in known}

    @property
    def tuned_by(self) -> list[str]:
        """Names of those that are the perplexity of the tuned model: they say how it came about."""
        return [name for name, value in self.other_perplexities.items() if value == self.perplexity.get("tuned")]


def load_run(directory: str | Path) -> Run:
    """Read a run directory, finished or not; raises NotARunError if it holds none."""
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise NotARunError(f"{directory} is no directory")
    if not (directory / "config.json").exists():
        raise NotARunError(f"{directory} holds no run: it has no config.json")
    rounds, clients = _table(directory / "rounds"), _table(directory / "clients")
    if rounds.empty:
        clients = clients.head(0)
    else:  # clients are written before their round: without its row, a round is not finished
        rounds = _with_figures(rounds.sort_values("round", ignore_index=True))
        clients = clients[clients["round"].isin(rounds["round"])]
        clients = clients.sort_values(["round", "device_id"], ignore_index=True)
        clients = clients if "group" in clients else clients.assign(group=None)
    summary = directory / "summary.json"
    return Run(
        directory=directory,
        config=_json(directory / "config.json"),
        rounds=rounds,
        clients=clients,
        summary=_json(summary) if summary.exists() else None,
        events=_events(directory / "events.jsonl"),
    )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted paths."""
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _pairs(perplexity: dict[str, Any]) -> list[str]:
    names = [name.removesuffix("_zero_shot") for name in perplexity if name.endswith("_zero_shot")]
    return [name for name in names if f"{name}_tuned" in perplexity]


def _with_figures(rounds: Frame) -> Frame:
    """With a column a name that was logged, and with none skipped in rounds that do not say."""
    rounds = rounds.reindex(columns=list(dict.fromkeys([*rounds, "num_skipped", "figures"])))
    rounds["num_skipped"] = rounds["num_skipped"].fillna(0).astype("int32")
    logged = [dict(figures) if isinstance(figures, list) else {} for figures in rounds.pop("figures")]
    return rounds.join(pd.DataFrame(logged, rounds.index, dtype=float).add_prefix("figures."))


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
