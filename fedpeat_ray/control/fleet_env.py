"""Episodes as gymnasium environments: one step is one round, an action a choice for every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from fedpeat_ray.control.environment import Episode, Setting
from fedpeat_ray.control.observation import Columns, observe, plan_of
from fedpeat_ray.control.plan import SKIP


class FleetEnv(gymnasium.Env):
    """Every episode draws its setting and its fleet anew. Observations (N, D) float32 of observation.py, actions (N, 2)
    of choices; the terms of the reward are in `info`."""

    def __init__(self, config: Mapping[str, Any]):
        """`config`: `settings` to draw from, alike in candidates, levels and rounds; optionally a `penalty` for each
        share of candidates that gets a level beyond its memory, in place of masks; and `draws`, of luck, beside the
        one that is played, over which rewards are averaged."""
        self.settings: Sequence[Setting] = config["settings"]
        self.penalty, self.draws = config.get("penalty"), config.get("draws", 0)
        self.observation_space, self.action_space = spaces(self.settings[0])

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """A new fleet."""
        super().reset(seed=seed)
        setting = self.settings[int(self.np_random.integers(len(self.settings)))]
        self.episode = Episode(setting, int(self.np_random.integers(2**31)))
        return rows(self.episode, self.penalty), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """A round. An episode is cut off after its rounds, it does not end: a federation goes on."""
        reward, terms = played(self.episode, action, self.penalty, self.draws)
        return rows(self.episode, self.penalty), float(reward), False, self.episode.is_over, terms


class FleetVectorEnv(gymnasium.vector.VectorEnv):
    """`num_envs` FleetEnvs side by side: a step is a few operations on arrays for all those of a setting, however many
    there are. They are as long as one another and start together."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012  gymnasium's own form

    def __init__(self, config: Mapping[str, Any]):
        """`config`: as of FleetEnv, and `num_envs`."""
        self.num_envs = int(config["num_envs"])
        self.settings: Sequence[Setting] = config["settings"]
        self.penalty, self.draws = config.get("penalty"), config.get("draws", 0)
        self.single_observation_space, self.single_action_space = spaces(self.settings[0])
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """New fleets, one an environment."""
        super().reset(seed=seed)
        drawn = np.sort(self.np_random.integers(len(self.settings), size=self.num_envs))
        seeds = self.np_random.integers(2**31, size=self.num_envs)
        self.episodes = [Episode(self.settings[i], seeds[drawn == i].tolist()) for i in np.unique(drawn)]
        self.ends = np.searchsorted(drawn, np.unique(drawn), side="right")
        return self._rows(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """A round of each; after the last one new fleets, whatever the actions."""
        never = np.full(self.num_envs, False)
        if self.episodes[0].is_over:
            observations, infos = self.reset()
            return observations, np.zeros(self.num_envs), never, never, infos
        of_each = np.split(np.asarray(actions), self.ends[:-1])
        results = [played(*each, self.penalty, self.draws) for each in zip(self.episodes, of_each, strict=True)]
        rewards = np.concatenate([reward for reward, _ in results])
        terms = {name: np.concatenate([of[name] for _, of in results]) for name in results[0][1]}
        return self._rows(), rewards, never, np.full(self.num_envs, self.episodes[0].is_over), terms

    def _rows(self) -> np.ndarray:
        return np.concatenate([rows(episode, self.penalty) for episode in self.episodes])


def spaces(setting: Setting) -> tuple[gymnasium.Space, gymnasium.Space]:
    """Of observations and of actions."""
    columns, num_candidates = Columns(len(setting.levels)), setting.num_candidates
    rows = gymnasium.spaces.Box(-np.inf, np.inf, (num_candidates, len(columns.names)), np.float32)
    return rows, gymnasium.spaces.MultiDiscrete(np.tile(columns.num_choices, (num_candidates, 1)))


def rows(episode: Episode, penalty: float | None) -> np.ndarray:
    """What is observed: (N, D), (E, N, D) of E fleets."""
    return observe(episode.round, episode.seen, masked=penalty is None)


def played(episode: Episode, action: np.ndarray, penalty: float | None, draws: int) -> tuple[Any, dict[str, Any]]:
    """(the reward to learn from, the one of this round and its terms): numbers, arrays (E,) of E fleets."""
    seen = episode.seen
    plan = plan_of(np.asarray(action), seen)
    beyond = (plan.levels_N != SKIP) & (seen.memory_bytes_L[plan.levels_N - 1] > seen.memory_cap_bytes_N)
    elsewhere = draws * episode.expected_reward(plan, draws) if draws else 0.0
    terms = episode.step(plan) | {"infeasible": beyond.mean(axis=-1)}
    return (terms["reward"] + elsewhere) / (1 + draws) - (penalty or 0.0) * terms["infeasible"], terms
