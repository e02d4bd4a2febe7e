"""Fleets side by side, for environments that play several at a time: one long fleet, with one round for each.

Device i of fleet e has the id e F + i. Legend: E fleets of F devices each, N devices of a round in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from fedpeat_ray.fleet.availability import AlwaysAvailable
from fedpeat_ray.fleet.channel import both_fadings
from fedpeat_ray.fleet.conditions import Conditions
from fedpeat_ray.fleet.population import Fleet


@dataclass(frozen=True)
class SideBySide(Conditions):
    """Conditions of E fleets: device ids are (E, N), times (E,). Fields that are the first one's are those of all."""

    of: Sequence[Conditions]

    @cached_property
    def num_places(self) -> np.ndarray:
        """(E, 1)."""
        return np.array([[each.cohort_size] for each in self.of])

    def sample(self, round: int, num_candidates: int | None = None) -> np.ndarray:
        """(E, N) device ids; N must be the same for all."""
        if num_candidates and num_candidates >= self._num_devices:
            return np.arange(self.fleet.num_devices).reshape(len(self.of), -1)
        return np.stack([each.sample(round, num_candidates) for each in self.of]) + self._first_ids

    def cohort_of(self, round: int, num_candidates: int) -> np.ndarray:
        """(E, N)."""
        if num_candidates <= self._fewest_asked:
            return np.full((len(self.of), num_candidates), True)
        return np.stack([each.cohort_of(round, num_candidates) for each in self.of])

    def available(self, device_ids: np.ndarray, now_s: float | np.ndarray) -> np.ndarray:
        """(E, N)."""
        if isinstance(self.availability, AlwaysAvailable):
            return self.availability.available(device_ids, 0.0)
        own_ids, now_s = device_ids - self._first_ids, np.broadcast_to(now_s, len(self.of))
        return np.stack(
            [each.available(ids, float(now)) for each, ids, now in zip(self.of, own_ids, now_s, strict=True)]
        )

    def fading(self, round: int, device_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(E, N) down and up."""
        return both_fadings(self.config.channel, self._seeds, round, device_ids - self._first_ids)

    @property
    def _num_devices(self) -> int:
        """Of one fleet."""
        return self.of[0].fleet.num_devices

    @cached_property
    def _fewest_asked(self) -> int:
        return min(each.num_asked for each in self.of)

    @cached_property
    def _seeds(self) -> np.ndarray:
        """(E, 1)."""
        return np.array([[each.seed] for each in self.of], np.uint64)

    @cached_property
    def _first_ids(self) -> np.ndarray:
        """(E, 1), of each fleet."""
        return np.arange(0, self.fleet.num_devices, self._num_devices)[:, None]


def side_by_side(conditions: Sequence[Conditions]) -> SideBySide:
    """Of fleets that differ in nothing but their seeds, their devices and the sizes of their cohorts."""
    first = conditions[0]
    columns = [item.name for item in fields(Fleet) if item.name not in ("seed", "tiers")]
    long: dict[str, Any] = {
        name: np.concatenate([getattr(each.fleet, name) for each in conditions]) for name in columns
    }
    return SideBySide(
        replace(first.fleet, **long),
        first.config,
        first.availability,
        first.seed,
        first.cohort_size,
        first.over_sample,
        first.deadline_s,
        conditions,
    )
