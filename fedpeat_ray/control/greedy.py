"""The largest emulator that a device can take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeat_ray.control.plan import Prospects, largest


@dataclass(frozen=True)
class Greedy:
    """Every device gets the highest level that fits its memory and, as far as can be told, the deadline."""

    def __call__(self, round: int, device_ids: np.ndarray, prospects: Prospects) -> np.ndarray:
        return largest(prospects.fits_NL & prospects.in_time_NL)
