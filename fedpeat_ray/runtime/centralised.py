"""The centralised reference: what an algorithm trains, tuned in one place on all private text and as many tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.algorithms.algorithm import Reference
from fedpeat_ray.config import LocalConfig, SimulationConfig
from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.files import kept_sha256, user_cache_dir, written_with_hash
from fedpeat_ray.models.arithmetic import arithmetic_key
from fedpeat_ray.records import ClientTask
from fedpeat_ray.tasks.score import Score
from fedpeat_ray.training.client_batch import build_optimizer
from fedpeat_ray.training.map_clients import MapClients, Where

_VERSION = 2  # of what is cached
BATCH_SIZE = 8  # sequences a step: small enough for many steps, large enough to be efficient
DIVERGED = Score(math.inf, 0, 1)
PART_SIZE = 4  # sequences of a step that one host has at a time: of 2 each takes a third longer


def tune_centrally(
    reference: Reference,
    data: ClientData,
    config: SimulationConfig,
    num_tokens: int,
    map_clients: MapClients,
    judge: Callable[[Tensor], Score],
    say: Callable[[str], None],
) -> Score:
    """The held-out score, by `judge(adapter_P)`, of one that has everything and trains on `num_tokens` tokens.

    The device's optimizer and learning rate, BATCH_SIZE sequences a step, one optimizer state throughout.
    With few tokens it may end worse than federated training, which takes more and smaller steps in parallel.
    Cached by all it depends on; `say` hears of it only if there is something to be done.
    """
    adapter = reference.adapter
    key = [*reference.key, adapter.kind, adapter.layout.names, config.foundation.dtype, data.corpus.digest]
    key += [num_tokens, BATCH_SIZE, PART_SIZE, config.foundation.num_shards > 1]  # shards train in the exact type
    key += [arithmetic_key(), repr(adapter.task), _VERSION]
    parts = (config.seed, config.lora, config.local, config.evaluation)
    key += [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    path = user_cache_dir() / f"centralised-{digest[:16]}.json"
    if kept_sha256(path):
        values = json.loads(path.read_text())
        return Score(**values | {"counts": values["counts"] and np.array(values["counts"])})
    say("tuning centrally, for comparison")
    num_steps = max(1, math.ceil(num_tokens / (BATCH_SIZE * config.local.sequence_length)))
    task = data.pooled_task(num_steps, BATCH_SIZE)
    start_P, local = adapter.init(config.seed), dataclasses.replace(config.local, prox_mu=0.0)
    if gradient := adapter.gradient():
        adapter_P = _step_by_step(gradient, start_P, task, local, map_clients, reference.where)
    else:
        adapter_P = _as_one_client(adapter.trainer(local), start_P, task, map_clients, reference.where)
    if adapter_P is None or not adapter_P.isfinite().all():  # it diverged
        return DIVERGED
    score = judge(adapter_P)
    with written_with_hash(path) as part:
        values = dataclasses.asdict(score) | {"counts": None if score.counts is None else score.counts.tolist()}
        part.write_text(json.dumps(values))
    return score


def _step_by_step(
    gradient: Callable, start_P: Tensor, task: ClientTask, local: LocalConfig, map_clients: MapClients, where: Where
) -> Tensor | None:
    """Hosts share the sequences of each step; the mean of their gradients is the gradient of the step."""
    theta_P = nn.Parameter(start_P.clone())
    optimizer = build_optimizer(local, [theta_P])
    for step in range(task.num_steps):
        starts = range(0, BATCH_SIZE, PART_SIZE)
        rows = [{name: a[start : start + PART_SIZE] for name, a in task.step(step).items()} for start in starts]
        parts = [part for part in rows if part["lengths"].any()]
        mean, _ = map_clients(gradient, theta_P.detach(), parts, WeightedMean(), where=where)
        gradient_P = mean.result()
        if gradient_P is None:
            return None
        theta_P.grad = gradient_P.to(theta_P.dtype)
        optimizer.step()
    return theta_P.detach()


def _as_one_client(
    train: Callable, start_P: Tensor, task: ClientTask, map_clients: MapClients, where: Where
) -> Tensor | None:
    """Where gradients are too large to be sent in every step."""
    mean, _ = map_clients(train, start_P, [task], WeightedMean(), where=where)
    delta_P = mean.result()
    return None if delta_P is None else (start_P.double() + delta_P).to(start_P.dtype)
