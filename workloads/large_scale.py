"""Tune a language model over a fleet of simulated devices, and write a report.

python workloads/large_scale.py --rounds 10 --cohort-size 32 --fleet.num-devices 2000

Go on with an interrupted run: python workloads/large_scale.py --resume DIR [--rounds MORE]
"""

from __future__ import annotations

import sys

from fedpeat_ray.commands import run


def main(arguments: list[str]) -> int:
    """Run the simulation that the command line describes; returns the exit status."""
    return run.main(arguments, called="python workloads/large_scale.py", description=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
