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
from fedpeat_ray.algorithms.on_devices import Held, history, with_seen
from fedpeat_ray.control.plan import SKIP, Decision, Plan, Prospects, Stale
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
        prospects = self.prospects(state, conditions, round, candidates, num_tokens)
        decision = self.decide(state, round, candidates, prospects)
        skipped = [assignments[i] for i in np.flatnonzero(decision.levels_N == SKIP)]
        part = np.flatnonzero(decision.levels_N != SKIP)
        device_ids, levels = candidates[part], decision.levels_N[part]
        ages = np.broadcast_to(decision.ages_N, candidates.shape)[part]
        tasks = [
            dataclasses.replace(assignments[i], level=int(level), age=int(age))
            for i, level, age in zip(part, levels, ages, strict=True)
        ]
        held = np.where(ages > 0, levels, prospects.held_level_N[part])
        demand = self.emulators.costs.task(levels, held, num_tokens[part])
        costs, admission = conditions.settle(round, now_s, device_ids, demand)

        chosen = [task for task, completes in zip(tasks, admission.completed, strict=True) if completes]
        chosen.sort(key=lambda task: (task.level, task.age, -task.num_steps))  # batches of like work waste nothing
        train, zero = self.trainer(state, ages), self.aggregator(self.emulators.trained())
        mean, reports = map_clients(WithData(train, data), state.model_P, chosen, zero, self.client_batch_size)
        if steps := self.emulators.config.server_steps:
            rng = generator(self.seed, "server order", round)
            own = self.emulators.workshop.public_text.task(steps, self.local, rng)
            of_server, report = map_clients(InExactType(train), state.model_P, [own], zero, where="driver")
            mean, reports = mean.merge(of_server), [*reports, *report]

        state, refused = accepted(state, server_step(self.server, state, mean.result()))
        version, received = int(state.memory[VERSION]), costs.download_bytes == demand.download_bytes
        holds = Held.of(state, conditions.fleet.num_devices)
        state = holds.noted(state, version, device_ids, levels, received & (ages == 0))
        if self.controller.wants_history:
            state = with_seen(state, conditions.fleet.num_devices, round, device_ids, costs)
        server = self.emulators.costs.server_tuning
        if (every := self.emulators.config.realign_every) and round % every == 0:
            state = self._realign(state, map_clients)
            server = server.then(self.emulators.costs.realignment)
        emulator_bytes = np.minimum(costs.download_bytes, self.emulators.costs.exchange_bytes(levels, held))
        facts = (device_ids, tasks, costs, admission, reports, self.adapter.rank, levels, emulator_bytes, server)
        return state, RoundResult(*facts, refused, skipped, decision)

    def prospects(
        self, state: ServerState, conditions: Conditions, round: int, device_ids: np.ndarray, num_tokens: np.ndarray
    ) -> Prospects:
        """What each level would cost each candidate."""
        levels, emulator_costs = self.emulators.levels, self.emulators.costs
        level_N, age_N = Held.of(state, conditions.fleet.num_devices).at(int(state.memory[VERSION]), device_ids)

        def total_s(levels_N: np.ndarray, held_N: np.ndarray) -> np.ndarray:
            return conditions.nominal_s(device_ids, emulator_costs.task(levels_N, held_N, num_tokens))

        current_N, stale_N = np.where(age_N == 0, level_N, 0), np.where(age_N > 0, level_N, 0)
        total_s_NL = np.stack([total_s(np.full(len(device_ids), level), current_N) for level in levels], axis=1)
        return Prospects(
            emulator_costs.memory_bytes_L[: len(levels)],
            conditions.fleet.memory_cap_bytes[device_ids],
            total_s_NL,
            current_N,
            conditions.deadline_s,
            conditions.cohort_of(round, len(device_ids)),
            num_tokens,
            Stale(stale_N, age_N, total_s(np.maximum(1, stale_N), stale_N)) if self.realigns else None,
            history(state, conditions, round, device_ids) if self.controller.wants_history else None,
        )

    def decide(self, state: ServerState, round: int, device_ids: np.ndarray, prospects: Prospects) -> Decision:
        """What the controller makes of it."""
        plan = self.controller.act(round, device_ids, prospects, self.control_memory(state))
        plan = plan if isinstance(plan, Plan) else Plan(plan)
        ages_N = np.zeros(len(device_ids), int)
        if prospects.stale:
            goes_on = plan.stale_N & (plan.levels_N == prospects.stale.level_N)
            ages_N = np.where(goes_on, prospects.stale.age_N, 0)
        return Decision(round, device_ids, prospects, plan.levels_N, ages_N)

    @property
    def realigns(self) -> bool:
        """Whether there will be several versions of emulators."""
        return self.emulators.config.realign_every > 0

    def _realign(self, state: ServerState, map_clients: MapClients) -> ServerState:
        """New emulators: no device holds a current one."""
        version = state.memory[VERSION] + 1
        self.emulators.workshop.realign(self.emulators.ladder, int(version), state.model_P, map_clients)
        return dataclasses.replace(state, memory={**state.memory, VERSION: version})
