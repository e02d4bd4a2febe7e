"""The weighted mean of updates, as a monoid: hosts add where they train, partial sums are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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

    @property
    def num_bytes(self) -> int:
        """Of the sum."""
        return 0 if self.sum_P is None else self.sum_P.nbytes

    def add(self, updates: Sequence[ClientUpdate]) -> WeightedMean:
        """With these updates added; those that failed are left out."""
        weight, sum_P = self.weight, None if self.sum_P is None else self.sum_P.clone()
        for update in updates:
            if update.report.failure is None:
                weight += update.weight
                term_P = update.weight * update.delta_P
                sum_P = term_P if sum_P is None else sum_P.add_(term_P)
        return WeightedMean(weight, sum_P)

    def merge(self, other: WeightedMean) -> WeightedMean:
        """The mean over both sides' updates."""
        if self.sum_P is None or other.sum_P is None:
            return other if self.sum_P is None else self
        return WeightedMean(self.weight + other.weight, self.sum_P + other.sum_P)

    def result(self) -> Tensor | None:
        """The mean (P,), float64; None if there was none."""
        return None if self.sum_P is None else torch.div(self.sum_P, self.weight)


@dataclass(frozen=True)
class MeanOverLevels:
    """The weighted mean where devices on different emulators have trained different parts of the adapter.

    Each element is the mean over the devices that trained it: sum_k w_k delta_k / sum_k w_k over those
    whose level has it, and zero where no device has. `trained[level]` says which elements (P,) a level has,
    and its updates hold just these; an update without a level has all.
    """

    trained: Mapping[int, Tensor]
    means: Mapping[int | None, WeightedMean] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of the sums."""
        return sum(mean.num_bytes for mean in self.means.values())

    def add(self, updates: Sequence[ClientUpdate]) -> MeanOverLevels:
        """With these updates added; those that failed are left out."""
        means = dict(self.means)
        for update in updates:
            means[update.level] = means.get(update.level, WeightedMean()).add([update])
        return replace(self, means=means)

    def merge(self, other: MeanOverLevels) -> MeanOverLevels:
        """The mean over both sides' updates."""
        means = dict(self.means)
        for level, mean in other.means.items():
            means[level] = means.get(level, WeightedMean()).merge(mean)
        return replace(self, means=means)

    def result(self) -> Tensor | None:
        """The mean (P,), float64; None if there was none."""
        sum_P = torch.zeros(next(iter(self.trained.values())).shape, dtype=torch.float64)
        weight_P = torch.zeros_like(sum_P)
        for level, mean in sorted(self.means.items(), key=lambda item: item[0] or 0):
            if mean.sum_P is not None:
                part = slice(None) if level is None else self.trained[level]
                sum_P[part] += mean.sum_P
                weight_P[part] += mean.weight
        return torch.where(weight_P > 0, sum_P / weight_P, 0.0) if weight_P.any() else None
