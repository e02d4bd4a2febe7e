"""MapClients on Ray: a few long-lived actors embody all devices.

Each host holds the backbone once (a private memory map), trains one client batch at a time with a
fixed number of threads, and returns a partial aggregate. Idle hosts take the next batches, so a slow
one holds up nobody. Partial aggregates are merged in an order that does not depend on who did what; large
ones stay in the object store and hosts merge them, so that the main process receives one. A host that is lost
is replaced and its batches rerun, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import ray
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayError

from fedpeat_ray import own
from fedpeat_ray.config import HostsConfig
from fedpeat_ray.errors import ConfigError, HostLostError
from fedpeat_ray.fleet.population import Fleet
from fedpeat_ray.fleet.tiers import TIERS
from fedpeat_ray.models.foundation import Foundation, load_backbone
from fedpeat_ray.records import MEMORY, Assignment, ClientReport, ClientTask
from fedpeat_ray.runtime.host_jobs import MOST_BATCHES, Away, HostJobs, Job
from fedpeat_ray.runtime.node_files import Sent, files_of, receive, send, travel_by_value
from fedpeat_ray.runtime.process import (
    give_freed_memory_back,
    is_out_of_memory,
    keep_freed_memory,
    kept_sigterm,
    limited_memory,
)
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.runtime.trace import Trace
from fedpeat_ray.training.map_clients import Call, MapClients

_GIB = 2**30
_LARGE_BYTES = 2**20  # a sum beyond this stays where it is
_TOLERANCE = 1.1  # of a device's cap: the memory model is held to 10 %
_TRIES = 3  # within the cap: a thread that Ray starts meanwhile takes 8 MiB of it for its stack
_HOST_LOST = (RayActorError, OutOfMemoryError, NodeDiedError)


@dataclass(frozen=True)
class Facts:
    """What the main process is told of an aggregate, which itself may stay away."""

    what: str
    """Was done."""
    reports: list[Any]
    num_bytes: int
    started_s: float
    stopped_s: float
    """Of the work, in seconds since the epoch."""

    @classmethod
    def of(cls, what: Any, total: Any, reports: list[Any], started_s: float) -> Facts:
        """Of work that is done now."""
        return cls(_name(what), reports, getattr(total, "num_bytes", 0), started_s, time.time())


class Host:
    """The actor: a backbone and the serial side of the seam around it."""

    def __init__(
        self,
        foundation: Foundation,
        driver: Foundation | None,
        files: dict[Path, Sent],
        num_threads: int,
        room_bytes: int | None = None,
    ):
        """`room_bytes`: what a device may take for training, beyond the weights it trains on."""
        keep_freed_memory() if room_bytes is None else give_freed_memory_back()
        torch.set_num_threads(num_threads)
        self._known_files: dict[Path, str] = {}
        receive(files, self._known_files)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        backbone = load_backbone(foundation, device)
        self._serial = Serial(backbone, driver and load_backbone(driver, device))
        if room_bytes is not None:
            torch.ones(2**20).exp_()  # starts the threads, whose stacks are not the device's
            limit = functools.partial(limited_memory, room_bytes, device)
            self._limited = Serial(dataclasses.replace(backbone, while_training=limit))
        gc.freeze()  # what is loaded stays

    def run(self, tasks: Sequence[Any], call: Call, files: dict[Path, Sent]) -> tuple[Any, Facts]:
        """Train some batches of a call; returns their aggregate, and what is to be known of it."""
        started_s = time.time()
        receive(files, self._known_files)
        total, reports = self._serial.run(dataclasses.replace(call, tasks=tasks))
        return total, Facts.of(call.train, total, reports, started_s)

    def run_capped(
        self, tasks: Sequence[ClientTask | Assignment], call: Call, files: dict[Path, Sent]
    ) -> tuple[Any, Facts]:
        """The same for devices with a memory cap: running into it is a fact about the device, not an error.

        What training needs the first time only (code, an emulator's weights) is no part of it: a first, smaller task
        is trained without the cap.
        """
        started_s = time.time()
        self.run([_smallest(task) for task in tasks], call, files)
        for _ in range(_TRIES):
            try:
                total, reports = self._limited.run(dataclasses.replace(call, tasks=tasks))
                return total, Facts.of(call.train, total, reports, started_s)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
        reports = [ClientReport(task.device_id, None, MEMORY, 0.0) for task in tasks]
        return call.aggregator, Facts.of(call.train, None, reports, started_s)

    def merge(self, first: Any, second: Any) -> tuple[Any, Facts]:
        """One aggregate of two."""
        started_s = time.time()
        total = first.merge(second)
        return total, Facts.of("merge", total, [], started_s)

    def process_id(self) -> int:
        """For tests that kill a host."""
        return os.getpid()


def _name(work: Any) -> str:
    """Of what is done in the end, in whatever it is wrapped."""
    inner = getattr(work, "train", None) or getattr(work, "whole", None)
    return work if isinstance(work, str) else _name(inner) if inner else getattr(work, "__name__", type(work).__name__)


def _smallest(task: ClientTask | Assignment) -> ClientTask | Assignment:
    """The same with one step, on two tokens where the text is there already."""
    if isinstance(task, Assignment):
        return dataclasses.replace(task, num_steps=1)
    return dataclasses.replace(task, tokens_SBT=task.tokens_SBT[:1, :1, :2], lengths_SB=np.full((1, 1), 2))


class RayHosts(MapClients):
    """A pool of hosts; use as a context manager. Joins the cluster it runs in, or starts a local Ray."""

    _most_batches = MOST_BATCHES

    def __init__(
        self,
        config: HostsConfig,
        foundation: Foundation,
        on_event: Callable[..., None],
        driver: Foundation | None = None,
        trace: Trace | None = None,
    ):
        """`on_event(kind, **facts)` hears of lost hosts; `driver` is what hosts do the driver's work on, if it is
        another model than `foundation`; `trace` is told what hosts do when.

        Raises ConfigError for GPUs that are not there.
        """
        self._on_event, self._trace = on_event, trace or Trace()
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            start_or_join((config.num_hosts or 1) * config.num_threads)
        resources = ray.cluster_resources()
        free_gpus = ray.available_resources().get("GPU", 0.0)  # shards of the foundation have taken theirs
        num_gpus = float(free_gpus >= 1) if config.num_gpus is None else config.num_gpus
        if num_gpus > free_gpus:
            raise ConfigError.of("hosts.num_gpus", num_gpus, f"at most the {free_gpus:g} GPUs that are free")
        slots = free_gpus // num_gpus if num_gpus else resources["CPU"] // config.num_threads
        self.num_hosts = config.num_hosts or max(1, int(slots))
        self._foundation, self._driver, self._num_threads = foundation, driver, config.num_threads
        self._weights: dict[Path, Sent] = {}
        self._sent: dict[Path, Sent] = {}
        self._actor_class = ray.remote(
            num_cpus=min(config.num_threads, resources["CPU"] / self.num_hosts),
            num_gpus=num_gpus,
            memory=int((config.memory_gib or 0) * _GIB),
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(config.num_threads)}},
        )(Host)
        self._hosts = [self._new_host() for _ in range(self.num_hosts)]
        self._idle, self._with_one_job = deque(self._hosts), deque()

    def __enter__(self) -> Self:
        try:
            self.process_ids()  # a host that cannot start says so here
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            ray.kill(host)
        if self._owns_ray:
            ray.shutdown()

    def process_ids(self) -> list[int]:
        """The hosts' processes; also waits until all of them are up."""
        return ray.get([host.process_id.remote() for host in self._hosts])

    def run(self, call: Call) -> tuple[Any, list[Any]]:
        """See MapClients. Raises HostLostError for a batch that two hosts did not survive."""
        if not call.tasks:
            return call.aggregator, []
        self._sent = send(files_of(call.train), self._weights | self._sent)
        travel_by_value(own.modules())
        work = (ray.put(dataclasses.replace(call, tasks=())), self._sent)
        jobs = HostJobs(call.tasks, call.batch_size, self.num_hosts, self._most_batches)
        running: dict[ray.ObjectRef, tuple[Any, Job, ray.ObjectRef]] = {}
        try:
            while True:
                while (job := jobs.next()) is not None:
                    if (host := self._take(job, len(running))) is None:
                        jobs.give_back(job)
                        break
                    part, facts = self._start(host, job, work)
                    running[facts] = (host, job, part)
                if running:
                    (done,), _ = ray.wait(list(running), fetch_local=False)
                    self._take_in(jobs, running, running[done][0])
                    continue
                with contextlib.suppress(ObjectLostError):
                    return ray.get(jobs.total.ref) if isinstance(jobs.total, Away) else jobs.total, jobs.reports
                jobs.parts_lost()
        finally:  # after an error in the training code the pool can still be used
            for host, *_ in running.values():
                self._give_back(host)

    def _take_in(self, jobs: HostJobs, running: dict[ray.ObjectRef, tuple[Any, Job, Any]], host: Any) -> None:
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
            self._lost(job, error)
            jobs.lost(job)
        except ObjectLostError:  # the aggregates to be merged went with the node they lay on
            del running[first]
            self._give_back(host)
            jobs.parts_lost(job)
        else:
            del running[first]
            self._note(host, job, facts)
            self._give_back(host)
            jobs.done(job, part, facts.reports)

    def _note(self, host: Any, job: Job, facts: Facts) -> None:
        """For the timeline."""
        lane = f"host {self._hosts.index(host)}" if host in self._hosts else "devices of their own"
        self._trace.add(lane, facts.what, facts.started_s, facts.stopped_s, batches=job.span[1] - job.span[0])

    def _take(self, job: Job, num_running: int) -> Any | None:
        """A host that is free for this job, if there is one. Long jobs are there before the one at work is done: a
        host need not wait for this process."""
        if self._idle:
            self._with_one_job.append(self._idle[0])
            return self._idle.popleft()
        return self._with_one_job.popleft() if self._with_one_job and job.is_long else None

    def _start(self, host: Any, job: Job, work: tuple[Any, ...]) -> list[ray.ObjectRef]:
        """Where the aggregate will be, and its facts."""
        if job.parts is None:
            return host.run.options(num_returns=2).remote(job.tasks, *work)
        parts = [part.ref if isinstance(part, Away) else part for part in job.parts]
        return host.merge.options(num_returns=2).remote(*parts)

    def _give_back(self, host: Any) -> None:
        """It has one job fewer."""
        if host in self._with_one_job:
            self._with_one_job.remove(host)
            self._idle.append(host)
        else:
            self._with_one_job.append(host)

    def _discard(self, lost: Any) -> None:
        """A new host in place of a lost one."""
        if lost in self._with_one_job:
            self._with_one_job.remove(lost)
        new = self._new_host()
        self._hosts[self._hosts.index(lost)] = new
        self._idle.append(new)

    def _new_host(self) -> Any:
        return self._actor_class.remote(*self._arguments(self._driver))

    def _arguments(self, driver: Foundation | None) -> tuple[Any, ...]:
        """Of a new host, which may lie on a node that was not there before."""
        self._weights = send([each.weights for each in (self._foundation, driver) if each], self._weights)
        return self._foundation, driver, self._weights, self._num_threads

    def _lost(self, job: Job, error: RayError) -> None:
        """A lost host is not a dropped device: its job is done again, once."""
        device_ids = [getattr(task, "device_id", None) for task in job.tasks]
        reason = str(error).splitlines()[0]
        self._on_event("host_lost", batch=job.span[0], device_ids=device_ids, error=reason)
        if job.lost_hosts:
            message = f"batch {job.span[0]} ended two hosts; its devices are {device_ids}: {reason}"
            raise HostLostError(message) from error


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
    ):
        """`weights_bytes(level)`: what the memory model counts for the weights of the model on a device."""
        super().__init__(dataclasses.replace(config, num_hosts=1), foundation, on_event, driver, trace)
        self._fleet, self._weights_bytes = fleet, weights_bytes
        self._has_gpus = bool(ray.cluster_resources().get("GPU"))
        self._num_slots = max(1, int(ray.cluster_resources()["CPU"]))
        self._devices: set[Any] = set()

    def run(self, call: Call) -> tuple[Any, list[Any]]:
        """See MapClients; always one client at a time in a process."""
        return super().run(dataclasses.replace(call, batch_size=1))

    def _take(self, job: Job, num_running: int) -> Any | None:
        task = next(iter(job.tasks), None)
        if not isinstance(task, ClientTask | Assignment) or task.device_id < 0:
            return super()._take(job, num_running)
        if num_running >= self._num_slots:
            return None
        tier = TIERS[self._fleet.tier[task.device_id]]
        share = tier.gpu_fraction if self._has_gpus else 0
        cap = int(_TOLERANCE * self._fleet.memory_cap_bytes[task.device_id])
        arguments = self._arguments(driver=None)  # a device has no part in the driver's work
        host = self._actor_class.options(num_cpus=0, num_gpus=share).remote(
            *arguments, cap - self._weights_bytes(task.level)
        )
        self._devices.add(host)
        return host

    def _start(self, host: Any, job: Job, work: tuple[Any, ...]) -> list[ray.ObjectRef]:
        if host in self._devices:
            return host.run_capped.options(num_returns=2).remote(job.tasks, *work)
        return super()._start(host, job, work)

    def _give_back(self, host: Any) -> None:
        if host in self._devices:
            self._devices.remove(host)
            ray.kill(host)
        else:
            super()._give_back(host)

    def _discard(self, lost: Any) -> None:
        if lost in self._devices:
            self._devices.remove(lost)
        else:
            super()._discard(lost)


def start_or_join(num_cpus: int) -> None:
    """Join the cluster this process was submitted to ($RAY_ADDRESS), or start a Ray of at least these cores."""
    with kept_sigterm():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
            return
        num_cores = len(os.sched_getaffinity(0))
        ray.init(
            address="local",  # without it, a stale cluster file would be tried first
            num_cpus=max(num_cores, num_cpus),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
