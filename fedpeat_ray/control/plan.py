"""What a controller is asked, and what it answers: a level for each device of a round.

Legend: N devices, L levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

SKIP = 0
"""The level of a device that is not to take part."""


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


class Controller(Protocol):
    """Decides before a round. A device that no level fits gets level 1, and drops out for want of memory."""

    def __call__(self, round: int, device_ids: np.ndarray, prospects: Prospects) -> np.ndarray:
        """Levels (N,), SKIP for devices that are not to take part."""
        ...


def largest(allowed_NL: np.ndarray) -> np.ndarray:
    """The highest level that is allowed, or 1 if none is: (N, L) bool -> (N,)."""
    levels = np.arange(1, allowed_NL.shape[1] + 1)
    return np.maximum(1, np.where(allowed_NL, levels, 0).max(axis=1))
