"""The upper reference: the same adapter tuned centrally on the foundation, on all private text and as many tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.files import kept_sha256, user_cache_dir, written_with_hash
from fedpeat_ray.models.arithmetic import arithmetic_key
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.training.adapters import Adapter
from fedpeat_ray.training.evaluation import EvaluationTask, ScoreSum
from fedpeat_ray.training.map_clients import MapClients

BATCH_SIZE = 8  # sequences a step: small enough for many steps, large enough to be efficient


def tune_centrally(
    foundation: Foundation,
    data: ClientData,
    adapter: Adapter,
    config: SimulationConfig,
    num_tokens: int,
    map_clients: MapClients,
    heldout: list[EvaluationTask],
) -> float:
    """Held-out perplexity of one client that has everything and trains on `num_tokens` tokens.

    The device's optimizer and learning rate, BATCH_SIZE sequences a step, one optimizer state
    throughout. Cached by all it depends on.
    """
    key = [adapter.kind, adapter.layout.names, foundation.digest, foundation.training_dtype, data.corpus.digest]
    key += [num_tokens, BATCH_SIZE, config.foundation.num_shards > 1]  # shards train in the exact type
    key += [arithmetic_key()]
    parts = (config.seed, config.lora, config.local, config.evaluation)
    key += [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    path = user_cache_dir() / f"centralised-{digest[:16]}.json"
    if kept_sha256(path):
        return json.loads(path.read_text())["perplexity"]
    num_steps = max(1, math.ceil(num_tokens / (BATCH_SIZE * config.local.sequence_length)))
    task = data.pooled_task(num_steps, BATCH_SIZE)
    start_P = adapter.init(config.seed)
    local = dataclasses.replace(config.local, prox_mu=0.0)
    mean, _ = map_clients(adapter.trainer(local), start_P, [task], WeightedMean(), where="driver")
    delta_P = mean.result()
    if delta_P is None:  # it diverged
        return math.inf
    adapter_P = (start_P.double() + delta_P).to(start_P.dtype)
    scores, _ = map_clients(adapter.evaluator(), adapter_P, heldout, ScoreSum(), where="driver")
    (score,) = scores.result().values()
    with written_with_hash(path) as part:
        part.write_text(json.dumps({"perplexity": score.perplexity}))
    return score.perplexity
