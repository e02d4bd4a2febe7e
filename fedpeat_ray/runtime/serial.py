"""The plainest side of the seam: one client batch after another, in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedpeat_ray.models.foundation import Backbone
from fedpeat_ray.training.map_clients import Call, MapClients, merged, split


@dataclass(frozen=True)
class Serial(MapClients):
    """MapClients in this process."""

    backbone: Backbone
    driver: Backbone | None = None
    """What the driver's work is done on; None: the same."""

    def run(self, call: Call) -> tuple[Any, list[Any]]:
        """See MapClients."""
        backbone = self.driver if call.where == "driver" and self.driver else self.backbone
        batches, reports = split(call.tasks, call.batch_size), []

        def part(batch: int) -> Any:
            updates = call.train(backbone, call.shared, batches[batch])
            reports.extend(update.report for update in updates)
            return call.aggregator.add(updates)

        return merged(part, (0, len(batches))) if batches else call.aggregator, reports
