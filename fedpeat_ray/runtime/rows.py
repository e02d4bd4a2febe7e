"""From the result of a round to the rows of the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpeat_ray.aggregation.server_optimizer import UPDATES
from fedpeat_ray.algorithms.algorithm import RoundResult
from fedpeat_ray.data.corpus import Corpus
from fedpeat_ray.fleet.population import Fleet
from fedpeat_ray.records import COMPLETED, DROPPED, NON_FINITE, SKIPPED


def client_columns(round: int, result: RoundResult, fleet: Fleet, corpus: Corpus) -> dict[str, np.ndarray]:
    """Columns of the clients table for one round, a sampled device a position; those skipped are in their places."""
    reports = {report.device_id: report for report in result.reports}
    refused = NON_FINITE if result.refused == UPDATES else None
    reasons = [
        reports[device_id].failure or refused if device_id in reports else reason
        for device_id, reason in zip(result.device_ids.tolist(), result.admission.drop_reason, strict=True)
    ]
    num_asked, num_skipped = len(result.device_ids), len(result.skipped)
    used = np.array([reason is None for reason in reasons], dtype=bool)
    trained = [reports.get(device_id) for device_id in result.device_ids.tolist()]
    costs, tasks = result.costs, [*result.tasks, *result.skipped]
    device_ids = np.array([*result.device_ids.tolist(), *(task.device_id for task in result.skipped)], dtype=np.int64)

    def with_skipped(values: Sequence[Any] | np.ndarray, default: Any) -> list[Any]:
        return [*(values.tolist() if isinstance(values, np.ndarray) else values), *[default] * num_skipped]

    outcomes = [COMPLETED if reason is None else DROPPED for reason in reasons]
    columns = {
        "round": [round] * len(tasks),
        "device_id": device_ids,
        "tier": [fleet.tier_names[tier] for tier in fleet.tier[device_ids]],
        "group": [corpus.most_common_group(task.documents) for task in tasks],
        "outcome": with_skipped(outcomes, SKIPPED),
        "drop_reason": with_skipped(reasons, None),
        "level": with_skipped([None] * num_asked if result.levels is None else result.levels, None),
        "emulator_age": with_skipped([None if task.level is None else task.age for task in result.tasks], None),
        "lora_rank": with_skipped([result.lora_rank] * num_asked, None),
        "num_steps": [task.num_steps for task in tasks],
        "num_examples": [task.num_examples for task in tasks],
        "num_tokens": [task.num_tokens for task in tasks],
        "download_bytes": with_skipped(costs.download_bytes, 0),
        "emulator_bytes": with_skipped([0] * num_asked if result.emulator_bytes is None else result.emulator_bytes, 0),
        "upload_bytes": with_skipped(np.where(used, costs.upload_bytes, 0), 0),
        "download_s": with_skipped(costs.download_s, 0.0),
        "compute_s": with_skipped(costs.compute_s, 0.0),
        "upload_s": with_skipped(costs.upload_s, 0.0),
        "energy_j": with_skipped(costs.energy_j, 0.0),
        "flops": with_skipped(costs.compute_s * fleet.flops_per_s[result.device_ids], 0.0),
        "memory_bytes": with_skipped(costs.memory_bytes, 0),
        "memory_cap_bytes": fleet.memory_cap_bytes[device_ids],
        "train_loss": with_skipped([report and report.train_loss for report in trained], None),
        "wall_train_s": with_skipped([report and report.wall_train_s for report in trained], None),
    }
    order = np.argsort(device_ids, kind="stable") if num_skipped else np.arange(len(tasks))
    return {
        name: np.asarray(values, dtype=object if None in values else None)[order] for name, values in columns.items()
    }


def round_row(round: int, clients: dict[str, Any], virtual_s: float) -> dict[str, Any]:
    """The row of the rounds table that follows from its clients; evaluation and wall times are added by the loop."""
    outcomes = np.array(clients["outcome"])
    completed = outcomes == COMPLETED
    tokens = np.array(clients["num_tokens"])[completed]
    losses = np.array(clients["train_loss"], dtype=float)[completed]
    return {
        "round": round,
        "virtual_s": virtual_s,
        "num_completed": int(completed.sum()),
        "num_dropped": int((outcomes == DROPPED).sum()),
        "num_skipped": int((outcomes == SKIPPED).sum()),
        "num_tokens": int(tokens.sum()),
        "download_bytes": int(clients["download_bytes"].sum()),
        "emulator_bytes": int(clients["emulator_bytes"].sum()),
        "upload_bytes": int(clients["upload_bytes"].sum()),
        "energy_j": float(clients["energy_j"].sum()),
        "flops": float(clients["flops"].sum()),
        "train_loss": float((losses * tokens).sum() / tokens.sum()) if completed.any() else None,
    }
