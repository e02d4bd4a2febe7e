"""What a person waits for: from the command to the first line, to the end of round 1, and to the end of the main job.

    python workloads/benchmarks/first_round.py [--times 3] [--before CHECKOUT] [--timeline FILE.png]

Runs the main job (`make run`) as it is typed and reads its lines as they come. With `--before`, another checkout,
the two take turns on the same machine. Caches are left as they are: the first run of all fills them.
`--timeline` draws where the wall time of one run of two rounds goes, from its `--trace`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parents[2]
MAIN_JOB = ("--fleet.memory-scale", "0.045", "--rounds", "8", "--evaluation.every", "2")
COLOURS = {"loading": "#bbbbbb", "train": "#2f6db3", "evalua": "#2f9e62", "start": "#e0a63b"}
COLOURS |= {"tuning": "#7d5ba6", "gradient": "#7d5ba6"}


@dataclass(frozen=True)
class BenchmarkConfig:
    times: int = 3
    """Runs of each checkout; 0: none."""
    before: Path | None = None
    """Another checkout, to be run in turn with this one."""
    timeline: Path | None = None
    """Picture to draw of one run of two rounds."""


def main(config: BenchmarkConfig) -> int:
    """Print the table, draw the picture; returns the exit status."""
    checkouts = {"now": HERE} | ({"before": config.before.absolute()} if config.before else {})
    waited = {name: [] for name in checkouts}
    for _ in range(config.times):
        for name, checkout in checkouts.items():
            waited[name].append(waits(checkout))
    if config.times:
        Console().print(table(waited))
    if config.timeline:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            waits(HERE, "--rounds", "2", "--trace", str(trace))
            draw(json.loads(trace.read_text())["traceEvents"], config.timeline)
        print(config.timeline)
    return 0


def waits(checkout: Path, *more: str) -> dict[str, float]:
    """Seconds to the first line, to the end of round 1 and to the end of the main job of a checkout."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", "workloads/large_scale.py", *MAIN_JOB, "--out", f"{folder}/run", *more]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        started = time.monotonic()
        with subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found.setdefault("first line", time.monotonic() - started)
                if re.match(r"(round)? *1/", line):  # once, each line began with the word
                    found["end of round 1"] = time.monotonic() - started
        found["end of the job"] = time.monotonic() - started
        assert process.returncode == 0, f"{checkout}: exit status {process.returncode}"
    return found


def table(waited: dict[str, list[dict[str, float]]]) -> Table:
    """Least and greatest of the runs, a row a checkout."""
    moments = list(next(iter(waited.values()))[0])
    result = Table("", *moments, title="seconds from the command, least to greatest")
    for name, runs in waited.items():
        cells = [sorted(run[moment] for run in runs) for moment in moments]
        result.add_row(name, *(f"{cell[0]:.1f} to {cell[-1]:.1f}" for cell in cells))
    return result


def draw(events: list[dict[str, Any]], path: Path) -> None:
    """A row a process; gaps are idle time."""
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    figure = Figure((12, 0.6 + 0.75 * len(lanes)), layout="constrained")
    axes = figure.subplots()
    for event in spans:
        name, start_s, length_s = event["name"], event["ts"] / 1e6, event["dur"] / 1e6
        colour = next((colour for part, colour in COLOURS.items() if part in name.lower()), "#8c8c8c")
        row = len(lanes) - 1 - list(lanes).index(event["tid"])
        edge = 0.4 if length_s > 0.3 else 0.0  # what is narrower would be all edge
        axes.barh(row, length_s, left=start_s, height=0.7, color=colour, edgecolor="white", linewidth=edge)
        if length_s > 0.06 * max(span["ts"] + span["dur"] for span in spans) / 1e6 and event["tid"] == 0:
            axes.text(start_s + length_s / 2, row, name.replace(", ", "\n"), ha="center", va="center", fontsize=6.5)
    axes.set_yticks(range(len(lanes)), list(reversed(list(lanes.values()))))
    axes.set_xlabel("seconds from the start of the process")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(BenchmarkConfig, description=__doc__)))
