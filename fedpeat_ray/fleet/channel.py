"""The radio link of a round: path loss, block fading, Shannon rate.

The standard model of the wireless federated learning literature (e.g. Tse and Viswanath 2005,
Fundamentals of Wireless Communication, sections 2.4 and 5.4), not that of one paper:

    g = PL(d) |h|^2                                   channel gain
    PL(d) = 10^(-(L_1km + 10 n log10(d / 1 km)) / 10)   3GPP TR 36.814: L_1km = 128.1 dB, 10 n = 37.6 dB
    rate = b log2(1 + p g / (N0 b))                   bit/s, orthogonal shares b = B / N of the band
"""

from __future__ import annotations

import math

import numpy as np

from fedpeat_ray.config import ChannelConfig
from fedpeat_ray.fleet.population import Fleet
from fedpeat_ray.seeding import derive_seed, exponentials, normals


def link_rates(
    fleet: Fleet,
    config: ChannelConfig,
    device_ids: np.ndarray,
    own: tuple[np.ndarray, np.ndarray],
    fading: tuple[np.ndarray, np.ndarray],
    num_sharing: int | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What each device of a round can receive and send, in bytes per second.

    `nominal`: `own`, the devices' own link figures (`Fleet.nominal_rates`). Otherwise the Shannon rate over an equal
    share of the band (and, downlink, of the server's power), capped by these.

    `fading`: down and up, see `both_fadings`; `num_sharing`: devices that share the band, by default all of these.

    Shapes: device_ids (N,) -> downlink (N,), uplink (N,), float64; num_sharing (P, 1), for P cases -> (P, N).
    """
    if config.kind == "nominal" or not device_ids.size:
        return own
    sharing = device_ids.shape[-1] if num_sharing is None else num_sharing
    share_hz = config.bandwidth_hz / sharing
    noise_w = 10 ** ((config.noise_dbm_per_hz - 30) / 10) * share_hz
    gain = path_gain(config, fleet.distance_m[device_ids])

    def rate_bytes_per_s(power_w: float | np.ndarray, fading_N: np.ndarray) -> np.ndarray:
        return share_hz * np.log1p(power_w * gain * fading_N / noise_w) / math.log(2) / 8

    downlink = rate_bytes_per_s(config.server_power_w / sharing, fading[0])
    uplink = rate_bytes_per_s(config.device_power_w, fading[1])
    return np.minimum(downlink, own[0]), np.minimum(uplink, own[1])


def path_gain(config: ChannelConfig, distance_m: np.ndarray) -> np.ndarray:
    """PL(d), the share of the transmitted power that arrives on average. Shapes: (N,) -> (N,)."""
    loss_db = config.path_loss_db_at_1km + 10 * config.path_loss_exponent * np.log10(distance_m / 1000.0)
    return 10 ** (-loss_db / 10)


def both_fadings(
    config: ChannelConfig, seed: int | np.ndarray, round: int, device_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """|h|^2 down and up, drawn anew for each (round, device), independently for both; it stays as it is for the length
    of the round. Shapes: as for `seeding.uniforms`."""
    if config.kind == "nominal":
        return np.ones(device_ids.shape), np.ones(device_ids.shape)
    down, up = (derive_seed(seed, f"fading {direction}", round) for direction in ("downlink", "uplink"))
    return fading_power(config, down, device_ids), fading_power(config, up, device_ids)


def fading_power(config: ChannelConfig, seed: int | np.ndarray, device_ids: np.ndarray) -> np.ndarray:
    """|h|^2, of mean 1, one draw a device.

    Rayleigh: h ~ CN(0, 1), so |h|^2 is exponential.
    Rician, with K = rician_k: h = sqrt(K / (K + 1)) + sqrt(1 / (K + 1)) CN(0, 1).

    Shapes: as for `seeding.uniforms`.
    """
    if config.kind == "rayleigh":
        return exponentials(seed, device_ids)
    line_of_sight = math.sqrt(config.rician_k / (config.rician_k + 1))
    scattered = math.sqrt(0.5 / (config.rician_k + 1))
    real = line_of_sight + scattered * normals(derive_seed(seed, "real"), device_ids)
    imaginary = scattered * normals(derive_seed(seed, "imaginary"), device_ids)
    return real**2 + imaginary**2


def link_ok(config: ChannelConfig, downlink: np.ndarray, uplink: np.ndarray) -> np.ndarray:
    """True where neither direction is in outage (min_bytes_per_s). Shapes: (N,), (N,) -> (N,) bool."""
    return np.minimum(downlink, uplink) >= config.min_bytes_per_s
