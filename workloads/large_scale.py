"""Tune a language model over a fleet of simulated devices, and write a report.

python workloads/large_scale.py --rounds 10 --cohort-size 32 --fleet.num-devices 2000

Go on with an interrupted run: python workloads/large_scale.py --resume DIR [--rounds MORE]
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

import tyro
from transformers.utils.logging import disable_progress_bar

from analysis.report import write_report
from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.errors import FedPeatError, RunFailedError
from fedpeat_ray.runtime.process import Terminated, raised_on_sigterm
from fedpeat_ray.runtime.progress import print_summary
from fedpeat_ray.runtime.run_log import last_round, read_settings


def main(arguments: list[str]) -> int:
    """Run the simulation that the command line describes; returns the exit status."""
    disable_progress_bar()  # our own says enough
    simulation, status = None, 0
    try:
        with raised_on_sigterm():
            config = tyro.cli(SimulationConfig, args=arguments, description=__doc__, default=defaults(arguments))
            simulation = Simulation(config)
            try:
                summary = simulation.run()
            except RunFailedError as error:
                print(f"error: {error}", file=sys.stderr)
                summary, status = error.summary, 2
            assert simulation.directory is not None
            print_summary(summary)
            print(f"report: {write_report([simulation.directory])}")
    except FedPeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{where_it_stopped(simulation)}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    print(simulation.directory)
    return status


def where_it_stopped(simulation: Simulation | None) -> str:
    """A line about an interrupted run: what is there, and how to go on with it."""
    directory = simulation and (simulation.directory or simulation.config.resume)
    if simulation is None or directory is None:
        return "interrupted before the run directory was made"
    rounds = f"{last_round(directory)} of {simulation.config.rounds} rounds are complete"
    command = f"python workloads/large_scale.py --resume {shlex.quote(str(directory))}"
    return f"interrupted: {rounds} in {directory}; go on with: {command}"


def defaults(arguments: list[str]) -> SimulationConfig:
    """The defaults of this workload; those of the run itself if one is resumed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    directory = parser.parse_known_args(arguments)[0].resume
    if directory is None:
        return SimulationConfig()
    return dataclasses.replace(read_settings(directory), out=None, resume=None)  # how that run was started itself


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
