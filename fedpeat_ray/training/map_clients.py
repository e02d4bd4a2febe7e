"""The seam between algorithms and machinery: what `map_clients` promises, whoever runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

Task = TypeVar("Task")


class Aggregator(Protocol):
    """A monoid over updates, immutable; an instance with nothing added is its zero."""

    def add(self, updates: Sequence[Any]) -> Any: ...
    def merge(self, other: Any) -> Any: ...
    def result(self) -> Any: ...


class MapClients(Protocol):
    """Train tasks in batches and aggregate what comes back; returns (aggregate, reports in task order).

    `train(backbone, shared, tasks) -> updates`, one update with a `.report` a task. The backbone is
    resident where the work is done. Partial aggregates are merged in batch order, and the batches
    depend on `tasks` and `batch_size` alone, so every implementation gives the same bits.
    """

    def __call__(
        self, train: Callable, shared: Any, tasks: Sequence[Any], aggregator: Aggregator, batch_size: int = 1
    ) -> tuple[Any, list[Any]]: ...


def split(tasks: Sequence[Task], batch_size: int) -> list[Sequence[Task]]:
    """Consecutive batches of at most batch_size tasks."""
    return [tasks[start : start + batch_size] for start in range(0, len(tasks), batch_size)]
