"""From the result of a round to the rows of the log."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedpeat_ray.aggregation.server_optimizer import UPDATES
from fedpeat_ray.algorithms.round_result import RoundResult
from fedpeat_ray.fleet.population import Fleet
from fedpeat_ray.records import COMPLETED, DROPPED, NON_FINITE


def client_columns(round: int, result: RoundResult, fleet: Fleet) -> dict[str, Any]:
    """Columns of the clients table for one round, a sampled device a position."""
    reports = {report.device_id: report for report in result.reports}
    refused = NON_FINITE if result.refused == UPDATES else None
    reasons = [
        reports[device_id].failure or refused if device_id in reports else reason
        for device_id, reason in zip(result.device_ids.tolist(), result.admission.drop_reason, strict=True)
    ]
    num_devices, costs = len(result.device_ids), result.costs
    used = np.array([reason is None for reason in reasons], dtype=bool)
    trained = [reports.get(device_id) for device_id in result.device_ids.tolist()]
    return {
        "round": [round] * num_devices,
        "device_id": result.device_ids,
        "tier": [fleet.tier_names[tier] for tier in fleet.tier[result.device_ids]],
        "outcome": [COMPLETED if reason is None else DROPPED for reason in reasons],
        "drop_reason": reasons,
        "level": [None] * num_devices if result.levels is None else result.levels,
        "lora_rank": [result.lora_rank] * num_devices,
        "num_steps": [task.num_steps for task in result.tasks],
        "num_examples": [task.num_examples for task in result.tasks],
        "num_tokens": [task.num_tokens for task in result.tasks],
        "download_bytes": costs.download_bytes,
        "emulator_bytes": np.zeros(num_devices, int) if result.emulator_bytes is None else result.emulator_bytes,
        "upload_bytes": np.where(used, costs.upload_bytes, 0),
        "download_s": costs.download_s,
        "compute_s": costs.compute_s,
        "upload_s": costs.upload_s,
        "energy_j": costs.energy_j,
        "flops": costs.compute_s * fleet.flops_per_s[result.device_ids],
        "memory_bytes": costs.memory_bytes,
        "memory_cap_bytes": costs.memory_cap_bytes,
        "train_loss": [report and report.train_loss for report in trained],
        "wall_train_s": [report and report.wall_train_s for report in trained],
    }


def round_row(round: int, clients: dict[str, Any], virtual_s: float) -> dict[str, Any]:
    """The row of the rounds table that follows from its clients; evaluation and wall times are added by the loop."""
    completed = np.array([outcome == COMPLETED for outcome in clients["outcome"]], dtype=bool)
    tokens = np.array(clients["num_tokens"])[completed]
    losses = np.array(clients["train_loss"], dtype=float)[completed]
    return {
        "round": round,
        "virtual_s": virtual_s,
        "num_completed": int(completed.sum()),
        "num_dropped": int((~completed).sum()),
        "num_tokens": int(tokens.sum()),
        "download_bytes": int(clients["download_bytes"].sum()),
        "emulator_bytes": int(clients["emulator_bytes"].sum()),
        "upload_bytes": int(clients["upload_bytes"].sum()),
        "energy_j": float(clients["energy_j"].sum()),
        "flops": float(clients["flops"].sum()),
        "train_loss": float((losses * tokens).sum() / tokens.sum()) if completed.any() else None,
    }
