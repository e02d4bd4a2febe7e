"""What is trained: small tensors beside a frozen model, whole blocks, or all weights. One interface for all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from fedpeat_ray.config import LocalConfig
from fedpeat_ray.fleet.memory import Trainable
from fedpeat_ray.models.architecture import configuration, model_class
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.tasks.language_modelling import LANGUAGE_MODELLING
from fedpeat_ray.tasks.task import Task
from fedpeat_ray.trainable import peft_files
from fedpeat_ray.trainable.find import kind_of, size_of
from fedpeat_ray.trainable.lora import Lora
from fedpeat_ray.trainable.part import Part, read_weights, stacked
from fedpeat_ray.training.client_batch import TrainClientBatch
from fedpeat_ray.training.evaluation import Evaluate, EvaluateWeights, replaced_weights
from fedpeat_ray.training.gradients import Gradient
from fedpeat_ray.training.one_client import TrainAllWeights


class Adapter(Protocol):
    """Tensors that are trained while everything else is frozen."""

    @property
    def kind(self) -> Trainable: ...

    @property
    def task(self) -> Task:
        """What they are trained for."""
        ...

    @property
    def layout(self) -> Layout: ...

    @property
    def rank(self) -> int | None:
        """Of LoRA."""
        ...

    @property
    def size(self) -> int:
        """Width of bottlenecks, or number of learned tokens; 0 for what has neither."""
        ...

    def init(self, seed: int) -> Tensor:
        """The start, flat: with it the model is the foundation, but for prompts."""
        ...

    def within(self, block_list: str, blocks: Container[int]) -> Adapter:
        """The part that lies in some blocks, or in none at all."""
        ...

    def trainer(self, local: LocalConfig) -> Callable:
        """`train(backbone, adapter_P, tasks)` of clients."""
        ...

    def gradient(self) -> Callable | None:
        """`train(backbone, adapter_P, batches)`: gradients of batches of examples; None if there are too many elements
        to be sent in every step."""
        ...

    def evaluator(self, exact: bool = True) -> Callable:
        """`train(backbone, adapter_P, tasks)` that scores held-out examples, exactly or in the type of training."""
        ...

    def plugged(self, model: PreTrainedModel, adapter_P: Tensor) -> contextlib.AbstractContextManager:
        """The model with these tensors, and its own again at the end."""
        ...

    def save(self, directory: Path, adapter_P: Tensor, base_model: str) -> None:
        """Write the tensors so that others can load them."""
        ...


@dataclass(frozen=True)
class StackedAdapter:
    """Small tensors such as LoRA, trained in client batches."""

    part: Part
    task: Task = LANGUAGE_MODELLING
    foundation: Foundation | None = None
    """The model it is for, by whose class PEFT knows what it is; None: a causal language model."""

    @property
    def kind(self) -> Trainable:
        return kind_of(self.part)

    @property
    def layout(self) -> Layout:
        return self.part.layout

    @property
    def rank(self) -> int | None:
        own, _ = peft_files.divided(self.part)
        return own.rank if isinstance(own, Lora) else None

    @property
    def size(self) -> int:
        return size_of(self.part)

    def init(self, seed: int) -> Tensor:
        return self.part.init(seed)

    def within(self, block_list: str, blocks: Container[int]) -> StackedAdapter:
        return replace(self, part=self.part.within(block_list, blocks))

    def trainer(self, local: LocalConfig) -> TrainClientBatch:
        return TrainClientBatch(self.part, local, task=self.task)

    def gradient(self) -> Gradient:
        return Gradient(self.part, self.task)

    def evaluator(self, exact: bool = True) -> Evaluate:
        return Evaluate(self.part, exact, self.task)

    @contextlib.contextmanager
    def plugged(self, model: PreTrainedModel, adapter_P: Tensor) -> Iterator[None]:
        with stacked(model, self.part, called=True) as set_tensors:
            set_tensors(adapter_P.to(next(model.parameters()).device).unsqueeze(0))
            yield

    def save(self, directory: Path, adapter_P: Tensor, base_model: str) -> None:
        kind = model_class(configuration(self.foundation.config_json)).__name__ if self.foundation else None
        peft_files.save(directory, self.part, adapter_P, base_model, *([kind] if kind else []))


@dataclass(frozen=True)
class WeightsAdapter:
    """Some of the foundation's own weights, or all, trained one client after another."""

    kind: Trainable
    layout: Layout
    foundation: Foundation
    task: Task = LANGUAGE_MODELLING
    rank: None = None
    size: int = 0

    def init(self, seed: int) -> Tensor:
        return read_weights(self.foundation, self.layout)

    def within(self, block_list: str, blocks: Container[int]) -> WeightsAdapter:
        return self  # it lies in blocks that every emulator has, and around them

    def trainer(self, local: LocalConfig) -> TrainAllWeights:
        return TrainAllWeights(self.layout, local, self.task)

    def gradient(self) -> None:
        return None

    def evaluator(self, exact: bool = True) -> EvaluateWeights:
        return EvaluateWeights(self.layout, self.task)  # whole weights are trained in the exact type

    def plugged(self, model: PreTrainedModel, adapter_P: Tensor) -> contextlib.AbstractContextManager:
        return replaced_weights(model, self.layout, adapter_P)

    def save(self, directory: Path, adapter_P: Tensor, base_model: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / peft_files.WEIGHTS).write_bytes(self.layout.serialize(adapter_P))


def find_blocks(
    model: PreTrainedModel, block_list: str, blocks: Iterable[int], foundation: Foundation, task: Task, head: Layout
) -> WeightsAdapter:
    """All weights of some blocks, and of the task's head."""
    prefixes = tuple(f"{block_list}.{i}." for i in blocks)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith(prefixes)}
    shapes |= dict(zip(head.names, head.shapes, strict=True))
    return WeightsAdapter("blocks", Layout(tuple(shapes), tuple(shapes.values())), foundation, task)
