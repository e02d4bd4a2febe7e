"""How near a plan comes to the run: planned and real wall time, and whether virtual figures are the same.

    python workloads/benchmarks/plan.py [--jobs "fed-peat" "fed-avg"]

Plans each job, runs it, and prints both. Without the centralised reference, which may be in a cache or not.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parents[2]
JOBS = {
    "fed-peat": "--fleet.memory-scale 0.045 --rounds 8 --evaluation.every 2",
    "fed-peft": "--algorithm fed-peft --rounds 6 --cohort-size 16",
    "fed-peft, serial": "--algorithm fed-peft --rounds 4 --cohort-size 8 --hosts.backend serial --local.max-steps 4",
    "fed-avg": "--algorithm fed-avg --rounds 4 --cohort-size 8",
    "fed-pt": "--algorithm fed-pt --rounds 4 --cohort-size 16",
}
SAME = ("virtual_s", "num_completed", "num_dropped", "download_bytes", "upload_bytes", "energy_j", "flops")
"""Columns of rounds that are compared."""


@dataclass(frozen=True)
class BenchmarkConfig:
    jobs: tuple[str, ...] = tuple(JOBS)
    """Names of jobs."""


def main(config: BenchmarkConfig) -> int:
    """Print the table; returns the exit status."""
    table = Table(
        "", "planned s", "run s", "planned / run", "virtual figures", title="wall time, and what is simulated"
    )
    for name in config.jobs:
        words = [*shlex.split(JOBS[name]), "--evaluation.no-centralised"]
        with tempfile.TemporaryDirectory() as folder:
            file, directory = Path(folder) / "plan.json", Path(folder) / "run"
            python("-m", "fedpeat_ray", "plan", *words, "--json-file", str(file))
            started = time.monotonic()
            python("workloads/large_scale.py", *words, "--out", str(directory))
            run_s = time.monotonic() - started
            planned, rounds = json.loads(file.read_text()), pd.read_parquet(directory / "rounds")
        same = all([row[name] for row in planned["rounds"]] == rounds[name].to_list() for name in SAME)
        wall_s = planned["wall"]["total"]
        table.add_row(name, f"{wall_s:.0f}", f"{run_s:.0f}", f"{wall_s / run_s:.2f}", "equal" if same else "differ")
    Console().print(table)
    return 0


def python(*words: str) -> None:
    """Run something of this checkout, quietly."""
    subprocess.run([sys.executable, *words], cwd=HERE, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(BenchmarkConfig, description=__doc__)))
