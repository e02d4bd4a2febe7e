"""What a larger cohort costs the main process: its memory, and the time in which hosts wait for it.

    python workloads/benchmarks/cohorts.py [--cohort-sizes 16 1000] [--many 10000]

First one round of FedAvg and of FedPEAT on `pydoc-base` at each cohort size, one local step a device: the greatest
resident memory of the main process. Then one round of many devices with one step each, FedPEFT on `pydoc-small`, and
which part of it was not spent in training: 1 - (seconds that hosts trained) / (hosts x seconds of the round, without
evaluation). Every run has a process of its own.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from analysis import load_run
from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.config import (
    AvailabilityConfig,
    EmulatorConfig,
    EvaluationConfig,
    FleetConfig,
    FoundationConfig,
    HostsConfig,
    LocalConfig,
)


@dataclass(frozen=True)
class BenchmarkConfig:
    cohort_sizes: tuple[int, ...] = (16, 1000)
    """Devices whose updates a round waits for, where memory is measured; none: it is not."""
    many: int = 10_000
    """Devices of the round whose time is measured; 0: not."""
    num_hosts: int = 2
    """Host actors of one thread."""


def main(config: BenchmarkConfig) -> int:
    """Print both tables; returns the exit status."""
    console = Console()
    if config.cohort_sizes:
        console.print(memory_table(config))
    if config.many:
        _, wall_s, outside = alone(one_round("fed-peft", "pydoc-small", config.many, config.num_hosts))
        rate = config.many / wall_s
        console.print(f"{config.many:,} devices: {wall_s:.1f} s, {rate:,.0f} a second, {outside:.1%} not in training")
    return 0


def memory_table(config: BenchmarkConfig) -> Table:
    """A row an algorithm, a column a cohort size."""
    table = Table(title="greatest resident memory of the main process, MB")
    for name in ("algorithm", *map(str, config.cohort_sizes), "difference"):
        table.add_column(name, justify="left" if name == "algorithm" else "right")
    for algorithm in ("fed-avg", "fed-peat"):
        peaks = [alone(one_round(algorithm, "pydoc-base", size, config.num_hosts))[0] for size in config.cohort_sizes]
        table.add_row(algorithm, *(f"{peak / 1e6:,.0f}" for peak in peaks), f"{(peaks[-1] - peaks[0]) / 1e6:,.0f}")
    return table


def one_round(
    algorithm: Literal["fed-avg", "fed-peft", "fed-peat"], model: str, cohort_size: int, num_hosts: int
) -> SimulationConfig:
    """A round that every device asked completes, each with one step of two sequences."""
    return SimulationConfig(
        algorithm=algorithm,
        rounds=1,
        cohort_size=cohort_size,
        over_sample=1.0,
        client_batch_size=1 if algorithm == "fed-avg" else 16,
        local=LocalConfig(max_steps=1),
        emulator=EmulatorConfig(weights="foundation"),
        foundation=FoundationConfig(model),
        fleet=FleetConfig(num_devices=2 * cohort_size, memory_scale=10, availability=AvailabilityConfig("always")),
        evaluation=EvaluationConfig(num_sequences=8, centralised=False),
        hosts=HostsConfig(num_hosts=num_hosts),
    )


def alone(config: SimulationConfig) -> tuple[int, float, float]:
    """`measure` in a new process."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, config).result()


def measure(config: SimulationConfig) -> tuple[int, float, float]:
    """Peak resident bytes of this process, seconds of the round, and the share of hosts' time not in training."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        Simulation(dataclasses.replace(config, out=directory)).run()
        run = load_run(directory)
    assert (run.clients["outcome"] == "completed").mean() > 0.9, "too few devices took part"
    wall_s, trained_s = float(run.rounds["wall_train_s"].sum()), float(run.clients["wall_train_s"].sum())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak, wall_s, 1 - trained_s / (config.hosts.num_hosts or 1) / wall_s


if __name__ == "__main__":
    sys.exit(main(tyro.cli(BenchmarkConfig, description=__doc__)))
