"""Run large_scale.py and die by SIGKILL just before a certain file or folder would appear.

python dies_at.py rounds/00003.parquet [arguments of large_scale.py]

The processes below this one are printed first, a line each.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from processes import below

from workloads.large_scale import main


def die_at(ending: str) -> None:
    """Everything of a run directory is moved to its place when it is whole: that is where to die."""
    move = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if str(target).endswith(ending):
            print(*(f"child: {process}" for process in below()), sep="\n", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return move(path, target)

    Path.replace = replace  # type: ignore[method-assign]


if __name__ == "__main__":
    die_at(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
