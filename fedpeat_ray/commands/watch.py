"""A run, followed from another terminal.

fedpeat watch DIR
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fedpeat_ray.command_line import parsed
from fedpeat_ray.commands.run import interrupted
from fedpeat_ray.errors import RunDirError

if TYPE_CHECKING:
    from fedpeat_ray.runtime.progress import Progress

POLL_S = 1.0  # network file systems tell nobody of changes
_LONGEST = 80  # characters of a fact


def main(arguments: list[str], called: str) -> int:
    """Follow the run that the command line names; returns the exit status."""
    return _followed(parsed(watch, arguments, prog=called), f"{called.removesuffix(' watch')} run")


def watch(directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]) -> Path:
    """Say what a run has done so far, then what it does, as it would say it itself, until it ends.

    The exit status is 0 if the run finished, 1 if it was interrupted, 2 if it came to nothing, 130 after Ctrl-C.

    Args:
        directory: of the run.
    """
    return directory


def _followed(directory: Path, to_run: str) -> int:
    from fedpeat_ray.runtime.progress import Progress, print_summary
    from fedpeat_ray.runtime.run_state import FAILED, UNFINISHED, is_run, state_of

    directory = directory.absolute()
    if not is_run(directory):
        raise RunDirError(f"{directory} holds no run")
    run = state_of(directory)
    print(f"{run.algorithm or '?'} on {run.foundation or '?'}, {run.num_rounds or '?'} rounds: {run.state}")
    print(f"run directory: {directory}")
    if run.state == UNFINISHED:
        print("no locks tell whether it is running: followed until it has a summary")
    sys.stdout.flush()
    with Progress(run.num_rounds or 0, metric=run.metric) as progress:
        _follow(directory, progress)
    run = state_of(directory)
    if not run.summary:
        print(interrupted(directory, run.num_rounds, to_run))
        return 1
    if run.state == FAILED:
        print(f"error: {run.summary['failure']}", file=sys.stderr)
    print_summary(run.summary)
    return 2 if run.state == FAILED else 0


def _follow(directory: Path, progress: Progress) -> None:
    """Say what is there and what comes, until the run has ended."""
    from fedpeat_ray.runtime.run_state import Follower, has_ended, state_of

    follower = Follower(directory)
    while True:
        ended = has_ended(directory)  # first: what it wrote by then is news now
        for news in follower.news():
            if news.round:
                progress.round(news.round)
            elif news.event and news.event.get("kind") != "warning":  # that is said with the summary
                progress.say(in_words(news.event))
                if news.event.get("kind") == "resumed":  # perhaps with more rounds
                    progress.num_rounds = state_of(directory).num_rounds or progress.num_rounds
        if ended:
            return
        time.sleep(POLL_S)


def in_words(event: Mapping[str, Any]) -> str:
    """An event as a line, e.g. "host_lost: batch 3, error the actor died"; long facts are cut."""
    facts = {name: value for name, value in event.items() if name not in ("time", "kind")}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    cut = {name: textwrap.shorten(text, _LONGEST, placeholder=" ...") for name, text in texts.items()}
    return f"{event.get('kind')}: {', '.join(f'{name} {text}' for name, text in cut.items())}"
