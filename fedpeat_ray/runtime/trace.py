"""Where wall time goes: what the main process and every host did when, as a timeline.

Chrome's trace format, for https://ui.perfetto.dev or chrome://tracing; `workloads/benchmarks/first_round.py` draws one.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from fedpeat_ray.files import written_whole

MAIN = "main process"


class Trace:
    """Spans of time by lane, in seconds since the epoch; a lane is a process."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, str, float, float, dict[str, Any]]] = []
        self._now: tuple[str, float] | None = None

    def add(self, lane: str, name: str, start_s: float, stop_s: float, **facts: Any) -> None:
        """Something that was done."""
        self._spans.append((lane, name, start_s, stop_s, facts))

    def begin(self, name: str) -> None:
        """The main process does this from now on, perhaps by letting hosts do it, and nothing of before any more."""
        self.end()
        self._now = (name, time.time())

    def end(self) -> None:
        """What the main process does ends."""
        if self._now is not None:
            self.add(MAIN, *self._now, time.time())
        self._now = None

    def write(self, path: Path) -> None:
        """The file; what was there before goes."""
        self.end()
        lanes = {lane: number for number, lane in enumerate(dict.fromkeys([MAIN, *(lane for lane, *_ in self._spans)]))}
        first_s = min((start_s for _, _, start_s, _, _ in self._spans), default=0.0)
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": lane}}
            for lane, number in lanes.items()
        ]
        events += [
            {
                "ph": "X",
                "name": name,
                "pid": 0,
                "tid": lanes[lane],
                "ts": round(1e6 * (start_s - first_s)),
                "dur": round(1e6 * (stop_s - start_s)),
                "args": facts,
            }
            for lane, name, start_s, stop_s, facts in self._spans
        ]
        with written_whole(path) as part:
            part.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def process_started_s() -> float:
    """When this process began, in seconds since the epoch; where that cannot be known, now."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        lines = Path("/proc/stat").read_text().splitlines()
        boot_s = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
        return boot_s + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return time.time()
