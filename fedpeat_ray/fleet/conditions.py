"""The simulated facts of a round: who is asked, what it costs each device, who completes and when."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from fedpeat_ray.config import FleetConfig
from fedpeat_ray.fleet.availability import Availability, build_availability
from fedpeat_ray.fleet.channel import both_fadings, link_ok, link_rates
from fedpeat_ray.fleet.costs import Admission, Costs, Task, admit, spent, task_costs, task_s
from fedpeat_ray.fleet.population import Fleet, build_fleet
from fedpeat_ray.seeding import generator


@dataclass(frozen=True)
class Conditions:
    """A fleet with its availability, its links and the rules of a round. Decides; trains nothing."""

    fleet: Fleet
    config: FleetConfig
    availability: Availability
    seed: int
    cohort_size: int
    over_sample: float
    deadline_s: float | None

    @property
    def num_places(self) -> int | np.ndarray:
        """Devices that can complete a round."""
        return self.cohort_size

    @property
    def num_asked(self) -> int:
        """Devices asked in a round: cohort_size * over_sample, rounded up."""
        return math.ceil(self.cohort_size * self.over_sample)

    def sample(self, round: int, num_candidates: int | None = None) -> np.ndarray:
        """Device ids asked in a round, sorted; or so many candidates to choose from."""
        return self.fleet.sample(round, num_candidates or self.num_asked)

    def cohort_of(self, round: int, num_candidates: int) -> np.ndarray:
        """(N,) bool: which of the candidates are asked if nobody chooses."""
        if num_candidates <= self.num_asked:
            return np.full(num_candidates, True)
        chosen = np.full(num_candidates, False)
        rng = generator(self.seed, "cohort of candidates", round)
        chosen[rng.choice(num_candidates, self.num_asked, replace=False, shuffle=False)] = True
        return chosen

    def nominal_s(self, device_ids: np.ndarray, task: Task) -> np.ndarray:
        """(N,) virtual seconds that the task would take each device at its tier's link speeds; (L, N) for figures of
        L tasks."""
        download_s, compute_s, upload_s = task_s(self.fleet, device_ids, task, *self.fleet.nominal_rates(device_ids))
        return download_s + compute_s + upload_s

    def settle(
        self, round: int, now_s: float | np.ndarray, device_ids: np.ndarray, task: Task, asked: np.ndarray | None = None
    ) -> tuple[Costs, Admission]:
        """What the round costs these devices, and who completes it. Unavailable devices take no bandwidth.

        A round that nobody completes and no deadline ends lasts one slot of the availability model.

        `asked`: which of them take part, by default all. For P cases at a time it is (P, N), and so are the figures of
        the task and all arrays of the answer.
        """
        asked = np.full(device_ids.shape, True) if asked is None else asked
        available = self.available(device_ids, now_s)
        downlink, uplink = self.rates(round, device_ids, available, asked)
        costs = task_costs(self.fleet, device_ids, task, downlink, uplink)
        in_reach = link_ok(self.config.channel, downlink, uplink)
        admission = admit(costs, available, in_reach, self.num_places, self.deadline_s, asked)
        slot_s, round_s = self.config.availability.slot_s, admission.round_s
        round_s = np.where(round_s == 0.0, slot_s, round_s)[()]
        admission = replace(admission, round_s=round_s)  # type: ignore[arg-type]  # numpy annotates an array
        return spent(costs, admission), admission

    def rates(
        self, round: int, device_ids: np.ndarray, available: np.ndarray, asked: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N,) down and up, in bytes per second; (P, N) for P cases of `asked`. Nobody sends to unavailable devices:
        theirs are those of their own links."""
        own, channel = self.fleet.nominal_rates(device_ids), self.config.channel
        if channel.kind == "nominal":
            return own
        num_sharing = np.maximum(1, (asked & available).sum(axis=-1, keepdims=True))
        shared = link_rates(self.fleet, channel, device_ids, own, self.fading(round, device_ids), num_sharing)
        return np.where(available, shared[0], own[0]), np.where(available, shared[1], own[1])

    def available(self, device_ids: np.ndarray, now_s: float | np.ndarray) -> np.ndarray:
        """(N,) bool: who can be asked at that time."""
        return self.availability.available(device_ids, float(now_s))

    def fading(self, round: int, device_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) down and up, of the channel in that round."""
        return both_fadings(self.config.channel, self.seed, round, device_ids)


def build_conditions(
    config: FleetConfig, seed: int, cohort_size: int, over_sample: float, deadline_s: float | None
) -> Conditions:
    """Draw the fleet and its surroundings. Raises ConfigError or DataError for settings that do not fit."""
    fleet = build_fleet(config, seed)
    availability = build_availability(config.availability, fleet.num_devices, seed)
    return Conditions(fleet, config, availability, seed, cohort_size, over_sample, deadline_s)
