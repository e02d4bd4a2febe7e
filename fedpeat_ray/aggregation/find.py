"""Aggregators by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from fedpeat_ray.aggregation.mean import MeanOverLevels, WeightedMean
from fedpeat_ray.own import find
from fedpeat_ray.training.map_clients import Aggregator

OURS = {"weighted-mean": "fedpeat_ray.aggregation.find:weighted_mean"}


def find_aggregator(name: str) -> Callable[..., Aggregator]:
    """What `server.aggregator` names: `aggregator(trained) -> Aggregator` with nothing added yet.

    Its `result()` is the change of the model, float64 (P,), or None without updates. `trained[level]` says which
    elements (P,) the updates of a level hold; without an argument all updates hold all. Raises ConfigError if
    there is no such function.
    """
    return find("server.aggregator", name, OURS)


def weighted_mean(trained: Mapping[int, Tensor] | None = None) -> WeightedMean | MeanOverLevels:
    """By the number of sequences on a device."""
    return WeightedMean() if trained is None else MeanOverLevels(trained)
