"""What a run would ask of devices, hosts and time, before it is run: from settings and a configuration of the model.

Rounds are gone through by the code that runs them (`Algorithm.settle`), but nobody trains. So what does not depend on
training is that of the run: who takes part, on which level, seconds, bytes, joules and memory.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedpeat_ray.aggregation.server_optimizer import ServerState
from fedpeat_ray.algorithms.algorithm import Given, level_group
from fedpeat_ray.algorithms.find import find_algorithm
from fedpeat_ray.config import LORA, LoraConfig, SimulationConfig
from fedpeat_ray.data.client_data import ServerData
from fedpeat_ray.data.corpus import NO_TEXT
from fedpeat_ray.errors import ConfigError, ModelError
from fedpeat_ray.fleet.costs import added_parameters, forward_flops, training_flops
from fedpeat_ray.fleet.fits import WHOLE_FLEET, Fits, fits
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models import weight_files
from fedpeat_ray.models.architecture import CAUSAL, Head
from fedpeat_ray.models.foundation import EMBEDDED, Foundation
from fedpeat_ray.models.sketch import KNOWN, sketched
from fedpeat_ray.records import COMPLETED, SKIPPED
from fedpeat_ray.runtime.calibration import Speed, measured_speed
from fedpeat_ray.runtime.rows import client_columns, round_row
from fedpeat_ray.runtime.trace import process_started_s
from fedpeat_ray.tasks.task import Task
from fedpeat_ray.trainable.lora import Lora, find_lora
from fedpeat_ray.trainable.shape import model_shape
from fedpeat_ray.world import World, described

_USUAL_BATCH = 8
SUMS = ("download_bytes", "emulator_bytes", "upload_bytes", "energy_j", "flops", "server_flops")
"""Of the rounds' columns, what adds up."""
RANKS = (1, 4, 16, 64)
"""Of LoRA, for the table of who has the memory for which."""


@dataclass(frozen=True)
class GivenSketch(Given):
    """What an algorithm is built from to be asked, and never to be run: models without weights, and no public text."""

    @classmethod
    def find(
        cls, name: str, training_dtype: str, field: str, head: Head = CAUSAL, pretrained: bool = True
    ) -> Foundation:
        """A model by its configuration."""
        return sketched(name, training_dtype, field, head)

    @classmethod
    def reader(cls, task: Task, name: str) -> Any:
        """The model's own, or where there is none an embedded one."""
        try:
            return super().reader(task, EMBEDDED[0] if name in KNOWN else name)
        except ModelError:
            return super().reader(task, EMBEDDED[0])

    @cached_property
    def model(self) -> PreTrainedModel:
        """Without memory for its parameters."""
        return foundations.empty(self.foundation.config_json, self.foundation.exact_dtype)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own, or where there is none an embedded one."""
        try:
            return foundations.load_tokenizer(self.foundation.config_dir)
        except ModelError:
            return foundations.load_tokenizer(foundations.model_dir(EMBEDDED[0]))

    def check_tokenizer(self) -> None:
        """That of another model knows other tokens."""

    def lora(self, config: LoraConfig) -> Lora:
        """Not tried on the model."""
        return find_lora(self.model, config)

    def public_text(self) -> ServerData:
        """None is read."""
        return ServerData(NO_TEXT, self.task)


def plan(config: SimulationConfig, num_rounds: int | None = None, calibrate: bool = True) -> dict[str, Any]:
    """What a run would ask for, in values for JSON; `docs/planning.md` says what each is.

    Args:
        config: settings of the run.
        num_rounds: rounds that are gone through and stand for the others; None: all.
        calibrate: measure how fast this machine trains, and say how long the run would take here.

    Raises ConfigError, DataError or ModelError as the run would, but not where no device could take part.
    """
    config.validate()
    find_algorithm(config.algorithm).check(config)
    if num_rounds is not None and num_rounds < 1:
        raise ConfigError.of("plan_rounds", num_rounds, "an integer of at least 1")
    started = time.perf_counter()
    world = described(config, Path(), GivenSketch)
    prepared_s = time.perf_counter() - started
    config = world.config
    rounds, columns = zip(*_rounds(world, min(num_rounds or config.rounds, config.rounds)), strict=True)
    clients = {name: np.concatenate([each[name] for each in columns]) for name in columns[0]}
    ranks = _ranks(world)
    return {
        "algorithm": config.algorithm,
        "model": _model(world),
        "fits": dataclasses.asdict(world.fits),
        "ranks": ranks and dataclasses.asdict(ranks),
        "tiers": by_tier(clients),
        "rounds": list(rounds),
        "run": _run(rounds, config.rounds),
        "hosts": _hosts(world),
        "wall": _wall(world, rounds, prepared_s) if calibrate else None,
    }


def _rounds(world: World, num_rounds: int) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """The row of each round, and the columns of its clients."""
    algorithm, conditions, now_s = world.algorithm, world.conditions, 0.0
    state = ServerState(torch.empty(0), {}, algorithm.memory())
    for round in range(1, num_rounds + 1):
        state, result = algorithm.settle(state, round, now_s, conditions, world.data.assignments)
        state = algorithm.learn(state, result, None)
        now_s += result.admission.round_s
        clients = client_columns(round, result, conditions.fleet, world.data.corpus)
        server = {"server_flops": result.server.flops, "server_memory_bytes": result.server.memory_bytes}
        done = np.where(clients["outcome"] == COMPLETED, clients["flops"], 0.0).sum()
        row = round_row(round, clients, now_s) | server | {"trained_flops": float(done)}
        del row["train_loss"]
        yield row, clients


def _ranks(world: World) -> Fits | None:
    config = world.config
    if LORA not in type(world.algorithm).uses(config):
        return None
    needs = {}
    for rank in sorted({*RANKS, config.lora.rank}):
        at_rank = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=rank))
        given = GivenSketch(at_rank, world.foundation, Path())
        needs[f"rank {rank}"] = min(type(world.algorithm).build(given).memory_needs().values())
    return fits(world.conditions.fleet, needs)


def by_tier(clients: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Means over the devices of each tier that were asked (of those that completed: seconds), and of all tiers."""
    tiers = [*dict.fromkeys(clients["tier"].tolist())]
    found: dict[str, dict[str, Any]] = {}
    for tier in (*sorted(tiers), WHOLE_FLEET):
        asked = (clients["outcome"] != SKIPPED) & ((clients["tier"] == tier) | (tier == WHOLE_FLEET))
        completed = asked & (clients["outcome"] == COMPLETED)
        found[tier] = {"num_asked": int(asked.sum()), "num_completed": int(completed.sum())}
        found[tier] |= {name: _mean(clients[name][completed]) for name in ("download_s", "compute_s", "upload_s")}
        found[tier] |= {name: _mean(clients[name][asked]) for name in ("download_bytes", "upload_bytes", "energy_j")}
    return found


def _mean(values: np.ndarray) -> float | None:
    return float(values.astype(float).mean()) if len(values) else None


def _model(world: World) -> dict[str, Any]:
    """The foundation, and what is trained and sent."""
    shape = model_shape(foundations.empty(world.foundation.config_json), world.config.fleet.weight_bytes)
    return {
        "name": world.foundation.name,
        "num_parameters": shape.num_parameters,
        "num_blocks": shape.num_blocks,
        "num_trained": world.algorithm.layout.num_elements,
        "payload_bytes": world.algorithm.layout.payload_bytes(),
    }


def _run(rounds: Sequence[Mapping[str, Any]], num_rounds: int) -> dict[str, float]:
    """Sums over all rounds; those that were not gone through are as these on average."""
    more = num_rounds / len(rounds)
    found = {name: float(sum(row[name] for row in rounds) * more) for name in SUMS}
    return {"num_rounds": num_rounds, "virtual_s": float(rounds[-1]["virtual_s"] * more), **found}


def _hosts(world: World) -> dict[str, Any]:
    """What a host holds: the exact weights, which all hosts of a machine share, those that are trained against if they
    are of another type, and what a client batch adds."""
    algorithm, config = world.algorithm, world.config
    exact_bytes = weight_files.num_bytes(world.held.shapes)
    narrow = torch.empty(0, dtype=getattr(torch, config.foundation.dtype)).element_size()
    wide = world.held.exact_dtype.itemsize
    own_bytes = 0 if narrow == wide else exact_bytes * narrow // wide
    levels = {level_group(level): level for level in range(1, algorithm.whole_level + 1)}
    step_bytes = max(
        need - algorithm.weights_bytes(levels.get(name)) for name, need in algorithm.memory_needs().items()
    )
    return {
        "num_hosts": _num_hosts(config),
        "shared_bytes": exact_bytes,
        "own_bytes": own_bytes,
        "client_batch_size": _client_batch_size(config),
        "batch_bytes": step_bytes * _client_batch_size(config),
        "driver_bytes": weight_files.num_bytes(world.foundation.shapes),
        "machine_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _num_hosts(config: SimulationConfig) -> int:
    """As many as this machine would have."""
    if config.hosts.backend == "serial":
        return 1
    return config.hosts.num_hosts or config.hosts.max_hosts or torch.cuda.device_count() or len(os.sched_getaffinity(0))


def _client_batch_size(config: SimulationConfig) -> int:
    """The setting; what is usually found where it is auto."""
    if config.client_batch_size != "auto":
        return config.client_batch_size
    return min(_USUAL_BATCH, math.ceil(config.cohort_size / _num_hosts(config)))


def _wall(world: World, rounds: Sequence[Mapping[str, Any]], prepared_s: float) -> dict[str, float]:
    """Seconds that the run would take here, by what it does; the evaluation at the end is exact, and of all levels."""
    loaded_s = time.time() - process_started_s() - prepared_s
    config, algorithm, num_hosts = world.config, world.algorithm, _num_hosts(world.config)
    speed = _speed(world)
    more, num_tokens = config.rounds / len(rounds), sum(row["num_tokens"] for row in rounds)
    shape, held = (model_shape(foundations.empty(each.config_json), 4) for each in (world.foundation, world.held))
    length = config.evaluation.sequence_length
    tokens = sum(task.num_tokens for task in world.heldout)
    steers = 2 * forward_flops(held, length) if world.held.config_json != world.foundation.config_json else 0.0
    whole, on_devices = tokens * (forward_flops(shape, length) + steers), tokens * forward_flops(held, length)
    num_judged = math.ceil(config.rounds / config.evaluation.every)
    a_round = (whole + bool(algorithm.levels) * on_devices) / speed.evaluation_flops_per_s
    at_the_end = 2 * (whole + len(algorithm.levels) * on_devices) / speed.exact_flops_per_s
    trained = added_parameters(held, algorithm.adapter.kind, algorithm.layout.num_elements)
    centrally = training_flops(held, num_tokens, config.local.sequence_length, algorithm.adapter.kind, trained)
    flops, server_flops = (sum(row[name] for row in rounds) for name in ("trained_flops", "server_flops"))
    processes = 1 + num_hosts if config.hosts.backend == "ray" else 1
    found = {
        "loading": loaded_s * max(1.0, processes / len(os.sched_getaffinity(0))) + prepared_s,
        "training": more * flops / speed.training_flops_per_s / num_hosts,
        "server": more * server_flops / speed.exact_flops_per_s,
        "evaluation": (num_judged * a_round + at_the_end) / num_hosts,
    }
    if config.evaluation.centralised:
        found["centralised"] = float(more * centrally) / speed.training_flops_per_s / num_hosts
    return found | {"total": sum(found.values())}


def _speed(world: World) -> Speed:
    """Of one host, with a client batch of the first round."""
    config, lora = world.config, dataclasses.replace(world.config.lora, blocks=())
    size = _client_batch_size(config) if world.algorithm.batches_clients else 1
    tasks = world.data.tasks(world.conditions.sample(1)[:size], round=1)
    kind = lora if world.algorithm.adapter.kind == "lora" else None
    return measured_speed(world.held, kind, config.local, world.task, tasks, world.heldout[0], config.hosts.num_threads)
