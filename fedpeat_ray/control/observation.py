"""What a policy sees of a round and what its choices mean: rows of numbers in, a plan out.

One row a candidate, so that a policy which treats rows alike serves any number of them. Times, links and tokens are
logarithms relative to the median of the candidates, memory relative to what level 1 takes: a policy meets the same
numbers in a fleet of slow devices as in one of fast ones.

Legend: N candidates, L levels, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeat_ray.control.plan import SKIP, Plan, Prospects

OF_LEVELS = ("seconds", "fits", "in_time", "holds")
OF_DEVICE = (
    "tokens",
    "memory",
    "downlink",
    "uplink",
    "rounds_since",
    "times",
    "stale_level",
    "stale_age",
    "stale_seconds",
)
OF_ROUND = ("candidates_per_place", "rounds_so_far", "perplexity_change")
GO_ON = 1
"""The choice of the exchange branch: to go on with a stale emulator; 0: to download what is current."""


@dataclass(frozen=True)
class Columns:
    """Where in a row what lies."""

    num_levels: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of all columns; the last 1 + L + 2 are masks."""
        of_levels = (f"{name} {level}" for name in OF_LEVELS for level in range(1, self.num_levels + 1))
        masks = ("may skip", *(f"may take {level}" for level in range(1, self.num_levels + 1)), "may renew", "may stay")
        return (*of_levels, *OF_DEVICE, *OF_ROUND, *masks)

    @property
    def num_features(self) -> int:
        """Columns that are no masks."""
        return len(OF_LEVELS) * self.num_levels + len(OF_DEVICE) + len(OF_ROUND)

    @property
    def num_choices(self) -> tuple[int, int]:
        """Of the branches of a candidate: skip or a level; renew or stay."""
        return 1 + self.num_levels, 2


def observe(round: int, prospects: Prospects, masked: bool = True) -> np.ndarray:
    """(N, D) float32; (E, N, D) of E fleets. Without `masked`, a level beyond a device's memory may be chosen (it then
    drops out)."""
    fits_NL, history, stale = prospects.fits_NL, prospects.history, prospects.stale
    *shape, num_levels = fits_NL.shape
    levels = np.arange(1, num_levels + 1)
    second = np.median(prospects.total_s_NL[..., 0], axis=-1, keepdims=True)
    zeros, change = np.zeros(shape), np.zeros(1)

    def relative(figures_N: np.ndarray | int) -> np.ndarray:
        figures_N = np.maximum(1e-9, np.broadcast_to(figures_N, shape))
        return np.log(figures_N / np.median(figures_N, axis=-1, keepdims=True))

    stay_N = may_stay(prospects)
    if history and history.perplexity is not None and history.perplexity_before is not None:
        change = np.log(np.asarray(history.perplexity_before) / history.perplexity)[..., None]
    of_device = (
        relative(prospects.num_tokens_N),
        np.log(np.maximum(1.0, prospects.memory_cap_bytes_N) / prospects.memory_bytes_L[0]),
        relative(history.downlink_bytes_per_s_N) if history else zeros,
        relative(history.uplink_bytes_per_s_N) if history else zeros,
        np.log1p(history.rounds_since_N) if history else zeros,
        np.log1p(history.times_N) if history else zeros,
        stale.level_N / num_levels if stale else zeros,
        np.log1p(stale.age_N) if stale else zeros,
        np.where(stay_N, np.log(stale.total_s_N / second), 0.0) if stale else zeros,
    )
    of_round = (np.log(shape[-1] / np.asarray(prospects.num_places)), np.log(round), 10 * change)
    return np.concatenate(
        [
            np.log(prospects.total_s_NL / second[..., None]),
            fits_NL,
            prospects.in_time_NL,
            prospects.held_level_N[..., None] == levels,
            np.stack([*of_device, *(np.broadcast_to(figure, shape) for figure in of_round)], axis=-1),
            np.full((*shape, 1), True),
            fits_NL if masked else np.full(fits_NL.shape, True),
            np.full((*shape, 1), True),
            stay_N[..., None],
        ],
        axis=-1,
        dtype=np.float32,
    )


def plan_of(choices: np.ndarray, prospects: Prospects) -> Plan:
    """(N, 2) choices of the two branches -> who takes part, and how; (E, N, 2) for E fleets. A device that stays keeps
    its stale level."""
    levels_N, exchange_N = choices[..., 0], choices[..., 1]
    stale_N = (levels_N != SKIP) & (exchange_N == GO_ON) & may_stay(prospects)
    if prospects.stale is None:
        return Plan(levels_N, stale_N)
    return Plan(np.where(stale_N, prospects.stale.level_N, levels_N), stale_N)


def may_stay(prospects: Prospects) -> np.ndarray:
    """(N,) bool: whether the device could go on with a stale emulator."""
    fits_NL, stale = prospects.fits_NL, prospects.stale
    if stale is None:
        return np.zeros(fits_NL.shape[:-1], bool)
    of_level = np.maximum(stale.level_N, 1)[..., None] - 1
    return (stale.level_N != SKIP) & np.take_along_axis(fits_NL, of_level, axis=-1)[..., 0]
