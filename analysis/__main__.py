"""`python -m analysis`: look at runs that were written down."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from analysis.compare import ComparisonError
from analysis.load import NotARunError
from analysis.report import write_report

app = tyro.extras.SubcommandApp()


@app.command
def report(
    directories: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR [DIR ...]")],
    out: Path | None = None,
    each: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    labels: tuple[str, ...] = (),
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side.

    Runs that differ in their seed only are shown together: as their mean and the range from the lowest to the highest.

    Args:
        directories: Run directories, finished or not; a report among them, as in runs/*, is passed over.
        out: HTML file to write; unset: report.html in the directory of a single run, comparison.html in the deepest
            folder that holds all of several.
        each: Show every run by itself.
        labels: What to call what is compared, in the order shown; unset: what differs, in few words.
    """
    directories = tuple(path for path in directories if path.suffix != ".html" or path.is_dir())  # runs/* has a report
    if not directories:
        raise NotARunError("report needs at least one run directory")
    print(write_report(directories, out, each, labels))


def main(arguments: list[str] | None = None, called: str = "python -m analysis") -> int:
    """Run the command line, by default that of this process; one line and exit status 2 for what holds no run or
    cannot be compared."""
    try:
        app.cli(args=arguments, prog=called, description="Look at the run directories of fedpeat_ray.")
    except (NotARunError, ComparisonError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
