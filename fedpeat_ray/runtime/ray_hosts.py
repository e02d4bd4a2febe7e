"""MapClients on Ray: a few long-lived actors embody all devices.

Each host (host_work) holds the backbone once (a private memory map), trains one client batch at a time with a
fixed number of threads, and returns a partial aggregate. Idle hosts take the next batches, so a slow
one holds up nobody. Partial aggregates are merged in an order that does not depend on who did what; large
ones stay in the object store and hosts merge them, so that the main process receives one.

Hosts follow the cluster: there are more once nodes have come, and the run goes on with those that are left when nodes
have gone. Batches of a lost host are rerun; one that ends two hosts raises, unless these went with their nodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Self

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayError

from fedpeat_ray import own
from fedpeat_ray.config import HostsConfig
from fedpeat_ray.errors import HostLostError
from fedpeat_ray.fleet.population import Fleet
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.records import NO_HOST, Assignment, ClientTask
from fedpeat_ray.runtime.host_jobs import MOST_BATCHES, Away, HostJobs, Job
from fedpeat_ray.runtime.host_pool import Holding, HostPool, is_reached, new_host
from fedpeat_ray.runtime.host_work import Facts
from fedpeat_ray.runtime.node_files import Sent, files_of, send, travel_by_value
from fedpeat_ray.runtime.trace import Trace
from fedpeat_ray.training.map_clients import Call, MapClients

_LARGE_BYTES = 2**20  # a sum beyond this stays where it is
_TOLERANCE = 1.1  # of a device's cap: the memory model is held to 10 %
_HOST_LOST = (RayActorError, OutOfMemoryError, NodeDiedError)
_LOOK_EVERY_S = 2.0  # at the cluster
_LATECOMERS_S = 60.0  # that the first host waits for others at the beginning
_SAY_SO_S = 30.0  # without a host
_FAILED_STARTS = 3  # one after another, of which the last is an error
_CALLS = 8  # more than a round has: hosts that none of them had work for are not needed


class RayHosts(MapClients):
    """Hosts of one simulation; use as a context manager."""

    _most_batches = MOST_BATCHES

    def __init__(
        self,
        config: HostsConfig,
        foundation: Foundation,
        on_event: Callable[..., None],
        driver: Foundation | None = None,
        trace: Trace | None = None,
        pool: HostPool | None = None,
    ):
        """`on_event(kind, **facts)` hears of lost hosts; `driver` is what hosts do the driver's work on, if it is
        another model than `foundation`; `trace` is told what hosts do when; `pool`: where hosts come from and go back
        to, instead of processes of their own.

        Raises ConfigError for GPUs that are not there.
        """
        self._on_event, self._trace = on_event, trace or Trace()
        self._foundation, self._driver, self._num_threads = foundation, driver, config.num_threads
        self._weights: dict[Path, Sent] = {}
        self._files: Sequence[Path] = ()
        self._sent: dict[Path, Sent] = {}
        self._hosts: list[Holding] = []
        self._idle: deque[Holding] = deque()
        self._with_one_job: deque[Holding] = deque()
        self._starting: dict[ray.ObjectRef, Any] = {}
        self._num_failed, self._look_s, self._without_s = 0, 0.0, time.monotonic()
        self._needed: deque[int] = deque(maxlen=_CALLS)
        self._lanes: dict[Holding, str] = {}
        self._owns_pool, self._pool = pool is None, pool or HostPool(config)
        try:
            self._room = self._pool.room(config)
            self._follow()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        try:
            num_expected, until_s = self._room.num_hosts(), math.inf
            while not self._hosts or (len(self._hosts) < num_expected and time.monotonic() < until_s):
                self._next(())
                until_s = min(until_s, time.monotonic() + _LATECOMERS_S) if self._hosts else until_s
            ray.get([host.held for host in self._hosts])  # a host that cannot load says so here
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            while self._hosts:
                self._pool.give_back(self._hosts.pop().host, self._room.share)
        self._end()

    def _end(self) -> None:
        """The hosts that may still be at work, and what they came from if nobody else takes from it."""
        for host in [host.host for host in self._hosts] + [*self._starting.values()]:
            ray.kill(host)
        if self._owns_pool:
            self._pool.__exit__()

    @property
    def num_hosts(self) -> int:
        """That there are, or may be."""
        return self._room.config.max_hosts or len(self._hosts)

    def process_ids(self) -> list[int]:
        """The hosts' processes."""
        return ray.get([host.host.process_id.remote() for host in self._hosts])

    def run(self, call: Call) -> tuple[Any, list[Any]]:
        """See MapClients. Raises HostLostError for a batch that two hosts did not survive."""
        if not call.tasks:
            return call.aggregator, []
        self._files = files_of(call.train)
        self._sent = send(self._files, self._weights | self._sent)
        self._needed.append(math.ceil(len(call.tasks) / call.batch_size))
        travel_by_value(own.modules())
        work = ray.put(dataclasses.replace(call, tasks=()))
        num_hosts = len(self._hosts) or 1  # the last one may just have been lost
        jobs = HostJobs(call.tasks, call.batch_size, num_hosts, self._most_batches)
        running: dict[ray.ObjectRef, tuple[Holding, Job, ray.ObjectRef]] = {}
        try:
            while True:
                while (job := jobs.next()) is not None:
                    if (host := self._take(job, len(running))) is None:
                        jobs.give_back(job)
                        break
                    part, facts = self._start(host, job, work)
                    running[facts] = (host, job, part)
                if running or job:
                    if (done := self._next(running)) is not None:
                        self._take_in(jobs, running, running[done][0])
                    continue
                with contextlib.suppress(ObjectLostError):
                    return ray.get(jobs.total.ref) if isinstance(jobs.total, Away) else jobs.total, jobs.reports
                jobs.parts_lost()
        finally:  # after an error in the training code the pool can still be used
            for host, *_ in running.values():
                self._give_back(host)

    def _next(self, running: Collection[ray.ObjectRef]) -> ray.ObjectRef | None:
        """A job that is done. None: a host came instead, or nothing happened for some seconds."""
        self._follow()
        done, _ = ray.wait([*running, *self._starting], fetch_local=False, timeout=_LOOK_EVERY_S)
        for ref in done:
            if ref in self._starting:
                self._welcome(ref)
        return next((ref for ref in done if ref in running), None)

    def _take_in(self, jobs: HostJobs, running: dict[ray.ObjectRef, tuple[Holding, Job, Any]], host: Holding) -> None:
        """What came of the first of a host's jobs. Large aggregates stay where they are."""
        first, *waiting = (facts for facts in running if running[facts][0] is host)
        _, job, part = running[first]
        try:
            facts: Facts = ray.get(first)
            part = Away(part) if facts.num_bytes > _LARGE_BYTES else ray.get(part)
        except _HOST_LOST as error:
            del running[first]
            for never_begun in waiting:
                jobs.give_back(running.pop(never_begun)[1])
            self._discard(host)
            jobs.lost(job, blamed=self._is_blamed(job, host, error))
        except ObjectLostError:  # the aggregates to be merged went with the node they lay on
            del running[first]
            self._give_back(host)
            jobs.parts_lost(job)
        else:
            del running[first]
            self._note(host, job, facts)
            self._give_back(host)
            jobs.done(job, part, facts.reports)

    def _note(self, host: Holding, job: Job, facts: Facts) -> None:
        """For the timeline."""
        lane = self._lanes.get(host, "devices of their own")
        self._trace.add(lane, facts.what, facts.started_s, facts.stopped_s, batches=job.span[1] - job.span[0])

    def _take(self, job: Job, num_running: int) -> Holding | None:
        """A host that is free for this job, if there is one. Long jobs are there before the one at work is done: a
        host need not wait for this process."""
        if self._idle:
            self._with_one_job.append(self._idle[0])
            return self._idle.popleft()
        return self._with_one_job.popleft() if self._with_one_job and job.is_long else None

    def _start(self, host: Holding, job: Job, work: ray.ObjectRef) -> list[ray.ObjectRef]:
        """Where the aggregate will be, and its facts."""
        if job.parts is None:
            return host.start("run", job.tasks, work, self._sent)
        return host.start("merge", *(part.ref if isinstance(part, Away) else part for part in job.parts))

    def _give_back(self, host: Holding) -> None:
        """It has one job fewer."""
        if host in self._with_one_job:
            self._with_one_job.remove(host)
            self._idle.append(host)
        else:
            self._with_one_job.append(host)

    def _discard(self, lost: Holding) -> None:
        """It is not there any more, or does not answer."""
        if lost in self._with_one_job:
            self._with_one_job.remove(lost)
        self._hosts.remove(lost)
        ray.kill(lost.host)
        self._look_s = 0.0

    def _follow(self) -> None:
        """Start hosts, or end some, until there are as many as there should be; looks every few seconds."""
        now_s = time.monotonic()
        if self._hosts:
            self._without_s = now_s
        if now_s < self._look_s:
            return
        self._look_s = now_s + _LOOK_EVERY_S
        missing = self._room.num_hosts(max(self._needed, default=None)) - len(self._hosts) - len(self._starting)
        for _ in range(missing):
            host = self._pool.take(self._room.share)
            self._starting[host.node.remote()] = host
        for ref in [*self._starting][: max(0, -missing)]:  # they have no place
            ray.kill(self._starting.pop(ref))
            missing += 1
        if self._room.config.max_hosts is not None:
            for host in [*self._idle][: max(0, -missing)]:
                self._idle.remove(host)
                self._hosts.remove(host)
                ray.kill(host.host)
                self._on_event("host_left", node=host.node, num_hosts=len(self._hosts))
        if now_s - self._without_s > _SAY_SO_S:
            self._without_s = math.inf
            self._on_event(NO_HOST)

    def _welcome(self, ref: ray.ObjectRef) -> None:
        """A process that was started is there."""
        process = self._starting.pop(ref)
        try:
            node = ray.get(ref)
        except _HOST_LOST:
            self._num_failed, self._look_s = self._num_failed + 1, 0.0
            if self._num_failed == _FAILED_STARTS:
                raise
            return
        host = Holding.of(process, node, *self._arguments(self._driver))
        self._sent = send(self._files, self._weights | self._sent)  # its node may be one that lacks them
        self._num_failed = 0
        self._lanes[host] = f"host {len(self._lanes)}"
        self._hosts.append(host)
        self._idle.append(host)
        self._on_event("host_joined", node=node, num_hosts=len(self._hosts))

    def _arguments(self, driver: Foundation | None) -> tuple[Any, ...]:
        """Of a new host, which may lie on a node that was not there before."""
        self._weights = send([each.weights for each in (self._foundation, driver) if each], self._weights)
        return self._foundation, driver, self._weights, self._num_threads

    def _is_blamed(self, job: Job, host: Holding, error: RayError) -> bool:
        """Whether the job may be what ended its host. A lost host is not a dropped device: the job is done again, but
        raises HostLostError if that was so before."""
        device_ids = [getattr(task, "device_id", None) for task in job.tasks]
        reason, with_node = str(error).splitlines()[0], not is_reached(host.node)
        facts = {"with_node": with_node, "num_hosts": len(self._hosts)}
        self._on_event("host_lost", batch=job.span[0], device_ids=device_ids, error=reason, **facts)
        if job.lost_hosts and not with_node:
            message = f"batch {job.span[0]} ended two hosts; its devices are {device_ids}: {reason}"
            raise HostLostError(message) from error
        return not with_node


class ExclusiveHosts(RayHosts):
    """An actor of its own for every device, with its tier's GPU fraction and a real cap on its memory.

    For tens of devices, to hold the memory model against the real thing: starting an actor takes
    seconds. Work that is not a device's (evaluation) runs on the ordinary hosts. Client batches are of
    one client, so the bits are those of client_batch_size = 1. What is capped is what training adds to the weights:
    these count as the memory model says, however this process holds them (mapped whole, in two types).
    """

    _most_batches = 1

    def __init__(
        self,
        config: HostsConfig,
        foundation: Foundation,
        on_event: Callable[..., None],
        fleet: Fleet,
        weights_bytes: Callable[[int | None], int],
        driver: Foundation | None = None,
        trace: Trace | None = None,
        pool: HostPool | None = None,
    ):
        """`weights_bytes(level)`: what the memory model counts for the weights of the model on a device."""
        config = dataclasses.replace(config, num_hosts=1, max_hosts=None)
        super().__init__(config, foundation, on_event, driver, trace, pool)
        self._fleet, self._weights_bytes = fleet, weights_bytes
        self._has_gpus = bool(ray.cluster_resources().get("GPU"))
        self._num_slots = max(1, int(ray.cluster_resources().get("CPU", 0)))
        self._devices: set[Holding] = set()

    def run(self, call: Call) -> tuple[Any, list[Any]]:
        """See MapClients; always one client at a time in a process."""
        return super().run(dataclasses.replace(call, batch_size=1))

    def _take(self, job: Job, num_running: int) -> Holding | None:
        task = next(iter(job.tasks), None)
        if not isinstance(task, ClientTask | Assignment) or task.device_id < 0:
            return super()._take(job, num_running)
        if num_running >= self._num_slots:
            return None
        tier = self._fleet.tiers[self._fleet.tier[task.device_id]]
        num_gpus = tier.gpu_fraction if self._has_gpus else 0
        cap = int(_TOLERANCE * self._fleet.memory_cap_bytes[task.device_id])
        arguments = self._arguments(driver=None)  # a device has no part in the driver's work
        process = new_host(dataclasses.replace(self._room.share, num_cpus=0, num_gpus=num_gpus))
        host = Holding.of(process, None, *arguments, cap - self._weights_bytes(task.level))
        self._devices.add(host)
        return host

    def _start(self, host: Holding, job: Job, work: ray.ObjectRef) -> list[ray.ObjectRef]:
        if host in self._devices:
            return host.start("run_capped", job.tasks, work, self._sent)
        return super()._start(host, job, work)

    def _give_back(self, host: Holding) -> None:
        if host in self._devices:
            self._devices.remove(host)
            ray.kill(host.host)
        else:
            super()._give_back(host)

    def _discard(self, lost: Holding) -> None:
        if lost in self._devices:
            self._devices.remove(lost)
        else:
            super()._discard(lost)
