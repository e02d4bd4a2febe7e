"""FedPEFT: devices train and send only a small part, low-rank factors for example; the server averages it.

Sun et al. 2022, "Exploring Parameter-Efficient Fine-Tuning to Enable Foundation Models in Federated
Learning" (arXiv 2210.01708): the pre-trained weights are frozen and stay where they are, a small
part is trained and shared: the head, biases, adapters, prompts. With LoRA, averaging A and B separately is FedIT
(Zhang et al. 2024, ICASSP); it is not the mean of the products B A, but equal in rank and traffic for every client.

The round is that of `averaging.py`, theta being that part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from fedpeat_ray.aggregation.find import find_aggregator
from fedpeat_ray.algorithms.algorithm import Given
from fedpeat_ray.algorithms.averaging import Averaging
from fedpeat_ray.config import LORA, PEFT, STACKED, SimulationConfig
from fedpeat_ray.models.foundation import max_positions, weights_layout
from fedpeat_ray.trainable.find import LEARNING_RATES, find_part
from fedpeat_ray.training.adapters import Adapter, StackedAdapter, WeightsAdapter


@dataclass(frozen=True)
class FedPEFT(Averaging):
    """Federated tuning of a small part of a foundation that every device already holds."""

    about = "federated PEFT: devices train and send a small part only"

    @classmethod
    def uses(cls, config: SimulationConfig) -> set[str]:
        """LoRA or another part."""
        module = config.peft.module
        return {PEFT} | ({LORA} if module == "lora" else set()) | ({STACKED} if module != "full" else set())

    @classmethod
    def learning_rate(cls, config: SimulationConfig) -> float:
        """The fewer elements, the larger the steps."""
        return LEARNING_RATES[config.peft.module]

    @classmethod
    def build(cls, given: Given) -> Self:
        """From the foundation itself, but for prompts, which have no value that changes nothing."""
        config, foundation, peft = given.config, given.foundation, given.config.peft
        if peft.module in ("prompt", "prefix"):
            most = max_positions(given.model) - peft.num_tokens
            of = f"{config.foundation.name}, less {peft.num_tokens} of peft.num_tokens"
            given.check_positions("local.sequence_length", "evaluation.sequence_length", most=most, of=of)
        if peft.module == "full":
            adapter: Adapter = WeightsAdapter("all", weights_layout(given.model), foundation, given.task)
        else:
            part = find_part(config, given.model, foundation, given.has_head, lambda: given.lora(config.lora))
            adapter = StackedAdapter(part, given.task, foundation)
        aggregator = find_aggregator(config.server.aggregator)
        return cls(adapter, foundation, given.shape, config.local, config.server, aggregator, given.client_batch_size)
