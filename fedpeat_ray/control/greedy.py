"""The largest emulator that a device can take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from fedpeat_ray.config import ControlConfig
from fedpeat_ray.control.plan import Controller, Memory, Prospects, asked, largest


@dataclass(frozen=True)
class Greedy(Controller):
    """Every device gets the highest level that fits its memory and, as far as can be told, the deadline."""

    @classmethod
    def build(cls, config: ControlConfig, seed: int) -> Self:
        """See Controller."""
        return cls()

    def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> np.ndarray:
        """See Controller."""
        return asked(largest(prospects.fits_NL & prospects.in_time_NL), prospects)
