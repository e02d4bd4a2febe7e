"""The command `fedpeat`, which is `python -m fedpeat_ray`: a table of those in `commands`."""

from __future__ import annotations

import sys
from pathlib import Path

from fedpeat_ray.commands import generate, plan, report, run, runs, watch
from fedpeat_ray.errors import FedPeatError, one_of

COMMANDS = {
    "run": (run.main, "tune a model over a fleet of simulated devices, and write a report"),
    "plan": (plan.main, "what a run would ask of devices, hosts and time"),
    "report": (report.main, "a page about a run, or about several side by side"),
    "generate": (generate.main, "go on with a text by the model before a run, and after it"),
    "watch": (watch.main, "follow a run from another terminal"),
    "runs": (runs.main, "list runs: how far they are, and their last figures"),
}


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says, by default that of this process; returns the exit status."""
    called = "fedpeat" if Path(sys.argv[0]).stem == "fedpeat" else "python -m fedpeat_ray"
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if command in ("", "-h", "--help"):
        print(f"usage: {called} COMMAND [OPTIONS]\n")
        print(*(f"  {name:<10}{about}" for name, (_, about) in COMMANDS.items()), sep="\n")
        print(f"\n{called} COMMAND --help has the options of each.")
        return 0 if command else 2
    try:
        if command not in COMMANDS:
            raise FedPeatError(f"there is no command {command!r}: {one_of(command, COMMANDS)}")
        return COMMANDS[command][0](rest, f"{called} {command}")
    except FedPeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
