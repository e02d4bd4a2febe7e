"""How a controller is trained, in numbers: what branching_ppo.py does with them takes RLlib, this does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedpeat_ray.settings import Decay, NonNegative, NonNegativeInt, Positive, PositiveInt, Share


@dataclass(frozen=True)
class PPOSettings:
    """Proximal policy optimisation over branches."""

    ratio: Literal["branch", "joint"] = "branch"
    """Clipped: the ratio of each branch, or the one of the whole action."""
    network: Literal["shared", "independent"] = "shared"
    """One network for all devices, or a common trunk and a head for each."""
    width: PositiveInt = 32
    """Of the layers."""
    rounds_per_iteration: PositiveInt = 800
    """Played before each update."""
    epochs: PositiveInt = 4
    """Passes over them."""
    minibatch_rounds: PositiveInt = 400
    """Rounds a step of the optimizer."""
    learning_rate: Positive = 3e-3
    """Of Adam, at first; it falls to a tenth."""
    discount: Decay = 0.5
    """Gamma, a round."""
    gae_lambda: Share = 0.9
    """Of generalised advantage estimation (Schulman et al. 2016)."""
    clip: Positive = 0.2
    """Epsilon."""
    advantage_clip: Positive = 10.0
    """Most that an advantage counts, in standard deviations: a round that one deep fade held up says little of any
    branch. With 1, rounds that nobody completes weigh too little, and too few are asked."""
    draws: NonNegativeInt = 8
    """Of luck (who is there, how channels fade), beside the one that is played, over which a round's reward is
    averaged: what a deep fade or a round that nobody completes costs is seen often and small, not rarely and large."""
    entropy: NonNegative = 0.0
    """Weight of the mean entropy of a branch. What one of a thousand branches changes is small: even 0.002 outweighs
    it, and more and more devices are asked."""
    penalty: NonNegative | None = None
    """For choices beyond a device's memory (times the share of candidates that get one); unset: they are masked."""
    num_env_runners: NonNegativeInt = 0
    """Actors that play; 0: the main process does."""
    num_envs: PositiveInt = 20
    """Episodes that a runner plays side by side."""
    num_gpus: NonNegative = 0.0
    """Of the learner, an actor of its own if there are any."""
    num_threads: PositiveInt = 1
    """Of PyTorch."""
