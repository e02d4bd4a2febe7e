"""How well a model does on held-out examples: sums that hosts work out side by side and that add up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Score:
    """Sums over labels: next tokens, or classes."""

    loss: float = 0.0
    num_correct: float = 0
    num_tokens: float = 0
    counts: np.ndarray | None = None
    """Whatever else a task counts, of one shape."""

    def __add__(self, other: Score) -> Score:
        if self.counts is None or other.counts is None:
            counts = other.counts if self.counts is None else self.counts
        else:
            counts = self.counts + other.counts
        correct, tokens = self.num_correct + other.num_correct, self.num_tokens + other.num_tokens
        return Score(self.loss + other.loss, correct, tokens, counts)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss a label; infinite only if the loss is."""
        mean = self.loss / self.num_tokens
        return math.exp(min(mean, 700.0) if math.isfinite(mean) else mean)  # beyond, a float overflows

    @property
    def token_accuracy(self) -> float:
        """Share of labels that the model finds likeliest."""
        return self.num_correct / self.num_tokens
