"""What a host does in its process: a backbone, and the serial side of the seam around it."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedpeat_ray.models.foundation import Foundation, load_backbone
from fedpeat_ray.records import MEMORY, Assignment, ClientReport, ClientTask
from fedpeat_ray.runtime.node_files import Sent, receive
from fedpeat_ray.runtime.process import give_freed_memory_back, is_out_of_memory, keep_freed_memory, limited_memory
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.training.map_clients import Call

_TRIES = 3  # within the cap: a thread that Ray starts meanwhile takes 8 MiB of it for its stack


@dataclass(frozen=True)
class Facts:
    """What the main process is told of an aggregate, which itself may stay away."""

    what: str
    """Was done."""
    reports: list[Any]
    num_bytes: int
    started_s: float
    stopped_s: float
    """Of the work, in seconds since the epoch."""

    @classmethod
    def of(cls, what: Any, total: Any, reports: list[Any], started_s: float) -> Facts:
        """Of work that is done now."""
        return cls(_name(what), reports, getattr(total, "num_bytes", 0), started_s, time.time())


class HostWork:
    """Of one simulation."""

    def __init__(
        self,
        foundation: Foundation,
        driver: Foundation | None,
        files: dict[Path, Sent],
        num_threads: int,
        room_bytes: int | None = None,
    ):
        """`room_bytes`: what a device may take for training, beyond the weights it trains on."""
        keep_freed_memory() if room_bytes is None else give_freed_memory_back()
        torch.set_num_threads(num_threads)
        self._known_files: dict[Path, str] = {}
        receive(files, self._known_files)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        backbone = load_backbone(foundation, device)
        self._serial = Serial(backbone, load_backbone(driver, device) if driver else None)
        if room_bytes is not None:
            torch.ones(2**20).exp_()  # starts the threads, whose stacks are not the device's
            limit = functools.partial(limited_memory, room_bytes, device)
            self._limited = Serial(dataclasses.replace(backbone, while_training=limit))
        gc.freeze()  # what is loaded stays

    def run(self, tasks: Sequence[Any], call: Call, files: dict[Path, Sent]) -> tuple[Any, Facts]:
        """Train some batches of a call; returns their aggregate, and what is to be known of it."""
        started_s = time.time()
        receive(files, self._known_files)
        total, reports = self._serial.run(dataclasses.replace(call, tasks=tasks))
        return total, Facts.of(call.train, total, reports, started_s)

    def run_capped(
        self, tasks: Sequence[ClientTask | Assignment], call: Call, files: dict[Path, Sent]
    ) -> tuple[Any, Facts]:
        """The same for devices with a memory cap: running into it is a fact about the device, not an error.

        What training needs the first time only (code, an emulator's weights) is no part of it: a first, smaller task
        is trained without the cap.
        """
        started_s = time.time()
        self.run([_smallest(task) for task in tasks], call, files)
        for _ in range(_TRIES):
            try:
                total, reports = self._limited.run(dataclasses.replace(call, tasks=tasks))
                return total, Facts.of(call.train, total, reports, started_s)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
        reports = [ClientReport(task.device_id, None, MEMORY, 0.0) for task in tasks]
        return call.aggregator, Facts.of(call.train, None, reports, started_s)

    def merge(self, first: Any, second: Any) -> tuple[Any, Facts]:
        """One aggregate of two."""
        started_s = time.time()
        total = first.merge(second)
        return total, Facts.of("merge", total, [], started_s)


def _name(work: Any) -> str:
    """Of what is done in the end, in whatever it is wrapped."""
    inner = getattr(work, "train", None) or getattr(work, "whole", None)
    return work if isinstance(work, str) else _name(inner) if inner else getattr(work, "__name__", type(work).__name__)


def _smallest(task: ClientTask | Assignment) -> ClientTask | Assignment:
    """The same with one step, of one row where the text is there already."""
    if isinstance(task, Assignment):
        return dataclasses.replace(task, num_steps=1)
    return dataclasses.replace(task, arrays={name: array[:1, :1] for name, array in task.arrays.items()})
