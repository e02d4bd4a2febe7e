"""A round of devices with emulators, as far as it costs anything: the simulation and the environment in which
controllers are trained are of this code.

Legend: N candidates, M of them take part, F devices of the fleet, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from fedpeat_ray.control.plan import SKIP, Decision, History, Plan, Prospects, Stale
from fedpeat_ray.fleet.conditions import Conditions
from fedpeat_ray.fleet.costs import Admission, Costs
from fedpeat_ray.fleet.levels import EmulatorCosts


@dataclass(frozen=True)
class Held:
    """Which emulator each device of the fleet has."""

    level_F: np.ndarray
    """int8; 0: none."""
    version_F: np.ndarray | None = None
    """int16, of that emulator; None: there was only one so far, 0."""

    @classmethod
    def nothing(cls, num_devices: int) -> Self:
        """Before the first round."""
        return cls(np.zeros(num_devices, np.int8))

    def at(self, version: int, device_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) level of the emulator that each of these devices has, and how many versions it is behind."""
        level_N = self.level_F[device_ids]
        version_N = 0 if self.version_F is None else self.version_F[device_ids].astype(int)
        return level_N, (version - version_N) * (level_N > 0)

    def after(self, settled: Settled, version: int) -> Self:
        """What is held after a round in which emulators of this version were sent."""
        received = np.flatnonzero(settled.received_N)
        device_ids, levels = settled.device_ids.ravel()[received], settled.levels_N.ravel()[received]
        level_F, version_F = written(self.level_F, device_ids, levels), self.version_F
        if version or version_F is not None:
            version_F = np.zeros(len(level_F), np.int16) if version_F is None else version_F
            version_F = written(version_F, device_ids, version)
        return replace(self, level_F=level_F, version_F=version_F)


@dataclass(frozen=True)
class Seen:
    """What the server saw of each device of the fleet."""

    last_round_F: np.ndarray
    """int32; 0: it never took part."""
    downlink_F: np.ndarray
    """float32, bytes per second in the last round it received something; 0: never."""
    uplink_F: np.ndarray
    times_F: np.ndarray
    """int16, rounds that it completed."""

    @classmethod
    def nothing(cls, num_devices: int) -> Self:
        """Before the first round."""
        return cls(*(np.zeros(num_devices, dtype) for dtype in (np.int32, np.float32, np.float32, np.int16)))

    def after(self, settled: Settled, round: int) -> Self:
        """What was seen once a round is over."""
        costs, device_ids = settled.costs, settled.device_ids.ravel()

        def measured(before_F: np.ndarray, num_bytes_N: np.ndarray, seconds_N: np.ndarray) -> np.ndarray:
            known = np.flatnonzero((seconds_N > 0) & (num_bytes_N > 0))
            return written(before_F, device_ids[known], num_bytes_N.ravel()[known] / seconds_N.ravel()[known])

        took_part = device_ids[np.flatnonzero(costs.download_s > 0)]
        completed = device_ids[np.flatnonzero(settled.admission.completed)]
        return replace(
            self,
            last_round_F=written(self.last_round_F, took_part, round),
            downlink_F=measured(self.downlink_F, costs.download_bytes, costs.download_s),
            uplink_F=measured(self.uplink_F, costs.upload_bytes, costs.upload_s),
            times_F=written(self.times_F, completed, self.times_F[completed] + 1),
        )

    def history(
        self, conditions: Conditions, round: int, device_ids: np.ndarray, perplexities: Sequence[float | np.ndarray]
    ) -> History:
        """What a controller is told of it; `perplexities` are those of the evaluations so far."""
        fleet = conditions.fleet
        downlink_N, uplink_N = self.downlink_F[device_ids], self.uplink_F[device_ids]
        last, before = (*reversed(perplexities), None, None)[:2]
        return History(
            downlink_N + fleet.downlink_bytes_per_s[device_ids] * (downlink_N == 0),
            uplink_N + fleet.uplink_bytes_per_s[device_ids] * (uplink_N == 0),
            round - self.last_round_F[device_ids],
            self.times_F[device_ids],
            last,
            before,
        )


def written(column_F: np.ndarray, device_ids: np.ndarray, values: np.ndarray | int) -> np.ndarray:
    """(F,) the column with new values for these devices, of the type it had."""
    new_F = column_F.copy()
    new_F[device_ids] = np.asarray(values).astype(column_F.dtype)
    return new_F


@dataclass(frozen=True)
class Settled:
    """What a decision costs, and who completes the round. Bytes, seconds and joules of a candidate that is left out are
    0."""

    device_ids: np.ndarray
    levels_N: np.ndarray
    ages_N: np.ndarray
    costs: Costs
    admission: Admission
    emulator_bytes_N: np.ndarray
    """Of emulators that were sent, as far as they got."""
    received_N: np.ndarray
    """bool: whether all of a new emulator arrived."""

    def of(self, chosen_N: np.ndarray) -> Settled:
        """For some of the devices."""
        return Settled(
            self.device_ids[chosen_N],
            self.levels_N[chosen_N],
            self.ages_N[chosen_N],
            self.costs.of(chosen_N),
            replace(self.admission, reason=self.admission.reason[chosen_N]),
            self.emulator_bytes_N[chosen_N],
            self.received_N[chosen_N],
        )


def prospects(
    emulators: EmulatorCosts,
    levels: Sequence[int],
    conditions: Conditions,
    held: Held,
    version: int,
    round: int,
    device_ids: np.ndarray,
    num_tokens: np.ndarray,
    realigns: bool,
    history: History | None = None,
) -> Prospects:
    """What each level would cost each candidate; `version` is the current one of emulators."""
    level_N, age_N = held.at(version, device_ids)
    current_N, stale = level_N * (age_N == 0), None
    levels_L = np.array(levels).reshape(-1, *[1] * device_ids.ndim)

    def total_s(levels: np.ndarray, held_N: np.ndarray) -> np.ndarray:
        task = emulators.task(levels, emulators.exchange_bytes(levels, held_N), num_tokens)
        return conditions.nominal_s(device_ids, task)

    if realigns:
        stale_N = level_N * (age_N > 0)
        stale = Stale(stale_N, age_N, total_s(np.maximum(1, stale_N), stale_N))
    return Prospects(
        emulators.memory_bytes_L[: len(levels)],
        conditions.fleet.memory_cap_bytes[device_ids],
        np.moveaxis(total_s(levels_L, current_N), 0, -1),
        current_N,
        conditions.deadline_s,
        conditions.cohort_of(round, device_ids.shape[-1]),
        conditions.num_places,
        num_tokens,
        stale,
        history,
    )


def decision(round: int, device_ids: np.ndarray, seen: Prospects, answer: Plan | np.ndarray) -> Decision:
    """A controller's answer to its prospects. To go on with a stale emulator, a device must have one of that level.
    For P answers at a time, (P, N) levels, so is the decision."""
    plan = answer if isinstance(answer, Plan) else Plan(answer)
    ages_N = np.zeros(plan.levels_N.shape, int)
    if seen.stale:
        goes_on = plan.stale_N & (plan.levels_N == seen.stale.level_N)
        ages_N = seen.stale.age_N * goes_on
    return Decision(round, device_ids, seen, plan.levels_N, ages_N)


def settle(emulators: EmulatorCosts, conditions: Conditions, now_s: float | np.ndarray, decided: Decision) -> Settled:
    """What comes of a decision, training apart."""
    seen, levels_N, ages_N = decided.prospects, decided.levels_N, np.asarray(decided.ages_N)
    asked_N, held_N = levels_N != SKIP, seen.held_level_N
    if seen.stale:
        held_N = np.where(ages_N > 0, levels_N, held_N)
    of_level_N = np.maximum(1, levels_N)
    sent_bytes_N = emulators.exchange_bytes(of_level_N, held_N)
    demand = emulators.task(of_level_N, sent_bytes_N, np.asarray(seen.num_tokens_N))
    costs, admission = conditions.settle(decided.round, now_s, decided.device_ids, demand, asked_N)
    emulator_bytes_N = np.minimum(costs.download_bytes, sent_bytes_N)
    received_N = asked_N & (costs.download_bytes == demand.download_bytes) & (ages_N == 0)
    return Settled(decided.device_ids, levels_N, ages_N, costs, admission, emulator_bytes_N, received_N)
