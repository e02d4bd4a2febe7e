"""Perplexity and token accuracy, as a sum over parts that hosts work out side by side."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedpeat_ray.models.foundation import Backbone, plain_head
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.models.lora import Lora
from fedpeat_ray.training.client_batch import IGNORED, next_token_labels, stacked_lora

ROWS_AT_A_TIME = 8  # sequences a forward pass; also the size of a task, so that hosts share the work


@dataclass(frozen=True)
class EvaluationTask:
    """Some held-out sequences of one group (all of them, or those of a tier)."""

    group: str
    tokens_NT: np.ndarray
    lengths_N: np.ndarray
    level: int | None = None
    """The emulator to be judged; None: the foundation."""


@dataclass(frozen=True)
class Score:
    """Sums over next tokens."""

    loss: float = 0.0
    num_correct: float = 0
    num_tokens: float = 0

    def __add__(self, other: Score) -> Score:
        correct, tokens = self.num_correct + other.num_correct, self.num_tokens + other.num_tokens
        return Score(self.loss + other.loss, correct, tokens)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss a token; infinite only if the loss is."""
        mean = self.loss / self.num_tokens
        return math.exp(min(mean, 700.0) if math.isfinite(mean) else mean)  # beyond, a float overflows

    @property
    def token_accuracy(self) -> float:
        """Share of next tokens that the model finds likeliest."""
        return self.num_correct / self.num_tokens


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


def evaluation_tasks(
    group: str, tokens_NT: np.ndarray, lengths_N: np.ndarray, level: int | None = None
) -> list[EvaluationTask]:
    """Cut held-out sequences into tasks."""
    starts = range(0, len(tokens_NT), ROWS_AT_A_TIME)
    parts = [slice(start, start + ROWS_AT_A_TIME) for start in starts]
    return [EvaluationTask(group, tokens_NT[part], lengths_N[part], level) for part in parts]


@dataclass(frozen=True)
class EvaluateLora:
    """`train(backbone, adapter_P, tasks)` for evaluation: the backbone with this adapter."""

    lora: Lora
    exact: bool = True
    """Whether in the exact type, or in that of training: faster, and over 32,000 tokens within 0.1 % of perplexity."""

    def __call__(self, backbone: Backbone, adapter_P: Tensor, tasks: Sequence[EvaluationTask]):
        model = backbone.exact if self.exact else backbone.training
        with torch.no_grad(), stacked_lora(model, self.lora) as set_factors:
            set_factors(adapter_P.to(next(model.parameters()).device).unsqueeze(0))
            return [_score(model, task) for task in tasks]


@dataclass(frozen=True)
class EvaluateWeights:
    """`train(backbone, weights_P, tasks)` for evaluation: the model with all its weights replaced."""

    layout: Layout

    def __call__(self, backbone: Backbone, weights_P: Tensor, tasks: Sequence[EvaluationTask]):
        model = backbone.exact
        with torch.no_grad(), replaced_weights(model, self.layout, weights_P):
            return [_score(model, task) for task in tasks]


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


def _score(model: PreTrainedModel, task: EvaluationTask) -> GroupScore:
    head_VD = plain_head(model)
    if head_VD is None:
        return score_of(lambda tokens_NT: model(input_ids=tokens_NT, use_cache=False).logits, task, model.device)
    tokens_NT, labels, rows = _labelled(task, model.device)
    hidden = model.base_model(input_ids=tokens_NT, use_cache=False).last_hidden_state
    return _scored(hidden.flatten(0, 1)[rows] @ head_VD.T, labels[rows], task.group)


def score_of(
    logits: Callable[[Tensor], Tensor], task: EvaluationTask, device: torch.device | str = "cpu"
) -> GroupScore:
    """The score of anything that gives logits (N, T, V) for tokens (N, T)."""
    tokens_NT, labels, rows = _labelled(task, device)
    found = logits(tokens_NT).flatten(0, 1)
    return _scored(found[rows.to(found.device)], labels[rows].to(found.device), task.group)


def _labelled(task: EvaluationTask, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the labels of all positions one after another, and which of them count."""
    tokens_NT = torch.from_numpy(task.tokens_NT.astype(np.int64)).to(device)
    lengths_N = torch.from_numpy(task.lengths_N.astype(np.int64)).to(device)
    labels = next_token_labels(tokens_NT, lengths_N).flatten()
    return tokens_NT, labels, labels != IGNORED


def _scored(logits: Tensor, labels: Tensor, group: str) -> GroupScore:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    correct = int((logits.argmax(dim=1) == labels).sum())
    return GroupScore(group, Score(losses.double().sum().item(), correct, len(labels)))
