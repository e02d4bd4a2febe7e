"""FedPEFT with LoRA: devices train and send only low-rank factors, the server averages them.

Sun et al. 2022, "Exploring Parameter-Efficient Fine-Tuning to Enable Foundation Models in Federated
Learning" (arXiv 2210.01708): the pre-trained weights are frozen and stay where they are, a small
part is trained and shared. Averaging A and B separately is FedIT (Zhang et al. 2024, ICASSP); it is
not the mean of the products B A, but equal in rank and traffic for every client.

The round is that of `averaging.py`, theta being the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from fedpeat_ray.aggregation.find import find_aggregator
from fedpeat_ray.algorithms.algorithm import Given
from fedpeat_ray.algorithms.averaging import Averaging
from fedpeat_ray.config import LORA, SimulationConfig
from fedpeat_ray.training.adapters import LoraAdapter


@dataclass(frozen=True)
class FedPEFT(Averaging):
    """Federated LoRA on a foundation that every device already holds."""

    about = "federated LoRA: devices train and send low-rank adapters only"

    @classmethod
    def uses(cls, config: SimulationConfig) -> set[str]:
        """LoRA."""
        return {LORA}

    @classmethod
    def build(cls, given: Given) -> Self:
        """PEFT's start: B is zero, so round 0 is the foundation itself."""
        config, lora = given.config, LoraAdapter(given.lora(given.config.lora))
        aggregator = find_aggregator(config.server.aggregator)
        return cls(
            lora, given.foundation, given.shape, config.local, config.server, aggregator, given.client_batch_size
        )
