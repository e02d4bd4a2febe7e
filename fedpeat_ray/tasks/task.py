"""What a task is: how documents become examples, the loss of an example, and what is measured.

A task of your own inherits from one of those beside this file and goes by its import path (docs/tasks.md).

Legend: N examples, B of a batch, T tokens, C classes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fedpeat_ray.config import DataConfig
from fedpeat_ray.data.batches import IGNORED
from fedpeat_ray.data.corpus import Corpus
from fedpeat_ray.models.architecture import Head
from fedpeat_ray.models.foundation import load_tokenizer
from fedpeat_ray.records import Arrays
from fedpeat_ray.tasks.score import Score

Batch = Mapping[str, Tensor]
"""Examples on the model's device, a row each: what `Task.rows` names, integers as int64. "lengths" is always there; a
row of length 0 counts for nothing."""


@dataclass(frozen=True)
class Task(ABC):
    """How a model is trained and judged. Immutable, and travels to hosts."""

    auto: ClassVar[str]
    """The class of transformers that finds the model for it, e.g. AutoModelForCausalLM."""
    metric: ClassVar[str] = "accuracy"
    """Of `metrics`, the one that tables, figures and `gap_closed` speak of."""
    higher_is_better: ClassVar[bool] = True
    self_supervised: ClassVar[bool] = False
    """Whether labels come from the examples themselves, so that a server's own data can teach the same."""
    about: ClassVar[str] = "task"

    # The data.

    def reader(self, directory: Path) -> Any:
        """What turns documents into numbers for the model in this directory: here its tokenizer."""
        return load_tokenizer(directory)

    def reading(self, reader: Any) -> Self:
        """The task with what it must know of that later."""
        return self

    def fixed_length(self, config: PretrainedConfig) -> int | None:
        """Tokens of every example, where the model says it; None: the settings do."""
        return None

    @abstractmethod
    def load(self, config: DataConfig, reader: Any, public: bool = False) -> Corpus:
        """The documents. Raises ConfigError or DataError."""

    def head(self, corpus: Corpus) -> Head:
        """What the model is to have."""
        return Head(self.auto)

    @abstractmethod
    def lengths(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Tokens (N,) of each example that these documents become, at most `length`."""

    @abstractmethod
    def rows(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> Arrays:
        """The examples: arrays (N, ...) by name, "lengths" (N,) as above among them. What fills up a batch is zeros,
        and in "labels" IGNORED."""

    def enough(self, corpus: Corpus, documents: np.ndarray, num_rows: int, length: int) -> np.ndarray:
        """The first of these documents, at least as many as become so many rows."""
        return documents[:num_rows]

    def first_rows(self, corpus: Corpus, documents: np.ndarray, num_rows: int, length: int) -> Arrays:
        """The first so many rows."""
        rows = self.rows(corpus, self.enough(corpus, documents, num_rows, length), length)
        return {name: array[:num_rows] for name, array in rows.items()}

    def prepared(self, corpus: Corpus, batches: Arrays, rng: np.random.Generator) -> Arrays:
        """Batches with what is drawn anew whenever examples are used; arrays (..., B, ...)."""
        return batches

    # The model.

    @abstractmethod
    def inputs(self, model: Any, batch: Batch) -> dict[str, Any]:
        """What the model is called with."""

    @abstractmethod
    def losses(self, model: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of each example (B,): the losses of its labels, summed, and how many labels it has."""

    @abstractmethod
    def score(self, model: Callable, batch: Batch) -> Score:
        """The same of all examples, with what else is measured."""

    def metrics(self, score: Score) -> dict[str, float]:
        """What is measured, by name, `metric` among it."""
        return {"accuracy": score.token_accuracy}


def padding_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, which pads with the token that the model takes for padding, if it knows one."""
    tokenizer = load_tokenizer(directory)
    padding = json.loads((directory / "config.json").read_text()).get("pad_token_id")
    if padding is not None and 0 <= padding < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    return tokenizer


def tensors_of(arrays: Arrays, device: torch.device | str, dtype: torch.dtype) -> Batch:
    """A batch on a device: integers as int64; pixels (uint8) and other numbers in the type of the model."""

    def moved(array: np.ndarray) -> Tensor:
        if array.dtype == np.uint8:
            return torch.from_numpy(array).to(device, dtype)
        if np.issubdtype(array.dtype, np.integer):
            return torch.from_numpy(array.astype(np.int64)).to(device)
        return torch.from_numpy(array).to(device, dtype)

    return {name: moved(np.ascontiguousarray(array)) for name, array in arrays.items()}


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each label in float32 at least; 0 where a label is IGNORED. (..., C), (...) -> (...)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = nn.functional.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels.shape)


def scored(logits: Tensor, labels: Tensor, counts: np.ndarray | None = None) -> Score:
    """Of logits (M, C) for labels (M,), none of which is IGNORED."""
    losses = label_losses(logits, labels)
    correct = int((logits.argmax(dim=-1) == labels).sum())
    return Score(losses.double().sum().item(), correct, len(labels), counts)


def text_inputs(batch: Batch) -> dict[str, Tensor]:
    """What a model that reads whole texts is given: no columns of padding alone, and a mask if there is other padding.

    A row that fills up has its first token read, so that no mean is over nothing.
    """
    lengths_B = batch["lengths"].clamp(min=1)
    longest = int(lengths_B.max())
    tokens_BT = batch["tokens"][:, :longest]
    if int(lengths_B.min()) == longest:
        return {"input_ids": tokens_BT}
    mask_BT = torch.arange(longest, device=tokens_BT.device) < lengths_B[:, None]
    return {"input_ids": tokens_BT, "attention_mask": mask_BT.long()}
