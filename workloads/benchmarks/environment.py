"""Decisions a second in the environment in which controllers are trained, beside a plain loop over devices; and what
an iteration of PPO spends on playing and on learning.

    python workloads/benchmarks/environment.py [--times 3] [--sizes 100 1000 10000] [--fleets 10]

A step is a round: what each level would cost each candidate, a plan, what it costs; of one fleet, and of several side
by side, as PPO plays them. The loop works out the same figures of the same formulas, device by device; both are checked
against one another before they are timed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from fedpeat_ray.config import AvailabilityConfig, ChannelConfig, FleetConfig
from fedpeat_ray.control.branching_ppo import Training
from fedpeat_ray.control.environment import Episode, Response, Setting
from fedpeat_ray.control.plan import SKIP, Prospects
from fedpeat_ray.control.ppo import PPOSettings
from fedpeat_ray.fleet.costs import ServerCosts
from fedpeat_ray.fleet.levels import EmulatorCosts
from fedpeat_ray.runtime.host_pool import some_ray

EMULATORS = EmulatorCosts(  # of pydoc-base, rounded
    emulator_bytes_L=np.array([25_000_000, 29_700_000, 36_100_000]),
    adapter_bytes_L=np.array([528_000] * 3),
    memory_bytes_L=np.array([42_400_000, 51_300_000, 60_300_000]),
    weights_bytes_L=np.array([25_000_000, 31_000_000, 37_000_000]),
    flops_per_token_L=np.array([2.4e7, 3.1e7, 3.8e7]),
    server_tuning=ServerCosts(),
    realignment=ServerCosts(),
)


@dataclass(frozen=True)
class BenchmarkConfig:
    times: int = 3
    """Episodes of each size."""
    sizes: tuple[int, ...] = (100, 1000, 10_000)
    """Candidates: all of a fleet of as many."""
    fleets: int = 10
    """Side by side."""
    rounds: int = 20
    ppo_rounds: int = 200
    """Of an iteration of PPO; 0: only the environment."""
    out: Path | None = None
    """File for the table in Markdown."""


def main(config: BenchmarkConfig) -> int:
    """Print the tables; returns the exit status."""
    decisions, ppo = [], []
    for size in config.sizes:
        one, several, slow = [], [], []
        for seed in range(config.times):
            one.append(size * config.rounds / seconds_vectorised(size, config.rounds, [seed]))
            seeds = list(range(config.fleets))
            several.append(size * config.fleets * config.rounds / seconds_vectorised(size, config.rounds, seeds))
            slow.append(size / seconds_in_a_loop(size, seed))
        loop = max(slow)
        best = [f"{figure:,.0f}" for figure in (max(one), max(several), loop)]
        decisions.append((f"{size:,}", *best, f"{max(several) / loop:.0f}"))
    head = ("candidates", "decisions/s, one fleet", f"{config.fleets} side by side", "plain loop", "times as fast")
    tables = [table(head, decisions)]
    if config.ppo_rounds:
        with some_ray(1):
            for size in config.sizes:
                sampling_s, learning_s = seconds_of_ppo(size, config.ppo_rounds)
                ppo.append((f"{size:,}", f"{sampling_s:.2f}", f"{learning_s:.2f}"))
        tables.append(table((f"PPO, {config.ppo_rounds} rounds", "s of playing", "s of learning"), ppo))
    text = "\n".join(tables)
    print(text)
    if config.out:
        config.out.write_text(text)
    return 0


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def seconds_of_ppo(size: int, rounds: int) -> tuple[float, float]:
    """Of the second iteration, with one thread: playing and learning."""
    ppo = PPOSettings(rounds_per_iteration=rounds, minibatch_rounds=max(1, rounds // 4))
    training = Training([setting(size, rounds=20)], ppo, iterations=2, seed=0)
    _, figures = training.iterate(), training.iterate()
    training.close()
    return figures["sampling_s"], figures["learning_s"]


def setting(size: int, rounds: int) -> Setting:
    """So many candidates, all of the fleet."""
    fleet = FleetConfig(
        size, memory_scale=0.045, availability=AvailabilityConfig("always"), channel=ChannelConfig("nominal")
    )
    response = Response(40.0, 0.2, (1e-4, 2e-4, 3e-4))
    return Setting(EMULATORS, (1, 2, 3), response, fleet, size, size, rounds, over_sample=1.0)


def seconds_vectorised(size: int, rounds: int, seeds: Sequence[int]) -> float:
    """Of the steps of an episode in which every device gets a level by chance, if it has the memory."""
    episode, rng = Episode(setting(size, rounds), seeds), np.random.default_rng(seeds[0])
    took_s = 0.0
    for _ in range(rounds):
        plan = np.minimum(rng.integers(SKIP, 4, (len(seeds), size)), 1 + episode.seen.fits_NL[..., 1:].sum(axis=-1))
        started = time.perf_counter()
        episode.step(plan)
        took_s += time.perf_counter() - started
    return took_s


def seconds_in_a_loop(size: int, seed: int) -> float:
    """Of one round, device by device; its figures are those of the environment."""
    episode = Episode(setting(size, 1), seed)
    seen, fleet, num_levels = episode.seen, episode.conditions.fleet, 3
    levels = np.minimum(np.random.default_rng(seed).integers(SKIP, 4, size), 1 + seen.fits_NL[:, 1:].sum(axis=1))
    columns = {
        "flops": fleet.flops_per_s,
        "down": fleet.downlink_bytes_per_s,
        "up": fleet.uplink_bytes_per_s,
        "cap": fleet.memory_cap_bytes,
        "watts": fleet.compute_power_w,
        "radio": fleet.radio_power_w,
    }
    devices = [
        {name: float(column[i]) for name, column in columns.items()} | {"tokens": int(episode.num_tokens_F[i])}
        for i in episode.device_ids.tolist()
    ]
    bytes_L, adapter_L = EMULATORS.emulator_bytes_L.tolist(), EMULATORS.adapter_bytes_L.tolist()
    memory_L, flops_L = EMULATORS.memory_bytes_L.tolist(), EMULATORS.flops_per_token_L.tolist()
    started = time.perf_counter()
    foreseen, sums = [], [0.0, 0.0, 0.0]
    for device, level in zip(devices, levels.tolist(), strict=True):
        seconds = []
        for index in range(num_levels):
            download_s = (bytes_L[index] + adapter_L[index]) / device["down"]
            seconds.append(
                download_s + flops_L[index] * device["tokens"] / device["flops"] + adapter_L[index] / device["up"]
            )
        foreseen.append(seconds)
        if level == SKIP or memory_L[level - 1] > device["cap"]:
            continue
        download_s = (bytes_L[level - 1] + adapter_L[level - 1]) / device["down"]
        compute_s = flops_L[level - 1] * device["tokens"] / device["flops"]
        upload_s = adapter_L[level - 1] / device["up"]
        sums[0] = max(sums[0], download_s + compute_s + upload_s)
        sums[1] += bytes_L[level - 1] + 2 * adapter_L[level - 1]
        sums[2] += device["watts"] * compute_s + device["radio"] * (download_s + upload_s)
    took = time.perf_counter() - started
    check(seen, foreseen, sums, episode, levels)
    return took


def check(
    seen: Prospects, foreseen: list[list[float]], sums: list[float], episode: Episode, levels: np.ndarray
) -> None:
    """The loop and the environment came to the same figures."""
    episode.step(levels)
    costs = episode.last.costs
    total = (episode.now_s, float((costs.download_bytes + costs.upload_bytes).sum()), float(costs.energy_j.sum()))
    assert np.allclose(seen.total_s_NL, foreseen, rtol=1e-5)
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(total, sums, strict=True)), (total, sums)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(BenchmarkConfig, description=__doc__)))
