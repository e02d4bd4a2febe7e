"""What watchers show of a run: numbers by name, the same names everywhere, in groups that stand before a slash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

from fedpeat_ray.records import DROP_REASONS

GROUPS = {
    "quality": ("perplexity", "device_perplexity", "token_accuracy", "train_loss"),
    "devices": ("num_completed", "num_dropped", "num_skipped", "num_tokens"),
    "costs": ("virtual_s", "download_bytes", "emulator_bytes", "upload_bytes", "energy_j", "flops", "server_flops")
    + ("server_memory_bytes",),
    "wall": ("wall_train_s", "wall_eval_s", "wall_s"),
}
"""The columns of the rounds table, all but `round` and those of MAPS."""

MAPS = ("metrics", "device_metrics", "figures")
"""Columns of numbers by name, each a group of its own."""

_RESULTS = ("perplexity", "scores", "metrics", "gap_closed", "privacy_gap", "token_accuracy", "figures")


def of_round(row: Mapping[str, Any], clients: Mapping[str, Any]) -> dict[str, float]:
    """A round: what its row of the rounds table has, and how many devices dropped out, by reason. What is null, as
    perplexity in a round without evaluation, is left out."""
    found = {f"{group}/{name}": row[name] for group, names in GROUPS.items() for name in names}
    found |= {f"{group}/{name}": value for group in MAPS for name, value in row[group].items()}
    reasons = Counter(clients["drop_reason"])
    found |= {f"dropped/{reason}": reasons[reason] for reason in DROP_REASONS}
    return {name: float(value) for name, value in found.items() if value is not None}


def of_summary(summary: Mapping[str, Any]) -> dict[str, float]:
    """What came out of a run, of its summary.json: `result/perplexity/tuned` and so on."""
    results = {name: summary[name] for name in _RESULTS if name in summary}
    return {f"result/{name}": float(value) for name, value in flat(results) if isinstance(value, Real)}


def flat(values: Mapping[Any, Any], separator: str = "/") -> Iterator[tuple[str, Any]]:
    """All that a nest of mappings holds, by path."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}{separator}{path}", inner) for path, inner in flat(value, separator))
        else:
            yield str(name), value
