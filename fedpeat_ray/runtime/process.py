"""How a process that trains is set up: threads, memory that is kept, memory that is capped."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
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


@contextlib.contextmanager
def loaded() -> Iterator[None]:
    """What is there now stays until the end, so garbage is not looked for in it: that takes a quarter of a second."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def give_freed_memory_back() -> None:
    """Have malloc return what is freed to the system, so that what a process has is what it uses."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**17)  # larger ones get pages of their own, which go when they are freed
        libc.mallopt(_M_TRIM_THRESHOLD, 2**17)


@contextlib.contextmanager
def limited_memory(room_bytes: int, device: str) -> Iterator[None]:
    """Until the end this process cannot allocate more than `room_bytes` beyond what it has already.

    On a GPU by PyTorch's allocator; on a CPU by the system's limit on private memory (Linux), which
    also counts what PyTorch does not allocate itself. Raises OSError on other systems' CPUs.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        most = torch.cuda.memory_reserved() + max(0, room_bytes)
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used_bytes = int(fields["VmData"].split()[0]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used_bytes + max(0, room_bytes), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
