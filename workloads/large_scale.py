"""Tune a language model over a fleet of simulated devices, and write a report.

python workloads/large_scale.py --rounds 10 --cohort-size 32 --fleet.num-devices 2000

Go on with an interrupted run: python workloads/large_scale.py --resume DIR [--rounds MORE]
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedpeat_ray import SimulationConfig
from fedpeat_ray.command_line import check_flags, flags, parsed
from fedpeat_ray.errors import FedPeatError, RunFailedError
from fedpeat_ray.runtime.signals import Terminated, raised_on_sigterm
from fedpeat_ray.settings import directory_to_resume

if TYPE_CHECKING:
    from fedpeat_ray import Simulation
    from fedpeat_ray.runtime.host_pool import HostPool


def main(arguments: list[str]) -> int:
    """Run the simulation that the command line describes; returns the exit status."""
    simulation, status = None, 0
    try:
        with raised_on_sigterm(), contextlib.ExitStack() as stack:
            check_flags(arguments, {*flags(SimulationConfig)})
            config = parsed(SimulationConfig, arguments, description=__doc__, default=defaults(arguments))
            config.validate()
            print(f"{config.algorithm} on {config.foundation.name}: loading PyTorch and transformers", flush=True)
            pool = hosts_that_start_meanwhile(config, stack, lambda: where_it_stopped(simulation))

            from transformers.utils.logging import disable_progress_bar

            from fedpeat_ray import Simulation
            from fedpeat_ray.runtime.progress import print_summary

            disable_progress_bar()  # our own says enough
            simulation = Simulation(config)
            try:
                summary = simulation.run(pool)
            except RunFailedError as error:
                print(f"error: {error}", file=sys.stderr)
                summary, status = error.summary, 2
            from analysis.report import write_report

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


def hosts_that_start_meanwhile(
    config: SimulationConfig, stack: contextlib.ExitStack, last_words: Callable[[], str]
) -> HostPool | None:
    """They load what they compute with while this process does; None where hosts come later or not at all: on the
    serial side, and where shards of the foundation take their GPUs first. `last_words`: see HostPool."""
    if config.hosts.backend != "ray" or config.foundation.num_shards > 1:
        return None
    from fedpeat_ray.runtime.host_pool import HostPool

    pool = stack.enter_context(HostPool(config.hosts, last_words))
    print(pool.about, flush=True)
    if not config.hosts.exclusive:
        pool.start(config.hosts)
    return pool


def where_it_stopped(simulation: Simulation | None) -> str:
    """A line about an interrupted run: what is there, and how to go on with it."""
    directory = (simulation.directory or simulation.config.resume) if simulation else None
    if simulation is None or directory is None:
        return "interrupted before the run directory was made"
    from fedpeat_ray.runtime.run_log import last_round

    rounds = f"{last_round(directory)} of {simulation.config.rounds} rounds are complete"
    command = f"python workloads/large_scale.py --resume {shlex.quote(str(directory))}"
    return f"interrupted: {rounds} in {directory}; go on with: {command}"


def defaults(arguments: list[str]) -> SimulationConfig:
    """The defaults of this workload; those of the run itself if one is resumed."""
    directory = directory_to_resume(arguments)
    if directory is None:
        return SimulationConfig()
    from fedpeat_ray.runtime.run_log import read_settings

    return dataclasses.replace(read_settings(directory), out=None, resume=None)  # how that run was started itself


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
