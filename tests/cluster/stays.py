"""A run on the Ray at an address, in a process that then stays until its input ends: what it shows can be read."""

from __future__ import annotations

import sys

import tiny_runs

from fedpeat_ray import Simulation
from fedpeat_ray.runtime.host_pool import HostPool

if __name__ == "__main__":
    config = tiny_runs.parse(sys.argv[1:])
    with HostPool(config.hosts) as pool:
        Simulation(config).run(pool)
        print("finished", flush=True)
        sys.stdin.read()
