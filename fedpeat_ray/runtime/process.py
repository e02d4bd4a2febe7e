"""How a process that trains is set up: threads, memory that is kept, memory that is capped, and what ends it."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let malloc keep what is freed: by default glibc returns large blocks to the system at once, and
    the fresh pages of the next step cost more than its arithmetic. Does nothing where there is no glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)


class Terminated(KeyboardInterrupt):
    """SIGTERM came; like Ctrl-C, it is no Exception."""


@contextlib.contextmanager
def raised_on_sigterm() -> Iterator[None]:
    """SIGTERM raises Terminated in the main thread, so that what was begun is put in order."""

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def kept_sigterm() -> Iterator[None]:
    """Who handles SIGTERM, if anybody set that up before, does so afterwards: Ray takes it over."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def process_settings(num_threads: int) -> Iterator[None]:
    """Train with this many threads, which the last bits depend on; the number before comes back at the end."""
    before = torch.get_num_threads()
    keep_freed_memory()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cap_memory(cap_bytes: int, device: str) -> None:
    """From here on this process cannot allocate more than `cap_bytes`; what it has already is not counted.

    On a GPU by PyTorch's allocator; on a CPU by the system's limit on private memory (Linux), which
    also counts what PyTorch does not allocate itself. Raises RuntimeError on other systems' CPUs.
    """
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total))
        return
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used_bytes = int(fields["VmData"].split()[0]) * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used_bytes + cap_bytes, hard))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
