"""How well a model does, as a sum over parts that hosts work out side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedpeat_ray.models.foundation import Backbone
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.records import Arrays
from fedpeat_ray.tasks.language_modelling import LANGUAGE_MODELLING
from fedpeat_ray.tasks.score import Score
from fedpeat_ray.tasks.task import Task
from fedpeat_ray.trainable.part import Part, stacked
from fedpeat_ray.training.client_batch import together

ROWS_AT_A_TIME = 8  # examples a forward pass; also the size of a task, so that hosts share the work


@dataclass(frozen=True)
class EvaluationTask:
    """Some held-out examples of one group (all of them, or those of a tier)."""

    group: str
    arrays: Arrays
    """A batch, arrays (N, ...)."""
    level: int | None = None
    """The emulator to be judged; None: the foundation."""

    @property
    def num_tokens(self) -> int:
        """That are not padding."""
        return int(self.arrays["lengths"].sum())


@dataclass(frozen=True)
class GroupScore:
    """The result of one task."""

    group: str
    score: Score
    report: None = None


@dataclass(frozen=True)
class ScoreSum:
    """Aggregator: the score of each group."""

    scores: Mapping[str, Score] = field(default_factory=dict)

    def add(self, updates: Sequence[GroupScore]) -> ScoreSum:
        """With these results added."""
        scores = dict(self.scores)
        for update in updates:
            scores[update.group] = scores.get(update.group, Score()) + update.score
        return ScoreSum(scores)

    def merge(self, other: ScoreSum) -> ScoreSum:
        """The scores of both sides."""
        return self.add([GroupScore(group, score) for group, score in other.scores.items()])

    def result(self) -> dict[str, Score]:
        """{group: score}."""
        return dict(self.scores)


def evaluation_tasks(group: str, arrays: Arrays, level: int | None = None) -> list[EvaluationTask]:
    """Cut held-out examples, arrays (N, ...), into tasks."""
    starts = range(0, len(arrays["lengths"]), ROWS_AT_A_TIME)
    parts = [slice(start, start + ROWS_AT_A_TIME) for start in starts]
    return [EvaluationTask(group, {name: array[part] for name, array in arrays.items()}, level) for part in parts]


@dataclass(frozen=True)
class Evaluate:
    """`train(backbone, adapter_P, tasks)` for evaluation: the backbone with these small tensors."""

    part: Part
    exact: bool = True
    """Whether in the exact type, or in that of training: faster, and over 32,000 tokens within 0.1 % of perplexity."""
    task: Task = LANGUAGE_MODELLING

    def __call__(self, backbone: Backbone, adapter_P: Tensor, tasks: Sequence[EvaluationTask]) -> list[GroupScore]:
        model = backbone.exact if self.exact else backbone.training
        with torch.no_grad(), stacked(model, self.part) as set_tensors:
            set_tensors(adapter_P.to(next(model.parameters()).device).unsqueeze(0))
            return [_score(self.task, model, task) for task in tasks]


@dataclass(frozen=True)
class EvaluateWeights:
    """`train(backbone, weights_P, tasks)` for evaluation: the model with all its weights replaced."""

    layout: Layout
    task: Task = LANGUAGE_MODELLING

    def __call__(self, backbone: Backbone, weights_P: Tensor, tasks: Sequence[EvaluationTask]) -> list[GroupScore]:
        model = backbone.exact
        with torch.no_grad(), replaced_weights(model, self.layout, weights_P):
            return [_score(self.task, model, task) for task in tasks]


@contextlib.contextmanager
def replaced_weights(backbone: PreTrainedModel, layout: Layout, weights_P: Tensor) -> Iterator[None]:
    """The backbone with other weights, and its own again at the end."""
    kept = {name: backbone.get_parameter(name).data for name in layout.names}
    try:
        for name, tensor in layout.unflatten(weights_P).items():
            backbone.get_parameter(name).data = tensor.to(kept[name], copy=True)
        yield
    finally:
        for name, data in kept.items():
            backbone.get_parameter(name).data = data


def _score(task: Task, model: PreTrainedModel, examples: EvaluationTask) -> GroupScore:
    return GroupScore(examples.group, task.score(model, together([examples.arrays], model)))
