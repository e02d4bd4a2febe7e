"""What is trained: LoRA, biases, whole blocks, or all weights. One interface for the four."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from fedpeat_ray.config import LocalConfig
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.models.lora import Lora, save_adapter
from fedpeat_ray.training.client_batch import TrainClientBatch, stacked_lora
from fedpeat_ray.training.evaluation import EvaluateLora, EvaluateWeights, replaced_weights
from fedpeat_ray.training.gradients import LoraGradient
from fedpeat_ray.training.one_client import TrainAllWeights


class Adapter(Protocol):
    """Tensors that are trained while everything else is frozen."""

    @property
    def kind(self) -> Literal["lora", "bias", "blocks", "all"]: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def rank(self) -> int | None:
        """Of LoRA."""
        ...

    def init(self, seed: int) -> Tensor:
        """The start, flat: with it the model is the foundation."""
        ...

    def within(self, block_list: str, blocks: Container[int]) -> Adapter:
        """The part that lies in some blocks."""
        ...

    def trainer(self, local: LocalConfig) -> Callable:
        """`train(backbone, adapter_P, tasks)` of clients."""
        ...

    def gradient(self) -> Callable | None:
        """`train(backbone, adapter_P, batches)`: gradients of batches of text; None if there are too many elements to
        be sent in every step."""
        ...

    def evaluator(self, exact: bool = True) -> Callable:
        """`train(backbone, adapter_P, tasks)` that scores held-out text, exactly or in the type of training."""
        ...

    def plugged(self, model: PreTrainedModel, adapter_P: Tensor) -> contextlib.AbstractContextManager:
        """The model with these tensors, and its own again at the end."""
        ...

    def save(self, directory: Path, adapter_P: Tensor, base_model: str) -> None:
        """Write the tensors so that others can load them."""
        ...


@dataclass(frozen=True)
class LoraAdapter:
    """Low-rank factors, trained in client batches."""

    lora: Lora
    kind: Literal["lora"] = "lora"

    @property
    def layout(self) -> Layout:
        return self.lora.layout

    @property
    def rank(self) -> int:
        return self.lora.rank

    def init(self, seed: int) -> Tensor:
        return self.lora.init(seed)

    def within(self, block_list: str, blocks: Container[int]) -> LoraAdapter:
        return LoraAdapter(self.lora.within(block_list, blocks))

    def trainer(self, local: LocalConfig) -> TrainClientBatch:
        return TrainClientBatch(self.lora, local)

    def gradient(self) -> LoraGradient:
        return LoraGradient(self.lora)

    def evaluator(self, exact: bool = True) -> EvaluateLora:
        return EvaluateLora(self.lora, exact)

    @contextlib.contextmanager
    def plugged(self, model: PreTrainedModel, adapter_P: Tensor) -> Iterator[None]:
        with stacked_lora(model, self.lora, called=True) as set_factors:
            set_factors(adapter_P.to(next(model.parameters()).device).unsqueeze(0))
            yield

    def save(self, directory: Path, adapter_P: Tensor, base_model: str) -> None:
        save_adapter(directory, self.lora, adapter_P, base_model)


@dataclass(frozen=True)
class WeightsAdapter:
    """Some of the foundation's own weights, or all, trained one client after another."""

    kind: Literal["bias", "blocks", "all"]
    layout: Layout
    foundation: Foundation
    rank: None = None

    def init(self, seed: int) -> Tensor:
        with safe_open(self.foundation.weights, framework="pt") as file:
            return self.layout.flatten({name: file.get_tensor(name) for name in self.layout.names})

    def within(self, block_list: str, blocks: Container[int]) -> WeightsAdapter:
        return self  # it lies in blocks that every emulator has

    def trainer(self, local: LocalConfig) -> TrainAllWeights:
        return TrainAllWeights(self.layout, local)

    def gradient(self) -> None:
        return None

    def evaluator(self, exact: bool = True) -> EvaluateWeights:
        return EvaluateWeights(self.layout)  # whole weights are trained in the exact type

    def plugged(self, model: PreTrainedModel, adapter_P: Tensor) -> contextlib.AbstractContextManager:
        return replaced_weights(model, self.layout, adapter_P)

    def save(self, directory: Path, adapter_P: Tensor, base_model: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "weights.safetensors").write_bytes(self.layout.serialize(adapter_P))


def find_weights(
    model: PreTrainedModel,
    kind: Literal["bias", "blocks"],
    block_list: str,
    blocks: Iterable[int],
    foundation: Foundation,
) -> WeightsAdapter:
    """The biases, or all weights, of some blocks. Raises ConfigError for a model without biases."""
    prefixes = tuple(f"{block_list}.{i}." for i in blocks)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes) and (kind == "blocks" or name.endswith(".bias"))
    }
    if not shapes:
        allowed = f"lora or blocks, as {type(model).__name__} has no biases"
        raise ConfigError.of("emulator.trained", kind, allowed)
    return WeightsAdapter(kind, Layout(tuple(shapes), tuple(shapes.values())), foundation)
