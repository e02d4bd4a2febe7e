"""MapClients on Ray: a few long-lived actors embody all devices.

Each host holds the backbone once (a private memory map), trains one client batch at a time with a
fixed number of threads, and returns a partial aggregate. Idle hosts take the next batch, so a slow
one holds up nobody; partial aggregates are merged in batch order, so the result does not depend on
who did what. A host that is lost is replaced and its batch rerun, once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import ray
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayError

from fedpeat_ray.config import HostsConfig
from fedpeat_ray.errors import ConfigError, HostLostError
from fedpeat_ray.fleet.population import Fleet
from fedpeat_ray.fleet.tiers import TIERS
from fedpeat_ray.models.foundation import Foundation, load_backbone
from fedpeat_ray.records import MEMORY, ClientReport, ClientTask
from fedpeat_ray.runtime.node_files import Sent, files_of, receive, send
from fedpeat_ray.runtime.process import give_freed_memory_back, is_out_of_memory, keep_freed_memory, limited_memory
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.training.map_clients import Aggregator, Where, split

_GIB = 2**30
_TOLERANCE = 1.1  # of a device's cap: the memory model is held to 10 %
_TRIES = 3  # within the cap: a thread that Ray starts meanwhile takes 8 MiB of it for its stack
_HOST_LOST = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)


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

    def run(
        self,
        batch: Sequence[Any],
        train: Callable,
        shared: Any,
        aggregator: Aggregator,
        where: Where,
        files: dict[Path, Sent],
    ) -> tuple[Any, list[Any]]:
        """Train one batch; returns its partial aggregate and reports."""
        receive(files, self._known_files)
        return self._serial(train, shared, batch, aggregator, len(batch), where)

    def run_capped(
        self, batch: Sequence[ClientTask], train: Callable, shared: Any, aggregator: Aggregator, *rest: Any
    ) -> tuple[Any, list[ClientReport]]:
        """The same for devices with a memory cap: running into it is a fact about the device, not an error.

        What training needs the first time only (code, an emulator's weights) is no part of it: a first step on two
        tokens is taken without the cap.
        """
        self.run([_smallest(task) for task in batch], train, shared, aggregator, *rest)
        for _ in range(_TRIES):
            try:
                return self._limited(train, shared, batch, aggregator, len(batch))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
        return aggregator, [ClientReport(task.device_id, None, MEMORY, 0.0) for task in batch]

    def process_id(self) -> int:
        """For tests that kill a host."""
        return os.getpid()


def _smallest(task: ClientTask) -> ClientTask:
    """The same with one step on two tokens."""
    return dataclasses.replace(task, tokens_SBT=task.tokens_SBT[:1, :1, :2], lengths_SB=np.full((1, 1), 2))


@dataclass
class _Batch:
    index: int
    tasks: Sequence[Any]
    lost_hosts: int = 0


class RayHosts:
    """A pool of hosts; use as a context manager. Joins the cluster it runs in, or starts a local Ray."""

    def __init__(
        self,
        config: HostsConfig,
        foundation: Foundation,
        on_event: Callable[..., None],
        driver: Foundation | None = None,
    ):
        """`on_event(kind, **facts)` hears of lost hosts; `driver` is what hosts do the driver's work on, if it is
        another model than `foundation`.

        Raises ConfigError for GPUs that are not there.
        """
        self._on_event = on_event
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
        self._idle = deque(self._hosts)

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

    def __call__(
        self,
        train: Callable,
        shared: Any,
        tasks: Sequence[Any],
        aggregator: Aggregator,
        batch_size: int = 1,
        where: Where = "hosts",
    ) -> tuple[Any, list[Any]]:
        """See MapClients. Raises HostLostError for a batch that two hosts did not survive."""
        batches = deque(_Batch(index, batch) for index, batch in enumerate(split(tasks, batch_size)))
        results: list[tuple[Any, list[Any]] | None] = [None] * len(batches)
        self._sent = send(files_of(train), self._weights | self._sent)
        work = (ray.put(train), ray.put(shared), ray.put(aggregator), where, self._sent)
        running: dict[ray.ObjectRef, tuple[Any, _Batch]] = {}
        try:
            while batches or running:
                while batches and (host := self._take(batches[0], len(running))) is not None:
                    batch = batches.popleft()
                    running[self._start(host, batch, work)] = (host, batch)
                (done,), _ = ray.wait(list(running))
                host, batch = running[done]
                try:
                    results[batch.index] = ray.get(done)
                except _HOST_LOST as error:
                    del running[done]
                    self._discard(host)
                    batches.appendleft(self._lost(batch, error))
                else:
                    del running[done]
                    self._give_back(host)
        finally:  # after an error in the training code the pool can still be used
            for host, _ in running.values():
                self._give_back(host)
        total, reports = aggregator, []
        for result in results:
            assert result is not None
            total = total.merge(result[0])
            reports += result[1]
        return total, reports

    def _take(self, batch: _Batch, num_running: int) -> Any | None:
        """A host that is free for this batch, if there is one."""
        return self._idle.popleft() if self._idle else None

    def _start(self, host: Any, batch: _Batch, work: tuple[Any, ...]) -> ray.ObjectRef:
        return host.run.remote(batch.tasks, *work)

    def _give_back(self, host: Any) -> None:
        self._idle.append(host)

    def _discard(self, lost: Any) -> None:
        """A new host in place of a lost one."""
        new = self._new_host()
        self._hosts[self._hosts.index(lost)] = new
        self._idle.append(new)

    def _new_host(self) -> Any:
        return self._actor_class.remote(*self._arguments(self._driver))

    def _arguments(self, driver: Foundation | None) -> tuple[Any, ...]:
        """Of a new host, which may lie on a node that was not there before."""
        self._weights = send([each.weights for each in (self._foundation, driver) if each], self._weights)
        return self._foundation, driver, self._weights, self._num_threads

    def _lost(self, batch: _Batch, error: RayError) -> _Batch:
        """The batch to run again. A lost host is not a dropped device."""
        device_ids = [getattr(task, "device_id", None) for task in batch.tasks]
        reason = str(error).splitlines()[0]
        self._on_event("host_lost", batch=batch.index, device_ids=device_ids, error=reason)
        if batch.lost_hosts:
            message = f"batch {batch.index} ended two hosts; its devices are {device_ids}: {reason}"
            raise HostLostError(message) from error
        return _Batch(batch.index, batch.tasks, batch.lost_hosts + 1)


class ExclusiveHosts(RayHosts):
    """An actor of its own for every device, with its tier's GPU fraction and a real cap on its memory.

    For tens of devices, to hold the memory model against the real thing: starting an actor takes
    seconds. Work that is not a device's (evaluation) runs on the ordinary hosts. Client batches are of
    one client, so the bits are those of client_batch_size = 1. What is capped is what training adds to the weights:
    these count as the memory model says, however this process holds them (mapped whole, in two types).
    """

    def __init__(
        self,
        config: HostsConfig,
        foundation: Foundation,
        on_event: Callable[..., None],
        fleet: Fleet,
        weights_bytes: Callable[[int | None], int],
        driver: Foundation | None = None,
    ):
        """`weights_bytes(level)`: what the memory model counts for the weights of the model on a device."""
        super().__init__(dataclasses.replace(config, num_hosts=1), foundation, on_event, driver)
        self._fleet, self._weights_bytes = fleet, weights_bytes
        self._has_gpus = bool(ray.cluster_resources().get("GPU"))
        self._num_slots = max(1, int(ray.cluster_resources()["CPU"]))
        self._devices: set[Any] = set()

    def __call__(
        self,
        train: Callable,
        shared: Any,
        tasks: Sequence[Any],
        aggregator: Aggregator,
        batch_size: int = 1,
        where: Where = "hosts",
    ) -> tuple[Any, list[Any]]:
        """See MapClients; always one client at a time in a process."""
        return super().__call__(train, shared, tasks, aggregator, batch_size=1, where=where)

    def _take(self, batch: _Batch, num_running: int) -> Any | None:
        (task,) = batch.tasks
        if not isinstance(task, ClientTask) or task.device_id < 0:
            return super()._take(batch, num_running)
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

    def _start(self, host: Any, batch: _Batch, work: tuple[Any, ...]) -> ray.ObjectRef:
        run = host.run_capped if host in self._devices else host.run
        return run.remote(batch.tasks, *work)

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
