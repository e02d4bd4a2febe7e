"""Classes of hardware: what a typical device of each can do, and where every figure comes from.

Three kinds of figure are told apart in `sources`: what a vendor states or somebody measured (named),
arithmetic on such a figure (shown), and what we assume (said so). Nobody publishes the sustained
training speed of phones, so `flops_per_s` is always a peak times an efficiency that is our
assumption: 10 % on phone GPUs (passive cooling, inference-first kernels), 25 % on a laptop GPU and on
tensor cores, 35 % on CUDA cores, 50 % of the Linpack speed on a CPU.

Also assumed by us, for all tiers: the shares of the default fleet; `memory_cap_bytes`, the part of the
RAM that an application may hold for training (a quarter on phones, half elsewhere, more on Jetson
boards that do nothing else); `radio_power_w`, the whole radio while it sends or receives
(1.5 W cellular, 1 W Wi-Fi); `gpu_fraction`, the share of a data-centre GPU that stands in for the
device in exclusive mode, chosen only to keep the order of the tiers.

Link speeds, in Mbit/s, are Ookla's (Speedtest Global Index, as quoted in the press):
mobile mean July 2021 56.74 down and 12.61 up (livemint.com, 24 Sep 2021); India, median mobile
download April 2023 36.35 (pratidintime.com, 17 May 2023); 5G median Q3 2021 166.13 down and 21.08 up
(ookla.com, 20 Dec 2021); fixed broadband August 2024 93.99 down and 48.36 up (datahub.io).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_GIB = 2**30
_MBIT = 1e6 / 8
_5G = (166.13 * _MBIT, 21.08 * _MBIT)
_MOBILE = (56.74 * _MBIT, 12.61 * _MBIT)
_MOBILE_SLOW = (36.35 * _MBIT, 8.08 * _MBIT)
_FIXED = (93.99 * _MBIT, 48.36 * _MBIT)

WHOLE_FLEET = "all"
"""The name beside those of tiers, and so that of none."""


@dataclass(frozen=True)
class Tier:
    """A class of hardware. Figures are those of its median device; `population` spreads them."""

    name: str
    description: str
    share: float
    """Part of the default fleet; the shares of all tiers add up to 1."""
    float32_flops_per_s: float
    """Sustained training speed in float32."""
    float16_flops_per_s: float
    """Sustained training speed in float16."""
    memory_cap_bytes: int
    """What is free for training."""
    gpu_fraction: float
    """GPU share of the actor that embodies one such device in exclusive mode."""
    downlink_bytes_per_s: float
    uplink_bytes_per_s: float
    compute_power_w: float
    """Power drawn while it trains."""
    radio_power_w: float
    """Power drawn while it sends or receives."""
    sources: str
    """Where the figures come from, and which of them are assumptions."""

    def flops_per_s(self, precision: Literal["float32", "float16"]) -> float:
        """Sustained training speed in the given arithmetic."""
        return self.float32_flops_per_s if precision == "float32" else self.float16_flops_per_s


TIERS: tuple[Tier, ...] = (
    Tier(
        name="sbc",
        description="single-board computer, CPU only (Raspberry Pi 5, 8 GB)",
        share=0.10,
        float32_flops_per_s=0.50 * 2 * 30.249e9,
        float16_flops_per_s=0.50 * 4 * 30.249e9,
        memory_cap_bytes=4 * _GIB,
        gpu_fraction=0.02,
        downlink_bytes_per_s=_FIXED[0],
        uplink_bytes_per_s=_FIXED[1],
        compute_power_w=11.0,
        radio_power_w=1.0,
        sources="HPL Linpack in float64 measured at 30.249 Gflop/s and 11 W (github.com/geerlingguy/top500-benchmark;"
        " a Pi 4 gives 11.889 Gflop/s at 7.2 W). Twice that in float32 and four times in float16 by vector width; "
        "our assumption: 50 % of it. Ookla fixed broadband.",
    ),
    Tier(
        name="phone-low",
        description="entry phone, 4 GB (Snapdragon 4 Gen 2, Adreno 613)",
        share=0.30,
        float32_flops_per_s=0.10 * 0.3667e12,
        float16_flops_per_s=0.10 * 2 * 0.3667e12,
        memory_cap_bytes=1 * _GIB,
        gpu_fraction=0.04,
        downlink_bytes_per_s=_MOBILE_SLOW[0],
        uplink_bytes_per_s=_MOBILE_SLOW[1],
        compute_power_w=3.0,
        radio_power_w=1.5,
        sources="GPU peak 0.3667 Tflop/s (cputronic.com); our assumptions: 10 % of it, float16 at twice the speed, 3 W "
        "sustained (a comparable chip, Helio G85, is listed at 5 W TDP by cputronic.com). Ookla mobile, India; "
        "upload not given there, assumed in the proportion of the world mean.",
    ),
    Tier(
        name="phone-mid",
        description="mid-range phone, 8 GB (Snapdragon 778G, Adreno 642L)",
        share=0.25,
        float32_flops_per_s=0.10 * 384 * 4 * 490e6,
        float16_flops_per_s=0.10 * 2 * 384 * 4 * 490e6,
        memory_cap_bytes=2 * _GIB,
        gpu_fraction=0.08,
        downlink_bytes_per_s=_MOBILE[0],
        uplink_bytes_per_s=_MOBILE[1],
        compute_power_w=4.0,
        radio_power_w=1.5,
        sources="384 shader units at 490 MHz (cputronic.com), at the 4 flop a unit and cycle which that site counts "
        "for the Adreno 613: peak 0.75 Tflop/s; our assumptions: 10 % of it, float16 at twice the speed, 4 W "
        "sustained. Ookla mobile, world mean.",
    ),
    Tier(
        name="phone-high",
        description="flagship phone, 12 GB (Snapdragon 8 Gen 2, Adreno 740)",
        share=0.15,
        float32_flops_per_s=0.10 * 384 * 4 * 490e6 * 12344 / 2463,
        float16_flops_per_s=0.10 * 2 * 384 * 4 * 490e6 * 12344 / 2463,
        memory_cap_bytes=3 * _GIB,
        gpu_fraction=0.12,
        downlink_bytes_per_s=_5G[0],
        uplink_bytes_per_s=_5G[1],
        compute_power_w=5.0,
        radio_power_w=1.5,
        sources="No peak found: that of phone-mid times the ratio of 3DMark Wild Life scores, 12344 / 2463 "
        "(nanoreview.net); our assumptions: 10 % of it, float16 at twice the speed, 5 W sustained (the chip draws "
        "7.3 to 7.6 W in short GPU tests, notebookcheck.com). 12 GB as in the Xiaomi 13. Ookla 5G median.",
    ),
    Tier(
        name="laptop",
        description="laptop with an integrated GPU, 16 GB (Apple M2, 10 cores)",
        share=0.12,
        float32_flops_per_s=0.25 * 3.578e12,
        float16_flops_per_s=0.25 * 3.578e12,
        memory_cap_bytes=8 * _GIB,
        gpu_fraction=0.20,
        downlink_bytes_per_s=_FIXED[0],
        uplink_bytes_per_s=_FIXED[1],
        compute_power_w=15.0,
        radio_power_w=1.0,
        sources="GPU peak 3.578 Tflop/s in float32 and 15 W (askgeek.io), the same in float16 (hmc-tech.com); our "
        "assumption: 25 % of it. Ookla fixed broadband.",
    ),
    Tier(
        name="edge-gpu",
        description="embedded GPU module, 8 GB (Jetson Orin Nano)",
        share=0.06,
        float32_flops_per_s=0.35 * 1024 * 2 * 625e6,
        float16_flops_per_s=0.25 * 10e12,
        memory_cap_bytes=5 * _GIB,
        gpu_fraction=0.25,
        downlink_bytes_per_s=_FIXED[0],
        uplink_bytes_per_s=_FIXED[1],
        compute_power_w=15.0,
        radio_power_w=1.0,
        sources="NVIDIA data sheet, as mirrored: 1024 CUDA cores at 625 MHz, 2 flop a core and cycle, so peak 1.28 "
        "Tflop/s in float32; 10 dense INT8 TOPS for the 4 GB half of it, so 20 here and 10 Tflop/s in float16 on "
        "tensor cores; 15 W mode. Our assumptions: 35 % and 25 % of these, 5 of the 8 GB free. Ookla fixed broadband.",
    ),
    Tier(
        name="edge-gpu-large",
        description="embedded GPU module, 64 GB (Jetson AGX Orin)",
        share=0.02,
        float32_flops_per_s=0.35 * 5.3e12,
        float16_flops_per_s=0.25 * 42.5e12,
        memory_cap_bytes=48 * _GIB,
        gpu_fraction=0.50,
        downlink_bytes_per_s=_FIXED[0],
        uplink_bytes_per_s=_FIXED[1],
        compute_power_w=50.0,
        radio_power_w=1.0,
        sources="NVIDIA technical brief, as quoted: peak 5.3 Tflop/s in float32 and 170 sparse INT8 TOPS, so 42.5 "
        "dense Tflop/s in float16 on tensor cores; 15 to 60 W (fixstars.com). Our assumptions: 35 % and 25 % of these, "
        "50 W, 48 of the 64 GB free. Ookla fixed broadband.",
    ),
)
