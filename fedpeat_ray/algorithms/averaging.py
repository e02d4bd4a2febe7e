"""The round that federated averaging and its descendants share; what is trained and sent is the adapter.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
algorithm 1, with the server's optimizer of Reddi et al. 2021.

    round r:  sample devices, settle who can complete it
              client k:  theta_k = LocalSteps(theta_r; data_k)          (what is no part of theta is frozen)
              server:    theta_{r+1} = ServerOptimizer(theta_r, sum_k n_k (theta_k - theta_r) / sum_k n_k)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from fedpeat_ray.aggregation.server_optimizer import ServerState, accepted, server_step
from fedpeat_ray.algorithms.algorithm import Algorithm, Assigned, RoundResult
from fedpeat_ray.config import LocalConfig, ServerConfig
from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.fleet.conditions import Conditions
from fedpeat_ray.fleet.costs import Task, added_parameters, training_flops
from fedpeat_ray.fleet.memory import ModelShape, training_memory
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.training.adapters import Adapter
from fedpeat_ray.training.map_clients import Aggregator, MapClients
from fedpeat_ray.training.with_data import WithData, assign


@dataclass(frozen=True)
class Averaging(Algorithm):
    """Devices hold the whole foundation, train the adapter in it and send what changed."""

    adapter: Adapter
    foundation: Foundation
    shape: ModelShape
    local: LocalConfig
    server: ServerConfig
    aggregator: Callable[..., Aggregator]
    """Gives the aggregator with nothing added yet."""
    client_batch_size: int

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
        if self.batches_clients:
            chosen.sort(key=lambda task: -task.num_steps)  # batches of like lengths waste nothing
        train = WithData(self.trainer(state), data)
        mean, reports = map_clients(train, state.model_P, chosen, self.aggregator(), self.client_batch_size)
        state, refused = accepted(settled, server_step(self.server, settled, mean.result()))
        return state, dataclasses.replace(result, reports=reports, refused=refused)

    def settle(
        self, state: ServerState, round: int, now_s: float, conditions: Conditions, assigned: Assigned
    ) -> tuple[ServerState, RoundResult]:
        """A sample of devices: training, and the adapter both ways."""
        device_ids = conditions.sample(round)
        tasks = assigned(device_ids, round)
        demand = self.demand(np.array([task.num_tokens for task in tasks]))
        costs, admission = conditions.settle(round, now_s, device_ids, demand)
        return state, RoundResult(device_ids, tasks, costs, admission, lora_rank=self.adapter.rank)

    def demand(self, num_tokens: np.ndarray) -> Task:
        """Training, and the adapter both ways."""
        kind, length, num_trained = self.adapter.kind, self.local.sequence_length, self.layout.num_elements
        memory = training_memory(
            self.shape,
            batch_size=self.local.batch_size,
            sequence_length=length,
            trainable=kind,
            lora_rank=self.adapter.rank or 0,
            part_size=self.adapter.size,
            trained_elements=None if kind in ("all", "lora") else num_trained,
            optimizer=self.local.optimizer,
        )
        added = added_parameters(self.shape, kind, num_trained)
        learned_tokens = self.adapter.size if kind in ("prompt", "prefix") else 0
        flops = training_flops(self.shape, num_tokens, length, kind, added, learned_tokens=learned_tokens)
        return Task(self._payload_bytes, self._payload_bytes, flops, memory.peak_bytes)

    def memory_needs(self) -> dict[str, int]:
        """Of the one model there is."""
        return {"model": int(self.demand(np.zeros(1)).memory_bytes)}

    def weights_bytes(self, level: int | None) -> int:
        """All of the foundation's."""
        return self.shape.num_parameters * self.shape.weight_bytes

    @cached_property
    def _payload_bytes(self) -> int:
        return self.layout.payload_bytes()
