"""FedAvg with full fine-tuning: every weight is trained on the device, sent and averaged.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
algorithm 1. The baseline: what parameter-efficient tuning is measured against.

    round r:  sample devices, settle who can complete it
              client k:  w_k = LocalSteps(w_r; data_k)
              server:    w_{r+1} = ServerOptimizer(w_r, sum_k n_k (w_k - w_r) / sum_k n_k)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.aggregation.server_optimizer import ServerState, accepted, init_server, server_step
from fedpeat_ray.algorithms.round_result import RoundResult
from fedpeat_ray.config import LocalConfig, ServerConfig
from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.fleet.conditions import Conditions
from fedpeat_ray.fleet.costs import Task, training_flops
from fedpeat_ray.fleet.memory import ModelShape, training_memory
from fedpeat_ray.models.foundation import Foundation, load, save_weights
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.training.evaluation import EvaluateWeights
from fedpeat_ray.training.map_clients import MapClients
from fedpeat_ray.training.one_client import TrainAllWeights
from fedpeat_ray.training.with_data import WithData, assign


@dataclass(frozen=True)
class FedAvg:
    """Federated averaging of all weights of a foundation."""

    layout: Layout
    shape: ModelShape
    local: LocalConfig
    server: ServerConfig
    foundation: Foundation
    levels: tuple[int, ...] = ()

    @cached_property
    def payload_bytes(self) -> int:
        """What a device receives, and sends."""
        return self.layout.payload_bytes()

    def init(self, seed: int) -> ServerState:
        """The pre-trained weights."""
        return init_server(self.server, self.layout.flatten(load(self.foundation).state_dict()))

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
        demand = self.demand(np.array([task.num_tokens for task in tasks]))
        costs, admission = conditions.settle(round, now_s, device_ids, demand)

        train = WithData(self.trainer(state), data)
        chosen = [task for task, completes in zip(tasks, admission.completed, strict=True) if completes]
        mean, reports = map_clients(train, state.model_P, chosen, WeightedMean())

        state, refused = accepted(state, server_step(self.server, state, mean.result()))
        return state, RoundResult(device_ids, tasks, costs, admission, reports, refused=refused)

    def demand(self, num_tokens: np.ndarray) -> Task:
        """What the round asks of each device."""
        sequence_length = self.local.sequence_length
        memory = training_memory(
            self.shape,
            batch_size=self.local.batch_size,
            sequence_length=sequence_length,
            trainable="all",
            optimizer=self.local.optimizer,
        )
        flops = training_flops(self.shape, num_tokens, sequence_length, "all")
        return Task(self.payload_bytes, self.payload_bytes, flops, memory.peak_bytes)

    def trainer(self, state: ServerState) -> TrainAllWeights:
        """Local training."""
        return TrainAllWeights(self.layout, self.local)

    def evaluator(self, state: ServerState) -> EvaluateWeights:
        """The model with the current weights."""
        return EvaluateWeights(self.layout)

    def save(self, directory: Path, model_P: Tensor) -> None:
        """A directory that `from_pretrained` reads."""
        save_weights(directory, self.foundation, self.layout, model_P)
