"""Processes that a test looks at from outside."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def listening() -> list[tuple[str, str]]:
    """The addresses on which processes below this one wait for connections, and their names."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            name, sockets = child.name(), child.net_connections("tcp")
            found += [(socket.laddr.ip, name) for socket in sockets if socket.status == psutil.CONN_LISTEN]
    return found


def naming(folder: Path) -> list[Known]:
    """All processes whose command line has this folder in it."""
    every = psutil.process_iter(["pid", "create_time", "name", "cmdline"])
    found = [each.info for each in every if any(str(folder) in word for word in each.info["cmdline"] or ())]
    return [Known(each["pid"], each["create_time"], each["name"]) for each in found]


def living(processes: list[Known], timeout_s: float = 60) -> list[Known]:
    """Those that are still there after this time at most."""
    deadline = time.monotonic() + timeout_s
    while (left := [process for process in processes if process.lives()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


_FORKS = multiprocessing.get_context("forkserver")


def forked(out: Path, error: Path, function: Callable[..., int], *arguments: object, timeout_s: float = 120) -> int:
    """The status of a process of its own that ends with `function`, its output in two files; -9: it was killed.

    It is forked from one that has loaded what a run needs and done nothing yet, so it starts at once.
    """
    _FORKS.set_forkserver_preload(["workloads.large_scale", "fedpeat_ray.simulation", "analysis.report"])
    process = _FORKS.Process(target=_redirected, args=(out, error, function, *arguments))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{function.__name__} runs for more than {timeout_s} s")
    return process.exitcode


def _redirected(out: Path, error: Path, function: Callable[..., int], *arguments: object) -> None:
    for path, descriptor in ((out, 1), (error, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.exit(function(*arguments))
