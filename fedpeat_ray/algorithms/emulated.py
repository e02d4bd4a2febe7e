"""What an algorithm whose devices have emulators is made of, and what it answers the engine; its round is its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fedpeat_ray.aggregation.find import find_aggregator
from fedpeat_ray.aggregation.server_optimizer import ServerState
from fedpeat_ray.algorithms.algorithm import ALL, Algorithm, Given, Reference, RoundResult, level_group
from fedpeat_ray.algorithms.on_devices import with_perplexity
from fedpeat_ray.config import EMULATORS, LORA, PUBLIC_TEXT, STACKED, LocalConfig, ServerConfig, SimulationConfig
from fedpeat_ray.control.find import find_controller
from fedpeat_ray.control.plan import Controller, Memory, Outcome
from fedpeat_ray.data.client_data import ServerData
from fedpeat_ray.emulators.emulators import Emulators, build_emulators, check_emulators
from fedpeat_ray.emulators.ladder import numbers
from fedpeat_ray.emulators.on_emulators import OnEmulators
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.tasks.score import Score
from fedpeat_ray.training.adapters import Adapter
from fedpeat_ray.training.map_clients import Aggregator, MapClients

VERSION = "version"
"""What a state remembers: after how many re-alignments its emulators are."""
_CONTROL = "control."


@dataclass(frozen=True)
class Emulated(Algorithm):
    """Devices get emulators of the levels that a controller chooses."""

    emulators: Emulators
    controller: Controller
    local: LocalConfig
    server: ServerConfig
    aggregator: Callable[..., Aggregator]
    """Gives the aggregator with nothing added yet, for what each level trains."""
    client_batch_size: int
    seed: int

    @classmethod
    def check(cls, config: SimulationConfig) -> None:
        """See Algorithm; shards are no matter, as no device has the foundation."""
        check_emulators(config)
        find_controller(config.control.kind).check(config)

    @classmethod
    def uses(cls, config: SimulationConfig) -> set[str]:
        """Emulators, and what their settings ask for."""
        lora = {LORA} if config.emulator.trained == "lora" else set()
        lora |= {STACKED} if config.emulator.trained != "blocks" else set()
        return {EMULATORS} | lora | ({PUBLIC_TEXT} if config.emulator.needs_public_text else set())

    @classmethod
    def learning_rate(cls, config: SimulationConfig) -> float:
        """Whole weights want a smaller step than adapters."""
        return 5e-4 if config.emulator.trained == "blocks" else 2e-3

    @classmethod
    def with_numbers(cls, given: Given) -> SimulationConfig:
        """Emulators by the depth of the model."""
        emulator = given.config.emulator
        first, last, shares = numbers(emulator, given.model.config.num_hidden_layers)
        emulator = dataclasses.replace(emulator, first=first, last=last, shares=shares)
        return dataclasses.replace(given.config, emulator=emulator)

    @classmethod
    def build(cls, given: Given) -> Self:
        """On evenly spread emulators with the foundation's own weights, until they are `furnished`."""
        config, public = given.config, None
        if config.emulator.needs_public_text:
            public = given.public_text()
            given.check_positions("emulator.distil.sequence_length")
        emulators = build_emulators(
            config,
            given.foundation,
            given.model,
            given.shape,
            given.lora,
            given.task,
            given.has_head,
            public,
            given.directory / "emulators",
        )
        controller = find_controller(config.control.kind).build(config.control, config.seed)
        aggregator = find_aggregator(config.server.aggregator)
        settings = (config.local, config.server, aggregator, given.client_batch_size, config.seed)
        return cls(emulators, controller, *settings)

    def memory(self) -> dict[str, Tensor]:
        """No device holds an emulator; what the controller starts with."""
        return {VERSION: torch.zeros(1, dtype=torch.int32)} | _of_control(self.controller.init())

    def trainer(self, state: ServerState, ages: np.ndarray | tuple[int, ...] = ()) -> OnEmulators:
        """Local training of the part of the adapter that lies in the blocks of a task's level; some emulators may be
        of these ages."""
        work, version = (lambda adapter: adapter.trainer(self.local)), version_of(state)
        return self.emulators.on_levels(version, work, set(map(int, ages)))

    def evaluator(self, state: ServerState, exact: bool = True) -> OnEmulators:
        """The foundation, or the emulator of a task's level, with the current adapter."""
        return self.emulators.on_levels(version_of(state), lambda adapter: adapter.evaluator(exact))

    def control_memory(self, state: ServerState) -> Memory:
        """What the controller remembers."""
        memory = state.memory.items()
        return {name.removeprefix(_CONTROL): value.numpy() for name, value in memory if name.startswith(_CONTROL)}

    def with_control_memory(self, state: ServerState, memory: Memory) -> ServerState:
        """The state in which the controller remembers this, and nothing else."""
        others = {name: value for name, value in state.memory.items() if not name.startswith(_CONTROL)}
        return dataclasses.replace(state, memory=others | _of_control(memory))

    def learn(self, state: ServerState, result: RoundResult, perplexity: float | None) -> ServerState:
        """The controller hears what came of its decision."""
        assert result.decision is not None
        outcome = outcome_of(result, perplexity)
        memory = self.controller.learn(result.decision, outcome, self.control_memory(state))
        if self.controller.wants_history and perplexity is not None:
            state = with_perplexity(state, perplexity)
        return self.with_control_memory(state, memory)

    @property
    def adapter(self) -> Adapter:
        """What is trained in the blocks that every emulator has."""
        return self.emulators.adapter

    @property
    def foundation(self) -> Foundation:
        """What hosts load: with several shards, the blocks that emulators have."""
        return self.emulators.workshop.foundation

    @property
    def levels(self) -> range:  # type: ignore[override]  # an attribute elsewhere
        """Those that devices may get."""
        return self.emulators.levels

    @property
    def public(self) -> ServerData | None:  # type: ignore[override]  # an attribute elsewhere
        """What emulators learn from, and the server."""
        return self.emulators.workshop.public

    @property
    def reference(self) -> Reference:
        """The adapter in the foundation."""
        return Reference(self.adapter, "driver", (self.emulators.foundation.digest,))

    @property
    def whole_level(self) -> int:
        """The top of the ladder."""
        return self.emulators.ladder.top

    def memory_needs(self) -> dict[str, int]:
        """By level that the controller may give."""
        memory_bytes_L = self.emulators.costs.memory_bytes_L
        return {level_group(level): int(memory_bytes_L[level - 1]) for level in self.controller.may_give(self.levels)}

    def weights_bytes(self, level: int | None) -> int:
        """Of the emulator of a level."""
        return int(self.emulators.costs.weights_bytes_L[(level or 0) - 1])

    def furnished(self, map_clients: MapClients, export: Callable | None, say: Callable[[str], None]) -> Self:
        """With the final emulators."""
        return dataclasses.replace(self, emulators=self.emulators.made(map_clients, export, say))

    def digests(self) -> dict[str, str | None]:
        """Of public text if rounds read it (what emulators learnt from it before is in their weights), and the
        controller's."""
        config = self.emulators.config
        of_text = super().digests() if config.server_steps or config.realign_every else {}
        return of_text | self.controller.digests()

    def made(self) -> dict[str, str | None]:
        """Blocks and weights of emulators."""
        return self.emulators.digests()

    def facts(self) -> dict[str, Any]:
        """The levels."""
        return {"levels": self.emulators.facts()}

    def scores(
        self, zero_shot: Mapping[str, Score], tuned: Mapping[str, Score]
    ) -> dict[str, Score | Mapping[str, Score]]:
        """The plug-in, which is the foundation tuned, and emulators."""
        groups = {str(level): level_group(level) for level in self.levels}
        return {
            "plug_in": tuned[ALL],
            "emulator_zero_shot": {level: zero_shot[group] for level, group in groups.items()},
            "emulator_tuned": {level: tuned[group] for level, group in groups.items()},
        }

    def summary(self, zero_shot: Mapping[str, Score], tuned: Mapping[str, Score]) -> dict[str, Any]:
        """How much better the foundation is than the largest emulator, in perplexity."""
        return {"privacy_gap": tuned[level_group(self.levels[-1])].perplexity - tuned[ALL].perplexity}


def version_of(state: ServerState) -> int:
    """After how many re-alignments the emulators of a state are."""
    return int(state.memory[VERSION])


def _of_control(memory: Memory) -> dict[str, Tensor]:
    """What a controller remembers, as a part of the state's memory."""
    return {_CONTROL + name: torch.from_numpy(np.array(value)) for name, value in memory.items()}


def outcome_of(result: RoundResult, perplexity: float | None) -> Outcome:
    """What a controller is told of a round, a device that it was asked about a position."""
    assert result.decision is not None
    asked, costs = result.decision.device_ids, result.costs
    places = np.searchsorted(asked, result.device_ids)
    failed = {report.device_id for report in result.reports if report.failure} if not result.refused else set(asked)
    used = result.admission.completed & ~np.isin(result.device_ids, list(failed))

    def spread(values: np.ndarray) -> np.ndarray:
        spread_N = np.zeros(len(asked), values.dtype)
        spread_N[places] = values
        return spread_N

    return Outcome(
        completed_N=spread(used),
        total_s_N=spread(costs.total_s),
        download_bytes_N=spread(costs.download_bytes),
        upload_bytes_N=spread(np.where(used, costs.upload_bytes, 0)),
        energy_j_N=spread(costs.energy_j),
        round_s=result.admission.round_s,
        perplexity=perplexity,
    )
