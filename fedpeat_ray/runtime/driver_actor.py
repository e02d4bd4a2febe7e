"""The actor that drives the ranks of a sharded foundation: it loads nothing heavy, and what ranks return stays away."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedpeat_ray.errors import ConfigError, DriverLostError
from fedpeat_ray.loading import loading

RESUME = "the run can be resumed from its last checkpoint"
_LOOPBACK = "127.0.0.1"
_M_TOP_PAD, _M_MMAP_THRESHOLD = -2, -3  # malloc.h
_PLACED_S = 60.0
_STUCK_S = 20.0  # after an error of one rank; those that had it too have raised it by then


class Rank:
    """The actor of one rank (see foundation_driver)."""

    def __init__(self, index: int, num_shards: int, num_threads: int):
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # read when PyTorch is loaded
        _keep_no_freed_memory()
        with loading():
            from fedpeat_ray.runtime.foundation_driver import Shard
        self._shard = Shard(index, num_shards, num_threads)

    def do(self, method: str, *arguments: Any) -> tuple[Any, None]:
        """Call a method of the shard; returns what it returned, and a sign that it did."""
        return getattr(self._shard, method)(*arguments), None


class FoundationDriver:
    """The actor that starts the ranks, has all of them do the same thing, and ends them when one is lost."""

    def __init__(self, num_shards: int, num_gpus: float, num_threads: int):
        # cores are not reserved: ranks and hosts take turns
        self._actor = ray.remote(num_cpus=0, num_gpus=num_gpus)(Rank)
        self._arguments = (num_shards, num_threads)
        self._num_gpus = num_gpus
        self._ranks: list[Any] = []
        self._lost: DriverLostError | None = None

    def start(self, shard_bytes: int, what: Sequence[ray.ObjectRef]) -> None:
        """Start the ranks and have them fill the model: `what` is the foundation, and its file as it was sent if rank 0
        cannot see it.

        Raises ConfigError if the cluster has no room for them.
        """
        bundle = {"memory": shard_bytes, "GPU": self._num_gpus}
        num_shards, _ = self._arguments
        group = placement_group([{name: amount for name, amount in bundle.items() if amount}] * num_shards)
        if not group.wait(_PLACED_S):
            allowed = f"the cluster must have {shard_bytes} bytes and {self._num_gpus:g} GPUs free for each"
            raise ConfigError.of("foundation.num_shards", num_shards, allowed)
        for index in range(num_shards):
            place = PlacementGroupSchedulingStrategy(group, index)
            self._ranks.append(self._actor.options(scheduling_strategy=place).remote(index, *self._arguments))
        nodes = ray.get(self._each(self._ranks, "address"))
        host = nodes[0] if len(set(nodes)) > 1 else _LOOPBACK
        (address,) = ray.get(self._each(self._ranks[:1], "open_store", host))
        self._each(self._ranks, "build", *what, *address)

    def call(self, method: str, arguments: Sequence[ray.ObjectRef] = ()) -> list[ray.ObjectRef]:
        """What this method of every rank returns. Raises what it raises, or DriverLostError."""
        return self._each(self._ranks, method, *arguments)

    def _each(self, ranks: Sequence[Any], method: str, *arguments: Any) -> list[ray.ObjectRef]:
        if self._lost:
            raise self._lost
        returned = [rank.do.options(num_returns=2).remote(method, *arguments) for rank in ranks]
        results, signs = ([refs[i] for refs in returned] for i in (0, 1))
        running, errors, timeout = signs, {}, None
        while running:
            done, running = ray.wait(running, timeout=timeout)
            if not done:
                break
            try:
                ray.get(done)
            except RayActorError as error:
                reason = str(error).splitlines()[0]
                raise self._end(signs.index(done[0]), reason) from error
            except RayTaskError as error:
                errors[signs.index(done[0])], timeout = error, _STUCK_S
        if running:  # it waits in a collective for one that failed
            self._end(signs.index(running[0]), f"it did not come to the error of rank {min(errors)}")
        if errors:
            first = errors[min(errors)]
            raise first.cause from first  # with the rank's traceback
        return results

    def _end(self, index: int, reason: str) -> DriverLostError:
        for rank in self._ranks:
            ray.kill(rank)
        self._lost = DriverLostError(
            f"rank {index} of the {len(self._ranks)} that hold the foundation is lost ({reason.rstrip('.')}); {RESUME}"
        )
        return self._lost


def _keep_no_freed_memory() -> None:
    """Layers come and go: on a heap that keeps what is freed they would leave holes larger than the whole model.

    Not by glibc's environment variables: actors that have some wait for an agent of Ray's, seconds after it starts.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, 2**20)
        mallopt(_M_TOP_PAD, 2**17)
