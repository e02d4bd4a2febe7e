"""What ends a process: SIGTERM, as orderly as Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


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
