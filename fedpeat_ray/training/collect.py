"""Work through the seam whose results are wanted one by one: what a teacher says of each batch, say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeat_ray.training.map_clients import MapClients, split

_TASKS_AT_A_TIME = 4


@dataclass(frozen=True)
class Result:
    """What was worked out for one task."""

    value: Any
    report: None = None


@dataclass(frozen=True)
class Collected:
    """Aggregator: all results in the order of the tasks."""

    values: tuple[Any, ...] = ()

    def add(self, updates: Sequence[Result]) -> Collected:
        """With these results at the end."""
        return Collected((*self.values, *(update.value for update in updates)))

    def merge(self, other: Collected) -> Collected:
        """Both sides' results."""
        return Collected(self.values + other.values)

    def result(self) -> tuple[Any, ...]:
        """The results."""
        return self.values


def collect(map_clients: MapClients, work: Callable, shared: Any, tasks: Sequence[Any]) -> Iterator[Any]:
    """What the driver's side works out for each task, in their order.

    Worked out when it is asked for, a few tasks at a time: several hosts share these, and no more results than
    these are in memory (a teacher's logits are large).
    """
    for few in split(tasks, _TASKS_AT_A_TIME):
        yield from map_clients(work, shared, few, Collected(), where="driver")[0].result()
