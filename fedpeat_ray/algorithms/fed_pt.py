"""FedPT: devices tune a small language model that steers a large one, which only the server can call.

Gao et al. 2024, "FedPT: Federated Proxy-Tuning of Large Language Models on Resource-Constrained Edge
Devices" (arXiv 2410.00362):

    round r:  a round of FedPEFT (or FedPEAT) on the small model:  theta_r -> theta'
              server:  l_proxy = l_large + alpha (l_small(theta') - l_small(original))
                       theta_{r+1} = distillation of l_proxy into the small model, from theta', on public text

The original is the small model before any tuning, in every round. What is deployed is the triple large,
tuned small, original small: three forward passes a token. Without distillation steps it is FedPEFT with
proxy-tuning at inference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpeat_ray.aggregation.server_optimizer import DISTILLATION, ServerState, accepted
from fedpeat_ray.algorithms.round_result import Algorithm, RoundResult
from fedpeat_ray.config import ProxyConfig
from fedpeat_ray.data.client_data import ClientData, ServerData
from fedpeat_ray.fleet.conditions import Conditions
from fedpeat_ray.fleet.costs import ServerCosts
from fedpeat_ray.models.foundation import load
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.seeding import generator
from fedpeat_ray.training.collect import collect
from fedpeat_ray.training.distillation import EvaluateProxy, SmallModel, TeacherLogits, distil_small
from fedpeat_ray.training.evaluation import EvaluationTask, GroupScore
from fedpeat_ray.training.map_clients import MapClients


@dataclass(frozen=True)
class FedPT:
    """Proxy-tuning of a large model by a small one that is tuned at the edge."""

    on_small: Algorithm
    """The algorithm by which devices tune the small model."""
    small: SmallModel
    small_level: int
    """Of evaluation tasks that ask for the small model alone."""
    config: ProxyConfig
    public: ServerData | None
    """None: nothing is distilled."""
    costs_of_a_step: ServerCosts
    seed: int

    @property
    def layout(self) -> Layout:
        """The small model's adapter."""
        return self.on_small.layout

    @property
    def levels(self) -> tuple[int]:
        """The small model."""
        return (self.small_level,)

    def init(self, seed: int) -> ServerState:
        """The small model as it is, which leaves the large one as it is."""
        return self.on_small.init(seed)

    def run_round(
        self,
        state: ServerState,
        round: int,
        now_s: float,
        conditions: Conditions,
        data: ClientData,
        map_clients: MapClients,
    ) -> tuple[ServerState, RoundResult]:
        """A round on the devices, then distillation on the server."""
        state, result = self.on_small.run_round(state, round, now_s, conditions, data, map_clients)
        if self.public is not None and self.config.steps:
            distilled = dataclasses.replace(state, model_P=self.distil(state.model_P, round, map_clients))
            state, refused = accepted(state, distilled, DISTILLATION)
            costs = self.costs_of_a_step.times(self.config.steps)
            result = dataclasses.replace(result, server=costs, refused=result.refused or refused)
        return state, result

    def distil(self, adapter_P: Tensor, round: int, map_clients: MapClients) -> Tensor:
        """The small model's adapter after it learnt from the large one that it steers."""
        assert self.public is not None
        config, rng = self.config, generator(self.seed, "proxy distillation", round)
        batches = self.public.batches(config.steps, config.batch_size, config.sequence_length, rng)
        taught = collect(map_clients, TeacherLogits(self.small, config.alpha, config.top_k), adapter_P, batches)
        return distil_small(load(self.small.foundation), self.small.lora, adapter_P, batches, taught, config)

    def trainer(self, state: ServerState) -> Any:
        """Local training of the small model."""
        return self.on_small.trainer(state)

    def evaluator(self, state: ServerState) -> EvaluateBoth:
        """The proxy-tuned large model, or for tasks with a level the small one."""
        return EvaluateBoth(EvaluateProxy(self.small, self.config.alpha), self.on_small.evaluator(state))

    def save(self, directory: Path, model_P: Tensor) -> None:
        """The small model's adapter."""
        self.on_small.save(directory, model_P)


@dataclass(frozen=True)
class EvaluateBoth:
    """`train(backbone, adapter_P, tasks)`: on the large model steered, on hosts the small model."""

    steered: EvaluateProxy
    small: Any

    @property
    def files(self) -> list[Path]:
        """The small model's weights."""
        return self.steered.files

    def __call__(self, backbone: Any, adapter_P: Tensor, tasks: Sequence[EvaluationTask]) -> list[GroupScore]:
        work = self.steered if tasks[0].level is None else self.small
        return work(backbone, adapter_P, tasks)
