"""One level for all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeat_ray.control.plan import Prospects


@dataclass(frozen=True)
class Fixed:
    """Every device gets the same emulator; those it does not fit drop out."""

    level: int

    def __call__(self, round: int, device_ids: np.ndarray, prospects: Prospects) -> np.ndarray:
        return np.full(len(device_ids), self.level)
