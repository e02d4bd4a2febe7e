"""Algorithms by name."""

from __future__ import annotations

from fedpeat_ray.algorithms.algorithm import Algorithm
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.own import find

OURS = {
    "fed-peat": "fedpeat_ray.algorithms.fed_peat:FedPEAT",
    "fed-peft": "fedpeat_ray.algorithms.fed_peft:FedPEFT",
    "fed-pt": "fedpeat_ray.algorithms.fed_pt:FedPT",
    "fed-avg": "fedpeat_ray.algorithms.fed_avg:FedAvg",
}


def find_algorithm(name: str) -> type[Algorithm]:
    """The class that `algorithm` names: ours, or one of the user's. Raises ConfigError if there is none."""
    found = find("algorithm", name, OURS)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ConfigError.of("algorithm", name, "a class that inherits from fedpeat_ray.algorithms.algorithm.Algorithm")
    return found
