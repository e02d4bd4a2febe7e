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
from dataclasses import dataclass

import numpy as np
import torch

from fedpeat_ray.aggregation.server_optimizer import ServerState, accepted, server_step
from fedpeat_ray.algorithms.algorithm import RoundResult
from fedpeat_ray.algorithms.emulated import VERSION, Emulated
from fedpeat_ray.control.plan import SKIP, Decision, Prospects
from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.emulators.on_emulators import InExactType
from fedpeat_ray.fleet.conditions import Conditions
from fedpeat_ray.fleet.costs import Costs, Task
from fedpeat_ray.seeding import generator
from fedpeat_ray.training.map_clients import MapClients
from fedpeat_ray.training.with_data import WithData, assign

_HELD_LEVEL = "held_level"


@dataclass(frozen=True)
class FedPEAT(Emulated):
    """Federated tuning of an adapter on a ladder of emulators."""

    about = "federated tuning on emulators: devices tune adapters on smaller stand-ins for the foundation"

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
        num_tokens = np.array([task.num_tokens for task in tasks])
        prospects = self.prospects(state, conditions, device_ids, num_tokens)
        levels = self.controller.act(round, device_ids, prospects, self.control_memory(state))
        decision = Decision(round, device_ids, prospects, levels)
        skipped = [tasks[i] for i in np.flatnonzero(levels == SKIP)]
        part = np.flatnonzero(levels != SKIP)
        device_ids, levels, held = device_ids[part], levels[part], prospects.held_level_N[part]
        tasks = [dataclasses.replace(tasks[i], level=int(level)) for i, level in zip(part, levels, strict=True)]
        demand = self.emulators.costs.task(levels, held, num_tokens[part])
        costs, admission = conditions.settle(round, now_s, device_ids, demand)

        chosen = [task for task, completes in zip(tasks, admission.completed, strict=True) if completes]
        chosen.sort(key=lambda task: (task.level, -task.num_steps))  # batches of like work waste nothing
        train, zero = self.trainer(state), self.aggregator(self.emulators.trained())
        mean, reports = map_clients(WithData(train, data), state.model_P, chosen, zero, self.client_batch_size)
        if steps := self.emulators.config.server_steps:
            rng = generator(self.seed, "server order", round)
            own = self.emulators.workshop.public_text.task(steps, self.local, rng)
            of_server, report = map_clients(InExactType(train), state.model_P, [own], zero, where="driver")
            mean, reports = mean.merge(of_server), [*reports, *report]

        state, refused = accepted(state, server_step(self.server, state, mean.result()))
        state = self._note_who_holds_what(state, conditions, device_ids, levels, costs, demand)
        server = self.emulators.costs.server_tuning
        if (every := self.emulators.config.realign_every) and round % every == 0:
            state = self._realign(state, map_clients)
            server = server.then(self.emulators.costs.realignment)
        emulator_bytes = np.minimum(costs.download_bytes, self.emulators.costs.exchange_bytes(levels, held))
        facts = (device_ids, tasks, costs, admission, reports, self.adapter.rank, levels, emulator_bytes, server)
        return state, RoundResult(*facts, refused, skipped, decision)

    def prospects(
        self, state: ServerState, conditions: Conditions, device_ids: np.ndarray, num_tokens: np.ndarray
    ) -> Prospects:
        """What each level would cost each device."""
        levels, emulator_costs, total_s_LN = self.emulators.levels, self.emulators.costs, []
        held_N = _held(state, conditions)[device_ids]
        for level in levels:
            demand = emulator_costs.task(np.full(len(device_ids), level), held_N, num_tokens)
            total_s_LN.append(conditions.nominal_s(device_ids, demand))
        caps_N = conditions.fleet.memory_cap_bytes[device_ids]
        memory_L, total_s_NL = emulator_costs.memory_bytes_L[: len(levels)], np.stack(total_s_LN, axis=1)
        return Prospects(memory_L, caps_N, total_s_NL, held_N, conditions.deadline_s)

    def _note_who_holds_what(
        self,
        state: ServerState,
        conditions: Conditions,
        device_ids: np.ndarray,
        levels: np.ndarray,
        costs: Costs,
        demand: Task,
    ) -> ServerState:
        """A device that received all that was sent keeps its emulator."""
        held = _held(state, conditions).copy()
        received = costs.download_bytes == demand.download_bytes
        held[device_ids[received]] = levels[received]
        return dataclasses.replace(state, memory={**state.memory, _HELD_LEVEL: torch.from_numpy(held)})

    def _realign(self, state: ServerState, map_clients: MapClients) -> ServerState:
        """New emulators: no device holds a current one."""
        version, held = state.memory[VERSION] + 1, torch.zeros_like(state.memory[_HELD_LEVEL])
        self.emulators.workshop.realign(self.emulators.ladder, int(version), state.model_P, map_clients)
        return dataclasses.replace(state, memory={**state.memory, VERSION: version, _HELD_LEVEL: held})


def _held(state: ServerState, conditions: Conditions) -> np.ndarray:
    """Level of the current version's emulator that each device of the fleet has; 0: none."""
    held = state.memory.get(_HELD_LEVEL)
    return np.zeros(conditions.fleet.num_devices, np.int8) if held is None else held.numpy()
