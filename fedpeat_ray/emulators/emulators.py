"""All emulators of one foundation: their ladder, what they cost, how they are made, and any work done on them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedpeat_ray.config import SHARES, EmulatorConfig, LoraConfig, SimulationConfig
from fedpeat_ray.data.client_data import ServerData
from fedpeat_ray.emulators.costs import emulator_costs
from fedpeat_ray.emulators.ladder import Ladder, block_number, build_ladder
from fedpeat_ray.emulators.on_emulators import OnEmulators
from fedpeat_ray.emulators.workshop import Workshop
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.files import file_sha256, user_cache_dir
from fedpeat_ray.fleet.levels import EmulatorCosts
from fedpeat_ray.fleet.memory import ModelShape
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.tasks.find import find_task
from fedpeat_ray.tasks.task import Task
from fedpeat_ray.trainable.find import with_head
from fedpeat_ray.trainable.lora import Lora
from fedpeat_ray.trainable.part import Part
from fedpeat_ray.trainable.weights import find_bias, find_head
from fedpeat_ray.training.adapters import Adapter, StackedAdapter, find_blocks
from fedpeat_ray.training.map_clients import MapClients

_STEPS_A_LINE = 50  # of distillation, between two lines of progress


@dataclass(frozen=True)
class Emulators:
    """The ladder with all that goes with it, for one adapter."""

    settings: SimulationConfig
    foundation: Foundation
    shape: ModelShape
    """Of the foundation."""
    adapter: Adapter
    ladder: Ladder
    workshop: Workshop

    @property
    def config(self) -> EmulatorConfig:
        """The settings of emulators."""
        return self.workshop.config

    @property
    def levels(self) -> range:
        """Those that devices may get."""
        return range(1, self.ladder.top + self.config.give_foundation)

    @cached_property
    def costs(self) -> EmulatorCosts:
        """What each level asks of devices, and the server's own work."""
        return emulator_costs(self.settings, self.foundation, self.shape, self.ladder, self.adapter)

    def made(self, map_clients: MapClients, export: Callable | None, say: Callable[[str], None]) -> Self:
        """The final ones: blocks chosen, weights distilled, and of a sharded foundation the blocks that hosts need."""
        workshop, ladder = self.workshop, self.workshop.choose(self.ladder, map_clients)
        if export is not None:
            workshop = dataclasses.replace(workshop, foundation=_exported(self.foundation, ladder, export))

        def on_step(step: int, num_steps: int) -> None:
            if step % _STEPS_A_LINE == 1:
                say(f"distilling emulators, {num_steps} steps: step {step}")

        return dataclasses.replace(self, ladder=workshop.furnish(ladder, map_clients, on_step), workshop=workshop)

    def on_levels(self, version: int, work: Callable[[Adapter], Callable], ages: Collection[int] = ()) -> OnEmulators:
        """Work on the emulator of each task's level, after so many re-alignments, or of one of these ages: `work(part
        of the adapter)` there."""
        ladder = self.workshop.version(self.ladder, version)
        stale = tuple((age, self.workshop.version(self.ladder, version - age)) for age in sorted(ages) if age)
        parts = [
            (work(ladder.part(self.adapter, level)), self._places(level)) for level in range(1, self.ladder.top + 1)
        ]
        return OnEmulators(ladder, work(self.adapter), tuple(parts), stale)

    def trained(self) -> dict[int, Tensor]:
        """Which elements (P,) of the adapter a device of each level trains: bool."""
        trained = {level: torch.zeros(self.adapter.layout.num_elements, dtype=torch.bool) for level in self.levels}
        for level, elements_P in trained.items():
            elements_P[self._places(level)] = True
        return trained

    def facts(self) -> list[dict[str, Any]]:
        """Of every level, for config.json."""
        return [
            {
                "level": rung.level,
                "blocks": rung.blocks,
                "weights": rung.weights and rung.weights.name,
                "weights_sha256": rung.weights and file_sha256(rung.weights),
                "emulator_bytes": int(self.costs.emulator_bytes_L[rung.level - 1]),
                "memory_bytes": int(self.costs.memory_bytes_L[rung.level - 1]),
            }
            for rung in self.ladder.rungs
        ]

    def digests(self) -> dict[str, str | None]:
        """What a resumed run must find as it was: blocks and weights by level."""
        rungs = self.ladder.rungs
        return {f"blocks of level {rung.level}": str(list(rung.blocks)) for rung in rungs} | {
            f"weights_sha256 of level {rung.level}": file_sha256(rung.weights) if rung.weights else None
            for rung in rungs
        }

    def _places(self, level: int) -> Tensor:
        return self.adapter.layout.part(self.ladder.part(self.adapter, level).layout.names)[1]


def build_emulators(
    config: SimulationConfig,
    foundation: Foundation,
    model: PreTrainedModel,
    shape: ModelShape,
    lora_of: Callable[[LoraConfig], Lora],
    task: Task,
    has_head: bool,
    public: ServerData | None,
    directory: Path,
) -> Emulators:
    """Evenly spread emulators with the foundation's own weights; `made` does the rest.

    Args:
        config: all settings.
        foundation: whose blocks are left out.
        model: the same, loaded.
        shape: the same, for memory and costs.
        lora_of: finds LoRA in it, and checks it.
        task: what it is tuned for.
        has_head: whether that put a head on the model, which is then trained too.
        public: text of the server, if the settings need it.
        directory: of re-aligned emulators.

    Raises ConfigError for blocks, shares or adapters that do not fit the model.
    """
    emulator, ladder = config.emulator, build_ladder(model, config.emulator)
    if emulator.trained == "blocks":
        head = find_head(model, foundation).layout if has_head else Layout((), ())
        blocks = (ladder.block_list, ladder.adapter_blocks)
        adapter: Adapter = find_blocks(model, *blocks, foundation, task, head)
    else:
        part = _part(config, ladder, model, foundation, lora_of)
        adapter = StackedAdapter(with_head(part, model, foundation, has_head), task, foundation)
    embedded_text = config.data.public_name is None
    workshop = Workshop(foundation, foundation.digest, emulator, adapter, public, embedded_text, directory)
    return Emulators(config, foundation, shape, adapter, ladder, workshop)


def _part(
    config: SimulationConfig,
    ladder: Ladder,
    model: PreTrainedModel,
    foundation: Foundation,
    lora_of: Callable[[LoraConfig], Lora],
) -> Part:
    """What is trained in the adapter blocks."""
    if config.emulator.trained == "bias":
        return find_bias(model, foundation, "emulator.trained", (ladder.block_list, ladder.adapter_blocks))
    blocks = config.lora.blocks or ladder.adapter_blocks
    if not set(blocks) & set(ladder.adapter_blocks):
        on_every_level = " ".join(map(str, ladder.adapter_blocks))
        raise ConfigError.of("lora.blocks", blocks, f"at least one block that every emulator has: {on_every_level}")
    return lora_of(dataclasses.replace(config.lora, blocks=blocks))


def check_emulators(config: SimulationConfig) -> None:
    """Raise ConfigError for settings of emulators and their control that do not go together."""
    emulator, control = config.emulator, config.control
    if emulator.server_steps and not find_task(config.task).self_supervised:
        allowed = f"0 with --task {config.task}: a server's own data have none of the devices' labels"
        raise ConfigError.of("emulator.server_steps", emulator.server_steps, allowed)
    shares = SHARES if emulator.shares == "auto" else emulator.shares
    if not shares or not all(0 <= share < 1 for share in shares):
        raise ConfigError.of("emulator.shares", emulator.shares, "at least one, each at least 0 and below 1")
    if emulator.first == emulator.last == 0:
        raise ConfigError.of("emulator.last", 0, "at least 1 if emulator.first = 0: there is nothing to train")
    top = len(shares) + emulator.give_foundation
    if control.kind == "fixed" and control.level > top:
        allowed = f"at most {top}, the highest level that devices are given (emulator.give_foundation)"
        raise ConfigError.of("control.level", control.level, allowed)
    num_asked = math.ceil(config.cohort_size * config.over_sample)
    if control.candidates is not None and control.candidates < num_asked:
        allowed = f"at least {num_asked}, as many as a cohort needs (cohort_size, over_sample)"
        raise ConfigError.of("control.candidates", control.candidates, allowed)
    if emulator.realign_every and emulator.eight_bit:
        raise ConfigError.of("emulator.realign_every", emulator.realign_every, "0 if emulator.eight_bit")
    if (shards := config.foundation.num_shards) > 1:
        if emulator.give_foundation:
            raise ConfigError.of("foundation.num_shards", shards, "1 if emulator.give_foundation")
        if emulator.trained != "lora":
            raise ConfigError.of("foundation.num_shards", shards, f"1 if emulator.trained = {emulator.trained!r}")


def _exported(foundation: Foundation, ladder: Ladder, export: Callable) -> Foundation:
    """The blocks that emulators have, and what is around them, in a file of its own: gathered one by one."""
    kept = sorted({number for rung in ladder.rungs[:-1] for number in rung.blocks})
    names = [
        name
        for name in foundation.shapes
        if (number := block_number(name, ladder.block_list)) is None or number in kept
    ]
    key = hashlib.sha256(f"{foundation.digest} {kept}".encode()).hexdigest()[:16]
    path = user_cache_dir() / f"held-{key}.safetensors"
    export(path, names)
    digest = foundations.model_digest(file_sha256(path), foundation.config_json)
    return dataclasses.replace(foundation, weights=path, digest=digest, blocks=tuple(kept))
