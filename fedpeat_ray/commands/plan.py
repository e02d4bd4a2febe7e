"""What a run would ask for, before there is one.

fedpeat plan --algorithm fed-peft --foundation.name llama-7b
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import tyro

from fedpeat_ray.command_line import check_flags, flags, parsed
from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.files import written_whole

OwnFlags = Annotated[SimulationConfig, tyro.conf.arg(name="")]


def main(arguments: list[str], called: str) -> int:
    """Print the plan that the command line asks for; returns the exit status."""
    check_flags(arguments, {*flags(SimulationConfig), "plan-rounds", "calibrate", "no-calibrate", "json-file"})
    parsed(plan, arguments, prog=called)
    return 0


def plan(
    config: OwnFlags, plan_rounds: int | None = None, calibrate: bool = True, json_file: Path | None = None
) -> None:
    """What a run with these settings would ask of devices, hosts and time; the model is known by its configuration
    alone: embedded, a directory, a Hugging Face name, or one of gpt2, gpt2-xl, opt-1.3b, tinyllama-1.1b, llama-7b,
    llama-13b, llama-2-70b.

    Args:
        config: those of a run.
        plan_rounds: so many rounds are gone through, and stand for the others; unset: all.
        calibrate: measure for some seconds how fast this machine trains, to say how long the run will take here.
        json_file: where to write all figures.
    """
    config.validate()
    from rich.console import Console

    from fedpeat_ray import planning
    from fedpeat_ray.runtime.progress import plan_tables

    found = planning.plan(config, plan_rounds, calibrate)
    for part in plan_tables(found):
        Console().print(part)
    if json_file:
        with written_whole(json_file) as part_file:
            part_file.write_text(json.dumps(found, indent=2))
