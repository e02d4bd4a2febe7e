"""What a run must say of itself at its end: that it came to nothing, or to less than it seems."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fedpeat_ray.runtime.metric import metric_of, scores_of


def failure(summary: Mapping[str, Any]) -> str | None:
    """One line if the run has no result: no update was used in any round, or a perplexity at its end is no number."""
    if not summary["num_completed"]:
        reasons = [f"{count:,} {reason}" for reason, count in summary["drop_reasons"].items() if count]
        return (
            f"no update was used in any of {summary['rounds']} rounds: devices dropped {', '.join(reasons) or 'none'}"
        )
    wrong = [name for name, value in _numbers(summary["perplexity"]) if not math.isfinite(value)]
    if wrong:
        hint = "the updates grew too large, a smaller local.learning_rate or server.learning_rate may help"
        return f"the perplexity at the end is no number ({', '.join(wrong)}): {hint}"
    return None


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """A line for each thing that a reader of the results should know first."""
    found, metric, scores = [], metric_of(summary), scores_of(summary)
    empty = summary["rounds_without_updates"]
    if 0 < empty < summary["rounds"]:  # in all of them: see `failure`
        found.append(f"no update was used in {empty} of {summary['rounds']} rounds")
    for what, before, after in (("model", "zero_shot", "tuned"), ("small model", "small_zero_shot", "small_tuned")):
        if after in scores and metric.worse(scores[after], scores[before]):
            change = f"{metric.written(scores[before])} -> {metric.written(scores[after])}"
            found.append(f"the tuned {what} is worse than it was before: {metric.words} {change}")
    return found


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Perplexities by name, less that of the reference."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{name} ")
        elif value is not None and name != "centralised":
            yield f"{prefix}{name}", value
