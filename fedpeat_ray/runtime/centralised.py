"""The centralised reference: what an algorithm trains, tuned in one place on all private text and as many tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable

from torch import Tensor, nn

from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.algorithms.algorithm import Reference
from fedpeat_ray.config import LocalConfig, SimulationConfig
from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.files import kept_sha256, user_cache_dir, written_with_hash
from fedpeat_ray.models.arithmetic import arithmetic_key
from fedpeat_ray.records import ClientTask, TextBatch
from fedpeat_ray.training.client_batch import build_optimizer
from fedpeat_ray.training.map_clients import MapClients, Where, split

BATCH_SIZE = 8  # sequences a step: small enough for many steps, large enough to be efficient
PART_SIZE = 4  # sequences of a step that one host has at a time: of 2 each takes a third longer


def tune_centrally(
    reference: Reference,
    data: ClientData,
    config: SimulationConfig,
    num_tokens: int,
    map_clients: MapClients,
    judge: Callable[[Tensor], float],
    say: Callable[[str], None],
) -> float:
    """Held-out perplexity, by `judge(adapter_P)`, of one that has everything and trains on `num_tokens` tokens.

    The device's optimizer and learning rate, BATCH_SIZE sequences a step, one optimizer state throughout.
    With few tokens it may end worse than federated training, which takes more and smaller steps in parallel.
    Cached by all it depends on; `say` hears of it only if there is something to be done.
    """
    adapter = reference.adapter
    key = [*reference.key, adapter.kind, adapter.layout.names, config.foundation.dtype, data.corpus.digest]
    key += [num_tokens, BATCH_SIZE, PART_SIZE, config.foundation.num_shards > 1]  # shards train in the exact type
    key += [arithmetic_key()]
    parts = (config.seed, config.lora, config.local, config.evaluation)
    key += [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    path = user_cache_dir() / f"centralised-{digest[:16]}.json"
    if kept_sha256(path):
        return json.loads(path.read_text())["perplexity"]
    say("tuning centrally, for comparison")
    num_steps = max(1, math.ceil(num_tokens / (BATCH_SIZE * config.local.sequence_length)))
    task = data.pooled_task(num_steps, BATCH_SIZE)
    start_P, local = adapter.init(config.seed), dataclasses.replace(config.local, prox_mu=0.0)
    if gradient := adapter.gradient():
        adapter_P = _step_by_step(gradient, start_P, task, local, map_clients, reference.where)
    else:
        adapter_P = _as_one_client(adapter.trainer(local), start_P, task, map_clients, reference.where)
    if adapter_P is None or not adapter_P.isfinite().all():  # it diverged
        return math.inf
    perplexity = judge(adapter_P)
    with written_with_hash(path) as part:
        part.write_text(json.dumps({"perplexity": perplexity}))
    return perplexity


def _step_by_step(
    gradient: Callable, start_P: Tensor, task: ClientTask, local: LocalConfig, map_clients: MapClients, where: Where
) -> Tensor | None:
    """Hosts share the sequences of each step; the mean of their gradients is the gradient of the step."""
    theta_P = nn.Parameter(start_P.clone())
    optimizer = build_optimizer(local, [theta_P])
    for tokens_BT, lengths_B in zip(task.tokens_SBT, task.lengths_SB, strict=True):
        rows = zip(split(tokens_BT, PART_SIZE), split(lengths_B, PART_SIZE), strict=True)
        parts = [TextBatch(*part) for part in rows if part[1].any()]
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
