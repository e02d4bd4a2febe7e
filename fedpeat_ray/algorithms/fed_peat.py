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
from functools import partial

import numpy as np

from fedpeat_ray.aggregation.server_optimizer import ServerState, accepted, server_step
from fedpeat_ray.algorithms.algorithm import Assigned, RoundResult
from fedpeat_ray.algorithms.emulated import VERSION, Emulated, version_of
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
        settled, result = self.settle(state, round, now_s, conditions, partial(assign, map_clients, data))
        chosen = result.completing
        chosen.sort(key=lambda task: (task.level, task.age, -task.num_steps))  # batches of like work waste nothing
        train = self.trainer(state, tuple(task.age for task in result.tasks))
        zero = self.aggregator(self.emulators.trained())
        mean, reports = map_clients(WithData(train, data), state.model_P, chosen, zero, self.client_batch_size)
        if steps := self.emulators.config.server_steps:
            rng = generator(self.seed, "server order", round)
            own = self.emulators.workshop.public_text.task(steps, self.local, rng)
            of_server, report = map_clients(InExactType(train), state.model_P, [own], zero, where="driver")
            mean, reports = mean.merge(of_server), [*reports, *report]

        version = version_of(state)
        state, refused = accepted(settled, server_step(self.server, settled, mean.result()))
        if version_of(state) > version:  # no device holds a current emulator
            self.emulators.workshop.realign(self.emulators.ladder, version + 1, state.model_P, map_clients)
        return state, dataclasses.replace(result, reports=reports, refused=refused)

    def settle(
        self, state: ServerState, round: int, now_s: float, conditions: Conditions, assigned: Assigned
    ) -> tuple[ServerState, RoundResult]:
        """The controller gives each candidate a level, or nothing; at the end, every so many rounds, a re-alignment."""
        candidates = conditions.sample(round, self.emulators.settings.control.candidates)
        assignments = assigned(candidates, round)
        num_tokens = np.array([task.num_tokens for task in assignments])
        foreseen = self.prospects(state, conditions, round, candidates, num_tokens)
        plan = self.controller.act(round, candidates, foreseen, self.control_memory(state))
        decided = decision(round, candidates, foreseen, plan)
        part = np.flatnonzero(decided.levels_N != SKIP)
        settled = settle(self.emulators.costs, conditions, now_s, decided).of(part)
        skipped = [assignments[i] for i in np.flatnonzero(decided.levels_N == SKIP)]
        tasks = [
            dataclasses.replace(assignments[i], level=int(level), age=int(age))
            for i, level, age in zip(part, settled.levels_N, settled.ages_N, strict=True)
        ]
        state, server = self.note(state, conditions, round, settled), self.emulators.costs.server_tuning
        if (every := self.emulators.config.realign_every) and round % every == 0:
            state = dataclasses.replace(state, memory={**state.memory, VERSION: state.memory[VERSION] + 1})
            server = server.then(self.emulators.costs.realignment)
        return state, RoundResult(
            settled.device_ids,
            tasks,
            settled.costs,
            settled.admission,
            lora_rank=self.adapter.rank,
            levels=settled.levels_N,
            emulator_bytes=settled.emulator_bytes_N,
            server=server,
            skipped=skipped,
            decision=decided,
        )

    def prospects(
        self, state: ServerState, conditions: Conditions, round: int, device_ids: np.ndarray, num_tokens: np.ndarray
    ) -> Prospects:
        """What each level would cost each candidate."""
        num_devices, history = conditions.fleet.num_devices, None
        if self.controller.wants_history:
            seen = seen_of(state, num_devices)
            history = seen.history(conditions, round, device_ids, perplexities_of(state))
        held, realigns = held_by(state, num_devices), self.emulators.config.realign_every > 0
        of_levels = (self.emulators.costs, self.emulators.levels, conditions, held, version_of(state))
        return prospects(*of_levels, round, device_ids, num_tokens, realigns, history)

    def note(self, state: ServerState, conditions: Conditions, round: int, settled: Settled) -> ServerState:
        """What the server remembers of the devices of a round: a device that received an emulator keeps it."""
        num_devices = conditions.fleet.num_devices
        state = with_held(state, held_by(state, num_devices).after(settled, version_of(state)))
        if self.controller.wants_history:
            state = with_seen(state, seen_of(state, num_devices).after(settled, round))
        return state
