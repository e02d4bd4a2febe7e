"""Runs and how far they are.

fedpeat runs [DIR ...]
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import tyro

from fedpeat_ray.command_line import parsed

_WIDTH = 1000  # what does not fit is wrapped by the terminal: names stay whole, and a pipe has no width


def main(arguments: list[str], called: str) -> int:
    """List the runs that the command line asks for; returns the exit status."""
    parsed(runs, arguments, prog=called)
    return 0


def runs(
    directories: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[DIR ...]")] = (),
) -> None:
    """List runs, the oldest first: how far they are, and their last figures.

    Args:
        directories: runs, or folders with runs in them or in their folders; unset: where runs go, which is
            $FEDPEAT_RUNS, runs/ of the checkout that is the working directory, or ~/fedpeat_runs.
    """
    from rich.console import Console

    from fedpeat_ray.runtime.progress import runs_table
    from fedpeat_ray.runtime.run_log import where_runs_go
    from fedpeat_ray.runtime.run_state import UNFINISHED, runs_in, state_of

    if not directories and not where_runs_go().exists():
        print(f"no runs yet: {where_runs_go()} is not there")
        return
    found: dict[Path, list[Path]] = {}  # by the folder that names are relative to
    for directory in directories or (where_runs_go(),):
        directory = directory.absolute()
        within = runs_in(directory)
        of_folder = found.setdefault(directory.parent if within == [directory] else directory, [])
        of_folder += [path for path in within if path not in of_folder]
    console = Console(width=_WIDTH)
    for folder, paths in found.items():
        if not paths:
            print(f"no runs in {folder}")
            continue
        states = sorted(map(state_of, paths), key=lambda state: state.created)
        print(f"runs in {folder}", flush=True)  # in a title of the table it would be wrapped
        console.print(runs_table(states, folder, time.time()))
        if any(state.state == UNFINISHED for state in states):
            print(f"{UNFINISHED}: running or interrupted, which locks would tell, and there are none to ask for")
