"""The plainest side of the seam: one client batch after another, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeat_ray.models.foundation import Backbone
from fedpeat_ray.training.map_clients import Aggregator, Where, merged, split


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
        batches, reports = split(tasks, batch_size), []

        def part(batch: int) -> Any:
            updates = train(backbone, shared, batches[batch])
            reports.extend(update.report for update in updates)
            return aggregator.add(updates)

        return merged(part, (0, len(batches))) if batches else aggregator, reports
