"""The plainest side of the seam: one client batch after another, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeat_ray.models.foundation import Backbone
from fedpeat_ray.training.map_clients import Aggregator, split


@dataclass(frozen=True)
class Serial:
    """MapClients in this process."""

    backbone: Backbone

    def __call__(
        self, train: Callable, shared: Any, tasks: Sequence[Any], aggregator: Aggregator, batch_size: int = 1
    ) -> tuple[Any, list[Any]]:
        total, reports = aggregator, []
        for batch in split(tasks, batch_size):
            updates = train(self.backbone, shared, batch)
            total = total.merge(aggregator.add(updates))
            reports += [update.report for update in updates]
        return total, reports
