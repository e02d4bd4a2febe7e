"""What the server remembers of devices from round to round, in ServerState.memory, and so in every checkpoint."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fedpeat_ray.aggregation.server_optimizer import ServerState
from fedpeat_ray.control.rounds import Held, Seen

_LEVEL, _VERSION, _PERPLEXITIES = "held_level", "held_version", "perplexities"
_SEEN = {"last_round_F": "last_round", "downlink_F": "seen_downlink", "uplink_F": "seen_uplink", "times_F": "times"}


def held_by(state: ServerState, num_devices: int) -> Held:
    """The emulators that devices have."""
    if _LEVEL not in state.memory:
        return Held.nothing(num_devices)
    version = state.memory.get(_VERSION)
    return Held(state.memory[_LEVEL].numpy(), None if version is None else version.numpy())


def with_held(state: ServerState, held: Held) -> ServerState:
    """The state in which devices have these."""
    version = {} if held.version_F is None else {_VERSION: held.version_F}
    return _with(state, {_LEVEL: held.level_F} | version)


def seen_of(state: ServerState, num_devices: int) -> Seen:
    """What was seen of devices."""
    if _SEEN["last_round_F"] not in state.memory:
        return Seen.nothing(num_devices)
    return Seen(**{field: state.memory[name].numpy() for field, name in _SEEN.items()})


def with_seen(state: ServerState, seen: Seen) -> ServerState:
    """The state in which this was seen."""
    return _with(state, {name: getattr(seen, field) for field, name in _SEEN.items()})


def perplexities_of(state: ServerState) -> list[float]:
    """The last two, as far as there are two."""
    return state.memory[_PERPLEXITIES].tolist() if _PERPLEXITIES in state.memory else []


def with_perplexity(state: ServerState, perplexity: float) -> ServerState:
    """The state after one more evaluation."""
    return _with(state, {_PERPLEXITIES: np.array([*perplexities_of(state), perplexity][-2:])})


def _with(state: ServerState, values: dict[str, np.ndarray]) -> ServerState:
    own = {name: torch.from_numpy(value) for name, value in values.items()}
    return dataclasses.replace(state, memory={**state.memory, **own})
