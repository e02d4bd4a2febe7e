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
        version_N = np.zeros(len(level_N), int) if self.version_F is None else self.version_F[device_ids].astype(int)
        return level_N, np.where(level_N > 0, version - version_N, 0)

    def after(self, settled: Settled, version: int) -> Self:
        """What is held after a round in which emulators of this version were sent."""
        received = settled.device_ids[settled.received_M]
        level_F, version_F = self.level_F.copy(), self.version_F
        level_F[received] = settled.levels_M[settled.received_M]
        if version or version_F is not None:
            version_F = np.zeros(len(level_F), np.int16) if version_F is None else version_F.copy()
            version_F[received] = version
        return replace(self, level_F=level_F, version_F=version_F)


@dataclass(frozen=True)
class Seen:
    """What the server saw of each device of the fleet."""

    last_round_F: np.ndarray
    """int32; 0: it never took part."""
    downlink_F: np.ndarray
    """float32, bytes per second in the last round it received something; 0: never."""
    uplink_F: np.ndarray

    @classmethod
    def nothing(cls, num_devices: int) -> Self:
        """Before the first round."""
        return cls(*(np.zeros(num_devices, dtype) for dtype in (np.int32, np.float32, np.float32)))

    def after(self, settled: Settled, round: int) -> Self:
        """What was seen once a round is over."""
        costs, device_ids, last_round_F = settled.costs, settled.device_ids, self.last_round_F.copy()
        last_round_F[device_ids[costs.download_s > 0]] = round

        def measured(before_F: np.ndarray, num_bytes_M: np.ndarray, seconds_M: np.ndarray) -> np.ndarray:
            after_F, known = before_F.copy(), (seconds_M > 0) & (num_bytes_M > 0)
            after_F[device_ids[known]] = num_bytes_M[known] / seconds_M[known]
            return after_F

        downlink_F = measured(self.downlink_F, costs.download_bytes, costs.download_s)
        return replace(
            self,
            last_round_F=last_round_F,
            downlink_F=downlink_F,
            uplink_F=measured(self.uplink_F, costs.upload_bytes, costs.upload_s),
        )

    def history(
        self, conditions: Conditions, round: int, device_ids: np.ndarray, perplexities: Sequence[float]
    ) -> History:
        """What a controller is told of it; `perplexities` are those of the evaluations so far."""
        fleet = conditions.fleet
        downlink_N, uplink_N = self.downlink_F[device_ids], self.uplink_F[device_ids]
        last, before = (*reversed(perplexities), None, None)[:2]
        return History(
            np.where(downlink_N > 0, downlink_N, fleet.downlink_bytes_per_s[device_ids]),
            np.where(uplink_N > 0, uplink_N, fleet.uplink_bytes_per_s[device_ids]),
            round - self.last_round_F[device_ids],
            last,
            before,
        )


@dataclass(frozen=True)
class Settled:
    """What a decision costs those who take part, and who completes the round."""

    part: np.ndarray
    """Their positions among the candidates."""
    device_ids: np.ndarray
    levels_M: np.ndarray
    ages_M: np.ndarray
    costs: Costs
    admission: Admission
    emulator_bytes_M: np.ndarray
    """Of emulators that were sent, as far as they got."""
    received_M: np.ndarray
    """bool: whether all of a new emulator arrived."""


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
    current_N, stale_N = np.where(age_N == 0, level_N, 0), np.where(age_N > 0, level_N, 0)

    def total_s(levels: np.ndarray, held_N: np.ndarray) -> np.ndarray:
        return conditions.nominal_s(device_ids, emulators.task(levels, held_N, num_tokens))

    return Prospects(
        emulators.memory_bytes_L[: len(levels)],
        conditions.fleet.memory_cap_bytes[device_ids],
        total_s(np.array(levels)[:, None], current_N).T,
        current_N,
        conditions.deadline_s,
        conditions.cohort_of(round, len(device_ids)),
        conditions.cohort_size,
        num_tokens,
        Stale(stale_N, age_N, total_s(np.maximum(1, stale_N), stale_N)) if realigns else None,
        history,
    )


def decision(round: int, device_ids: np.ndarray, seen: Prospects, answer: Plan | np.ndarray) -> Decision:
    """A controller's answer to its prospects. To go on with a stale emulator, a device must have one of that level."""
    plan = answer if isinstance(answer, Plan) else Plan(answer)
    ages_N = np.zeros(len(device_ids), int)
    if seen.stale:
        goes_on = plan.stale_N & (plan.levels_N == seen.stale.level_N)
        ages_N = np.where(goes_on, seen.stale.age_N, 0)
    return Decision(round, device_ids, seen, plan.levels_N, ages_N)


def settle(emulators: EmulatorCosts, conditions: Conditions, now_s: float, decided: Decision) -> Settled:
    """What comes of a decision, training apart."""
    seen, part = decided.prospects, np.flatnonzero(decided.levels_N != SKIP)
    device_ids, levels_M = decided.device_ids[part], decided.levels_N[part]
    ages_M = np.broadcast_to(decided.ages_N, decided.device_ids.shape)[part]
    num_tokens_M = np.broadcast_to(seen.num_tokens_N, decided.device_ids.shape)[part]
    held_M = np.where(ages_M > 0, levels_M, seen.held_level_N[part])
    demand = emulators.task(levels_M, held_M, num_tokens_M)
    costs, admission = conditions.settle(decided.round, now_s, device_ids, demand)
    emulator_bytes_M = np.minimum(costs.download_bytes, emulators.exchange_bytes(levels_M, held_M))
    received_M = (costs.download_bytes == demand.download_bytes) & (ages_M == 0)
    return Settled(part, device_ids, levels_M, ages_M, costs, admission, emulator_bytes_M, received_M)
