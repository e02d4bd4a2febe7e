"""Local training that fails in a way a test has chosen. Hosts import it by name.

KillsItsHost and Raises go in the place of TrainClientBatch: `partial(KillsItsHost, device_id=..., ...)`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from patience import OutOfPatience
from torch import Tensor

from fedpeat_ray.models.foundation import Backbone
from fedpeat_ray.records import ClientTask
from fedpeat_ray.training.client_batch import ClientUpdate, TrainClientBatch


@dataclass(frozen=True)
class KillsItsHost(TrainClientBatch):
    """Kills the process with the batch of one device, its work done and not yet handed in."""

    device_id: int
    once: Path | None
    """A file that is written at the first kill, after which there is no second; None: always."""

    def __call__(self, backbone: Backbone, start_P: Tensor, tasks: Sequence[ClientTask]) -> list[ClientUpdate]:
        updates = super().__call__(backbone, start_P, tasks)
        if _has(tasks, self.device_id) and not (self.once and self.once.exists()):
            if self.once:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return updates


@dataclass(frozen=True)
class EndsItsNode(TrainClientBatch):
    """Ends the node it is on, as a failure of power would, in the first batch with one of these devices."""

    devices: tuple[int, ...]
    head: bool
    """Whether the head, GCS and all, or another node."""

    def __call__(self, backbone: Backbone, start_P: Tensor, tasks: Sequence[ClientTask]) -> list[ClientUpdate]:
        updates = super().__call__(backbone, start_P, tasks)
        start = psutil.Process().parents()[1]  # ray start, above the raylet
        names = {process.name() for process in start.children()}
        if any(_has(tasks, device_id) for device_id in self.devices) and ("gcs_server" in names) == self.head:
            for process in [*start.children(recursive=True), start]:
                if process.pid != os.getpid():
                    process.kill()
            os.kill(os.getpid(), signal.SIGKILL)
        return updates


@dataclass(frozen=True)
class OneAfterAnother(TrainClientBatch):
    """Holds the batch of each device until that of the next is done: as many hosts are needed, at one time."""

    devices: tuple[int, ...]
    pipes: tuple[Path, ...]
    """One fewer."""

    def __call__(self, backbone: Backbone, start_P: Tensor, tasks: Sequence[ClientTask]) -> list[ClientUpdate]:
        updates = super().__call__(backbone, start_P, tasks)
        for number, device_id in enumerate(self.devices):
            if _has(tasks, device_id):
                if number < len(self.pipes):
                    self.pipes[number].read_bytes()  # each side of a pipe waits for the other
                if number > 0:
                    self.pipes[number - 1].write_bytes(b"done")
        return updates


@dataclass(frozen=True)
class Raises(TrainClientBatch):
    """Raises in the batch of one device."""

    device_id: int

    def __call__(self, backbone: Backbone, start_P: Tensor, tasks: Sequence[ClientTask]) -> list[ClientUpdate]:
        if _has(tasks, self.device_id):
            lose_patience(self.device_id)
        return super().__call__(backbone, start_P, tasks)


def lose_patience(device_id: int) -> None:
    """A frame that a traceback should show."""
    raise OutOfPatience(f"device {device_id} took too long")


def _has(tasks: Sequence[ClientTask], device_id: int) -> bool:
    return any(task.device_id == device_id for task in tasks)


@dataclass(frozen=True)
class Update:
    """The update of a task that is a number: the number."""

    report: int


@dataclass(frozen=True)
class EndsLast:
    """Tasks are numbers; holds the batch of the first until that of the last is done, by a named pipe."""

    first: int
    last: int
    pipe: Path

    def __call__(self, backbone: Backbone, shared: None, tasks: Sequence[int]) -> list[Update]:
        if self.first in tasks:
            self.pipe.read_bytes()  # each side of a pipe waits for the other
        elif self.last in tasks:
            self.pipe.write_bytes(b"done")
        return [Update(task) for task in tasks]


@dataclass(frozen=True)
class EndsItsHost:
    """Tasks are numbers; ends the process at one of them, once or always."""

    number: int
    once: Path | None

    def __call__(self, backbone: Backbone, shared: None, tasks: Sequence[int]) -> list[Update]:
        if self.number in tasks and not (self.once and self.once.exists()):
            if self.once:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [Update(task) for task in tasks]


@dataclass(frozen=True)
class Text:
    """An aggregator that shows what was added to it, in which order."""

    text: str = ""

    def add(self, updates: Sequence[Update]) -> Text:
        return Text(self.text + "(" + "".join(str(update.report) for update in updates) + ")")

    def merge(self, other: Text) -> Text:
        return Text(self.text + other.text)

    def result(self) -> str:
        return self.text
