"""What a run's task is judged by, as its files say it; those of older versions say nothing, and mean perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NO_VALUE = "-"  # ASCII: a log may have any encoding
SHARES = ("accuracy", "exact_match", "precision", "recall", "f1")  # how the names of metrics end that are shares


@dataclass(frozen=True)
class Metric:
    """A metric by its name."""

    name: str = "perplexity"
    higher_is_better: bool = False

    @property
    def words(self) -> str:
        """As a person writes it: macro F1."""
        return metric_words(self.name)

    def written(self, value: float | None) -> str:
        """A value of it: a share in percent."""
        return written_metric(self.name, value)

    def worse(self, value: float, than: float) -> bool:
        """Whether a value is; never so if one of the two is no number."""
        return value < than if self.higher_is_better else value > than


def metric_of(said: Mapping[str, Any] | None) -> Metric:
    """That of a run, by its summary.json or by what config.json has `resolved`."""
    metric = (said or {}).get("metric")
    if not isinstance(metric, Mapping) or not isinstance(metric.get("name"), str):
        return Metric()
    return Metric(metric["name"], bool(metric.get("higher_is_better")))


def scores_of(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a summary says of the metric, by name."""
    return summary.get("scores") or summary["perplexity"]


def score_of_round(row: Mapping[str, Any], metric: Metric) -> float | None:
    """What a row of the rounds table says of it; None if the round was not evaluated."""
    return dict(row.get("metrics") or ()).get(metric.name, row.get(metric.name))


def metric_words(name: str) -> str:
    """The name of a metric as a person writes it: macro F1."""
    return " ".join("F1" if word == "f1" else word for word in name.split("_"))


def written_metric(name: str, value: float | None) -> str:
    """A value of the metric of this name: a share in percent."""
    if value is None or math.isnan(value):
        return NO_VALUE
    if name.endswith(SHARES):
        return f"{value:.1%}"
    return f"{value:.2f}" if name == "perplexity" else f"{value:.4g}"
