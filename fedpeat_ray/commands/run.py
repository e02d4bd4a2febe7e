"""Tune a language model over a fleet of simulated devices, and write a report.

fedpeat run --rounds 10 --cohort-size 32 --fleet.num-devices 2000

Go on with an interrupted run: fedpeat run --resume DIR [--rounds MORE]
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeat_ray import SimulationConfig
from fedpeat_ray.command_line import check_flags, flags, parsed
from fedpeat_ray.errors import FedPeatError, RunFailedError
from fedpeat_ray.runtime.signals import Terminated, raised_on_sigterm
from fedpeat_ray.settings import directory_to_resume

if TYPE_CHECKING:
    from fedpeat_ray import Simulation
    from fedpeat_ray.runtime.host_pool import HostPool


def main(arguments: list[str], called: str, description: str | None = __doc__) -> int:
    """Run the simulation that the command line describes; returns the exit status.

    Args:
        arguments: the words after what was called.
        called: the words that started it, with which it also goes on.
        description: what its help begins with.
    """
    simulation, status = None, 0
    try:
        with raised_on_sigterm(), contextlib.ExitStack() as stack:
            check_flags(arguments, {*flags(SimulationConfig)})
            config = parsed(
                SimulationConfig, arguments, prog=called, description=description, default=defaults(arguments)
            )
            config.validate()
            print(f"{config.algorithm} on {config.foundation.name}: loading PyTorch and transformers", flush=True)
            pool = hosts_that_start_meanwhile(config, stack, lambda: where_it_stopped(simulation, called))

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
        print(f"\n{where_it_stopped(simulation, called)}", file=sys.stderr)
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


def where_it_stopped(simulation: Simulation | None, called: str) -> str:
    """A line about an interrupted run: what is there, and how to go on with it."""
    directory = (simulation.directory or simulation.config.resume) if simulation else None
    if simulation is None or directory is None:
        return "interrupted before the run directory was made"
    return interrupted(directory, simulation.config.rounds, called)


def interrupted(directory: Path, num_rounds: int | None, called: str) -> str:
    """The same of a run that has a directory."""
    from fedpeat_ray.runtime.run_log import last_round

    rounds = f"{last_round(directory)} of {num_rounds or '?'} rounds are complete"
    return f"interrupted: {rounds} in {directory}; go on with: {called} --resume {shlex.quote(str(directory))}"


def defaults(arguments: list[str]) -> SimulationConfig:
    """The defaults of this workload; those of the run itself if one is resumed."""
    directory = directory_to_resume(arguments)
    if directory is None:
        return SimulationConfig()
    from fedpeat_ray.runtime.run_log import read_settings

    return dataclasses.replace(read_settings(directory), out=None, resume=None)  # how that run was started itself
