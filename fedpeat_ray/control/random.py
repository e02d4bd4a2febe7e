"""A level at random: what any other controller must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from fedpeat_ray.config import ControlConfig
from fedpeat_ray.control.plan import Controller, Memory, Prospects, asked
from fedpeat_ray.seeding import derive_seed, uniforms


@dataclass(frozen=True)
class Random(Controller):
    """Every device gets, in every round anew, one of the levels that fit its memory, all alike likely."""

    seed: int

    @classmethod
    def build(cls, config: ControlConfig, seed: int) -> Self:
        """See Controller."""
        return cls(seed)

    def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> np.ndarray:
        """See Controller."""
        draws = uniforms(derive_seed(self.seed, "random level", round), device_ids)
        num_fitting = prospects.fits_NL.sum(axis=1)  # memory rises with the level: those from 1 on
        return asked(1 + np.floor(draws * np.maximum(1, num_fitting)).astype(int), prospects)
