"""What came out of a run, as text.

fedpeat generate DIR --prompt "Return the"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from fedpeat_ray.command_line import parsed


def main(arguments: list[str], called: str) -> int:
    """Print the texts that the command line asks for; returns the exit status."""
    parsed(generate, arguments, prog=called)
    return 0


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
