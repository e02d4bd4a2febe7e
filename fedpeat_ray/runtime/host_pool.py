"""Processes of hosts: started before it is known what they will hold, and kept from one simulation to the next.

This module is loaded first, and loads nothing heavy: while hosts load what they compute with, so does the process
that started them.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray._private import ray_constants
from ray._private.utils import read_ray_address

from fedpeat_ray.config import HostsConfig
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.loading import loading
from fedpeat_ray.runtime.head_watch import HeadWatch, answers
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

    def node(self) -> str:
        """The id of the node it is on."""
        return ray.get_runtime_context().get_node_id()

    def process_id(self) -> int:
        """For tests that kill a host."""
        return os.getpid()


@dataclass(frozen=True, eq=False)
class Holding:
    """A host and its word, once it comes, that it holds what it was told to."""

    host: Any
    held: ray.ObjectRef
    node: str | None
    """Where it is, by Ray's id; None: not known."""

    @classmethod
    def of(cls, host: Any, node: str | None, *arguments: Any) -> Self:
        """Tell a host to hold something."""
        return cls(host, host.hold.remote(*arguments), node)

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


@dataclass(frozen=True)
class Room:
    """For hosts: what each takes, and how many there should be, which follows the cluster."""

    share: Share
    taken_gpus: float
    """By others, shards of the foundation for example."""
    config: HostsConfig

    def num_hosts(self, num_needed: int | None = None) -> int:
        """As many as the settings say; without a number, as many as the cluster has room for as it is now. Up to
        `hosts.max_hosts` as many as are needed: nodes for them are the autoscaler's."""
        if self.config.num_hosts is not None:
            return self.config.num_hosts
        most = self.config.max_hosts
        return max(1, self.slots() if most is None else min(most, self.slots() if num_needed is None else num_needed))

    def slots(self) -> int:
        """How many the nodes that there are now can have."""
        nodes, share = _nodes(), self.share
        if share.num_gpus:
            gpus = sum(int(node.get("GPU", 0) // share.num_gpus) for node in nodes)
            return gpus - math.ceil(self.taken_gpus / share.num_gpus)
        return sum(int(node.get("CPU", 0) // share.num_cpus) for node in nodes)


class HostPool:
    """Ray, joined or started, and hosts that wait for a simulation; use as a context manager.

    `Simulation.run(pool)` takes hosts from it and gives them back, so that of several simulations in one process only
    the first waits for processes to start.
    """

    def __init__(self, config: HostsConfig, last_words: Callable[[], str] | None = None):
        """`last_words`: what is said if the process must end because the head of Ray is lost."""
        self._owns_ray = not ray.is_initialized()
        self._waiting: dict[Share, list[Any]] = {}
        if self._owns_ray:
            start_or_join((config.num_hosts or 1) * config.num_threads, config.address)
        self._watch = HeadWatch(ray.get_runtime_context().gcs_address, last_words)
        self._watch.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_waiting()
        self._watch.stop()
        if self._owns_ray:
            ray.shutdown()

    @property
    def about(self) -> str:
        """A line about the Ray that hosts are on, and about a cluster that runs here and is not joined."""
        alive, resources = len(_nodes()), ray.cluster_resources()
        used = ray.get_runtime_context().gcs_address
        line = f"Ray at {used}: nodes {alive}, CPUs {resources.get('CPU', 0):g}, GPUs {resources.get('GPU', 0):g}"
        other = read_ray_address()  # what `ray start` wrote down here
        if other is None or other == used or not answers(other):
            return line
        return f"{line}; not the cluster at {other}, which --hosts.address auto joins"

    def room(self, config: HostsConfig) -> Room:
        """For the hosts of a configuration. Raises ConfigError for GPUs that are not there and that nobody brings."""
        total_gpus, free_gpus = (of().get("GPU", 0.0) for of in (ray.cluster_resources, ray.available_resources))
        free_gpus += sum(share.num_gpus * len(hosts) for share, hosts in self._waiting.items())
        num_gpus = float(free_gpus >= 1) if config.num_gpus is None else config.num_gpus
        if num_gpus > free_gpus and config.max_hosts is None:
            raise ConfigError.of("hosts.num_gpus", num_gpus, f"at most the {free_gpus:g} GPUs that are free")
        cpus = [node.get("CPU", 0.0) for node in _nodes()]
        num_cpus = min(config.num_threads, max(cpus) or config.num_threads)
        if config.num_hosts is not None:
            num_cpus = min(num_cpus, sum(cpus) / config.num_hosts or num_cpus)
        share = Share(num_cpus, num_gpus, int((config.memory_gib or 0) * _GIB), config.num_threads)
        return Room(share, max(0.0, total_gpus - free_gpus), config)

    def start(self, config: HostsConfig) -> None:
        """Start the hosts that a simulation with this configuration will take. Does not wait for them."""
        room = self.room(config)
        self._waiting.setdefault(room.share, []).extend(new_host(room.share) for _ in range(room.num_hosts()))

    def take(self, share: Share) -> Any:
        """A host that waits, or a new one; those that wait with other shares would be in its way."""
        if self._waiting.get(share):
            return self._waiting[share].pop()
        self.end_waiting()
        return new_host(share)

    def give_back(self, host: Any, share: Share) -> None:
        """It has nothing to do any more."""
        host.let_go.remote()
        self._waiting.setdefault(share, []).append(host)

    def end_waiting(self) -> None:
        """Of all hosts that have nothing to do."""
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
            if address != "auto" and not answers(address):  # Ray would try for minutes
                raise ConfigError.of("hosts.address", address, f"{allowed}; nothing answers there")
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError as error:
                raise ConfigError.of("hosts.address", address, f"{allowed}; none was found here") from error
            return
        num_cores = len(os.sched_getaffinity(0))
        with _on_loopback():
            ray.init(
                address=LOCAL,  # without it, a stale cluster file would be tried first
                num_cpus=max(num_cores, num_cpus),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
            )


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """What is started here listens on the loopback address. Otherwise Ray puts an outer one in the place of 127.0.0.1,
    for the sake of other nodes, and listens on all interfaces."""
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def is_reached(node: str | None) -> bool:
    """Whether the node of this id is there; one that has just gone is in Ray's list for some more seconds."""
    known = {each["NodeID"]: each for each in ray.nodes() if each["Alive"]}
    if node not in known:
        return node is None
    return answers(f"{known[node]['NodeManagerAddress']}:{known[node]['NodeManagerPort']}")


def _nodes() -> list[dict[str, float]]:
    """What each node that is there has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
