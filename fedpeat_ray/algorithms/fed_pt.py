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
from dataclasses import dataclass

from torch import Tensor

from fedpeat_ray.aggregation.server_optimizer import DISTILLATION, ServerState, accepted
from fedpeat_ray.algorithms.algorithm import Assigned, RoundResult
from fedpeat_ray.algorithms.steered import Steered
from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.fleet.conditions import Conditions
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.seeding import generator
from fedpeat_ray.training.collect import collect
from fedpeat_ray.training.map_clients import MapClients
from fedpeat_ray.training.proxy_tuning import TeacherLogits, distil_small


@dataclass(frozen=True)
class FedPT(Steered):
    """Proxy-tuning of a large model by a small one that is tuned at the edge."""

    about = "federated proxy-tuning: devices tune a small model, which steers a large one that they never see"

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
        if self.distils:
            distilled = dataclasses.replace(state, model_P=self.distil(state.model_P, round, map_clients))
            state, refused = accepted(state, distilled, DISTILLATION)
            result = dataclasses.replace(result, server=self.server_costs, refused=result.refused or refused)
        return state, result

    def settle(
        self, state: ServerState, round: int, now_s: float, conditions: Conditions, assigned: Assigned
    ) -> tuple[ServerState, RoundResult]:
        """That of the small model, and what distillation costs."""
        state, result = self.on_small.settle(state, round, now_s, conditions, assigned)
        return state, dataclasses.replace(result, server=self.server_costs) if self.distils else result

    def distil(self, adapter_P: Tensor, round: int, map_clients: MapClients) -> Tensor:
        """The small model's adapter after it learnt from the large one that it steers."""
        assert self.teaching_text is not None
        config, rng = self.config, generator(self.seed, "proxy distillation", round)
        batches = self.teaching_text.batches(config.steps, config.batch_size, config.sequence_length, rng)
        taught = collect(map_clients, TeacherLogits(self.small, config.alpha, config.top_k), adapter_P, batches)
        return distil_small(foundations.load(self.foundation), self.small.lora, adapter_P, batches, taught, config)
