"""TensorBoard: event files in the folder `tensorboard` of the run directory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.summary import hparams

from fedpeat_ray.runtime.watchers import scalars

_EVENTS: Any = event_pb2  # made when they are loaded: their classes are nowhere to be read
_SUMMARIES: Any = summary_pb2
FOLDER = "tensorboard"


class TensorBoard:
    """Writes a file for each part of a run, the round that it starts with in its name.

    It writes in this thread, and not as tensorboardX's SummaryWriter in another, where a full disk would go unnoticed.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], first_round: int):
        """`settings`: what the page HPARAMS shows. `first_round`: what older files have of it and of later rounds is
        shown no more."""
        folder = directory / FOLDER
        folder.mkdir(exist_ok=True)
        self._last_round = first_round - 1
        self._file = EventsWriter(str(folder / "events"), f".{first_round:05d}")
        self._write(first_round, session_log=_EVENTS.SessionLog(status=_EVENTS.SessionLog.START))
        _, begun, _ = hparams({name: _plain(value) for name, value in scalars.flat(settings, ".")}, {})
        self._write(0, summary=begun)
        self._file.flush()

    def round(self, row: Mapping[str, Any], clients: Mapping[str, Any]) -> None:
        """The scalars of a round, which is the step."""
        self._last_round = row["round"]
        self._show(scalars.of_round(row, clients))

    def summary(self, summary: Mapping[str, Any]) -> None:
        """What came out, at the last round."""
        self._show(scalars.of_summary(summary))

    def close(self) -> None:
        """All is written already."""
        self._file.close()

    def _show(self, values: Mapping[str, float]) -> None:
        shown = [_SUMMARIES.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(self._last_round, summary=_SUMMARIES.Summary(value=shown))
        self._file.flush()

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(_EVENTS.Event(wall_time=time.time(), step=step, **what))


def _plain(value: Any) -> Any:
    """A list as its text: the page knows only numbers, truths and texts."""
    return str(value) if isinstance(value, list) else value
