"""Episodes as a gymnasium environment: one step is one round, an action a choice for every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from fedpeat_ray.control.environment import Episode, Setting
from fedpeat_ray.control.observation import Columns, observe, plan_of
from fedpeat_ray.control.plan import SKIP


class FleetEnv(gymnasium.Env):
    """Every episode draws its setting and its fleet anew. Observations (N, D) float32 of observation.py, actions (N, 2)
    of choices; the terms of the reward are in `info`."""

    def __init__(self, config: Mapping[str, Any]):
        """`config`: `settings` to draw from, alike in candidates and levels; optionally a `penalty` for each share of
        candidates that gets a level beyond its memory, in place of masks."""
        self.settings: Sequence[Setting] = config["settings"]
        self.penalty: float | None = config.get("penalty")
        columns, num_candidates = Columns(len(self.settings[0].levels)), self.settings[0].num_candidates
        shape = (num_candidates, len(columns.names))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)
        choices = np.tile(columns.num_choices, (num_candidates, 1))
        self.action_space = gymnasium.spaces.MultiDiscrete(choices)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """A new fleet."""
        super().reset(seed=seed)
        setting = self.settings[int(self.np_random.integers(len(self.settings)))]
        self.episode = Episode(setting, int(self.np_random.integers(2**31)))
        return self._rows(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """A round. An episode is cut off after its rounds, it does not end: a federation goes on."""
        seen = self.episode.seen
        plan = plan_of(np.asarray(action), seen)
        beyond = (plan.levels_N != SKIP) & (seen.memory_bytes_L[plan.levels_N - 1] > seen.memory_cap_bytes_N)
        terms = self.episode.step(plan) | {"infeasible": float(beyond.mean())}
        reward = terms["reward"] - (self.penalty or 0.0) * terms["infeasible"]
        return self._rows(), reward, False, self.episode.is_over, terms

    def _rows(self) -> np.ndarray:
        return observe(self.episode.round, self.episode.seen, masked=self.penalty is None)
