"""The fleet: one array a property, one entry a device, never one object a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedpeat_ray.config import FleetConfig
from fedpeat_ray.fleet.own_tiers import read_tiers
from fedpeat_ray.fleet.tiers import TIERS, Tier
from fedpeat_ray.seeding import derive_seed, generator, normals, uniforms

_MOST_BYTES = 2.0**62  # more than anything needs; beyond int64 a cap would turn negative


@dataclass(frozen=True)
class Fleet:
    """The simulated population. Every array has shape (num_devices,); index i is device i."""

    seed: int
    tiers: tuple[Tier, ...]
    """The classes of hardware that there are."""
    tier: np.ndarray
    """int8, index into `tiers`."""
    flops_per_s: np.ndarray
    """float32, sustained training speed in the configured precision."""
    memory_cap_bytes: np.ndarray
    """int64, what is free for training."""
    downlink_bytes_per_s: np.ndarray
    """float32, the device's own link; the channel may give less."""
    uplink_bytes_per_s: np.ndarray
    """float32, as above."""
    compute_power_w: np.ndarray
    """float32, drawn while it trains."""
    radio_power_w: np.ndarray
    """float32, drawn while it sends or receives."""
    distance_m: np.ndarray
    """float32, from the server's antenna."""

    @property
    def num_devices(self) -> int:
        """Devices in the fleet."""
        return len(self.tier)

    @property
    def tier_names(self) -> tuple[str, ...]:
        """Names of the tiers, in the order that `tier` indexes."""
        return tuple(tier.name for tier in self.tiers)

    def nominal_rates(self, device_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) down and up, float64: what these devices' own links carry."""
        downlink, uplink = self.downlink_bytes_per_s[device_ids], self.uplink_bytes_per_s[device_ids]
        return downlink.astype(np.float64), uplink.astype(np.float64)

    def sample(self, round: int, size: int) -> np.ndarray:
        """The devices asked in a round: uniform without replacement, a function of (seed, round).

        Takes time and memory in proportion to `size` while that is a small part of the fleet.

        Shapes: -> (min(size, num_devices),) int64, sorted.
        """
        if size >= self.num_devices:
            return np.arange(self.num_devices)
        drawn = generator(self.seed, "cohort", round).choice(self.num_devices, size, replace=False, shuffle=False)
        return np.sort(drawn)


def build_fleet(config: FleetConfig, seed: int) -> Fleet:
    """Draw the fleet. The properties of device i depend on (config, seed, i), not on `num_devices`.

    Speed, memory and link of a device are its tier's figures times exp(spread * z), with one standard
    normal z for each of the three (both directions of the link share theirs), so that the median is the
    tier's figure. Power is the tier's. Positions are uniform over the disc of the cell.

    Raises ConfigError if `tier_shares` does not fit the tiers, or what `read_tiers` raises.
    """
    tiers = read_tiers(config.tiers) if config.tiers else TIERS
    config.check_shares([tier.name for tier in tiers])
    device_ids = np.arange(config.size)

    def draw(purpose: str) -> np.ndarray:
        return uniforms(derive_seed(seed, purpose), device_ids)

    def spread(purpose: str) -> np.ndarray:
        return np.exp(config.spread * normals(derive_seed(seed, purpose), device_ids))

    tier = np.searchsorted(_cumulative_shares(config.tier_shares, tiers), draw("tier"), side="right").astype(np.int8)

    def of_tier(figures: list[float]) -> np.ndarray:
        return np.array(figures, np.float32)[tier]

    link_spread = spread("link")
    memory_bytes = np.array([config.memory_scale * each.memory_cap_bytes for each in tiers])[tier]
    cell = config.channel
    distance_m = np.maximum(cell.min_distance_m, cell.cell_radius_m * np.sqrt(draw("distance")))
    return Fleet(
        seed=seed,
        tiers=tiers,
        tier=tier,
        flops_per_s=_float32(of_tier([each.flops_per_s(config.precision) for each in tiers]) * spread("speed")),
        memory_cap_bytes=np.minimum(memory_bytes * spread("memory"), _MOST_BYTES).astype(np.int64),
        downlink_bytes_per_s=_float32(of_tier([each.downlink_bytes_per_s for each in tiers]) * link_spread),
        uplink_bytes_per_s=_float32(of_tier([each.uplink_bytes_per_s for each in tiers]) * link_spread),
        compute_power_w=of_tier([each.compute_power_w for each in tiers]),
        radio_power_w=of_tier([each.radio_power_w for each in tiers]),
        distance_m=_float32(distance_m),
    )


def _float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def _cumulative_shares(by_name: Mapping[str, float], tiers: Sequence[Tier]) -> np.ndarray:
    """Upper ends of all tiers but the last, in (0, 1); shares are relative to their sum."""
    shares = np.array([by_name.get(tier.name, 0.0) if by_name else tier.share for tier in tiers], np.float64)
    return np.cumsum(shares / shares.sum())[:-1]
