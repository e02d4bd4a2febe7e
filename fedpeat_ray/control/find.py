"""Controllers by name."""

from __future__ import annotations

from fedpeat_ray.control.plan import Controller
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.own import find

OURS = {
    "fixed": "fedpeat_ray.control.fixed:Fixed",
    "random": "fedpeat_ray.control.random:Random",
    "greedy": "fedpeat_ray.control.greedy:Greedy",
    "greedy-by-time": "fedpeat_ray.control.greedy:GreedyByTime",
    "greedy-by-holding": "fedpeat_ray.control.greedy:GreedyByHolding",
    "learned": "fedpeat_ray.control.learned:Learned",
}


def find_controller(name: str) -> type[Controller]:
    """The class that `control.kind` names: ours, or one of the user's. Raises ConfigError if there is none."""
    found = find("control.kind", name, OURS)
    if not (isinstance(found, type) and issubclass(found, Controller)):
        raise ConfigError.of("control.kind", name, "a class that inherits from fedpeat_ray.control.plan.Controller")
    return found
