"""What the server remembers of devices from round to round: the emulators they hold, and what it saw of them.

All of it is in ServerState.memory, and so in every checkpoint. Legend: N devices of a round, F of the fleet.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from fedpeat_ray.aggregation.server_optimizer import ServerState
from fedpeat_ray.control.plan import History
from fedpeat_ray.fleet.conditions import Conditions
from fedpeat_ray.fleet.costs import Costs

_LEVEL, _VERSION = "held_level", "held_version"
_LAST_ROUND, _DOWNLINK, _UPLINK, _PERPLEXITIES = "last_round", "seen_downlink", "seen_uplink", "perplexities"


@dataclass(frozen=True)
class Held:
    """Which emulator each device of the fleet has."""

    level_F: np.ndarray
    """int8; 0: none."""
    version_F: np.ndarray | None
    """int16, of that emulator; None: there was only one so far, 0."""

    @classmethod
    def of(cls, state: ServerState, num_devices: int) -> Self:
        """As the state remembers it."""
        level, version = state.memory.get(_LEVEL), state.memory.get(_VERSION)
        level_F = np.zeros(num_devices, np.int8) if level is None else level.numpy()
        return cls(level_F, None if version is None else version.numpy())

    def at(self, version: int, device_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) level of the emulator that each of these devices has, and how many versions it is behind."""
        level_N = self.level_F[device_ids]
        version_N = np.zeros(len(level_N), int) if self.version_F is None else self.version_F[device_ids].astype(int)
        return level_N, np.where(level_N > 0, version - version_N, 0)

    def noted(
        self, state: ServerState, version: int, device_ids: np.ndarray, levels: np.ndarray, is_new: np.ndarray
    ) -> ServerState:
        """The state after these devices received new emulators of these levels, where `is_new`."""
        level_F, received = self.level_F.copy(), device_ids[is_new]
        level_F[received] = levels[is_new]
        own = {_LEVEL: torch.from_numpy(level_F)}
        if version or self.version_F is not None:
            version_F = np.zeros(len(level_F), np.int16) if self.version_F is None else self.version_F.copy()
            version_F[received] = version
            own[_VERSION] = torch.from_numpy(version_F)
        return dataclasses.replace(state, memory={**state.memory, **own})


def history(state: ServerState, conditions: Conditions, round: int, device_ids: np.ndarray) -> History:
    """What was seen of these devices, and of the model."""
    fleet, memory = conditions.fleet, state.memory
    downlink_N, uplink_N = fleet.downlink_bytes_per_s[device_ids], fleet.uplink_bytes_per_s[device_ids]
    since_N = np.full(len(device_ids), round)
    if _LAST_ROUND in memory:
        last_N = memory[_LAST_ROUND].numpy()[device_ids]
        since_N = round - last_N
        seen = [memory[name].numpy()[device_ids] for name in (_DOWNLINK, _UPLINK)]
        downlink_N, uplink_N = (np.where(s > 0, s, own) for s, own in zip(seen, (downlink_N, uplink_N), strict=True))
    perplexities = memory[_PERPLEXITIES].tolist() if _PERPLEXITIES in memory else []
    last, before = (*reversed(perplexities), None, None)[:2]
    return History(downlink_N, uplink_N, since_N, last, before)


def with_seen(state: ServerState, num_devices: int, round: int, device_ids: np.ndarray, costs: Costs) -> ServerState:
    """The state after a round that cost these devices so much: what their links gave, and that they took part."""
    own = {}
    took_part = costs.download_s > 0
    for name, num_bytes_N, seconds_N in (
        (_LAST_ROUND, None, None),
        (_DOWNLINK, costs.download_bytes, costs.download_s),
        (_UPLINK, costs.upload_bytes, costs.upload_s),
    ):
        before = state.memory.get(name)
        dtype = np.int32 if num_bytes_N is None else np.float32
        values_F = np.zeros(num_devices, dtype) if before is None else before.numpy().copy()
        if num_bytes_N is None or seconds_N is None:
            values_F[device_ids[took_part]] = round
        else:
            measured = (seconds_N > 0) & (num_bytes_N > 0)
            values_F[device_ids[measured]] = num_bytes_N[measured] / seconds_N[measured]
        own[name] = torch.from_numpy(values_F)
    return dataclasses.replace(state, memory={**state.memory, **own})


def with_perplexity(state: ServerState, perplexity: float) -> ServerState:
    """The state after one more evaluation; the last two are remembered."""
    before = state.memory.get(_PERPLEXITIES, torch.zeros(0, dtype=torch.float64))
    latest = torch.cat([before, torch.tensor([perplexity], dtype=torch.float64)])[-2:]
    return dataclasses.replace(state, memory={**state.memory, _PERPLEXITIES: latest})
