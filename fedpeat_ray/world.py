"""All that a run is made of, built from its configuration and checked: the loop starts from here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeat_ray.algorithms.algorithm import ALL, Algorithm, Given, level_group
from fedpeat_ray.algorithms.find import find_algorithm
from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.data.corpus import Corpus
from fedpeat_ray.data.partition import Partition
from fedpeat_ray.fleet.conditions import Conditions, build_conditions
from fedpeat_ray.fleet.fits import Fits, check_fits, fits
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.runtime.knee import MAX_SIZE, find_client_batch_size, remembered
from fedpeat_ray.runtime.process import process_settings
from fedpeat_ray.runtime.progress import Progress
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.runtime.trace import Trace
from fedpeat_ray.tasks.find import find_task
from fedpeat_ray.tasks.task import Task
from fedpeat_ray.training.evaluation import EvaluationTask, evaluation_tasks
from fedpeat_ray.training.map_clients import HostsAndDriver, MapClients

if TYPE_CHECKING:
    from fedpeat_ray.runtime.host_pool import HostPool


@dataclass(frozen=True)
class World:
    """All that a run is made of, checked: nothing here can be refused any more."""

    config: SimulationConfig
    foundation: Foundation
    algorithm: Algorithm
    conditions: Conditions
    data: ClientData
    heldout: list[EvaluationTask]
    fits: Fits
    """Which devices have the memory to take part."""
    fixed_length: int | None = None
    """Tokens of every example, where the model says it."""

    @property
    def task(self) -> Task:
        """What the model is tuned for."""
        return self.algorithm.adapter.task

    @property
    def held(self) -> Foundation:
        """What hosts load."""
        return self.algorithm.foundation

    @property
    def corpora(self) -> dict[str, Corpus]:
        """The text that the run reads, by side: private, and public if the algorithm asks for it."""
        public = self.algorithm.public
        return {"private": self.data.corpus} | ({"public": public.corpus} if public else {})

    def heldout_by_level(self, levels: Sequence[int]) -> list[EvaluationTask]:
        """The held-out text for models on devices."""
        return [
            dataclasses.replace(task, group=level_group(level), level=level)
            for level in levels
            for task in self.heldout
        ]


def prepare(config: SimulationConfig, directory: Path) -> World:
    """Load and check everything. Raises ConfigError, DataError or ModelError before any process is started."""
    world = described(config, directory)
    check_fits(world.fits, world.conditions.fleet, config.fleet.memory_scale)
    return world


def described(config: SimulationConfig, directory: Path, given_as: type[Given] = Given) -> World:
    """The same for a fleet in which perhaps nobody can take part; `given_as` says how much there is of the models."""
    kind = find_algorithm(config.algorithm)
    if config.foundation.dtype == "auto":
        dtype = foundations.fast_training_dtype()
        config = dataclasses.replace(config, foundation=dataclasses.replace(config.foundation, dtype=dtype))
    if config.local.learning_rate == "auto":
        local = dataclasses.replace(config.local, learning_rate=kind.learning_rate(config))
        config = dataclasses.replace(config, local=local)
    conditions = None
    if config.data.partition.kind != "natural":  # otherwise the text says how many devices there are
        config, conditions = _with_fleet(config, config.fleet.size)
    task, named = find_task(config.task), config.foundation
    reader = given_as.reader(task, named.name)
    task = task.reading(reader)
    corpus = task.load(config.data, reader)
    head = task.head(corpus)
    foundation = given_as.find(named.name, named.dtype, "foundation.name", head, named.pretrained)
    given = given_as(config, foundation, directory, task, bool(head.labels))
    fixed_length = task.fixed_length(given.model.config)
    config = _with_fixed_length(kind.with_numbers(given), fixed_length)
    kind.check(config)
    given = given.with_config(config)
    given.check_positions("local.sequence_length", "evaluation.sequence_length", of=config.foundation.name)
    given.check_tokenizer()
    partition = Partition(config.data.partition, corpus.group, corpus.heldout, config.seed)
    if conditions is None:
        config, conditions = _with_fleet(config, partition.num_devices(config.fleet.num_devices))
        given = given.with_config(config)
    data = ClientData(corpus, partition, config.local, config.seed, task)
    algorithm = kind.build(given)
    heldout = evaluation_tasks(ALL, data.heldout(config.evaluation))
    who_fits = fits(conditions.fleet, algorithm.memory_needs())
    return World(config, foundation, algorithm, conditions, data, heldout, who_fits, fixed_length)


def _with_fixed_length(config: SimulationConfig, length: int | None) -> SimulationConfig:
    """The configuration with the length that all examples have, where the model says it."""
    if length is None:
        return config
    local = dataclasses.replace(config.local, sequence_length=length)
    evaluation = dataclasses.replace(config.evaluation, sequence_length=length)
    distil = dataclasses.replace(config.emulator.distil, sequence_length=length)
    emulator = dataclasses.replace(config.emulator, distil=distil)
    return dataclasses.replace(config, local=local, evaluation=evaluation, emulator=emulator)


def _with_fleet(config: SimulationConfig, num_devices: int) -> tuple[SimulationConfig, Conditions]:
    """The configuration with so many devices, and them."""
    fleet = dataclasses.replace(config.fleet, num_devices=num_devices)
    fleet.check_has("cohort_size", config.cohort_size, config.data.partition)
    conditions = build_conditions(fleet, config.seed, config.cohort_size, config.over_sample, config.deadline_s)
    return dataclasses.replace(config, fleet=fleet), conditions


@contextlib.contextmanager
def driver_of(world: World, on_event: Callable[..., None]) -> Iterator[MapClients | None]:
    """The sharded foundation, if there is to be one."""
    config = world.config.foundation
    if config.num_shards == 1:
        yield None
        return
    from fedpeat_ray.runtime.foundation_driver import ShardedFoundation  # loads Ray and DeepSpeed

    hosts = world.config.hosts
    shards = (config.num_shards, config.num_gpus, on_event, hosts.num_threads, hosts.address)
    with ShardedFoundation(world.foundation, *shards) as driver:
        yield driver


def furnished(world: World, driver: Any, progress: Progress) -> World:
    """The world with what its algorithm makes before the first round, emulators for example."""
    with process_settings(world.config.hosts.num_threads):
        map_clients = driver or Serial(foundations.load_backbone(world.foundation))
        algorithm = world.algorithm.furnished(map_clients, driver and driver.export, progress.stage)
    return dataclasses.replace(world, algorithm=algorithm)


@contextlib.contextmanager
def hosts(
    world: World,
    on_event: Callable[..., None],
    driver: MapClients | None = None,
    trace: Trace | None = None,
    pool: HostPool | None = None,
) -> Iterator[tuple[MapClients, int]]:
    """The configured side of the seam, and how many hosts it has; the driver does its own part of the work. Hosts come
    from the pool, if there is one."""
    config = world.config.hosts
    large = world.foundation if driver is None and world.held is not world.foundation else None
    if config.backend == "ray":
        from fedpeat_ray.runtime.ray_hosts import ExclusiveHosts, RayHosts  # Ray is loaded only where it is used

        if config.exclusive:
            ray_hosts = ExclusiveHosts(
                config, world.held, on_event, world.conditions.fleet, world.algorithm.weights_bytes, large, trace, pool
            )
        else:
            ray_hosts = RayHosts(config, world.held, on_event, large, trace, pool)
        with ray_hosts:
            yield HostsAndDriver(ray_hosts, driver) if driver else ray_hosts, ray_hosts.num_hosts
    else:
        with process_settings(config.num_threads):
            serial = Serial(foundations.load_backbone(world.held), foundations.load_backbone(large) if large else None)
            yield HostsAndDriver(serial, driver) if driver else serial, 1


def with_measured_batch_size(world: World, map_clients: MapClients, num_hosts: int, progress: Progress) -> World:
    """The world with a client batch size in place of auto. Where they cannot be stacked, clients go one by one."""
    config, algorithm, size = world.config, world.algorithm, 1
    if algorithm.batches_clients and not config.hosts.exclusive:

        def find() -> int:
            progress.stage("measuring client batch sizes")
            level = algorithm.levels[-1] if algorithm.levels else None
            tasks = world.data.tasks(world.conditions.sample(1)[:MAX_SIZE], round=1)
            tasks = [dataclasses.replace(task, level=level) for task in tasks]
            state = algorithm.init(config.seed)
            train = algorithm.trainer(state)
            return find_client_batch_size(map_clients, num_hosts, train, state.model_P, tasks, config.cohort_size)

        training = (config.local.batch_size, config.local.sequence_length, config.local.optimizer)
        layout = (algorithm.layout.names, algorithm.layout.shapes, algorithm.memory_needs())
        work = (algorithm.foundation.config_json, config.foundation.dtype, layout, training)
        size = remembered((*work, config.cohort_size, num_hosts, config.hosts.num_threads), find)
        algorithm = algorithm.with_client_batch_size(size)
    config = dataclasses.replace(config, client_batch_size=size)
    return dataclasses.replace(world, config=config, algorithm=algorithm)
