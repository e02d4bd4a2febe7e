"""FedPEAT: devices tune adapters on emulators they can hold, and the adapters go back into the full model.

Chua et al. 2023, "FedPEAT: Convergence of Federated Learning, Parameter-Efficient Fine Tuning, and
Emulator Assisted Tuning" (arXiv 2310.17491), on offsite-tuning (Xiao et al. 2023): an emulator is the
foundation with blocks of its middle left out, the adapter lies in the blocks at its ends, and only the
driver has the foundation.

    round r:  sample devices; the controller gives each a level, or nothing; settle who can complete it
              client k:  theta_k = LocalSteps(theta_r; emulator of k's level, data_k)
                         (the emulator is sent if k does not hold it, the adapter always;
                         the controller may have k go on with one from before a re-alignment)
              server:    theta_0 = LocalSteps(theta_r; foundation, public data), if it takes part
                         theta_{r+1} = ServerOptimizer(theta_r, the mean of theta_k - theta_r by n_k)
                         every so many rounds: emulators are re-aligned with theta_{r+1} plugged in
    plug-in:  the foundation with theta, which fits as blocks keep their numbers at every level
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from fedpeat_ray.aggregation.server_optimizer import ServerState, accepted, server_step
from fedpeat_ray.algorithms.algorithm import RoundResult
from fedpeat_ray.algorithms.emulated import VERSION, Emulated
from fedpeat_ray.algorithms.on_devices import held_by, perplexities_of, seen_of, with_held, with_seen
from fedpeat_ray.control.plan import SKIP, Prospects
from fedpeat_ray.control.rounds import Settled, decision, prospects, settle
from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.emulators.on_emulators import InExactType
from fedpeat_ray.fleet.conditions import Conditions
from fedpeat_ray.seeding import generator
from fedpeat_ray.training.map_clients import MapClients
from fedpeat_ray.training.with_data import WithData, assign


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
        candidates = conditions.sample(round, self.emulators.settings.control.candidates)
        assignments = assign(map_clients, data, candidates, round)
        num_tokens = np.array([task.num_tokens for task in assignments])
        foreseen = self.prospects(state, conditions, round, candidates, num_tokens)
        plan = self.controller.act(round, candidates, foreseen, self.control_memory(state))
        decided = decision(round, candidates, foreseen, plan)
        part = np.flatnonzero(decided.levels_N != SKIP)
        settled = settle(self.emulators.costs, conditions, now_s, decided).of(part)
        completed, levels = settled.admission.completed, settled.levels_N
        skipped = [assignments[i] for i in np.flatnonzero(decided.levels_N == SKIP)]
        tasks = [
            dataclasses.replace(assignments[i], level=int(level), age=int(age))
            for i, level, age in zip(part, levels, settled.ages_N, strict=True)
        ]

        chosen = [task for task, completes in zip(tasks, completed, strict=True) if completes]
        chosen.sort(key=lambda task: (task.level, task.age, -task.num_steps))  # batches of like work waste nothing
        train, zero = self.trainer(state, settled.ages_N), self.aggregator(self.emulators.trained())
        mean, reports = map_clients(WithData(train, data), state.model_P, chosen, zero, self.client_batch_size)
        if steps := self.emulators.config.server_steps:
            rng = generator(self.seed, "server order", round)
            own = self.emulators.workshop.public_text.task(steps, self.local, rng)
            of_server, report = map_clients(InExactType(train), state.model_P, [own], zero, where="driver")
            mean, reports = mean.merge(of_server), [*reports, *report]

        state, refused = accepted(state, server_step(self.server, state, mean.result()))
        state = self.note(state, conditions, round, settled)
        server = self.emulators.costs.server_tuning
        if (every := self.emulators.config.realign_every) and round % every == 0:
            state = self._realign(state, map_clients)
            server = server.then(self.emulators.costs.realignment)
        facts = (settled.device_ids, tasks, settled.costs, settled.admission, reports, self.adapter.rank)
        return state, RoundResult(*facts, levels, settled.emulator_bytes_N, server, refused, skipped, decided)

    def prospects(
        self, state: ServerState, conditions: Conditions, round: int, device_ids: np.ndarray, num_tokens: np.ndarray
    ) -> Prospects:
        """What each level would cost each candidate."""
        num_devices, history = conditions.fleet.num_devices, None
        if self.controller.wants_history:
            seen = seen_of(state, num_devices)
            history = seen.history(conditions, round, device_ids, perplexities_of(state))
        held, realigns = held_by(state, num_devices), self.emulators.config.realign_every > 0
        of_levels = (self.emulators.costs, self.emulators.levels, conditions, held, int(state.memory[VERSION]))
        return prospects(*of_levels, round, device_ids, num_tokens, realigns, history)

    def note(self, state: ServerState, conditions: Conditions, round: int, settled: Settled) -> ServerState:
        """What the server remembers of the devices of a round: a device that received an emulator keeps it."""
        num_devices = conditions.fleet.num_devices
        state = with_held(state, held_by(state, num_devices).after(settled, int(state.memory[VERSION])))
        if self.controller.wants_history:
            state = with_seen(state, seen_of(state, num_devices).after(settled, round))
        return state

    def _realign(self, state: ServerState, map_clients: MapClients) -> ServerState:
        """New emulators: no device holds a current one."""
        version = state.memory[VERSION] + 1
        self.emulators.workshop.realign(self.emulators.ladder, int(version), state.model_P, map_clients)
        return dataclasses.replace(state, memory={**state.memory, VERSION: version})
