"""The loop, visible: prepare, then for every round run, evaluate, log and checkpoint, then sum up."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedpeat_ray import own
from fedpeat_ray.aggregation.find import find_aggregator
from fedpeat_ray.aggregation.server_optimizer import ServerState
from fedpeat_ray.algorithms.algorithm import ALL, level_group
from fedpeat_ray.algorithms.find import find_algorithm
from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.data.corpus import Corpus
from fedpeat_ray.errors import RunDirError, RunFailedError
from fedpeat_ray.files import file_sha256, written_whole_dir
from fedpeat_ray.records import NO_HOST
from fedpeat_ray.runtime import verdict
from fedpeat_ray.runtime.centralised import tune_centrally
from fedpeat_ray.runtime.checkpoint import Facts, load_checkpoint, save_checkpoint
from fedpeat_ray.runtime.metric import Metric
from fedpeat_ray.runtime.process import loaded, process_settings
from fedpeat_ray.runtime.progress import Progress, fits_table
from fedpeat_ray.runtime.resume import with_resumed
from fedpeat_ray.runtime.rows import client_columns, round_row
from fedpeat_ray.runtime.run_lock import only_writer
from fedpeat_ray.runtime.run_log import (
    ADAPTER,
    RunLog,
    check_inputs,
    default_run_dir,
    read_config,
)
from fedpeat_ray.runtime.trace import MAIN, Trace, process_started_s
from fedpeat_ray.runtime.watchers.watchers import Watchers, check_watchers, watchers_of
from fedpeat_ray.tasks.find import find_task
from fedpeat_ray.tasks.score import Score
from fedpeat_ray.tasks.task import Task
from fedpeat_ray.trainable.shape import memory_model
from fedpeat_ray.training.evaluation import ScoreSum
from fedpeat_ray.training.map_clients import MapClients
from fedpeat_ray.tuned import texts, tuned_model
from fedpeat_ray.world import World, driver_of, furnished, hosts, prepare, with_measured_batch_size

if TYPE_CHECKING:
    from fedpeat_ray.runtime.host_pool import HostPool


class Simulation:
    """A federated run from a configuration; `run` does it and returns what summary.json holds."""

    def __init__(
        self,
        config: SimulationConfig,
        *,
        algorithm: type | None = None,
        controller: type | None = None,
        aggregator: Callable | None = None,
        dataset: Callable | None = None,
        task: type | None = None,
    ):
        """What is given beside the configuration takes the place of `algorithm`, `control.kind`, `server.aggregator`,
        `data.name` and `task` in it. Raises ConfigError for the first setting that cannot be used."""
        config = _with_own(config, algorithm, controller, aggregator, dataset, task)
        config.validate()
        find_task(config.task)
        find_algorithm(config.algorithm).check(config)
        find_aggregator(config.server.aggregator)
        check_watchers(config.watch)
        out, resume = (path and path.absolute() for path in (config.out, config.resume))  # workers are elsewhere
        config = dataclasses.replace(config, out=out, resume=resume)
        self.config = with_resumed(config) if config.resume else config
        self.directory: Path | None = None
        """The run directory, known once `run` has started."""

    def __repr__(self) -> str:
        config, directory = self.config, self.directory or self.config.resume or self.config.out
        about = f"{config.algorithm} on {config.foundation.name}, {config.rounds} rounds, seed {config.seed}"
        return f"<Simulation: {about}; {directory or 'not run yet'}>"

    def model(self) -> PreTrainedModel:
        """The tuned model, once the run is finished: what it tuned is merged into the weights. For FedPT the small
        one."""
        return tuned_model(self._finished())

    def generate(self, prompt: str, max_new_tokens: int = 60, temperature: float = 0.0, seed: int = 0) -> str:
        """How the tuned model goes on with a text, once the run is finished; for FedPT the large one, steered."""
        return [*texts(self._finished(), prompt, max_new_tokens, temperature, None, seed).values()][-1]

    def _finished(self) -> Path:
        if self.directory is None:
            raise RunDirError("this simulation has not been run")
        return self.directory

    def run(self, pool: HostPool | None = None) -> dict[str, Any]:
        """Run all rounds, on hosts from the pool if there is one. Raises a FedPeatError, with nothing written, if
        something does not fit; RunFailedError, with everything written, if nothing came out."""
        config, started, log, trace = self.config, time.monotonic(), None, Trace()
        trace.add(MAIN, "loading Python's modules", process_started_s(), time.time())
        directory = config.resume or config.out or default_run_dir(own.short(config.algorithm), config.seed)
        if not config.resume:
            RunLog.check_free(directory)

        early: list[tuple[str, dict[str, Any]]] = []  # before there is a log

        def on_event(kind: str, **facts: Any) -> None:
            if log is None:
                early.append((kind, facts))
            else:
                log.event(kind, **facts)
            if kind == NO_HOST:
                progress.warn("no host: waiting until the cluster has room for one")

        before, has_locks = None, True
        with contextlib.ExitStack() as stack:
            if config.resume:
                has_locks = stack.enter_context(only_writer(directory))
                config, before = with_resumed(config), load_checkpoint(directory)  # nobody changes them now
                started -= before[1].wall_s if before else 0.0
            stack.enter_context(process_settings(config.hosts.num_threads))
            if config.trace:
                stack.callback(trace.write, config.trace)
            first_round = before[1].round + 1 if before else 1
            metric = Metric(**_metric(find_task(config.task)))
            progress = stack.enter_context(Progress(config.rounds, first_round, trace=trace, metric=metric))
            for path, value, when in config.without_effect(_uses(config)):
                progress.warn(f"{path} = {value!r} has no effect here: it counts if {when}")
            progress.stage(f"loading {config.foundation.name} and {config.data.name}")
            world = prepare(config, directory)
            if config.resume:
                check_inputs(directory, read_config(directory), _inputs(world))
            _introduce(world, progress)
            if config.foundation.num_shards > 1:
                progress.stage(f"dividing {config.foundation.name} into {config.foundation.num_shards} shards")
            driver = stack.enter_context(driver_of(world, on_event))
            world = furnished(world, driver, progress)
            if config.resume:
                check_inputs(directory, read_config(directory), world.algorithm.made())
            if config.hosts.backend == "ray":
                progress.stage("starting hosts")
            map_clients, num_hosts = stack.enter_context(hosts(world, on_event, driver, trace, pool))
            if world.config.client_batch_size == "auto":
                world = with_measured_batch_size(world, map_clients, num_hosts, progress)
            if not config.resume:
                has_locks = stack.enter_context(only_writer(directory))
            log = _open_log(world, directory, num_hosts)
            for kind, facts in early:
                log.event(kind, **facts)
            self.directory = log.directory
            progress.say(f"run directory: {log.directory}")
            if not has_locks:
                progress.say("the file system has no locks: do not resume this run while it is going on")
            stack.enter_context(loaded())
            watchers = stack.enter_context(_watchers(config, log, first_round, progress))
            summary = _run(world, map_clients, log, watchers, progress, trace, started)
            summary |= {"warnings": verdict.warnings(summary), "failure": verdict.failure(summary)}
            for line in summary["warnings"]:
                log.event("warning", text=line)
            summary["wall_s"] = time.monotonic() - started
            log.write_summary(summary)
            watchers.summary(summary)
        if summary["failure"]:
            raise RunFailedError(summary["failure"], summary)
        return summary


def _with_own(
    config: SimulationConfig,
    algorithm: type | None,
    controller: type | None,
    aggregator: Callable | None,
    dataset: Callable | None,
    task: type | None,
) -> SimulationConfig:
    """The configuration that names what is given."""
    if task is not None:
        config = dataclasses.replace(config, task=own.given(task))
    if algorithm is not None:
        config = dataclasses.replace(config, algorithm=own.given(algorithm))
    if controller is not None:
        config = dataclasses.replace(config, control=dataclasses.replace(config.control, kind=own.given(controller)))
    if aggregator is not None:
        server = dataclasses.replace(config.server, aggregator=own.given(aggregator))
        config = dataclasses.replace(config, server=server)
    if dataset is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, name=own.given(dataset)))
    return config


def _uses(config: SimulationConfig) -> Collection[str]:
    return find_algorithm(config.algorithm).uses(config)


def _introduce(world: World, progress: Progress) -> None:
    """What is known of text and fleet before anything starts."""
    for side, corpus in world.corpora.items():
        if corpus.removed.total:
            progress.say(f"{side} text: {corpus.num_documents} documents; left out: {corpus.removed}")
    if caution := world.data.partition.caution:
        progress.warn(caution)
    progress.show(fits_table(world.fits))


def _run(
    world: World,
    map_clients: MapClients,
    log: RunLog,
    watchers: Watchers,
    progress: Progress,
    trace: Trace,
    run_started: float,
) -> dict[str, Any]:
    """Everything from the first evaluation to the summary; `run_started` on the monotonic clock, as if the parts of
    a resumed run had followed one another."""
    config, algorithm = world.config, world.algorithm
    state, facts = load_checkpoint(log.directory) or (None, None)
    if state is None or facts is None:
        state, facts = algorithm.init(config.seed), Facts(0, 0.0, 0)
        save_checkpoint(log.directory, state, facts.at(time.monotonic() - run_started))
    log.truncate_after(facts.round)

    for round in range(facts.round + 1, config.rounds + 1):
        started = time.monotonic()
        trace.begin(f"round {round}, training")
        state, result = algorithm.run_round(state, round, facts.virtual_s, world.conditions, world.data, map_clients)
        trained = time.monotonic()
        clients = client_columns(round, result, world.conditions.fleet, world.data.corpus)
        row = round_row(round, clients, facts.virtual_s + result.admission.round_s)
        scores: dict[str, Score] = {}
        trace.begin(f"round {round}, evaluation and log")
        if round % config.evaluation.every == 0 or round == config.rounds:
            scores = evaluate(world, map_clients, state, algorithm.levels[-1:], exact=False)
        score = scores.get(ALL)
        on_devices = scores[level_group(algorithm.levels[-1])] if scores and algorithm.levels else None
        row |= {
            "server_flops": result.server.flops,
            "server_memory_bytes": result.server.memory_bytes,
            "perplexity": score and score.perplexity,
            "device_perplexity": on_devices and on_devices.perplexity,
            "token_accuracy": score and score.token_accuracy,
            "metrics": world.task.metrics(score) if score else {},
            "device_metrics": world.task.metrics(on_devices) if on_devices else {},
            "figures": result.figures,
            "wall_train_s": trained - started,
            "wall_eval_s": time.monotonic() - trained,
            "wall_s": time.monotonic() - started,
        }
        log.write_round(round, row, clients)
        watchers.round(row, clients)
        for report in result.reports:
            if report.failure:
                log.event(report.failure, round=round, device_id=report.device_id)
        if result.refused:
            log.event("refused", round=round, what=result.refused, why="the server's state would be not finite")
        state = algorithm.learn(state, result, score.perplexity if score else None)
        facts = Facts(round, row["virtual_s"], facts.num_tokens + row["num_tokens"])
        if round % config.checkpoint_every == 0 or round == config.rounds:
            save_checkpoint(log.directory, state, facts.at(time.monotonic() - run_started))
        progress.round(row)
    return _finish(world, map_clients, log, progress, state, facts)


def _finish(
    world: World, map_clients: MapClients, log: RunLog, progress: Progress, state: ServerState, facts: Facts
) -> dict[str, Any]:
    """Save the model, judge it exactly, against what it was and against centralised tuning, and sum up the log."""
    config, levels = world.config, world.algorithm.levels
    with written_whole_dir(log.directory / ADAPTER) as part:
        world.algorithm.save(part, state.model_P)
    progress.stage("evaluating what came out")
    tuned = evaluate(world, map_clients, state, levels)
    progress.stage("evaluating zero-shot, for comparison")
    zero_shot = evaluate(world, map_clients, world.algorithm.init(config.seed), levels)
    centralised = None
    if config.evaluation.centralised and facts.num_tokens:

        def judge(model_P: Tensor) -> Score:
            return evaluate(world, map_clients, dataclasses.replace(state, model_P=model_P))[ALL]

        reference = world.algorithm.reference
        centralised = tune_centrally(
            reference, world.data, config, facts.num_tokens, map_clients, judge, progress.stage
        )
    task, scores = world.task, {"zero_shot": zero_shot[ALL], "tuned": tuned[ALL], "centralised": centralised}
    by_metric = _values(scores, lambda score: task.metrics(score)[task.metric])
    gap = gap_closed(**by_metric, higher_is_better=task.higher_is_better)
    scores |= world.algorithm.scores(zero_shot, tuned)
    return {
        "algorithm": config.algorithm,
        "task": config.task,
        "rounds": config.rounds,
        "adapter_sha256": world.algorithm.layout.sha256(state.model_P),
        **log.totals(),
        "virtual_s": facts.virtual_s,
        "num_tokens": facts.num_tokens,
        "perplexity": _values(scores, lambda score: score.perplexity),
        "metric": _metric(task),
        "scores": _values(scores, lambda score: task.metrics(score)[task.metric]),
        "gap_closed": gap,
        **world.algorithm.summary(zero_shot, tuned),
        "token_accuracy": {"zero_shot": zero_shot[ALL].token_accuracy, "tuned": tuned[ALL].token_accuracy},
        "metrics": {"zero_shot": task.metrics(zero_shot[ALL]), "tuned": task.metrics(tuned[ALL])},
    }


def _metric(task: Task) -> dict[str, Any]:
    """What config.json and summary.json say of the metric."""
    return {"name": task.metric, "higher_is_better": task.higher_is_better}


def _values(scores: Mapping[str, Any], value: Callable[[Score], float]) -> dict[str, Any]:
    """A number of each score, also of those by level."""
    return {
        name: _values(score, value) if isinstance(score, Mapping) else score and value(score)
        for name, score in scores.items()
    }


def evaluate(
    world: World, map_clients: MapClients, state: ServerState, levels: Sequence[int] = (), exact: bool = True
) -> dict[str, Score]:
    """Scores of the current model by group: of the foundation, where it lies, and on hosts of models on devices."""
    evaluator, total = world.algorithm.evaluator(state, exact), ScoreSum()
    total = total.merge(map_clients(evaluator, state.model_P, world.heldout, ScoreSum(), where="driver")[0])
    if levels:
        total = total.merge(map_clients(evaluator, state.model_P, world.heldout_by_level(levels), ScoreSum())[0])
    return total.result()


def gap_closed(
    zero_shot: float, tuned: float, centralised: float | None, higher_is_better: bool = False
) -> float | None:
    """Share of the way from zero-shot to centralised tuning, in the task's metric; None where that is no bound: it came
    no further than zero-shot, or not as far as federated tuning."""
    if centralised is None:
        return None
    sign = -1 if higher_is_better else 1
    whole, gone = sign * (zero_shot - centralised), sign * (zero_shot - tuned)
    return gone / whole if whole > 0 and gone <= whole else None


def _open_log(world: World, directory: Path, num_hosts: int) -> RunLog:
    """A new run directory, or the one to go on with."""
    hosts = dataclasses.replace(world.config.hosts, address=None)  # who goes on with it has another cluster
    config = dataclasses.replace(world.config, out=None, resume=None, accept_changes=False, trace=None, hosts=hosts)
    settings = config.to_dict()
    if world.config.resume:
        return RunLog.resume(world.config.resume, settings)
    inputs = _inputs(world)
    data_digest = inputs.pop("data_digest")
    resolved: dict[str, Any] = {
        "num_hosts": num_hosts,
        "tiers": world.conditions.fleet.tier_names,
        "metric": _metric(world.task),
        **inputs,
        "num_trained_elements": world.algorithm.layout.num_elements,
        "payload_bytes": world.algorithm.layout.payload_bytes(),
        "documents": {side: _documents(corpus) for side, corpus in world.corpora.items()},
        "fits": dataclasses.asdict(world.fits),
        "memory_model": memory_model(world.held.config_json, world.algorithm.adapter.kind),
        "fixed_length": world.fixed_length,
        "labels": world.data.corpus.label_names if world.task.head(world.data.corpus).labels else (),
        "algorithm": {"name": type(world.algorithm).__name__, "about": world.algorithm.about},
        **world.algorithm.facts(),
    }
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    log = RunLog.create(directory, settings, resolved, data_digest=data_digest, gpus=gpus)
    for side, corpus in world.corpora.items():
        if corpus.removed.total:
            log.event("documents_removed", side=side, **dataclasses.asdict(corpus.removed))
    for path, value, when in world.config.without_effect(_uses(world.config)):
        log.event("ignored_setting", setting=path, value=value, counts_if=when)
    if resolved["memory_model"] == "estimate":
        log.event("memory_estimated", model=world.held.name)
    return log


def _watchers(config: SimulationConfig, log: RunLog, first_round: int, progress: Progress) -> Watchers:
    """Those who watch, and what happens if one of them fails."""

    def failed(name: str, error: Exception) -> None:
        log.event("watcher_failed", watcher=name, error=repr(error))
        progress.warn(f"{name} is left out from here on: {error!r}")

    return watchers_of(config, log.directory, first_round, failed)


def _documents(corpus: Corpus) -> dict[str, Any]:
    """How many documents a side has, and how many were left out."""
    heldout = int(corpus.heldout.sum())
    removed = dataclasses.asdict(corpus.removed)
    return {"training": corpus.num_documents - heldout, "heldout": heldout, "removed": removed}


def _inputs(world: World) -> dict[str, str | None]:
    """Digests of what the rounds read, by their names in config.json; None where there is nothing of the kind."""
    tiers, availability = world.config.fleet.tiers, world.config.fleet.availability
    trace = availability.trace
    return {
        "data_digest": world.data.corpus.digest,
        "foundation_sha256": world.foundation.digest,
        "tiers_sha256": file_sha256(tiers) if tiers else None,
        "trace_sha256": file_sha256(trace) if trace and availability.kind == "trace" else None,
        **world.algorithm.digests(),
    }
