"""The weighted mean of updates, as a monoid: hosts add where they train, partial sums are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeat_ray.training.client_batch import ClientUpdate


@dataclass(frozen=True)
class WeightedMean:
    """sum_k w_k delta_k / sum_k w_k in float64 over the updates that did not fail (McMahan et al. 2017, algorithm 1).

    Immutable: `add` and `merge` return a new one. The result depends on the order of merging (in the
    last bits), which is therefore always that of the client batches.
    """

    weight: float = 0.0
    sum_P: Tensor | None = None

    def add(self, updates: Sequence[ClientUpdate]) -> WeightedMean:
        """With these updates added; those that failed are left out."""
        weight, sum_P = self.weight, self.sum_P
        for update in updates:
            if update.report.failure is None:
                weight += update.weight
                term_P = update.weight * update.delta_P
                sum_P = term_P if sum_P is None else sum_P + term_P
        return WeightedMean(weight, sum_P)

    def merge(self, other: WeightedMean) -> WeightedMean:
        """The mean over both sides' updates."""
        if self.sum_P is None or other.sum_P is None:
            return other if self.sum_P is None else self
        return WeightedMean(self.weight + other.weight, self.sum_P + other.sum_P)

    def result(self) -> Tensor | None:
        """The mean (P,), float64; None if there was none."""
        return None if self.sum_P is None else torch.div(self.sum_P, self.weight)
