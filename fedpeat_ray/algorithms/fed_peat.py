"""FedPEAT: devices tune adapters on emulators they can hold, and the adapters go back into the full model.

Chua et al. 2023, "FedPEAT: Convergence of Federated Learning, Parameter-Efficient Fine Tuning, and
Emulator Assisted Tuning" (arXiv 2310.17491), on offsite-tuning (Xiao et al. 2023): an emulator is the
foundation with blocks of its middle left out, the adapter lies in the blocks at its ends, and only the
driver has the foundation.

    round r:  sample devices; the controller gives each a level; settle who can complete it
              client k:  theta_k = LocalSteps(theta_r; emulator of k's level, data_k)
                         (the emulator is sent if k does not hold it, the adapter always)
              server:    theta_0 = LocalSteps(theta_r; foundation, public data), if it takes part
                         theta_{r+1} = ServerOptimizer(theta_r, the mean of theta_k - theta_r by n_k)
                         every so many rounds: emulators are re-aligned with theta_{r+1} plugged in
    plug-in:  the foundation with theta, which fits as blocks keep their numbers at every level
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpeat_ray.aggregation.mean import MeanOverLevels
from fedpeat_ray.aggregation.server_optimizer import ServerState, accepted, init_server, server_step
from fedpeat_ray.algorithms.round_result import RoundResult
from fedpeat_ray.config import LocalConfig, ServerConfig
from fedpeat_ray.control.plan import SKIP, Controller, Prospects
from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.fleet.conditions import Conditions
from fedpeat_ray.fleet.costs import Costs, Task
from fedpeat_ray.fleet.emulator_costs import EmulatorCosts
from fedpeat_ray.models.emulator import Ladder
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.records import Assignment
from fedpeat_ray.seeding import generator
from fedpeat_ray.training.adapters import Adapter
from fedpeat_ray.training.emulator_workshop import Workshop
from fedpeat_ray.training.emulators import InExactType, OnEmulators
from fedpeat_ray.training.map_clients import MapClients
from fedpeat_ray.training.with_data import WithData, assign


@dataclass(frozen=True)
class FedPEAT:
    """Federated tuning of an adapter on a ladder of emulators."""

    adapter: Adapter
    ladder: Ladder
    emulator_costs: EmulatorCosts
    controller: Controller
    local: LocalConfig
    server: ServerConfig
    workshop: Workshop
    client_batch_size: int
    seed: int
    base_model: str

    @property
    def layout(self) -> Layout:
        """The adapter."""
        return self.adapter.layout

    @property
    def levels(self) -> range:
        """Those that devices may get."""
        return range(1, self.ladder.top + self.workshop.config.give_foundation)

    def init(self, seed: int) -> ServerState:
        """The adapter that changes nothing; no device holds an emulator."""
        state = init_server(self.server, self.adapter.init(seed))
        return dataclasses.replace(state, memory={"version": torch.zeros(1, dtype=torch.int32)})

    def run_round(
        self,
        state: ServerState,
        round: int,
        now_s: float,
        conditions: Conditions,
        data: ClientData,
        map_clients: MapClients,
    ) -> tuple[ServerState, RoundResult]:
        """One round; the work of devices that will not complete it is never done."""
        device_ids = conditions.sample(round)
        tasks = assign(map_clients, data, device_ids, round)
        prospects = self.prospects(state, conditions, device_ids, tasks)
        levels = self.controller(round, device_ids, prospects)
        part = np.flatnonzero(levels != SKIP)
        device_ids, levels, held = device_ids[part], levels[part], prospects.held_level_N[part]
        tasks = [tasks[i] for i in part]
        demand = self.emulator_costs.task(levels, held, np.array([task.num_tokens for task in tasks]))
        costs, admission = conditions.settle(round, now_s, device_ids, demand)

        chosen = [
            dataclasses.replace(task, level=int(level))
            for task, level, completes in zip(tasks, levels, admission.completed, strict=True)
            if completes
        ]
        chosen.sort(key=lambda task: (task.level, -task.num_steps))  # batches of like work waste nothing
        train, zero = self.trainer(state), MeanOverLevels(self._trained())
        mean, reports = map_clients(WithData(train, data), state.model_P, chosen, zero, self.client_batch_size)
        if steps := self.workshop.config.server_steps:
            rng = generator(self.seed, "server order", round)
            own = self.workshop.public_text.task(steps, self.local, rng)
            of_server, report = map_clients(InExactType(train), state.model_P, [own], zero, where="driver")
            mean, reports = mean.merge(of_server), [*reports, *report]

        state, refused = accepted(state, server_step(self.server, state, mean.result()))
        state = self._remember(state, conditions.fleet.num_devices, device_ids, levels, costs, demand)
        server = self.emulator_costs.server_tuning
        if (every := self.workshop.config.realign_every) and round % every == 0:
            state = self._realign(state, map_clients)
            server = server.then(self.emulator_costs.realignment)
        emulator_bytes = np.minimum(costs.download_bytes, self.emulator_costs.exchange_bytes(levels, held))
        rank = self.adapter.rank
        facts = (device_ids, tasks, costs, admission, reports, rank, levels, emulator_bytes, server, refused)
        return state, RoundResult(*facts)

    def prospects(
        self, state: ServerState, conditions: Conditions, device_ids: np.ndarray, tasks: Sequence[Assignment]
    ) -> Prospects:
        """What each level would cost each device."""
        fleet = conditions.fleet
        held_N = self._held(state, fleet.num_devices)[device_ids]
        num_tokens_N, total_s_LN = np.array([task.num_tokens for task in tasks]), []
        for level in self.levels:
            demand = self.emulator_costs.task(np.full(len(device_ids), level), held_N, num_tokens_N)
            total_s_LN.append(conditions.nominal_s(device_ids, demand))
        memory_L, caps_N = self.emulator_costs.memory_bytes_L[: len(self.levels)], fleet.memory_cap_bytes[device_ids]
        return Prospects(memory_L, caps_N, np.stack(total_s_LN, axis=1), held_N, conditions.deadline_s)

    def trainer(self, state: ServerState) -> OnEmulators:
        """Local training of the part of the adapter that lies in the blocks of a task's level."""
        return self._on_emulators(state, lambda adapter: adapter.trainer(self.local))

    def evaluator(self, state: ServerState) -> OnEmulators:
        """The foundation, or the emulator of a task's level, with the current adapter."""
        return self._on_emulators(state, lambda adapter: adapter.evaluator())

    def save(self, directory: Path, model_P: Tensor) -> None:
        """The adapter, to be plugged into the foundation."""
        self.adapter.save(directory, model_P, self.base_model)

    def _on_emulators(self, state: ServerState, work: Callable[[Adapter], Callable]) -> OnEmulators:
        ladder = self.workshop.version(self.ladder, int(state.memory["version"]))
        levels = range(1, ladder.top + 1)
        parts = [(work(self.adapter.within(ladder, level)), self._places(level)) for level in levels]
        return OnEmulators(ladder, work(self.adapter), tuple(parts))

    def _places(self, level: int) -> Tensor:
        return self.layout.part(self.adapter.within(self.ladder, level).layout.names)[1]

    def _trained(self) -> dict[int, Tensor]:
        trained = {}
        for level in self.levels:
            trained[level] = torch.zeros(self.layout.num_elements, dtype=torch.bool)
            trained[level][self._places(level)] = True
        return trained

    def _held(self, state: ServerState, num_devices: int) -> np.ndarray:
        """Level of the current version's emulator that each device of the fleet has; 0: none."""
        held = state.memory.get("held_level")
        return np.zeros(num_devices, np.int8) if held is None else held.numpy()

    def _remember(
        self,
        state: ServerState,
        num_devices: int,
        device_ids: np.ndarray,
        levels: np.ndarray,
        costs: Costs,
        demand: Task,
    ) -> ServerState:
        """A device that received all that was sent keeps its emulator."""
        held = self._held(state, num_devices).copy()
        received = costs.download_bytes == demand.download_bytes
        held[device_ids[received]] = levels[received]
        return dataclasses.replace(state, memory={**state.memory, "held_level": torch.from_numpy(held)})

    def _realign(self, state: ServerState, map_clients: MapClients) -> ServerState:
        """New emulators: no device holds a current one."""
        version = state.memory["version"] + 1
        self.workshop.realign(self.ladder, int(version), state.model_P, map_clients)
        held = torch.zeros_like(state.memory["held_level"])
        return dataclasses.replace(state, memory={"version": version, "held_level": held})
