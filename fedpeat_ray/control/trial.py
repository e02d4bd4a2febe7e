"""Controllers side by side on the same fleets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedpeat_ray.control.environment import Episode, Setting
from fedpeat_ray.control.plan import Controller, Plan

Player = Callable[[Episode], Plan | np.ndarray]
"""Decides a round of an episode."""


def player(controller: Controller) -> Player:
    """A controller that learns nothing on the way."""
    memory = controller.init()
    return lambda episode: controller.act(episode.round, episode.device_ids, episode.seen, memory)


def play(setting: Setting, seed: int, decide: Player) -> list[dict[str, float]]:
    """An episode: the reward and its terms, round by round."""
    episode, rounds = Episode(setting, seed), []
    while not episode.is_over:
        rounds.append(episode.step(decide(episode)) | {"perplexity": episode.perplexities[-1], "now_s": episode.now_s})
    return rounds
