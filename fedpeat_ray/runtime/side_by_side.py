"""Work on simulations side by side: each in a process of its own on this node, with its share of the hosts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedpeat_ray.config import HostsConfig
from fedpeat_ray.runtime.host_pool import HostPool, Room

Work = Callable[[Any, HostsConfig, Path], Any]


def side_by_side(pool: HostPool, config: HostsConfig, work: Work, on: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What comes of `work(what, hosts, folder)`, by name, as it ends; a line if its process is lost.

    Args:
        pool: whose waiting hosts end: they would be in the way.
        config: all the hosts that there may be.
        work: is done in another process; paths are seen from the folder.
        on: what it is done on, by name.
    """
    pool.end_waiting()
    room = pool.room(config)
    num_hosts = room.num_hosts(len(on))
    at_once = min(len(on), num_hosts)
    each = _share(room, num_hosts, at_once)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    num_cpus = room.share.num_cpus if each.backend == "serial" else 0
    process = ray.remote(work).options(num_cpus=num_cpus, max_retries=0, scheduling_strategy=here)
    waiting, running = list(on), {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                running[process.remote(on[name], each, Path.cwd())] = name
            (done,), _ = ray.wait(list(running))
            name = running.pop(done)
            try:
                result = ray.get(done)
            except RayError as error:
                result = str(error).splitlines()[0]
            yield name, result
    finally:
        for ref in running:
            ray.cancel(ref, force=True)


def _share(room: Room, num_hosts: int, at_once: int) -> HostsConfig:
    """The hosts of one of several simulations. A core for each on one node that stays alone: they compute in their own
    processes."""
    one_node = room.config.max_hosts is None and sum(node["Alive"] for node in ray.nodes()) == 1
    if one_node and at_once == num_hosts <= room.slots() and not room.share.num_gpus:
        return dataclasses.replace(room.config, backend="serial", num_hosts=None)
    if room.config.max_hosts is None:
        return dataclasses.replace(room.config, num_hosts=num_hosts // at_once)
    return dataclasses.replace(room.config, max_hosts=room.config.max_hosts // at_once)
