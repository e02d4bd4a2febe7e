"""The best plan of a round by its true costs, which no controller knows: what controllers are measured against.

It looks at one round only: a controller that thinks of later ones can do better.
"""

from __future__ import annotations

import itertools

import numpy as np

from fedpeat_ray.control.environment import Episode
from fedpeat_ray.control.observation import may_stay
from fedpeat_ray.control.plan import SKIP, Plan

MOST_PLANS = 5**8
"""That are tried one by one."""


def best_plan(episode: Episode) -> Plan:
    """By trying all plans; where there are more than MOST_PLANS, by coordinate ascent: each candidate in turn gets what
    is best given all others, until nothing changes, from nobody and from everybody on the lowest level."""
    seen = episode.seen
    stays = may_stay(seen)
    stale_level_N = seen.stale.level_N if seen.stale else np.zeros(len(stays), int)
    options = [
        [
            (SKIP, False),
            *((int(level), False) for level in np.flatnonzero(fits) + 1),
            *([(int(stale), True)] * bool(stay)),
        ]
        for fits, stay, stale in zip(seen.fits_NL, stays, stale_level_N, strict=True)
    ]
    if np.prod([float(len(own)) for own in options]) <= MOST_PLANS:
        plans = np.array(list(itertools.product(*options)))
        best = plans[int(episode.rewards(plans[..., 0], plans[..., 1].astype(bool)).argmax())]
        return Plan(best[:, 0], best[:, 1].astype(bool))
    starts = [[own[0] for own in options], [own[min(1, len(own) - 1)] for own in options]]
    ascents = [_ascend(episode, np.array(start), options) for start in starts]
    _, plan = max(ascents, key=lambda found: found[0])
    return Plan(plan[:, 0], plan[:, 1].astype(bool))


def _ascend(episode: Episode, plan: np.ndarray, options: list[list[tuple[int, bool]]]) -> tuple[float, np.ndarray]:
    """(its reward, the plan (N, 2) that no change of one candidate betters)."""
    best = -np.inf
    while True:
        before = best
        for candidate, own in enumerate(options):
            tried = np.repeat(plan[None], len(own), axis=0)
            tried[:, candidate] = own
            rewards = episode.rewards(tried[..., 0], tried[..., 1].astype(bool))
            plan, best = tried[int(rewards.argmax())], float(rewards.max())
        if best <= before + 1e-12:
            return best, plan
