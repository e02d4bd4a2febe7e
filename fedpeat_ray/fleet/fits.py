"""Who can hold what: the part of a fleet that has the memory for a task, by tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedpeat_ray.errors import ConfigError
from fedpeat_ray.fleet.population import Fleet
from fedpeat_ray.fleet.tiers import WHOLE_FLEET


@dataclass(frozen=True)
class Fits:
    """Who has the memory for each of several tasks, e.g. training on the emulator of each level."""

    memory_bytes: Mapping[str, int]
    """What each task needs."""
    num_devices: Mapping[str, int]
    """Of each tier that has any, and WHOLE_FLEET."""
    shares: Mapping[str, Mapping[str, float]]
    """By tier, then task: the share of these devices that have the memory."""


def fits(fleet: Fleet, memory_bytes: Mapping[str, int]) -> Fits:
    """Counts over the whole fleet, a pass over its arrays a task."""
    num_tiers = len(fleet.tier_names)
    num_devices = np.bincount(fleet.tier, minlength=num_tiers)
    num_fitting = {
        task: np.bincount(fleet.tier[fleet.memory_cap_bytes >= need], minlength=num_tiers)
        for task, need in memory_bytes.items()
    }
    shares = {
        name: {task: float(counts[tier] / num_devices[tier]) for task, counts in num_fitting.items()}
        for tier, name in enumerate(fleet.tier_names)
        if num_devices[tier]
    }
    shares[WHOLE_FLEET] = {task: float(counts.sum() / fleet.num_devices) for task, counts in num_fitting.items()}
    counted = dict(zip(fleet.tier_names, num_devices.tolist(), strict=True)) | {WHOLE_FLEET: fleet.num_devices}
    return Fits(dict(memory_bytes), {name: counted[name] for name in shares}, shares)


def check_fits(found: Fits, fleet: Fleet, memory_scale: float) -> None:
    """Raise ConfigError if no device has the memory for any of the tasks: nobody could ever take part."""
    if not any(found.shares[WHOLE_FLEET].values()):
        need, most = min(found.memory_bytes.values()), int(fleet.memory_cap_bytes.max())
        allowed = f"no device could train, which takes {need:,} bytes at least; the largest device has {most:,} bytes"
        raise ConfigError.of("fleet.memory_scale", memory_scale, allowed)
