"""Processes that a test looks at from outside."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Known:
    """A process as it was once seen; its id may be another's by now."""

    process_id: int
    created: float
    name: str

    def __str__(self) -> str:
        return f"{self.process_id} {self.created!r} {self.name}"

    @classmethod
    def parse(cls, line: str) -> Known:
        """The inverse of str."""
        process_id, created, name = line.split(maxsplit=2)
        return cls(int(process_id), float(created), name)

    def lives(self) -> bool:
        """Whether it is still there; a zombie is not."""
        try:
            process = psutil.Process(self.process_id)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def below(process_id: int | None = None) -> list[Known]:
    """All processes below one; by default this one."""
    found = []
    for child in psutil.Process(process_id).children(recursive=True):
        try:
            found.append(Known(child.pid, child.create_time(), child.name()))
        except psutil.NoSuchProcess:
            continue
    return found


def living(processes: list[Known], timeout_s: float = 60) -> list[Known]:
    """Those that are still there after this time at most."""
    deadline = time.monotonic() + timeout_s
    while (left := [process for process in processes if process.lives()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
