"""What a controller is asked, what it answers (a level for each device of a round), and what it hears of it.

Legend: N devices, L levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from fedpeat_ray.config import ControlConfig

SKIP = 0
"""The level of a device that is not to take part."""

Memory = Mapping[str, np.ndarray]
"""What a controller remembers, by name."""


@dataclass(frozen=True)
class Prospects:
    """What each level would ask of each device, as far as the server can know before the round."""

    memory_bytes_L: np.ndarray
    """Peak training memory on the emulator of level 1, 2, …"""
    memory_cap_bytes_N: np.ndarray
    total_s_NL: np.ndarray
    """Virtual seconds at the nominal speed of the links; a level that the device does not hold is downloaded."""
    held_level_N: np.ndarray
    """The level of the emulator that a device has; 0: none that is current."""
    deadline_s: float | None

    @property
    def fits_NL(self) -> np.ndarray:
        """Whether the device has the memory."""
        return self.memory_bytes_L <= self.memory_cap_bytes_N[:, None]

    @property
    def in_time_NL(self) -> np.ndarray:
        """Whether the device can be expected before the deadline."""
        return np.full(self.total_s_NL.shape, True) if self.deadline_s is None else self.total_s_NL <= self.deadline_s


@dataclass(frozen=True)
class Decision:
    """What a controller was asked in a round, and what it answered."""

    round: int
    device_ids: np.ndarray
    prospects: Prospects
    levels_N: np.ndarray
    """SKIP for devices that were left out."""


@dataclass(frozen=True)
class Outcome:
    """What came of a decision; a device that was left out has zeros."""

    completed_N: np.ndarray
    """Whether the device's update was used."""
    total_s_N: np.ndarray
    """Virtual seconds, downloading and uploading included, as far as it got."""
    download_bytes_N: np.ndarray
    upload_bytes_N: np.ndarray
    energy_j_N: np.ndarray
    round_s: float
    """Virtual seconds of the round."""
    perplexity: float | None
    """Of the model after the round; None where it was not evaluated."""


class Controller(ABC):
    """Observes, acts and learns, round by round.

    What it remembers is a mapping of arrays that is handed in and out: it is part of every checkpoint.
    """

    @classmethod
    @abstractmethod
    def build(cls, config: ControlConfig, seed: int) -> Self:
        """With the run's settings and seed."""

    def may_give(self, levels: Sequence[int]) -> Sequence[int]:
        """Which of these levels it may give a device, ever."""
        return levels

    def init(self) -> Memory:
        """What it remembers before the first round."""
        return {}

    @abstractmethod
    def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> np.ndarray:
        """Levels (N,) from 1, SKIP for devices that are not to take part. A device that gets a level beyond its
        memory drops out."""

    def learn(self, decision: Decision, outcome: Outcome, memory: Memory) -> Memory:
        """What it remembers once it knows what came of its decision."""
        return memory


def largest(allowed_NL: np.ndarray) -> np.ndarray:
    """The highest level that is allowed, or 1 if none is: (N, L) bool -> (N,)."""
    levels = np.arange(1, allowed_NL.shape[1] + 1)
    return np.maximum(1, np.where(allowed_NL, levels, 0).max(axis=1))
