"""The seam between algorithms and machinery: what `map_clients` promises, whoever runs it.

Partial aggregates of consecutive batches are merged two and two, in a tree that the number of batches alone
decides: so whoever merges what, and where, the bits are the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

Tasks = TypeVar("Tasks", Sequence, np.ndarray)

Where = Literal["hosts", "driver"]
"""Who does the work: the hosts, which embody devices, or the driver, which has the whole foundation."""

Span = tuple[int, int]
"""Consecutive batches: the first, and the one after the last."""


class Aggregator(Protocol):
    """A monoid over updates, immutable; an instance with nothing added is its zero.

    A sum that may be large says its size as `num_bytes`: it is then merged where it lies, and travels once.
    """

    def add(self, updates: Sequence[Any]) -> Any: ...
    def merge(self, other: Any) -> Any: ...
    def result(self) -> Any: ...


@dataclass(frozen=True)
class Call:
    """One call of the seam: what is to be done, for whom, and how the results are added up."""

    train: Callable
    """`train(backbone, shared, tasks) -> updates`, one update with a `.report` a task. What it reads from disk
    besides the backbone it names as `train.files`, and it will be there."""
    shared: Any
    """The same for all tasks: the current adapter, say."""
    tasks: Sequence[Any]
    aggregator: Aggregator
    batch_size: int
    where: Where


class MapClients(ABC):
    """Train tasks in batches and aggregate what comes back; returns (aggregate, reports in task order).

    The backbone is resident where the work is done. Partial aggregates are merged in the order of `merged`, and
    the batches depend on `tasks` and `batch_size` alone, so every implementation gives the same bits. Where
    hosts have the whole foundation too, they also do the driver's work.
    """

    def __call__(
        self,
        train: Callable,
        shared: Any,
        tasks: Sequence[Any],
        aggregator: Aggregator,
        batch_size: int = 1,
        where: Where = "hosts",
    ) -> tuple[Any, list[Any]]:
        """See Call for the arguments."""
        return self.run(Call(train, shared, tasks, aggregator, batch_size, where))

    @abstractmethod
    def run(self, call: Call) -> tuple[Any, list[Any]]:
        """The call, done."""


@dataclass(frozen=True)
class HostsAndDriver(MapClients):
    """MapClients over two: hosts with emulators, and a driver that alone has the foundation."""

    hosts: MapClients
    driver: MapClients

    def run(self, call: Call) -> tuple[Any, list[Any]]:
        """See MapClients."""
        return (self.driver if call.where == "driver" else self.hosts).run(call)


def split(tasks: Tasks, batch_size: int) -> list[Tasks]:
    """Consecutive batches of at most batch_size tasks; of an array, of its rows."""
    starts = range(0, len(tasks), batch_size)
    return [tasks[start : start + batch_size] for start in starts]  # type: ignore[return-value]  # a part is of its kind


def halves(span: Span) -> tuple[Span, Span]:
    """The two parts whose aggregates are merged to that of the span: the first as long as a power of two can be."""
    start, stop = span
    middle = start + 2 ** ((stop - start - 1).bit_length() - 1)
    return (start, middle), (middle, stop)


def merged(part: Callable[[int], Any], span: Span) -> Any:
    """The aggregate of a span, of `part(batch)` of each of its batches, which are asked for one after another."""
    start, stop = span
    if stop - start == 1:
        return part(start)
    first, second = halves(span)
    return merged(part, first).merge(merged(part, second))
