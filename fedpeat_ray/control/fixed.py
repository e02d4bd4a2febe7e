"""One level for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from fedpeat_ray.config import ControlConfig
from fedpeat_ray.control.plan import Controller, Memory, Prospects, asked


@dataclass(frozen=True)
class Fixed(Controller):
    """Every device gets the same emulator; those it does not fit drop out."""

    level: int

    @classmethod
    def build(cls, config: ControlConfig, seed: int) -> Self:
        """See Controller."""
        return cls(config.level)

    def may_give(self, levels: Sequence[int]) -> Sequence[int]:
        """Its own."""
        return (self.level,)

    def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> np.ndarray:
        """See Controller."""
        return asked(self.level, prospects)
