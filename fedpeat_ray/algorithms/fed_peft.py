"""FedPEFT with LoRA: devices train and send only low-rank factors, the server averages them.

Sun et al. 2022, "Exploring Parameter-Efficient Fine-Tuning to Enable Foundation Models in Federated
Learning" (arXiv 2210.01708): the pre-trained weights are frozen and stay where they are, a small
part is trained and shared. Averaging A and B separately is FedIT (Zhang et al. 2024, ICASSP); it is
not the mean of the products B A, but equal in rank and traffic for every client.

    round r:  sample devices, settle who can complete it
              client k:  theta_k = LocalSteps(theta_r; data_k)          (the foundation is frozen)
              server:    theta_{r+1} = ServerOptimizer(theta_r, sum_k n_k (theta_k - theta_r) / sum_k n_k)
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
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.models.lora import Lora, save_adapter
from fedpeat_ray.training.client_batch import TrainClientBatch
from fedpeat_ray.training.evaluation import EvaluateLora
from fedpeat_ray.training.map_clients import MapClients
from fedpeat_ray.training.with_data import WithData, assign


@dataclass(frozen=True)
class FedPEFT:
    """Federated LoRA on a foundation that every device already holds."""

    lora: Lora
    shape: ModelShape
    local: LocalConfig
    server: ServerConfig
    client_batch_size: int
    base_model: str
    levels: tuple[int, ...] = ()

    @property
    def layout(self) -> Layout:
        """A and B of every adapted module."""
        return self.lora.layout

    @cached_property
    def payload_bytes(self) -> int:
        """What a device receives, and sends."""
        return self.layout.payload_bytes()

    def init(self, seed: int) -> ServerState:
        """PEFT's start: B is zero, so round 0 is the foundation itself."""
        return init_server(self.server, self.lora.init(seed))

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
        chosen.sort(key=lambda task: -task.num_steps)  # batches of like lengths waste nothing
        mean, reports = map_clients(train, state.model_P, chosen, WeightedMean(), self.client_batch_size)

        state, refused = accepted(state, server_step(self.server, state, mean.result()))
        return state, RoundResult(device_ids, tasks, costs, admission, reports, self.lora.rank, refused=refused)

    def demand(self, num_tokens: np.ndarray) -> Task:
        """What the round asks of each device."""
        sequence_length, lora_parameters = self.local.sequence_length, self.layout.num_elements
        memory = training_memory(
            self.shape,
            batch_size=self.local.batch_size,
            sequence_length=sequence_length,
            trainable="lora",
            lora_rank=self.lora.rank,
            optimizer=self.local.optimizer,
        )
        flops = training_flops(self.shape, num_tokens, sequence_length, "lora", lora_parameters)
        return Task(self.payload_bytes, self.payload_bytes, flops, memory.peak_bytes)

    def trainer(self, state: ServerState) -> TrainClientBatch:
        """Local training."""
        return TrainClientBatch(self.lora, self.local)

    def evaluator(self, state: ServerState) -> EvaluateLora:
        """The foundation with the current adapter."""
        return EvaluateLora(self.lora)

    def save(self, directory: Path, model_P: Tensor) -> None:
        """A PEFT directory."""
        save_adapter(directory, self.lora, model_P, self.base_model)
