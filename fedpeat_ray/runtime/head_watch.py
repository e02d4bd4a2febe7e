"""Whether the head of the Ray cluster still answers.

Once it is lost every call to Ray hangs, until Ray ends the process without a word of the run: this ends it before,
with one line.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

STATUS = 75
"""Exit status of a process whose head is lost: EX_TEMPFAIL of sysexits.h, try again."""
_LOOK_EVERY_S = 2.0
_RAYS_LIMIT_S = "RAY_gcs_rpc_server_reconnect_timeout_s"
_SHARE = 0.75  # of that time


class HeadWatch:
    """Looks from a thread of its own, from `start` to `stop`."""

    def __init__(self, address: str, last_words: Callable[[], str] | None = None):
        """`address`: HOST:PORT of the head; `last_words`: what a process that ends should say of its work."""
        self._address, self._last_words = address, last_words
        self._limit_s = _SHARE * float(os.environ.get(_RAYS_LIMIT_S) or 60)
        self._done = threading.Event()

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._look, daemon=True, name="head watch").start()

    def stop(self) -> None:
        """The head may go."""
        self._done.set()

    def _look(self) -> None:
        answered_s = time.monotonic()
        while not self._done.wait(min(_LOOK_EVERY_S, self._limit_s / 2)):
            if answers(self._address):
                answered_s = time.monotonic()
            elif time.monotonic() - answered_s > self._limit_s and not self._done.is_set():
                words = f"; {self._last_words()}" if self._last_words else ""
                line = f"the head of Ray at {self._address} has not answered for {self._limit_s:.0f} s{words}"
                print(f"\nerror: {line}", file=sys.stderr, flush=True)
                os._exit(STATUS)  # other threads hang in Ray


def answers(address: str) -> bool:
    """Whether somebody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=5):
            return True
    except (OSError, ValueError):
        return False
