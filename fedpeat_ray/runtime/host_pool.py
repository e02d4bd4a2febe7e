"""Processes of hosts: started before it is known what they will hold, and kept from one simulation to the next.

This module is loaded first, and loads nothing heavy: while hosts load what they compute with, so does the process
that started them.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray._private.utils import read_ray_address

from fedpeat_ray.config import HostsConfig
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.loading import loading
from fedpeat_ray.runtime.signals import kept_sigterm

_GIB = 2**30


class Host:
    """The actor: does the work of one simulation after another (see host_work)."""

    def __init__(self, num_threads: int):
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # read when PyTorch is loaded
        with loading():
            from fedpeat_ray.runtime.host_work import HostWork
        self._new = HostWork
        self._work: HostWork | None = None

    def hold(self, *arguments: Any) -> None:
        """Load the models of a simulation; the arguments are HostWork's."""
        self._work = self._new(*arguments)

    def let_go(self) -> None:
        """Of the models, to wait for others."""
        self._work = None
        gc.unfreeze()
        gc.collect()

    def do(self, held: None, method: str, *arguments: Any) -> Any:
        """Call a method of the work; `held` is what `hold` returned."""
        return getattr(self._work, method)(*arguments)

    def process_id(self) -> int:
        """For tests that kill a host."""
        return os.getpid()


@dataclass(frozen=True, eq=False)
class Holding:
    """A host and its word, once it comes, that it holds what it was told to."""

    host: Any
    held: ray.ObjectRef

    @classmethod
    def of(cls, host: Any, *arguments: Any) -> Self:
        """Tell a host to hold something."""
        return cls(host, host.hold.remote(*arguments))

    def start(self, method: str, *arguments: Any) -> list[ray.ObjectRef]:
        """Where the aggregate will be that a method returns, and its facts. If the host could not load what it was
        to hold, the error is that one."""
        return self.host.do.options(num_returns=2).remote(self.held, method, *arguments)


LOCAL = "local"
"""In place of an address: a Ray of one's own."""


@dataclass(frozen=True)
class Share:
    """What a host takes of the cluster."""

    num_cpus: float
    num_gpus: float
    memory_bytes: int
    num_threads: int


class HostPool:
    """Ray, joined or started, and hosts that wait for a simulation; use as a context manager.

    `Simulation.run(pool)` takes hosts from it and gives them back, so that of several simulations in one process only
    the first waits for processes to start.
    """

    def __init__(self, config: HostsConfig):
        self._owns_ray = not ray.is_initialized()
        self._waiting: dict[Share, list[Any]] = {}
        if self._owns_ray:
            start_or_join((config.num_hosts or 1) * config.num_threads, config.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_waiting()
        if self._owns_ray:
            ray.shutdown()

    @property
    def about(self) -> str:
        """A line about the Ray that hosts are on, and about a cluster that runs here and is not joined."""
        alive, resources = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
        used = ray.get_runtime_context().gcs_address
        line = f"Ray at {used}: nodes {alive}, CPUs {resources.get('CPU', 0):g}, GPUs {resources.get('GPU', 0):g}"
        other = read_ray_address()  # what `ray start` wrote down here
        if other is None or other == used or not _answers(other):
            return line
        return f"{line}; not the cluster at {other}, which --hosts.address auto joins"

    def room(self, config: HostsConfig) -> tuple[int, Share]:
        """How many hosts there will be, and the share of each. Raises ConfigError for GPUs that are not there."""
        resources = ray.cluster_resources()
        free_gpus = ray.available_resources().get("GPU", 0.0)  # shards of the foundation have taken theirs
        free_gpus += sum(share.num_gpus * len(hosts) for share, hosts in self._waiting.items())
        num_gpus = float(free_gpus >= 1) if config.num_gpus is None else config.num_gpus
        if num_gpus > free_gpus:
            raise ConfigError.of("hosts.num_gpus", num_gpus, f"at most the {free_gpus:g} GPUs that are free")
        slots = free_gpus // num_gpus if num_gpus else resources["CPU"] // config.num_threads
        num_hosts = config.num_hosts or max(1, int(slots))
        num_cpus = min(config.num_threads, resources["CPU"] / num_hosts)
        return num_hosts, Share(num_cpus, num_gpus, int((config.memory_gib or 0) * _GIB), config.num_threads)

    def start(self, config: HostsConfig) -> None:
        """Start the hosts that a simulation with this configuration will take. Does not wait for them."""
        num_hosts, share = self.room(config)
        self._waiting.setdefault(share, []).extend(new_host(share) for _ in range(num_hosts))

    def take(self, share: Share) -> Any:
        """A host that waits, or a new one; those that wait with other shares would be in its way."""
        if self._waiting.get(share):
            return self._waiting[share].pop()
        self._end_waiting()
        return new_host(share)

    def give_back(self, host: Any, share: Share) -> None:
        """It has nothing to do any more."""
        host.let_go.remote()
        self._waiting.setdefault(share, []).append(host)

    def _end_waiting(self) -> None:
        for hosts in self._waiting.values():
            for host in hosts:
                ray.kill(host)
        self._waiting.clear()


def new_host(share: Share) -> Any:
    """A process that begins to load what hosts compute with."""
    kind = ray.remote(num_cpus=share.num_cpus, num_gpus=share.num_gpus, memory=share.memory_bytes, max_restarts=0)
    return kind(Host).remote(share.num_threads)


@contextlib.contextmanager
def some_ray(num_cpus: int) -> Iterator[None]:
    """The Ray that is running, or one that is joined or started and left at the end."""
    owns_ray = not ray.is_initialized()
    if owns_ray:
        start_or_join(num_cpus)
    try:
        yield
    finally:
        if owns_ray:
            ray.shutdown()


def start_or_join(num_cpus: int, address: str | None = None) -> None:
    """Join the Ray at an address (`hosts.address`), or start one of at least these cores.

    Raises ConfigError where there is none to be joined.
    """
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    with kept_sigterm():
        if address != LOCAL:
            allowed = "auto, local, or HOST:PORT of a Ray that runs"
            if address != "auto" and not _answers(address):  # Ray would try for minutes
                raise ConfigError.of("hosts.address", address, f"{allowed}; nothing answers there")
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError as error:
                raise ConfigError.of("hosts.address", address, f"{allowed}; none was found here") from error
            return
        num_cores = len(os.sched_getaffinity(0))
        ray.init(
            address=LOCAL,  # without it, a stale cluster file would be tried first
            num_cpus=max(num_cores, num_cpus),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=5):
            return True
    except (OSError, ValueError):
        return False
