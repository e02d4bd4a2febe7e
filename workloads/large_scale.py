"""Tune a language model over a fleet of simulated devices, and write a report.

python workloads/large_scale.py --rounds 10 --cohort-size 32 --fleet.num-devices 2000

Go on with an interrupted run: python workloads/large_scale.py --resume DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import tyro
from transformers.utils.logging import disable_progress_bar

from analysis.report import write_report
from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.errors import FedPeatError, RunFailedError
from fedpeat_ray.runtime.progress import print_summary
from fedpeat_ray.runtime.run_log import read_config


def main(arguments: list[str]) -> int:
    """Run the simulation that the command line describes; returns the exit status."""
    disable_progress_bar()  # our own says enough
    status = 0
    try:
        config = tyro.cli(SimulationConfig, args=arguments, description=__doc__, default=defaults(arguments))
        simulation = Simulation(config)
        summary = simulation.run()
    except RunFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        summary, status = error.summary, 2
    except FedPeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    assert simulation.directory is not None
    print_summary(summary)
    print(f"report: {write_report([simulation.directory])}")
    print(simulation.directory)
    return status


def defaults(arguments: list[str]) -> SimulationConfig:
    """The defaults of this workload; those of the run itself if one is resumed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    directory = parser.parse_known_args(arguments)[0].resume
    if directory is None:
        return SimulationConfig()
    config = SimulationConfig.from_dict(read_config(directory)["config"])
    return dataclasses.replace(config, out=None, resume=None)  # how that run was started itself


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
