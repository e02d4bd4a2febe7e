"""The loop, visible: prepare, then for every round run, evaluate, log and checkpoint, then sum up."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeat_ray.aggregation.server_optimizer import ServerState
from fedpeat_ray.algorithms.fed_avg import FedAvg
from fedpeat_ray.algorithms.fed_peft import FedPEFT
from fedpeat_ray.algorithms.round_result import Algorithm
from fedpeat_ray.config import SimulationConfig, differences
from fedpeat_ray.config import get as config_get
from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.data.corpus import load_corpus
from fedpeat_ray.data.partition import Partition
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.fleet.conditions import Conditions, build_conditions
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.models.lora import Lora, find_lora
from fedpeat_ray.runtime.centralised import tune_centrally
from fedpeat_ray.runtime.checkpoint import Facts, load_checkpoint, save_checkpoint
from fedpeat_ray.runtime.knee import find_client_batch_size
from fedpeat_ray.runtime.process import process_settings
from fedpeat_ray.runtime.progress import Progress
from fedpeat_ray.runtime.rows import client_columns, round_row
from fedpeat_ray.runtime.run_log import RunLog, default_run_dir, read_config
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.training.client_batch import TrainClientBatch
from fedpeat_ray.training.evaluation import EvaluationTask, Score, ScoreSum, evaluation_tasks
from fedpeat_ray.training.map_clients import MapClients

ALL = "all"  # the group of held-out text that stands for the whole fleet
_DEVICES_PER_TIER = 8  # whose held-out text stands for their tier


class Simulation:
    """A federated run from a configuration; `run` does it and returns what summary.json holds."""

    def __init__(self, config: SimulationConfig):
        """Raises ConfigError for the first setting that cannot be used."""
        config.validate()
        self.config = _with_resumed(config) if config.resume else config
        self.directory: Path | None = None
        """The run directory, known once `run` has started."""

    def run(self) -> dict[str, Any]:
        """Run all rounds. Raises a FedPeatError, with nothing written, if something does not fit."""
        config, started, log = self.config, time.monotonic(), None
        directory = config.resume or config.out or default_run_dir(config.algorithm, config.seed)
        if not config.resume:
            RunLog.check_free(directory)

        def on_event(kind: str, **facts: Any) -> None:
            if log is not None:
                log.event(kind, **facts)

        before = load_checkpoint(config.resume) if config.resume else None
        with Progress(config.rounds, first_round=before[1].round + 1 if before else 1) as progress:
            progress.stage(f"loading {config.foundation.name} and {config.data.name}")
            world = prepare(config)
            progress.stage("starting hosts")
            with hosts(world, on_event) as (map_clients, num_hosts):
                if world.config.client_batch_size == "auto":
                    world = _with_measured_batch_size(world, map_clients, num_hosts, progress)
                log = _open_log(world, directory, num_hosts)
                self.directory = log.directory
                summary = _run(world, map_clients, log, progress)
        summary["wall_s"] = time.monotonic() - started
        log.write_summary(summary)
        return summary


@dataclass(frozen=True)
class World:
    """All that a run is made of, checked: nothing here can be refused any more."""

    config: SimulationConfig
    foundation: Foundation
    lora: Lora
    algorithm: Algorithm
    conditions: Conditions
    data: ClientData
    heldout: list[EvaluationTask]
    heldout_by_tier: list[EvaluationTask]


def prepare(config: SimulationConfig) -> World:
    """Load and check everything. Raises ConfigError, DataError or ModelError before any process is started."""
    if config.foundation.dtype == "auto":
        dtype = foundations.fast_training_dtype()
        config = dataclasses.replace(config, foundation=dataclasses.replace(config.foundation, dtype=dtype))
    conditions = build_conditions(config.fleet, config.seed, config.cohort_size, config.over_sample, config.deadline_s)
    foundation = foundations.prepare(config.foundation.name, config.foundation.dtype)
    model = foundations.load(foundation)
    for field in ("local.sequence_length", "evaluation.sequence_length"):
        if (length := config_get(config, field)) > (most := foundations.max_positions(model)):
            raise ConfigError.of(field, length, f"at most {most}, the positions of {config.foundation.name}")
    corpus = load_corpus(config.data, foundations.load_tokenizer(foundation.config_dir))
    partition = Partition(config.data.partition, corpus.group, corpus.heldout, config.seed)
    data = ClientData(corpus, partition, config.local, config.seed)
    lora = find_lora(model, config.lora)
    shape = foundations.model_shape(model, weight_bytes=4 if config.fleet.precision == "float32" else 2)
    if config.algorithm == "fed-avg":
        layout = foundations.weights_layout(model)
        algorithm: Algorithm = FedAvg(layout, shape, config.local, config.server, foundation)
    else:
        size = 1 if config.client_batch_size == "auto" else config.client_batch_size
        algorithm = FedPEFT(lora, shape, config.local, config.server, size, config.foundation.name)
    heldout = evaluation_tasks(ALL, *data.heldout(config.evaluation))
    by_tier = _heldout_by_tier(conditions, data, config)
    return World(config, foundation, lora, algorithm, conditions, data, heldout, by_tier)


@contextlib.contextmanager
def hosts(world: World, on_event: Any) -> Iterator[tuple[MapClients, int]]:
    """The configured side of the seam, and how many hosts it has."""
    config = world.config.hosts
    if config.backend == "ray":
        from fedpeat_ray.runtime.ray_hosts import ExclusiveHosts, RayHosts  # Ray is loaded only where it is used

        if config.exclusive:
            ray_hosts = ExclusiveHosts(config, world.foundation, on_event, world.conditions.fleet)
        else:
            ray_hosts = RayHosts(config, world.foundation, on_event)
        with ray_hosts:
            yield ray_hosts, ray_hosts.num_hosts
    else:
        with process_settings(config.num_threads):
            yield Serial(foundations.load_backbone(world.foundation)), 1


def _run(world: World, map_clients: MapClients, log: RunLog, progress: Progress) -> dict[str, Any]:
    """Everything from the first evaluation to the summary."""
    config, algorithm = world.config, world.algorithm
    state, facts = load_checkpoint(log.directory) or (None, None)
    if state is None or facts is None:
        progress.stage("measuring zero-shot")
        state = algorithm.init(config.seed)
        zero_shot = evaluate(world, map_clients, state, world.heldout + world.heldout_by_tier)
        facts = Facts(0, 0.0, 0, {group: dataclasses.asdict(score) for group, score in zero_shot.items()})
        save_checkpoint(log.directory, state, facts)
    log.truncate_after(facts.round)

    for round in range(facts.round + 1, config.rounds + 1):
        started = time.monotonic()
        state, result = algorithm.run_round(state, round, facts.virtual_s, world.conditions, world.data, map_clients)
        trained = time.monotonic()
        clients = client_columns(round, result, world.conditions.fleet)
        row = round_row(clients, facts.virtual_s + result.admission.round_s)
        score = None
        if round % config.evaluation.every == 0 or round == config.rounds:
            score = evaluate(world, map_clients, state, world.heldout)[ALL]
        row |= {
            "perplexity": score and score.perplexity,
            "token_accuracy": score and score.token_accuracy,
            "wall_train_s": trained - started,
            "wall_eval_s": time.monotonic() - trained,
            "wall_s": time.monotonic() - started,
        }
        log.write_round(round, row, clients)
        for report in result.reports:
            if report.failure:
                log.event(report.failure, round=round, device_id=report.device_id)
        facts = Facts(round, row["virtual_s"], facts.num_tokens + row["num_tokens"], facts.zero_shot)
        if round % config.checkpoint_every == 0 or round == config.rounds:
            save_checkpoint(log.directory, state, facts)
        progress.round(row)
    return _finish(world, map_clients, log, progress, state, facts)


def _finish(
    world: World, map_clients: MapClients, log: RunLog, progress: Progress, state: ServerState, facts: Facts
) -> dict[str, Any]:
    """Save the model, judge it by tier and against centralised tuning, and sum up the log."""
    config = world.config
    world.algorithm.save(log.directory / "adapter", state.model_P)
    progress.stage("evaluating by tier")
    tuned = evaluate(world, map_clients, state, world.heldout + world.heldout_by_tier)
    zero_shot = {group: Score(**values) for group, values in facts.zero_shot.items()}
    upper_bound = None
    if config.evaluation.upper_bound and facts.num_tokens:
        progress.stage("tuning centrally, for comparison")
        upper_bound = tune_centrally(
            world.foundation, world.data, world.lora, config, facts.num_tokens, map_clients, world.heldout
        )
    perplexity = {"zero_shot": zero_shot[ALL].perplexity, "tuned": tuned[ALL].perplexity, "upper_bound": upper_bound}
    return {
        "algorithm": config.algorithm,
        "rounds": config.rounds,
        "adapter_sha256": world.algorithm.layout.sha256(state.model_P),
        **log.totals(),
        "virtual_s": facts.virtual_s,
        "num_tokens": facts.num_tokens,
        "perplexity": perplexity,
        "gap_closed": gap_closed(**perplexity),
        "token_accuracy": {"zero_shot": zero_shot[ALL].token_accuracy, "tuned": tuned[ALL].token_accuracy},
        "perplexity_by_tier": {
            tier: {"zero_shot": zero_shot[tier].perplexity, "tuned": tuned[tier].perplexity}
            for tier in tuned
            if tier != ALL
        },
    }


def evaluate(
    world: World, map_clients: MapClients, state: ServerState, tasks: list[EvaluationTask]
) -> dict[str, Score]:
    """Scores by group of the current model, worked out on the hosts."""
    scores, _ = map_clients(world.algorithm.evaluator(), state.model_P, tasks, ScoreSum())
    return scores.result()


def gap_closed(zero_shot: float, tuned: float, upper_bound: float | None) -> float | None:
    """Share of the way from zero-shot to centralised tuning, in perplexity; None where there is no way to go."""
    if upper_bound is None or upper_bound >= zero_shot:
        return None
    return (zero_shot - tuned) / (zero_shot - upper_bound)


def _heldout_by_tier(conditions: Conditions, data: ClientData, config: SimulationConfig) -> list[EvaluationTask]:
    """Held-out text of the first devices of each tier; a tier without devices has none."""
    tasks: list[EvaluationTask] = []
    if config.evaluation.num_sequences_per_tier:
        for tier, name in enumerate(conditions.fleet.tier_names):
            device_ids = np.flatnonzero(conditions.fleet.tier == tier)[:_DEVICES_PER_TIER]
            if len(device_ids):
                tasks += evaluation_tasks(name, *data.heldout_of(device_ids, config.evaluation))
    return tasks


def _with_measured_batch_size(world: World, map_clients: MapClients, num_hosts: int, progress: Progress) -> World:
    """The world with a client batch size in place of auto. FedAvg trains clients one after another."""
    config, algorithm, size = world.config, world.algorithm, 1
    if isinstance(algorithm, FedPEFT) and not config.hosts.exclusive:
        progress.stage("measuring client batch sizes")
        tasks = world.data.tasks(world.conditions.sample(1), round=1)
        train = TrainClientBatch(algorithm.lora, config.local)
        start_P = algorithm.init(config.seed).model_P
        size = find_client_batch_size(map_clients, num_hosts, train, start_P, tasks, config.cohort_size)
        algorithm = dataclasses.replace(algorithm, client_batch_size=size)
    config = dataclasses.replace(config, client_batch_size=size)
    return dataclasses.replace(world, config=config, algorithm=algorithm)


def _open_log(world: World, directory: Path, num_hosts: int) -> RunLog:
    """A new run directory, or the one to go on with."""
    settings = dataclasses.replace(world.config, out=None, resume=None).to_dict()  # the directory may be moved
    if world.config.resume:
        return RunLog.resume(world.config.resume, settings)
    resolved = {
        "num_hosts": num_hosts,
        "tiers": world.conditions.fleet.tier_names,
        "foundation_sha256": world.foundation.digest,
        "num_trained_elements": world.algorithm.layout.num_elements,
        "payload_bytes": world.algorithm.layout.payload_bytes(),
    }
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return RunLog.create(directory, settings, resolved, data_digest=world.data.corpus.digest, gpus=gpus)


_MAY_CHANGE = ("out", "resume", "rounds", "checkpoint_every", "hosts")
_MUST_STAY = ("hosts.num_threads", "hosts.exclusive")  # the last bits depend on them


def _with_resumed(config: SimulationConfig) -> SimulationConfig:
    """The configuration of the run to go on with; only what cannot change its results may differ.

    Raises ConfigError for the first setting that differs, RunDirError if the directory holds no run.
    """
    assert config.resume is not None
    stored = SimulationConfig.from_dict(read_config(config.resume)["config"])
    for path, was, now in differences(stored, config):
        may_change = path.split(".")[0] in _MAY_CHANGE and path not in _MUST_STAY
        if not may_change and now != "auto":
            raise ConfigError.of(path, now, f"{was!r}, as in the run that is resumed, {config.resume}")
    kept = {name: getattr(config, name) for name in _MAY_CHANGE}
    merged = dataclasses.replace(stored, **kept)
    checkpoint = load_checkpoint(config.resume)
    if checkpoint and checkpoint[1].round > config.rounds:
        raise ConfigError.of("rounds", config.rounds, f"at least {checkpoint[1].round}, which {config.resume} has done")
    return merged
