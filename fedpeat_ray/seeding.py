"""Randomness as a function of names: every draw is keyed by (run seed, purpose, round, device).

Nothing reads a global generator, so a draw does not depend on how many others were made before it,
on the number of hosts, or on whether the run was resumed.
"""

from __future__ import annotations

import hashlib
from typing import overload

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@overload
def derive_seed(run_seed: int, purpose: str, *keys: int) -> int: ...
@overload
def derive_seed(run_seed: np.ndarray, purpose: str, *keys: int) -> np.ndarray: ...
def derive_seed(run_seed: int | np.ndarray, purpose: str, *keys: int) -> int | np.ndarray:
    """A 63-bit seed for one purpose, e.g. `derive_seed(seed, "batch order", round, device_id)`; for an array of seeds
    an array of them.

    The same arguments give the same seed on every machine (BLAKE2b, no Python hashing).
    """
    if isinstance(run_seed, np.ndarray):
        derived = [derive_seed(int(each), purpose, *keys) for each in run_seed.flat]
        return np.array(derived, np.uint64).reshape(run_seed.shape)
    text = "\x1f".join([str(int(run_seed)), purpose, *map(str, map(int, keys))])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(run_seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """A numpy generator for one purpose (see `derive_seed`)."""
    return np.random.default_rng(derive_seed(run_seed, purpose, *keys))


def uniforms(seed: int | np.ndarray, device_ids: np.ndarray) -> np.ndarray:
    """One float64 in (0, 1) a device, vectorised: SplitMix64 of (seed, device_id).

    The draw of a device is its own: the same in a fleet of ten and in one of a million.
    For several independent draws a device, derive a seed for each.

    Shapes: device_ids (N,) integers -> (N,); with seeds (E, 1) and device_ids (E, N) -> (E, N).
    """
    with np.errstate(over="ignore"):
        state = np.asarray(seed, np.uint64) + (np.asarray(device_ids).astype(np.uint64) + np.uint64(1)) * _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        state = state ^ (state >> np.uint64(31))
    return ((state >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def normals(seed: int | np.ndarray, device_ids: np.ndarray) -> np.ndarray:
    """One standard normal a device (Box-Muller over two `uniforms`). Shapes: as there."""
    radius = np.sqrt(-2.0 * np.log(uniforms(derive_seed(seed, "radius"), device_ids)))
    return radius * np.cos(2.0 * np.pi * uniforms(derive_seed(seed, "angle"), device_ids))


def exponentials(seed: int | np.ndarray, device_ids: np.ndarray) -> np.ndarray:
    """One exponential variate of mean 1 a device. Shapes: as for `uniforms`."""
    return -np.log(uniforms(seed, device_ids))
