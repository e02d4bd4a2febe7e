"""Run large_scale.py and die by SIGKILL, or get another signal, just before a certain file or folder would appear.

The processes below this one are printed first, a line each, then where they listen.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from processes import below, listening

from workloads.large_scale import main


def die_at(ending: str, by: signal.Signals) -> None:
    """Everything of a run directory is moved to its place when it is whole: that is where to die."""
    move = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if str(target).endswith(ending):
            print(*(f"child: {process}" for process in below()), sep="\n")
            print(*(f"listens: {address} {name}" for address, name in listening()), sep="\n", flush=True)
            os.kill(os.getpid(), by)
        return move(path, target)

    Path.replace = replace  # type: ignore[method-assign]


def run(ending: str, by: signal.Signals, arguments: list[str]) -> int:
    """The status of large_scale.py with these arguments, if it comes to its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background, whose processes ignore it
    die_at(ending, by)
    return main(arguments)
