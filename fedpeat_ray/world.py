"""All that a run is made of, built from its configuration and checked: the loop starts from here."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from fedpeat_ray.algorithms.fed_avg import FedAvg
from fedpeat_ray.algorithms.fed_peat import FedPEAT
from fedpeat_ray.algorithms.fed_peft import FedPEFT
from fedpeat_ray.algorithms.fed_pt import FedPT
from fedpeat_ray.algorithms.round_result import Algorithm
from fedpeat_ray.config import ControlConfig, SimulationConfig
from fedpeat_ray.control.fixed import Fixed
from fedpeat_ray.control.greedy import Greedy
from fedpeat_ray.control.plan import Controller
from fedpeat_ray.control.random import Random
from fedpeat_ray.data.client_data import ClientData, ServerData
from fedpeat_ray.data.corpus import Corpus, load_corpus
from fedpeat_ray.data.partition import Partition
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.files import file_sha256, user_cache_dir
from fedpeat_ray.fleet.conditions import Conditions, build_conditions
from fedpeat_ray.fleet.fits import Fits, check_fits, fits
from fedpeat_ray.fleet.memory import ModelShape
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models import weight_files
from fedpeat_ray.models.emulator import Ladder, block_number, build_ladder
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.models.lora import find_lora
from fedpeat_ray.models.proxy import check_vocabularies
from fedpeat_ray.models.shape import model_shape
from fedpeat_ray.models.traits import check_tokenizer, num_tokens
from fedpeat_ray.runtime.centralised import Reference
from fedpeat_ray.runtime.knee import MAX_SIZE, find_client_batch_size
from fedpeat_ray.runtime.process import process_settings
from fedpeat_ray.runtime.progress import Progress
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.settings import get
from fedpeat_ray.training.adapters import Adapter, LoraAdapter, WeightsAdapter, find_weights
from fedpeat_ray.training.costs import emulator_costs, proxy_step_costs, weight_bytes
from fedpeat_ray.training.distillation import SmallModel
from fedpeat_ray.training.emulator_workshop import Workshop
from fedpeat_ray.training.evaluation import EvaluationTask, evaluation_tasks
from fedpeat_ray.training.map_clients import HostsAndDriver, MapClients, Where
from fedpeat_ray.training.stacking import check_stacking

ALL = "all"  # the group of held-out text that stands for the whole fleet
_STEPS_A_LINE = 50  # of distillation, between two lines of progress


def level_group(level: int) -> str:
    """The group of held-out text that an emulator is judged by."""
    return f"level {level}"


@dataclass(frozen=True)
class World:
    """All that a run is made of, checked: nothing here can be refused any more."""

    config: SimulationConfig
    foundation: Foundation
    held: Foundation
    """What hosts load: the foundation, or with several shards the blocks of it that emulators have."""
    reference: Reference
    """What is tuned centrally, for comparison."""
    algorithm: Algorithm
    conditions: Conditions
    data: ClientData
    heldout: list[EvaluationTask]
    fits: Fits
    """Which devices have the memory to take part."""

    @property
    def corpora(self) -> dict[str, Corpus]:
        """The text that the run reads, by side: private, and public if the algorithm asks for it."""
        algorithm, public = self.algorithm, None
        if isinstance(algorithm, FedPT):
            algorithm, public = algorithm.on_small, algorithm.public
        if isinstance(algorithm, FedPEAT):
            public = public or algorithm.workshop.public
        return {"private": self.data.corpus} | ({"public": public.corpus} if public else {})

    def heldout_by_level(self, levels: Sequence[int]) -> list[EvaluationTask]:
        """The held-out text for emulators."""
        return [
            dataclasses.replace(task, group=level_group(level), level=level)
            for level in levels
            for task in self.heldout
        ]


def prepare(config: SimulationConfig, directory: Path) -> World:
    """Load and check everything. Raises ConfigError, DataError or ModelError before any process is started."""
    if config.foundation.dtype == "auto":
        dtype = foundations.fast_training_dtype()
        config = dataclasses.replace(config, foundation=dataclasses.replace(config.foundation, dtype=dtype))
    if config.local.learning_rate == "auto":
        local = dataclasses.replace(config.local, learning_rate=config.auto_learning_rate)
        config = dataclasses.replace(config, local=local)
    conditions = build_conditions(config.fleet, config.seed, config.cohort_size, config.over_sample, config.deadline_s)
    foundation = foundations.prepare(config.foundation.name, config.foundation.dtype)
    model = foundations.load(foundation)
    for field in ("local.sequence_length", "evaluation.sequence_length"):
        if (length := get(config, field)) > (most := foundations.max_positions(model)):
            raise ConfigError.of(field, length, f"at most {most}, the positions of {config.foundation.name}")
    tokenizer = foundations.load_tokenizer(foundation.config_dir)
    check_tokenizer(tokenizer, model, f"foundation.name = {config.foundation.name!r}")
    corpus = load_corpus(config.data, tokenizer)
    partition = Partition(config.data.partition, corpus.group, corpus.heldout, config.seed)
    data = ClientData(corpus, partition, config.local, config.seed)
    shape = model_shape(model, weight_bytes(config.fleet))
    reference_key: tuple[str, ...] = (foundation.digest,)
    where: Where = "driver"
    if config.algorithm == "fed-peat":
        algorithm: Algorithm = (peat := build_fed_peat(config, foundation, shape, directory))
        adapter = peat.adapter
    elif config.algorithm == "fed-pt":
        algorithm = (proxy := build_fed_pt(config, foundation, model, shape, directory))
        adapter, where = LoraAdapter(proxy.small.lora), "hosts"  # the small model, which then steers the foundation
        reference_key += (proxy.small.foundation.digest, str(config.proxy.alpha))
    elif config.algorithm == "fed-avg":
        layout = foundations.weights_layout(model)
        algorithm = FedAvg(layout, shape, config.local, config.server, foundation)
        adapter = WeightsAdapter("all", layout, foundation)
    else:
        lora, size = find_lora(model, config.lora), _first_batch_size(config)
        check_stacking(foundation, lora)
        algorithm = FedPEFT(lora, shape, config.local, config.server, size, config.foundation.name)
        adapter = LoraAdapter(lora)
    reference = Reference(adapter, where, reference_key)
    heldout = evaluation_tasks(ALL, *data.heldout(config.evaluation))
    who_fits = fits(conditions.fleet, memory_needs(algorithm))
    check_fits(who_fits, conditions.fleet, config.fleet.memory_scale)
    held = algorithm.small.foundation if isinstance(algorithm, FedPT) else foundation
    return World(config, foundation, held, reference, algorithm, conditions, data, heldout, who_fits)


def build_fed_peat(config: SimulationConfig, foundation: Foundation, shape: ModelShape, directory: Path) -> FedPEAT:
    """FedPEAT on evenly spread emulators with the foundation's own weights; `with_emulators` does the rest."""
    model, emulator = foundations.load(foundation), config.emulator
    ladder = build_ladder(model, emulator)
    if emulator.trained == "lora":
        blocks = config.lora.blocks or ladder.adapter_blocks
        if not set(blocks) & set(ladder.adapter_blocks):
            on_every_level = " ".join(map(str, ladder.adapter_blocks))
            raise ConfigError.of("lora.blocks", blocks, f"at least one block that every emulator has: {on_every_level}")
        lora = find_lora(model, dataclasses.replace(config.lora, blocks=blocks))
        check_stacking(foundation, lora)
        adapter: Adapter = LoraAdapter(lora)
    else:
        adapter = find_weights(model, emulator.trained, ladder, foundation)
    public = None
    if emulator.needs_public_text:
        tokenizer = foundations.load_tokenizer(foundation.config_dir)
        public = ServerData(load_corpus(config.data, tokenizer, public=True))
        if (length := emulator.distil.sequence_length) > (most := foundations.max_positions(model)):
            raise ConfigError.of("emulator.distil.sequence_length", length, f"at most {most}, the model's positions")
    workshop = Workshop(
        foundation,
        foundation.digest,
        emulator,
        adapter,
        public,
        config.data.public_name is None,
        directory / "emulators",
    )
    return FedPEAT(
        adapter=adapter,
        ladder=ladder,
        emulator_costs=emulator_costs(config, foundation, shape, ladder, adapter),
        controller=build_controller(config.control, config.seed),
        local=config.local,
        server=config.server,
        workshop=workshop,
        client_batch_size=_first_batch_size(config),
        seed=config.seed,
        base_model=config.foundation.name,
    )


def build_fed_pt(
    config: SimulationConfig, foundation: Foundation, large: PreTrainedModel, shape: ModelShape, directory: Path
) -> FedPT:
    """FedPT with FedPEFT, or FedPEAT, on the small model."""
    proxy = config.proxy
    foundation_of_small = foundations.prepare(proxy.small, config.foundation.dtype, field="proxy.small")
    small = foundations.load(foundation_of_small)
    tokenizer = foundations.load_tokenizer(foundation.config_dir)
    check_vocabularies(
        tokenizer,
        num_tokens(large),
        foundations.load_tokenizer(foundation_of_small.config_dir),
        num_tokens(small),
    )
    lengths = ("local.sequence_length", "evaluation.sequence_length", "proxy.sequence_length")
    for field in lengths if proxy.steps else lengths[:2]:
        most = min(foundations.max_positions(small), foundations.max_positions(large))
        if (length := get(config, field)) > most:
            raise ConfigError.of(field, length, f"at most {most}, the positions of both models")
    small_shape = model_shape(small, weight_bytes(config.fleet))
    lora, small_level = find_lora(small, config.lora), 1
    if proxy.emulators:
        on_small: Algorithm = (peat := build_fed_peat(config, foundation_of_small, small_shape, directory))
        assert isinstance(peat.adapter, LoraAdapter)
        lora, small_level = peat.adapter.lora, peat.ladder.top
    else:
        check_stacking(foundation_of_small, lora)
        size = _first_batch_size(config)
        on_small = FedPEFT(lora, small_shape, config.local, config.server, size, proxy.small)
    public = ServerData(load_corpus(config.data, tokenizer, public=True)) if proxy.steps else None
    costs = proxy_step_costs(proxy, shape, small_shape, lora)
    return FedPT(on_small, SmallModel(foundation_of_small, lora), small_level, proxy, public, costs, config.seed)


def memory_needs(algorithm: Algorithm) -> dict[str, int]:
    """Bytes that a device must have to take part: for each level it may get, or for the one model there is."""
    if isinstance(algorithm, FedPT):
        return memory_needs(algorithm.on_small)
    if isinstance(algorithm, FedPEAT):
        controller = algorithm.controller
        levels = (controller.level,) if isinstance(controller, Fixed) else algorithm.levels
        return {level_group(level): int(algorithm.emulator_costs.memory_bytes_L[level - 1]) for level in levels}
    assert isinstance(algorithm, FedAvg | FedPEFT)
    return {"model": int(algorithm.demand(np.zeros(1)).memory_bytes)}


def held_weights(world: World) -> Callable[[int | None], int]:
    """Bytes that the memory model counts for the weights on a device, by level."""
    algorithm = world.algorithm.on_small if isinstance(world.algorithm, FedPT) else world.algorithm
    if isinstance(algorithm, FedPEAT):
        weights_bytes_L = algorithm.emulator_costs.weights_bytes_L
        return lambda level: int(weights_bytes_L[(level or 0) - 1])
    assert isinstance(algorithm, FedAvg | FedPEFT)
    weights_bytes = algorithm.shape.num_parameters * algorithm.shape.weight_bytes
    return lambda level: weights_bytes


def build_controller(config: ControlConfig, seed: int) -> Controller:
    """The controller that the configuration names."""
    return {"fixed": Fixed(config.level), "random": Random(seed), "greedy": Greedy()}[config.kind]


@contextlib.contextmanager
def driver_of(world: World, on_event: Callable[..., None]) -> Iterator[MapClients | None]:
    """The sharded foundation, if there is to be one."""
    config = world.config.foundation
    if config.num_shards == 1:
        yield None
        return
    from fedpeat_ray.runtime.foundation_driver import ShardedFoundation  # loads Ray and DeepSpeed

    num_threads = world.config.hosts.num_threads
    with ShardedFoundation(world.foundation, config.num_shards, config.num_gpus, on_event, num_threads) as driver:
        yield driver


def with_emulators(world: World, driver: Any, progress: Progress) -> World:
    """The world with its final emulators: blocks chosen, weights distilled, and what hosts are to load."""
    algorithm = world.algorithm
    if not isinstance(algorithm, FedPEAT):
        return world
    config, workshop, ladder, held = world.config, algorithm.workshop, algorithm.ladder, world.held
    with process_settings(config.hosts.num_threads):
        map_clients = driver or Serial(foundations.load_backbone(world.foundation))
        ladder = workshop.choose(ladder, map_clients)
        if driver is not None:
            held = _exported(world.foundation, ladder, driver)
            workshop = dataclasses.replace(workshop, foundation=held)

        def on_step(step: int, num_steps: int) -> None:
            if step % _STEPS_A_LINE == 1:
                progress.stage(f"distilling emulators, {num_steps} steps: step {step}")

        ladder = workshop.furnish(ladder, map_clients, on_step)
    shape = model_shape(foundations.load(world.foundation), weight_bytes(config.fleet))
    costs = emulator_costs(config, world.foundation, shape, ladder, algorithm.adapter)
    algorithm = dataclasses.replace(algorithm, ladder=ladder, workshop=workshop, emulator_costs=costs)
    return dataclasses.replace(world, held=held, algorithm=algorithm)


def _exported(foundation: Foundation, ladder: Ladder, driver: Any) -> Foundation:
    """The blocks that emulators have, and what is around them, in a file of its own: gathered one by one."""
    kept = sorted({number for rung in ladder.rungs[:-1] for number in rung.blocks})
    names = [
        name
        for name in weight_files.shapes_of(foundation.weights)
        if (number := block_number(name, ladder.block_list)) is None or number in kept
    ]
    key = hashlib.sha256(f"{foundation.digest} {kept}".encode()).hexdigest()[:16]
    path = user_cache_dir() / f"held-{key}.safetensors"
    driver.export(path, names)
    digest = foundations.model_digest(file_sha256(path), foundation.config_json)
    return dataclasses.replace(foundation, weights=path, digest=digest, blocks=tuple(kept))


@contextlib.contextmanager
def hosts(
    world: World, on_event: Callable[..., None], driver: MapClients | None = None
) -> Iterator[tuple[MapClients, int]]:
    """The configured side of the seam, and how many hosts it has; the driver does its own part of the work."""
    config = world.config.hosts
    large = world.foundation if driver is None and world.held is not world.foundation else None
    if config.backend == "ray":
        from fedpeat_ray.runtime.ray_hosts import ExclusiveHosts, RayHosts  # Ray is loaded only where it is used

        if config.exclusive:
            ray_hosts = ExclusiveHosts(config, world.held, on_event, world.conditions.fleet, held_weights(world), large)
        else:
            ray_hosts = RayHosts(config, world.held, on_event, large)
        with ray_hosts:
            yield HostsAndDriver(ray_hosts, driver) if driver else ray_hosts, ray_hosts.num_hosts
    else:
        with process_settings(config.num_threads):
            serial = Serial(foundations.load_backbone(world.held), large and foundations.load_backbone(large))
            yield HostsAndDriver(serial, driver) if driver else serial, 1


def with_measured_batch_size(world: World, map_clients: MapClients, num_hosts: int, progress: Progress) -> World:
    """The world with a client batch size in place of auto. Where all weights are trained, clients go one by one."""
    config, algorithm, size = world.config, world.algorithm, 1
    if isinstance(world.reference.adapter, LoraAdapter) and not config.hosts.exclusive:
        progress.stage("measuring client batch sizes")
        level = algorithm.levels[-1] if algorithm.levels else None
        tasks = world.data.tasks(world.conditions.sample(1)[:MAX_SIZE], round=1)
        tasks = [dataclasses.replace(task, level=level) for task in tasks]
        state = algorithm.init(config.seed)
        train = algorithm.trainer(state)
        size = find_client_batch_size(map_clients, num_hosts, train, state.model_P, tasks, config.cohort_size)
        algorithm = _with_client_batch_size(algorithm, size)
    config = dataclasses.replace(config, client_batch_size=size)
    return dataclasses.replace(world, config=config, algorithm=algorithm)


def _with_client_batch_size(algorithm: Algorithm, size: int) -> Algorithm:
    if isinstance(algorithm, FedPT):
        return dataclasses.replace(algorithm, on_small=_with_client_batch_size(algorithm.on_small, size))
    assert isinstance(algorithm, FedPEAT | FedPEFT)
    return dataclasses.replace(algorithm, client_batch_size=size)


def _first_batch_size(config: SimulationConfig) -> int:
    """The client batch size, until it is measured."""
    return 1 if config.client_batch_size == "auto" else config.client_batch_size
