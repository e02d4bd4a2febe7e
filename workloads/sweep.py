"""Settings times seeds, side by side on one cluster; a table and a comparison report at the end.

python workloads/sweep.py --vary algorithm=fed-peft,fed-avg local.learning-rate=1e-3,3e-3 --seeds 0 1 2 --rounds 10

All other flags are those of a run. What is finished is not repeated: the same command goes on with what was
interrupted.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from analysis import tables
from analysis.compare import group_runs, read_runs
from analysis.report import write_report
from fedpeat_ray import SimulationConfig
from fedpeat_ray.command_line import check_flags, flags, parsed
from fedpeat_ray.errors import ConfigError, FedPeatError
from fedpeat_ray.sweep import Sweep, report


def settings(
    config: Annotated[SimulationConfig, tyro.conf.arg(name="")],
    vary: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
) -> tuple[SimulationConfig, dict[str, SimulationConfig]]:
    """What all runs have in common, and every run by name.

    Args:
        config: what the runs have in common; out is the folder of them all.
        vary: settings and their values, as flags have them: local.learning-rate=1e-3,3e-3; several: every combination.
        seeds: of the runs of each.
    """
    if not seeds:
        raise ConfigError.of("seeds", seeds, "at least one")
    if config.resume is not None:
        raise ConfigError.of("resume", str(config.resume), "unset: the same command goes on with a sweep")
    runs = {}
    for choice in itertools.product(*map(choices, vary)):
        arguments = [word for name, value in choice for word in (f"--{name}", value)]
        of_choice = parsed(SimulationConfig, arguments, default=config)
        of_choice.validate()
        for seed in seeds:
            name = ",".join(f"{name}={value}" for name, value in (*choice, ("seed", str(seed))))
            runs[name.replace("/", "_")] = dataclasses.replace(of_choice, seed=seed)
    return config, runs


def choices(setting: str) -> list[tuple[str, str]]:
    """A setting with each of its values. Raises ConfigError for one that there is not, or without a value."""
    name, _, values = setting.partition("=")
    name = name.replace("_", "-")
    check_flags([f"--{name}"], {*flags(SimulationConfig)})
    if not all(values.split(",")):
        raise ConfigError.of("vary", setting, "SETTING=VALUE,VALUE…")
    return [(name, value) for value in values.split(",")]


def table(directories: Sequence[Path]) -> str:
    """What came of each setting, as mean and range over its seeds, and what it cost; not how long it took here."""
    groups = group_runs(read_runs(directories))
    results = [*tables.key_figures(groups), *tables.metrics(groups)]
    figures = [(name, values) for name, values in results if "measured" not in name]
    rows = [["", *groups], *([name, *values] for name, values in figures)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def main(arguments: list[str]) -> int:
    """Run what the command line says; returns the exit status."""
    try:
        check_flags(arguments, {*flags(SimulationConfig), "vary", "seeds"})
        common, runs = parsed(settings, arguments, description=__doc__)
    except FedPeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def study(sweep: Sweep) -> str:
        directories = [directory for _, directory in sweep.run_all(runs).values()]
        print(f"report: {write_report(directories, sweep.out / 'comparison.html')}")
        return table(directories)

    return report(Sweep(common.out or Path("runs/sweep"), common.hosts), "table.md", study)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
