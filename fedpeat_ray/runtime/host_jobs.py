"""One call of the seam as jobs for hosts: batches to train, and partial aggregates to merge, in whatever order.

Knows no Ray. Which aggregates are merged with which depends on the number of batches alone (see
`map_clients.merged`), and how many batches a job has does not show in the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedpeat_ray.training.map_clients import Span, halves, split

MOST_BATCHES = 16  # of a job: what a host is busy with while the others wait for it, and loses if it dies
_JOBS_A_HOST = 4  # at least, of what is left


@dataclass(frozen=True)
class Away:
    """A partial aggregate that stays where it was made."""

    ref: Any


@dataclass(frozen=True)
class Job:
    """Batches to be trained; or with `parts` a span whose two halves are to be merged."""

    span: Span
    tasks: Sequence[Any]
    parts: tuple[Any, Any] | None = None
    lost_hosts: int = 0

    @property
    def is_long(self) -> bool:
        """That it has several batches to be trained."""
        return self.parts is None and self.span[1] - self.span[0] > 1


class HostJobs:
    """What is still to be done of a call, and what came of it so far."""

    def __init__(self, tasks: Sequence[Any], batch_size: int, num_hosts: int, most_batches: int = MOST_BATCHES):
        self._tasks, self._batch_size = tasks, batch_size
        self._num_hosts, self._most_batches = num_hosts, most_batches
        self._all: Span = (0, -(-len(tasks) // batch_size))
        self._next = 0
        self._again: deque[Job] = deque()
        self._parts: dict[Span, Any] = {}
        self._ready: deque[Span] = deque()  # spans of which both halves are there
        self._reports: dict[int, Sequence[Any]] = {}

    def next(self) -> Job | None:
        """What an idle host is to do; None if there is nothing just now. What is here and can be merged is.

        Jobs have many batches at first and few at the end, so that all hosts end at about the same time.
        """
        while self._ready:
            span = self._ready.popleft()
            first, second = (self._parts.pop(half) for half in halves(span))
            if isinstance(first, Away) or isinstance(second, Away):
                return Job(span, (), (first, second))
            self._put(span, first.merge(second))
        if self._again:
            return self._again.popleft()
        if self._next == self._all[1]:
            return None
        fair = (self._all[1] - self._next) // (_JOBS_A_HOST * self._num_hosts)
        span = self._longest(max(1, min(fair, self._most_batches)))
        self._next = span[1]
        return self._training(span)

    def give_back(self, job: Job) -> None:
        """No host is free for it."""
        self._again.appendleft(job)

    def done(self, job: Job, part: Any, reports: Sequence[Any]) -> None:
        """Its aggregate is there."""
        if job.parts is None:
            self._reports |= zip(range(*job.span), split(reports, self._batch_size), strict=True)
        self._put(job.span, part)

    def lost(self, job: Job, blamed: bool = True) -> None:
        """Its host is lost: batches are done again one by one, which tells one that ends its host from the others."""
        lost_hosts = job.lost_hosts + blamed
        if job.parts is None:
            self._train_again(job.span, lost_hosts)
        else:
            self._again.appendleft(Job(job.span, (), job.parts, lost_hosts))

    def parts_lost(self, merging: Job | None = None) -> None:
        """The aggregates that a job was to merge, or without one the total, are gone with the node they lay on."""
        self._train_again(self._all if merging is None else merging.span)

    @property
    def total(self) -> Any:
        """The aggregate of everything, once nothing is left to be done."""
        return self._parts[self._all]

    @property
    def reports(self) -> list[Any]:
        """In the order of the tasks."""
        return [report for batch in sorted(self._reports) for report in self._reports[batch]]

    def _training(self, span: Span, lost_hosts: int = 0) -> Job:
        first, last = (batch * self._batch_size for batch in span)
        return Job(span, self._tasks[first:last], None, lost_hosts)

    def _train_again(self, span: Span, lost_hosts: int = 0) -> None:
        self._parts.pop(span, None)
        self._again.extendleft(self._training((batch, batch + 1), lost_hosts) for batch in reversed(range(*span)))

    def _longest(self, most: int) -> Span:
        """The longest span of the tree that begins at the next batch and has at most so many."""
        span = self._all
        while span[0] != self._next or span[1] - span[0] > most:
            first, second = halves(span)
            span = first if self._next < first[1] else second
        return span

    def _put(self, span: Span, part: Any) -> None:
        self._parts[span] = part
        if span == self._all:
            return
        whole = self._all
        while span not in (both := halves(whole)):
            whole = both[0] if span[0] < both[0][1] else both[1]
        if all(half in self._parts for half in both):
            self._ready.append(whole)
