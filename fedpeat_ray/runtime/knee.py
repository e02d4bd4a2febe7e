"""How many clients to train at once: the knee of throughput over batch size, measured on this machine.

Larger batches give larger matrix products, until they no longer fit a cache: past the knee it gets
slower again. The number found is written into config.json, and a rerun from there repeats it; it is remembered for the
next run of its kind on a machine of its kind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.files import kept_sha256, user_cache_dir, written_with_hash
from fedpeat_ray.models.arithmetic import arithmetic_key
from fedpeat_ray.records import ClientTask
from fedpeat_ray.training.map_clients import MapClients

WORTH_IT = 1.05  # a larger batch must be this much faster, as it takes more memory
MAX_SIZE = 512
_VERSION = 1  # of how it is found


def find_client_batch_size(
    map_clients: MapClients,
    num_hosts: int,
    train: Callable,
    start_P: Tensor,
    tasks: Sequence[ClientTask],
    cohort_size: int,
) -> int:
    """Double the batch until throughput stops growing; at most an even share of the cohort for each host.

    Two steps of the given tasks are timed at each size, on all hosts at once, after one to warm up.
    """
    limit = min(MAX_SIZE, math.ceil(cohort_size / num_hosts))
    size, best_size, best_rate = 1, 1, 0.0
    while size <= limit:
        probe = [_two_steps(tasks[i % len(tasks)]) for i in range(size * num_hosts)]
        walls_s = []
        for _ in range(2):
            started = time.perf_counter()
            map_clients(train, start_P, probe, WeightedMean(), size)
            walls_s.append(time.perf_counter() - started)
        rate = len(probe) / walls_s[-1]
        if rate < best_rate:
            break
        if rate > WORTH_IT * best_rate:
            best_size, best_rate = size, rate
        size *= 2
    return math.ceil(limit / math.ceil(limit / best_size))  # batches of like size


def remembered(what: Sequence[Any], find: Callable[[], int]) -> int:
    """The size that was found before for the same work on a machine like this, or else what `find` finds.

    `what` says the work, in values for JSON. A size that was found while the machine was busy is remembered, too:
    delete `client-batch-*.json` in the cache to have it found again.
    """
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    key = json.dumps([_VERSION, arithmetic_key(), platform.processor(), os.cpu_count(), gpus, *what])
    path = user_cache_dir() / f"client-batch-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if kept_sha256(path):
        return json.loads(path.read_text())["size"]
    size = find()
    with written_with_hash(path) as part:
        part.write_text(json.dumps({"size": size}))
    return size


def _two_steps(task: ClientTask) -> ClientTask:
    return dataclasses.replace(task, arrays={name: array[:2] for name, array in task.arrays.items()})
