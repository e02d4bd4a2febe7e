"""`python -m analysis`: look at runs that were written down."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from analysis.load import NotARunError
from analysis.report import write_report

app = tyro.extras.SubcommandApp()


@app.command
def report(
    directories: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR [DIR ...]")],
    out: Path | None = None,
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side.

    Args:
        directories: Run directories, finished or not.
        out: HTML file to write; unset: report.html in the first directory.
    """
    if not directories:
        raise NotARunError("report needs at least one run directory")
    print(write_report(directories, out))


def main() -> int:
    """Run the command line; one line and exit status 2 for a directory that holds no run."""
    try:
        app.cli(prog="python -m analysis", description="Look at the run directories of fedpeat_ray.")
    except (NotARunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
