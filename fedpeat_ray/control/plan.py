"""What a controller is asked, what it answers (who takes part in a round, on which emulator), and what it hears of it.

Legend: N devices, L levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from fedpeat_ray.config import ControlConfig, SimulationConfig

SKIP = 0
"""The level of a device that is not to take part."""

Memory = Mapping[str, np.ndarray]
"""What a controller remembers, by name."""


@dataclass(frozen=True)
class Stale:
    """Emulators that were current once and are on devices still; to go on with one costs no exchange."""

    level_N: np.ndarray
    """0: the device has none."""
    age_N: np.ndarray
    """Re-alignments since."""
    total_s_N: np.ndarray
    """Virtual seconds of a round on it, at the nominal speed of the links."""


@dataclass(frozen=True)
class History:
    """What the server saw of the devices and of the model in the rounds before."""

    downlink_bytes_per_s_N: np.ndarray
    """When the device last took part; until then its tier's."""
    uplink_bytes_per_s_N: np.ndarray
    rounds_since_N: np.ndarray
    """Since the device last took part; the number of the round if it never did."""
    times_N: np.ndarray
    """Rounds that the device completed."""
    perplexity: float | np.ndarray | None
    """When it was last evaluated; (E,) of E fleets side by side."""
    perplexity_before: float | np.ndarray | None
    """The time before."""


@dataclass(frozen=True)
class Prospects:
    """What each level would ask of each candidate, as far as the server can know before the round. Of E fleets side by
    side, where controllers are trained, all arrays have a leading axis E."""

    memory_bytes_L: np.ndarray
    """Peak training memory on the emulator of level 1, 2, …"""
    memory_cap_bytes_N: np.ndarray
    total_s_NL: np.ndarray
    """Virtual seconds at the nominal speed of the links; a level that the device does not hold is downloaded."""
    held_level_N: np.ndarray
    """The level of the emulator that a device has; 0: none that is current."""
    deadline_s: float | None
    asked_N: np.ndarray | bool = True
    """Whether the device would be asked if a cohort were drawn from the candidates at random."""
    num_places: int | np.ndarray = 1
    """Devices that can complete the round: the fastest so many of those that take part; (E, 1) of E fleets."""
    num_tokens_N: np.ndarray | int = 0
    """That the device would train on."""
    stale: Stale | None = None
    """None: emulators are never re-aligned."""
    history: History | None = None
    """For controllers that want it."""

    @property
    def fits_NL(self) -> np.ndarray:
        """Whether the device has the memory."""
        return self.memory_bytes_L <= self.memory_cap_bytes_N[..., None]

    @property
    def in_time_NL(self) -> np.ndarray:
        """Whether the device can be expected before the deadline."""
        return np.full(self.total_s_NL.shape, True) if self.deadline_s is None else self.total_s_NL <= self.deadline_s


@dataclass(frozen=True)
class Plan:
    """A controller's answer."""

    levels_N: np.ndarray
    """From 1; SKIP for devices that are not to take part."""
    stale_N: np.ndarray | bool = False
    """Whether the device goes on with the stale emulator that it has; the level is that one's."""


@dataclass(frozen=True)
class Decision:
    """What a controller was asked in a round, and what it answered."""

    round: int
    device_ids: np.ndarray
    prospects: Prospects
    levels_N: np.ndarray
    """SKIP for devices that were left out."""
    ages_N: np.ndarray | int = 0
    """Above 0 where a device goes on with the stale emulator that it has."""


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

    wants_history: ClassVar[bool] = False
    """Whether prospects are to have it: some numbers a device of the fleet, in every checkpoint."""

    @classmethod
    @abstractmethod
    def build(cls, config: ControlConfig, seed: int) -> Self:
        """With the run's settings and seed."""

    @classmethod
    def check(cls, config: SimulationConfig) -> None:
        """Raise ConfigError for settings that it cannot work with, before anything starts."""
        cls.build(config.control, config.seed)

    def may_give(self, levels: Sequence[int]) -> Sequence[int]:
        """Which of these levels it may give a device, ever."""
        return levels

    def digests(self) -> dict[str, str | None]:
        """By name, of what it decides by beside its settings: config.json has them, and a run goes on with no other."""
        return {}

    def init(self) -> Memory:
        """What it remembers before the first round."""
        return {}

    @abstractmethod
    def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> Plan | np.ndarray:
        """A plan, or its levels (N,) alone, for the candidates of a round. A device that gets a level beyond its
        memory drops out; of those that take part, the fastest `cohort_size` complete the round."""

    def learn(self, decision: Decision, outcome: Outcome, memory: Memory) -> Memory:
        """What it remembers once it knows what came of its decision."""
        return memory


def asked(levels: np.ndarray | int, prospects: Prospects) -> np.ndarray:
    """These levels for the cohort that chance picks from the candidates: (N,)."""
    return np.where(np.broadcast_to(prospects.asked_N, prospects.memory_cap_bytes_N.shape), levels, SKIP)


def largest(allowed_NL: np.ndarray) -> np.ndarray:
    """The highest level that is allowed, or 1 if none is: (N, L) bool -> (N,)."""
    levels = np.arange(1, allowed_NL.shape[1] + 1)
    return np.maximum(1, np.where(allowed_NL, levels, 0).max(axis=1))
