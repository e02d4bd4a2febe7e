"""Rules of thumb: the largest emulator that a device can take, and three ways to pick the devices."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np

from fedpeat_ray.config import ControlConfig
from fedpeat_ray.control.plan import SKIP, Controller, Memory, Prospects, asked, largest


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


class Preferring(Greedy):
    """Greedy, but of the candidates those that come first in some order are asked, as many as chance would ask."""

    def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> np.ndarray:
        """See Controller."""
        levels_N, late_N = self.preferred(prospects)
        fits_N = prospects.fits_NL[np.arange(len(levels_N)), levels_N - 1]
        num_asked = int(np.broadcast_to(prospects.asked_N, levels_N.shape).sum())
        first = np.lexsort((late_N, ~fits_N))[:num_asked]
        plan = np.full(len(levels_N), SKIP)
        plan[first] = levels_N[first]
        return plan

    @abstractmethod
    def preferred(self, prospects: Prospects) -> tuple[np.ndarray, np.ndarray]:
        """(N,) the level for each candidate, and its place in the order: the lowest come first."""


class GreedyByTime(Preferring):
    """Those that are expected soonest, each on the largest level that fits its memory and the deadline."""

    def preferred(self, prospects: Prospects) -> tuple[np.ndarray, np.ndarray]:
        """See Preferring."""
        levels_N = largest(prospects.fits_NL & prospects.in_time_NL)
        return levels_N, prospects.total_s_NL[np.arange(len(levels_N)), levels_N - 1]


class GreedyByHolding(Preferring):
    """Those that hold a current emulator, on it; then the others, each on the largest level. By time among equals."""

    def preferred(self, prospects: Prospects) -> tuple[np.ndarray, np.ndarray]:
        """See Preferring."""
        held_N = prospects.held_level_N
        levels_N = np.where(held_N > 0, held_N, largest(prospects.fits_NL & prospects.in_time_NL))
        total_s = prospects.total_s_NL[np.arange(len(levels_N)), levels_N - 1]
        return levels_N, np.argsort(np.lexsort((total_s, held_N == 0)))
