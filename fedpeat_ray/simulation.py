"""The loop, visible: prepare, then for every round run, evaluate, log and checkpoint, then sum up."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from fedpeat_ray.aggregation.server_optimizer import ServerState
from fedpeat_ray.algorithms.fed_peat import FedPEAT
from fedpeat_ray.algorithms.fed_pt import FedPT
from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.models.shape import memory_model
from fedpeat_ray.runtime.centralised import tune_centrally
from fedpeat_ray.runtime.checkpoint import Facts, load_checkpoint, save_checkpoint
from fedpeat_ray.runtime.process import process_settings
from fedpeat_ray.runtime.progress import Progress
from fedpeat_ray.runtime.rows import client_columns, round_row
from fedpeat_ray.runtime.run_log import RunLog, default_run_dir, read_config
from fedpeat_ray.settings import differences
from fedpeat_ray.training.evaluation import EvaluationTask, Score, ScoreSum
from fedpeat_ray.training.map_clients import MapClients
from fedpeat_ray.world import (
    ALL,
    World,
    driver_of,
    hosts,
    level_group,
    prepare,
    with_emulators,
    with_measured_batch_size,
)


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
        with contextlib.ExitStack() as stack:
            stack.enter_context(process_settings(config.hosts.num_threads))
            progress = stack.enter_context(Progress(config.rounds, first_round=before[1].round + 1 if before else 1))
            progress.stage(f"loading {config.foundation.name} and {config.data.name}")
            world = prepare(config, directory)
            if config.foundation.num_shards > 1:
                progress.stage(f"dividing {config.foundation.name} into {config.foundation.num_shards} shards")
            driver = stack.enter_context(driver_of(world, on_event))
            world = with_emulators(world, driver, progress)
            progress.stage("starting hosts")
            map_clients, num_hosts = stack.enter_context(hosts(world, on_event, driver))
            if world.config.client_batch_size == "auto":
                world = with_measured_batch_size(world, map_clients, num_hosts, progress)
            log = _open_log(world, directory, num_hosts)
            self.directory = log.directory
            summary = _run(world, map_clients, log, progress)
        summary["wall_s"] = time.monotonic() - started
        log.write_summary(summary)
        return summary


def _run(world: World, map_clients: MapClients, log: RunLog, progress: Progress) -> dict[str, Any]:
    """Everything from the first evaluation to the summary."""
    config, algorithm = world.config, world.algorithm
    state, facts = load_checkpoint(log.directory) or (None, None)
    if state is None or facts is None:
        progress.stage("measuring zero-shot")
        state = algorithm.init(config.seed)
        tasks = world.heldout + world.heldout_by_tier + world.heldout_by_level(algorithm.levels)
        zero_shot = evaluate(world, map_clients, state, tasks)
        facts = Facts(0, 0.0, 0, {group: dataclasses.asdict(score) for group, score in zero_shot.items()})
        save_checkpoint(log.directory, state, facts)
    log.truncate_after(facts.round)

    for round in range(facts.round + 1, config.rounds + 1):
        started = time.monotonic()
        state, result = algorithm.run_round(state, round, facts.virtual_s, world.conditions, world.data, map_clients)
        trained = time.monotonic()
        clients = client_columns(round, result, world.conditions.fleet)
        row = round_row(round, clients, facts.virtual_s + result.admission.round_s)
        score = on_devices = None
        if round % config.evaluation.every == 0 or round == config.rounds:
            largest = algorithm.levels[-1:]
            scores = evaluate(world, map_clients, state, world.heldout + world.heldout_by_level(largest))
            score = scores[ALL]
            on_devices = scores[level_group(largest[0])].perplexity if largest else None
        row |= {
            "server_flops": result.server.flops,
            "server_memory_bytes": result.server.memory_bytes,
            "perplexity": score and score.perplexity,
            "device_perplexity": on_devices,
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
    levels = world.algorithm.levels
    tasks = world.heldout + world.heldout_by_tier + world.heldout_by_level(levels)
    tuned = evaluate(world, map_clients, state, tasks)
    zero_shot = {group: Score(**values) for group, values in facts.zero_shot.items()}
    upper_bound = None
    if config.evaluation.upper_bound and facts.num_tokens:
        progress.stage("tuning centrally, for comparison")
        upper_bound = tune_centrally(
            world.foundation, world.data, world.adapter, config, facts.num_tokens, map_clients, world.heldout
        )
    perplexity = {"zero_shot": zero_shot[ALL].perplexity, "tuned": tuned[ALL].perplexity, "upper_bound": upper_bound}
    gap = gap_closed(**perplexity)
    emulators = {}
    if isinstance(world.algorithm, FedPT):
        small = level_group(levels[0])
        perplexity |= {
            "small_zero_shot": zero_shot[small].perplexity,
            "small_tuned": tuned[small].perplexity,
            "proxy_tuned": tuned[ALL].perplexity,
        }
    elif levels:
        of_level = {str(level): level_group(level) for level in levels}
        perplexity |= {
            "plug_in": tuned[ALL].perplexity,
            "emulator_zero_shot": {level: zero_shot[group].perplexity for level, group in of_level.items()},
            "emulator_tuned": {level: tuned[group].perplexity for level, group in of_level.items()},
        }
        privacy_gap = tuned[level_group(levels[-1])].perplexity - tuned[ALL].perplexity
        emulators = {"privacy_gap": privacy_gap}
    return {
        "algorithm": config.algorithm,
        "rounds": config.rounds,
        "adapter_sha256": world.algorithm.layout.sha256(state.model_P),
        **log.totals(),
        "virtual_s": facts.virtual_s,
        "num_tokens": facts.num_tokens,
        "perplexity": perplexity,
        "gap_closed": gap,
        **emulators,
        "token_accuracy": {"zero_shot": zero_shot[ALL].token_accuracy, "tuned": tuned[ALL].token_accuracy},
        "perplexity_by_tier": {
            tier: {"zero_shot": zero_shot[tier].perplexity, "tuned": tuned[tier].perplexity}
            for tier in world.conditions.fleet.tier_names
            if tier in tuned
        },
    }


def evaluate(
    world: World, map_clients: MapClients, state: ServerState, tasks: list[EvaluationTask]
) -> dict[str, Score]:
    """Scores by group of the current model: of emulators on the hosts, of the foundation where it lies."""
    evaluator, total = world.algorithm.evaluator(state), ScoreSum()
    on_foundation = [task for task in tasks if task.level is None]
    on_emulators = [task for task in tasks if task.level is not None]
    if on_foundation:
        total = total.merge(map_clients(evaluator, state.model_P, on_foundation, ScoreSum(), where="driver")[0])
    if on_emulators:
        total = total.merge(map_clients(evaluator, state.model_P, on_emulators, ScoreSum())[0])
    return total.result()


def gap_closed(zero_shot: float, tuned: float, upper_bound: float | None) -> float | None:
    """Share of the way from zero-shot to centralised tuning, in perplexity; None where there is no way to go."""
    if upper_bound is None or upper_bound >= zero_shot:
        return None
    return (zero_shot - tuned) / (zero_shot - upper_bound)


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
        "memory_model": memory_model(world.held.config_json),
    }
    if isinstance(world.algorithm, FedPEAT):
        costs = world.algorithm.emulator_costs
        resolved["levels"] = [
            {
                "level": rung.level,
                "blocks": rung.blocks,
                "weights": rung.weights and rung.weights.name,
                "emulator_bytes": int(costs.emulator_bytes_L[rung.level - 1]),
                "memory_bytes": int(costs.memory_bytes_L[rung.level - 1]),
            }
            for rung in world.algorithm.ladder.rungs
        ]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    log = RunLog.create(directory, settings, resolved, data_digest=world.data.corpus.digest, gpus=gpus)
    if resolved["memory_model"] == "estimate":
        log.event("memory_estimated", model=world.held.name)
    return log


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
