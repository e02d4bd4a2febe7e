"""The plainest side of the seam: one client batch after another, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeat_ray.models.foundation import Backbone
from fedpeat_ray.training.map_clients import Aggregator, Where, split


@dataclass(frozen=True)
class Serial:
    """MapClients in this process."""

    backbone: Backbone
    driver: Backbone | None = None
    """What the driver's work is done on; None: the same."""

    def __call__(
        self,
        train: Callable,
        shared: Any,
        tasks: Sequence[Any],
        aggregator: Aggregator,
        batch_size: int = 1,
        where: Where = "hosts",
    ) -> tuple[Any, list[Any]]:
        backbone = self.driver if where == "driver" and self.driver else self.backbone
        total, reports = aggregator, []
        for batch in split(tasks, batch_size):
            updates = train(backbone, shared, batch)
            total = total.merge(aggregator.add(updates))
            reports += [update.report for update in updates]
        return total, reports
