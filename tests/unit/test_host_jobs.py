"""A call of the seam as jobs: in whatever order they are done, the result is that of the serial side."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from fedpeat_ray.runtime.host_jobs import MOST_BATCHES, Away, HostJobs, Job
from fedpeat_ray.training.map_clients import halves, merged, split


@dataclass(frozen=True)
class Shape:
    """An aggregate that shows how it was merged."""

    text: str

    def merge(self, other: Shape) -> Shape:
        return Shape(f"({self.text} {other.text})")


def work(job: Job, batch_size: int) -> Shape:
    """What a host does."""
    if job.parts is not None:
        first, second = (part.ref if isinstance(part, Away) else part for part in job.parts)
        return first.merge(second)
    batches = split(job.tasks, batch_size)
    return merged(lambda batch: shape_of(batches[batch]), (0, len(batches)))


def shape_of(tasks: Sequence[int]) -> Shape:
    return Shape(",".join(map(str, tasks)))


def serial(num_tasks: int, batch_size: int) -> Shape:
    batches = split(range(num_tasks), batch_size)
    return merged(lambda batch: shape_of(batches[batch]), (0, len(batches)))


def carried_out(
    jobs: HostJobs, batch_size: int, num_hosts: int, away: bool, rng: random.Random, loses: int = 0
) -> tuple[Any, list[Any]]:
    """All jobs, done in random order by so many hosts; now and then a host or what it made is lost."""
    running: list[Job] = []
    while True:
        while len(running) < num_hosts and (job := jobs.next()) is not None:
            running.append(job)
        if not running:
            total = jobs.total
            return total.ref if isinstance(total, Away) else total, jobs.reports
        job = running.pop(rng.randrange(len(running)))
        if loses and rng.random() < 0.3:
            loses -= 1
            if job.parts is not None and rng.random() < 0.5:
                jobs.parts_lost(job)
            else:
                jobs.lost(job)
            continue
        part = work(job, batch_size)
        jobs.done(job, Away(part) if away else part, [f"report {task}" for task in job.tasks])


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize(("num_tasks", "batch_size"), [(1, 1), (2, 1), (3, 1), (7, 2), (64, 3), (333, 1), (500, 7)])
def test_any_order_on_any_number_of_hosts_gives_the_serial_result(num_tasks, batch_size, away):
    for seed, num_hosts in enumerate((1, 2, 3, 8)):
        jobs = HostJobs(range(num_tasks), batch_size, num_hosts)
        total, reports = carried_out(jobs, batch_size, num_hosts, away, random.Random(seed))
        assert total == serial(num_tasks, batch_size)
        assert reports == [f"report {task}" for task in range(num_tasks)]


@pytest.mark.parametrize("seed", range(10))
def test_lost_hosts_and_lost_aggregates_change_nothing(seed):
    jobs = HostJobs(range(200), 3, 4)
    total, reports = carried_out(jobs, 3, 4, True, random.Random(seed), loses=5)
    assert total == serial(200, 3)
    assert reports == [f"report {task}" for task in range(200)]


def test_a_lost_total_is_made_again():
    jobs = HostJobs(range(9), 2, 2)
    carried_out(jobs, 2, 2, True, random.Random(0))
    jobs.parts_lost()
    assert carried_out(jobs, 2, 2, True, random.Random(1))[0] == serial(9, 2)


def test_batches_of_a_lost_host_are_done_again_one_by_one_and_remember_it():
    jobs = HostJobs(range(200), 1, 2)
    first = jobs.next()
    assert first is not None and first.span == (0, 16)
    jobs.lost(first)
    again = [jobs.next() for _ in range(16)]
    assert [(job.span, job.lost_hosts) for job in again if job] == [((i, i + 1), 1) for i in range(16)]


def test_jobs_grow_smaller_towards_the_end():
    jobs, lengths = HostJobs(range(300), 1, 3), []
    while (job := jobs.next()) is not None:
        lengths.append(job.span[1] - job.span[0])
    assert max(lengths) == MOST_BATCHES and lengths[-4:] == [1] * 4 and sum(lengths) == 300


def test_small_aggregates_are_merged_where_they_are_and_large_ones_by_hosts():
    for away in (False, True):
        jobs = HostJobs(range(2), 1, 2)
        for job in [jobs.next(), jobs.next()]:
            assert job is not None
            part = work(job, 1)
            jobs.done(job, Away(part) if away else part, [None])
        merging = jobs.next()
        assert (merging is not None and merging.parts is not None) == away
        assert away or jobs.total == serial(2, 1)


@pytest.mark.parametrize("length", range(2, 40))
def test_the_tree_does_not_depend_on_where_a_span_begins(length):
    (_, middle), _ = halves((0, length))
    for start in (1, 5, 64):
        assert halves((start, start + length)) == ((start, start + middle), (start + middle, start + length))
