"""Training where the text of a device is read by whoever trains it, and what devices are asked to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.records import Assignment
from fedpeat_ray.training.collect import Collected, Result
from fedpeat_ray.training.map_clients import MapClients, split

_DEVICES_AT_A_TIME = 512


@dataclass(frozen=True)
class WithData:
    """`train(backbone, shared, assignments)`: each device's text, then `train` on it.

    So the main process handles a few numbers a device, and hosts build batches side by side.
    """

    train: Callable
    data: ClientData

    @property
    def files(self) -> list[Path]:
        """Of the text, and of the work."""
        return [*self.data.corpus.files, *getattr(self.train, "files", ())]

    def __call__(self, backbone: Any, shared: Any, assignments: Sequence[Assignment]) -> list[Any]:
        return self.train(backbone, shared, [self.data.task(assignment) for assignment in assignments])


@dataclass(frozen=True)
class Assign:
    """`train(backbone, round, groups of device ids)`: what each device is asked, in numbers."""

    data: ClientData

    def __call__(self, backbone: Any, round: int, groups: Sequence[np.ndarray]) -> list[Result]:
        return [Result(self.data.assignments(device_ids, round)) for device_ids in groups]


def assign(map_clients: MapClients, data: ClientData, device_ids: np.ndarray, round: int) -> list[Assignment]:
    """What each device is asked to train in a round; hosts share the drawing."""
    groups = split(device_ids, _DEVICES_AT_A_TIME)
    found, _ = map_clients(Assign(data), round, groups, Collected())
    return [assignment for group in found.result() for assignment in group]
