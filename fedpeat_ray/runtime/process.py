"""How a process that trains is set up: threads, and memory that is kept."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

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
