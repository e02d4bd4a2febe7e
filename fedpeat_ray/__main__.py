"""Before a run and after it.

python -m fedpeat_ray plan --algorithm fed-peft --foundation.name llama-7b
python -m fedpeat_ray generate RUN_DIR --prompt "Return the"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from fedpeat_ray.command_line import check_flags, flags, parsed
from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.errors import FedPeatError
from fedpeat_ray.files import written_whole

OwnFlags = Annotated[SimulationConfig, tyro.conf.arg(name="")]


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


def generate(
    run_dir: Annotated[Path, tyro.conf.Positional],
    prompt: str = "",
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    alpha: float | None = None,
    seed: int = 0,
) -> None:
    """Go on with a text by the model before the run, and after it; for FedPT by base, tuned small and both together.

    Args:
        run_dir: a finished run.
        prompt: the beginning of the text.
        max_new_tokens: at most so many tokens are added.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        alpha: weight of the small model's change in FedPT; unset: the run's own.
        seed: of the draws.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text
    from transformers.utils.logging import disable_progress_bar

    from fedpeat_ray.tuned import texts

    disable_progress_bar()
    found = texts(run_dir, prompt, max_new_tokens, temperature, alpha, seed)
    table = Table(*map(escape, found), box=box.SIMPLE)
    table.add_row(*map(Text, found.values()))  # as it is: brackets are no markup
    Console().print(table)


def main(arguments: list[str]) -> int:
    """Do what the command line says; returns the exit status."""
    commands = {"plan": plan, "generate": generate}
    try:
        if arguments[:1] == ["plan"]:
            check_flags(arguments, {*flags(SimulationConfig), "plan-rounds", "calibrate", "no-calibrate", "json-file"})
        parsed(commands, arguments, prog="python -m fedpeat_ray", description=__doc__)
    except FedPeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
