"""Weights & Biases, for those who have it installed and ask for it."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeat_ray.runtime.watchers import scalars

wandb: Any = importlib.import_module("wandb")  # no type checker needs to have it


class WeightsAndBiases:
    """A run there for the run here, also when it is resumed: rounds that are then run again have the numbers they had,
    and W&B drops what comes twice."""

    def __init__(self, project: str, directory: Path, settings: Mapping[str, Any], created: str):
        """`created`: when the run began, of its config.json; with the name of the directory it makes the run's id."""
        self._finished = False
        self._run = wandb.init(
            project=project,
            name=directory.name,
            id=hashlib.sha256(f"{directory.name} {created}".encode()).hexdigest()[:16],
            resume="allow",
            dir=str(directory),
            config=dict(settings),
        )

    def round(self, row: Mapping[str, Any], clients: Mapping[str, Any]) -> None:
        """The scalars of a round, which is the step."""
        self._run.log(scalars.of_round(row, clients), step=row["round"])

    def summary(self, summary: Mapping[str, Any]) -> None:
        """What came out, beside the last values."""
        self._finished = not summary["failure"]
        self._run.summary.update(scalars.of_summary(summary) | {"adapter_sha256": summary["adapter_sha256"]})

    def close(self) -> None:
        """Send what is left; a run without a result is marked as failed there."""
        self._run.finish(exit_code=0 if self._finished else 1)
