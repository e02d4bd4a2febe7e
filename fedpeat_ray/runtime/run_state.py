"""How far runs are, from outside: read from their directories, which may be of an older version, half written, or
being written at this moment. Nothing is written, and what cannot be read is None."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from fedpeat_ray import own
from fedpeat_ray.errors import RunDirError
from fedpeat_ray.runtime.metric import Metric, metric_of, score_of_round
from fedpeat_ray.runtime.run_lock import is_held
from fedpeat_ray.runtime.run_log import CONFIG, EVENTS, SUMMARY, round_files

RUNNING, FINISHED, FAILED, INTERRUPTED, UNFINISHED = "running", "finished", "failed", "interrupted", "unfinished"


@dataclass(frozen=True)
class RunState:
    """What a run directory says of its run."""

    directory: Path
    state: str
    """running: a process holds its lock; finished or failed: it has a summary, which says so; interrupted: it has none;
    unfinished: it has none, and locks cannot be asked for, so that it may be running or interrupted."""
    created: str
    algorithm: str | None
    foundation: str | None
    num_rounds: int | None
    """Of the whole run."""
    last_round: int
    """That is complete; 0 if none is."""
    metric: Metric
    """What the task is judged by."""
    score: float | None
    """In it: of the summary; else of the last round that was evaluated."""
    virtual_s: float | None
    wall_s: float | None
    """Of the summary; else of all rounds together."""
    last_round_at: float | None
    """When it was written, in seconds since the epoch."""
    summary: dict[str, Any] | None


def state_of(directory: Path) -> RunState:
    """How far the run in a directory is."""
    held = is_held(directory)  # first: who does not hold it any more has written its summary
    config, summary = _json(directory / CONFIG), _json(directory / SUMMARY)
    if held:
        state = RUNNING
    elif summary:
        state = FAILED if summary.get("failure") else FINISHED
    else:
        state = UNFINISHED if held is None else INTERRUPTED
    ended = None if held else summary
    rounds = round_files(directory)
    rows = [] if ended else [row for _, part in sorted(rounds.items()) if (row := _row(part))]
    metric = metric_of(ended or _at(config, dict, "resolved"))
    scores = (score_of_round(row, metric) for row in rows)
    last, algorithm = max(rounds, default=0), _at(config, str, "config", "algorithm")
    return RunState(
        directory=directory,
        state=state,
        created=_at(config, str, "created") or "",
        algorithm=algorithm and own.short(algorithm),
        foundation=_at(config, str, "config", "foundation", "name"),
        num_rounds=_at(config, int, "config", "rounds"),
        last_round=last,
        metric=metric,
        score=_at(ended, float, "scores" if "scores" in ended else "perplexity", "tuned") if ended else _last(scores),
        virtual_s=_at(ended, float, "virtual_s") if ended else _last(row["virtual_s"] for row in rows),
        wall_s=_at(ended, float, "wall_s") if ended else sum(row["wall_s"] for row in rows) if rows else None,
        last_round_at=_written_at(rounds[last]) if rounds else None,
        summary=summary,
    )


def has_ended(directory: Path) -> bool:
    """Whether nobody writes a run any more; where no locks can be asked for: whether it has its summary."""
    held = is_held(directory)
    return (directory / SUMMARY).exists() if held is None else not held


def is_run(directory: Path) -> bool:
    """Whether a directory holds a run, perhaps one that was ended before its config.json was there."""
    try:
        return (directory / "rounds").is_dir()
    except OSError:  # not ours to look at
        return False


def runs_in(folder: Path) -> list[Path]:
    """Directories of runs: the folder itself, those in it, and those in folders in it, as sweeps make them.

    Raises RunDirError if the folder cannot be read; others that cannot are passed over.
    """
    if is_run(folder):
        return [folder]
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise RunDirError(f"{folder} cannot be read: {error.strerror}") from None
    return [each for one in inside for each in ([one] if is_run(one) else _subfolders(one)) if is_run(each)]


class News(NamedTuple):
    """Something that was written down: the row of a round, or an event."""

    at: float
    """Seconds since the epoch."""
    round: dict[str, Any] | None = None
    event: dict[str, Any] | None = None


class Follower:
    """Reads what comes to be written in a run directory."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._last_round = 0
        self._events_read = 0  # bytes

    def news(self) -> list[News]:
        """What was written since the last call, in order. Rounds that a resumed run does again are news again."""
        return sorted([*self._rounds(), *self._events()], key=lambda news: news.at)

    def _rounds(self) -> Iterator[News]:
        rounds = round_files(self._directory)
        self._last_round = min(self._last_round, max(rounds, default=0))
        for round in sorted(round for round in rounds if round > self._last_round):
            self._last_round = round
            if row := _row(rounds[round]):
                yield News(_written_at(rounds[round]) or 0.0, round=row)

    def _events(self) -> Iterator[News]:
        try:
            with (self._directory / EVENTS).open("rb") as file:
                file.seek(self._events_read)
                whole, end, _ = file.read().rpartition(b"\n")  # what has no end yet is still being written
        except OSError:
            return
        self._events_read += len(whole) + len(end)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
                yield News(datetime.fromisoformat(event["time"]).timestamp(), event=event)
            except (ValueError, TypeError, KeyError):  # cut off by a crash
                continue


def _row(part: Path) -> dict[str, Any] | None:
    """Of a round; None if its file is broken, or gone by now."""
    try:
        with pq.ParquetFile(part) as file:  # read_table would load pandas
            (row,) = file.read().to_pylist()
    except (OSError, ValueError):  # Arrow's errors are ValueErrors
        return None
    return row


def _last(values: Iterable[float | None]) -> float | None:
    return next((value for value in reversed([*values]) if value is not None), None)


def _written_at(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _at(values: Any, kind: type, *names: str) -> Any:
    """What lies in nested dictionaries, if it is there and of this kind; whole numbers are floats, too."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    if kind is float and isinstance(values, int):
        return float(values)
    return values if isinstance(values, kind) else None
