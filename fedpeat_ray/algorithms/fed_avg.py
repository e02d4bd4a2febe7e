"""FedAvg with full fine-tuning: every weight is trained on the device, sent and averaged.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
algorithm 1. The baseline: what parameter-efficient tuning is measured against.

The round is that of `averaging.py`, theta being all weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from fedpeat_ray.aggregation.find import find_aggregator
from fedpeat_ray.algorithms.algorithm import Given
from fedpeat_ray.algorithms.averaging import Averaging
from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.models.foundation import save_weights, weights_layout
from fedpeat_ray.training.adapters import WeightsAdapter


@dataclass(frozen=True)
class FedAvg(Averaging):
    """Federated averaging of all weights of a foundation."""

    about = "federated averaging: devices train and send all weights"

    @classmethod
    def uses(cls, config: SimulationConfig) -> set[str]:
        """None of what adapters need."""
        return set()

    @classmethod
    def learning_rate(cls, config: SimulationConfig) -> float:
        """Whole weights want a smaller step than adapters."""
        return 5e-4

    @classmethod
    def build(cls, given: Given) -> Self:
        """From the pre-trained weights; clients are trained one by one."""
        config, foundation = given.config, given.foundation
        weights = WeightsAdapter("all", weights_layout(given.model), foundation, given.task)
        aggregator = find_aggregator(config.server.aggregator)
        return cls(weights, foundation, given.shape, config.local, config.server, aggregator, client_batch_size=1)

    def save(self, directory: Path, model_P: Tensor) -> None:
        """A directory that `from_pretrained` reads."""
        save_weights(directory, self.foundation, self.layout, model_P)
