"""Controllers side by side on the same fleets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedpeat_ray.control.environment import TERMS, Episode, Setting
from fedpeat_ray.control.plan import Controller, Plan

Player = Callable[[Episode], Plan | np.ndarray]
"""Decides a round of an episode."""

HELD_OUT, VALIDATION = 2**31, 2**32
"""Seeds from here on are of fleets that no training draws: to compare controllers on, and to pick policies by."""


def player(controller: Controller) -> Player:
    """A controller that learns nothing on the way."""
    memory = controller.init()
    return lambda episode: controller.act(episode.round, episode.device_ids, episode.seen, memory)


def play(setting: Setting, seed: int, decide: Player) -> list[dict[str, float]]:
    """An episode: the reward, its terms, perplexity and virtual seconds, round by round."""
    episode, rounds = Episode(setting, seed), []
    while not episode.is_over:
        rounds.append(episode.step(decide(episode)) | {"perplexity": episode.perplexities[-1], "now_s": episode.now_s})
    return rounds


def compare(setting: Setting, players: Mapping[str, Player], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Everybody on every fleet: a row an episode, with the means of its rounds."""
    rows = []
    for name, decide in players.items():
        for seed in seeds:
            rounds = play(setting, seed, decide)
            means = {term: float(np.mean([each[term] for each in rounds])) for term in ("reward", *TERMS)}
            rows.append({"controller": name, "seed": seed, **means, "perplexity": rounds[-1]["perplexity"]})
    return rows


def mean_rewards(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By controller, of what `compare` found."""
    rewards: dict[str, list[float]] = {}
    for row in rows:
        rewards.setdefault(row["controller"], []).append(row["reward"])
    return {name: float(np.mean(of)) for name, of in rewards.items()}
