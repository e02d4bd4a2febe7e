"""FedAvg, FedPEFT and FedPEAT with each controller, on the same fleet, text and seeds: quality against its price.

    python workloads/compare_algorithms.py [--rounds 12] [--seeds 0] [--out DIR]
    python workloads/compare_algorithms.py --algorithms fed-avg "fed-peat, greedy" "fed-peat, learned" --candidates 60

Price is what devices pay: bytes, virtual time, energy, memory. FedPEAT comes with emulators in 8 bit, too. Writes
comparison.csv, comparison.md and comparison.png; a run directory for every algorithm and seed lies beside them.
Runs that are finished are not repeated, one that was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from analysis.load import load_run
from fedpeat_ray import SimulationConfig
from fedpeat_ray.config import (
    ControlConfig,
    EmulatorConfig,
    EvaluationConfig,
    FleetConfig,
    HostsConfig,
    LocalConfig,
)
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.sweep import Sweep, report

COLOURS = {
    "fed-avg": "#c44e52",
    "fed-peft": "#2f6db3",
    "fed-peat, fixed": "#8bc48a",
    "fed-peat, random": "#e0a63b",
    "fed-peat, greedy": "#2f9e62",
    "fed-peat, greedy, 8 bit": "#7d5ba6",
    "fed-peat, greedy-by-time": "#a0522d",
    "fed-peat, greedy-by-holding": "#666666",
    "fed-peat, learned": "#111111",
}

PAID = ("bytes", "virtual_s", "energy_j")


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    algorithms: tuple[str, ...] = tuple(COLOURS)[:6]
    """fed-avg, fed-peft, or fed-peat with a controller and perhaps 8 bit: "fed-peat, greedy, 8 bit"."""
    rounds: int = 12
    seeds: tuple[int, ...] = (0,)
    num_devices: int = 60
    """A fleet whose devices are asked again and again, so that keeping an emulator pays."""
    cohort_size: int = 16
    candidates: int | None = None
    """Devices that controllers choose from in a round; unset: as many as a cohort needs."""
    memory_scale: float = 0.045
    """Shrinks every device's memory, so that the embedded model feels large."""
    fed_avg_learning_rate: float = 5e-4
    """Full fine-tuning wants a smaller one than LoRA."""
    fixed_level: int = 1
    """Of FedPEAT's fixed controller."""
    num_sequences: int = 64
    """Held-out sequences of 128 tokens, after every round."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    out: Path = Path("runs/comparison")


def main(settings: Settings) -> int:
    """Run everything and write the results; returns the exit status."""

    def compare(sweep: Sweep) -> str:
        runs = {(name, seed): c for seed in settings.seeds for name, c in configurations(settings, seed).items()}
        files = {(name, seed): f"{name.replace(',', '').replace(' ', '-')}-seed{seed}" for name, seed in runs}
        found = sweep.run_all({files[run]: config for run, config in runs.items()})
        frames, finals = [], []
        for name, seed in runs:
            summary, directory = found[files[name, seed]]
            frame, final = measured(directory, summary)
            frames.append(frame.assign(name=name, seed=seed))
            finals.append(final | {"name": name, "seed": seed})
        rounds, runs = pd.concat(frames), pd.DataFrame(finals)
        rounds.to_csv(sweep.out / "comparison.csv", index=False)
        draw(rounds, runs, sweep.out / "comparison.png")
        return markdown(rounds, runs)

    return report(Sweep(settings.out, settings.hosts), "comparison.md", compare)


def configurations(settings: Settings, seed: int) -> dict[str, SimulationConfig]:
    """A configuration for each name."""
    base = SimulationConfig(
        rounds=settings.rounds,
        cohort_size=settings.cohort_size,
        client_batch_size=8,  # not what a machine measures: the last digits depend on it
        seed=seed,
        fleet=FleetConfig(num_devices=settings.num_devices, memory_scale=settings.memory_scale),
        evaluation=EvaluationConfig(num_sequences=settings.num_sequences, centralised=False),
    )
    return {name: configured(name, base, settings) for name in settings.algorithms}


def configured(name: str, base: SimulationConfig, settings: Settings) -> SimulationConfig:
    """That of a name."""
    if name not in COLOURS:
        raise ConfigError.of("algorithms", name, f"one of {', '.join(map(repr, COLOURS))}")
    algorithm, *of_peat = name.split(", ")
    if not of_peat:
        local = LocalConfig(learning_rate=settings.fed_avg_learning_rate) if algorithm == "fed-avg" else base.local
        return dataclasses.replace(base, algorithm=algorithm, local=local)
    level = settings.fixed_level if of_peat[0] == "fixed" else ControlConfig.level
    control = ControlConfig(of_peat[0], level, settings.candidates)
    emulator = EmulatorConfig(eight_bit="8 bit" in of_peat)
    return dataclasses.replace(base, algorithm=algorithm, control=control, emulator=emulator)


def measured(directory: Path, summary: dict) -> tuple[pd.DataFrame, dict]:
    """Perplexity over what was paid so far, from before the first round; and the figures of the whole run."""
    run = load_run(directory)
    columns = ["virtual_s", "download_bytes", "upload_bytes", "energy_j", "perplexity", "num_completed"]
    rounds = run.rounds[columns].astype(float)
    paid = rounds[["download_bytes", "upload_bytes", "energy_j"]].cumsum()
    frame = pd.DataFrame(
        {
            "round": run.rounds["round"].astype(int),
            "virtual_s": rounds["virtual_s"],
            "bytes": paid["download_bytes"] + paid["upload_bytes"],
            "energy_j": paid["energy_j"],
            "perplexity": rounds["perplexity"],
        }
    )
    start = {"round": 0, "virtual_s": 0.0, "bytes": 0.0, "energy_j": 0.0}
    frame = pd.concat([pd.DataFrame([start | {"perplexity": summary["perplexity"]["zero_shot"]}]), frame])
    done = run.clients.query("outcome == 'completed'")
    final = {
        "perplexity": summary["perplexity"]["tuned"],
        "memory_bytes": float(done["memory_bytes"].mean()),
        "share_too_small": float((run.clients["drop_reason"] == "memory").mean()),
        "bytes": frame["bytes"].iloc[-1],
        "virtual_s": frame["virtual_s"].iloc[-1],
        "energy_j": frame["energy_j"].iloc[-1],
    }
    return frame, final


def paid_at(rounds: pd.DataFrame, column: str, target: float) -> float:
    """What was paid when perplexity first came to the target, in proportion between rounds; infinite if never."""
    perplexity, paid = rounds["perplexity"].to_numpy(float), rounds[column].to_numpy(float)
    reached = perplexity <= target
    if not reached.any():
        return float("inf")
    first = int(reached.argmax())
    if first == 0:
        return float(paid[0])
    part = (perplexity[first - 1] - target) / (perplexity[first - 1] - perplexity[first])
    return float(paid[first - 1] + part * (paid[first] - paid[first - 1]))


def markdown(rounds: pd.DataFrame, runs: pd.DataFrame) -> str:
    """Means over seeds, and what it took to come as far as the worst of the runs ends."""
    lowest = [min(run["perplexity"].to_list()) for _, run in rounds.groupby(["name", "seed"])]
    target, to_target = max(lowest), {}
    for name, of in rounds.groupby("name", sort=False):
        each = [[paid_at(run, column, target) for column in PAID] for _, run in of.groupby("seed")]
        to_target[str(name)] = [sum(column) / len(each) for column in zip(*each, strict=True)]
    lines = [
        "| algorithm | perplexity | MB | virtual s | kJ | MB a device needs | too small "
        f"| MB to {target:.2f} | s to {target:.2f} | J to {target:.2f} |",
        "|" + "---|" * 10,
    ]
    for name, of in runs.groupby("name", sort=False):
        mean = of.drop(columns="name").mean()
        num_bytes, seconds, joules = to_target[str(name)]
        lines.append(
            f"| {name} | {mean['perplexity']:.2f} | {mean['bytes'] / 1e6:,.0f} | {mean['virtual_s']:,.1f} "
            f"| {mean['energy_j'] / 1e3:.2f} | {mean['memory_bytes'] / 1e6:.0f} | {mean['share_too_small']:.0%} "
            f"| {num_bytes / 1e6:,.0f} | {seconds:,.1f} | {joules:,.0f} |"
        )
    full = to_target.get("fed-avg")
    lines.append("")
    for name in to_target:
        if full and name != "fed-avg":
            less, faster, saved = (a / b for a, b in zip(full, to_target[name], strict=True))
            lines.append(
                f"- {name} comes to {target:.2f} with {less:.1f} times fewer bytes, {faster:.1f} times faster and "
                f"with {saved:.1f} times less energy than fed-avg."
            )
    if full and len(to_target) > 1:
        lines += ["", *against_fed_avg(rounds)]
    return "\n".join(lines) + "\n"


def against_fed_avg(rounds: pd.DataFrame) -> list[str]:
    """How many times fewer bytes and how many times faster the others came to the best perplexity that fed-avg had
    after so many rounds."""
    names, last = [str(name) for name in rounds["name"].unique()], int(rounds["round"].to_numpy().max())
    runs = {(str(name), seed): run for (name, seed), run in rounds.groupby(["name", "seed"])}  # type: ignore[misc]
    seeds, others = sorted({seed for _, seed in runs}), [name for name in names if name != "fed-avg"]
    lines = [f"| fed-avg's best of | seed | perplexity | {' | '.join(others)} |", "|" + "---|" * (3 + len(others))]
    for number in sorted({min(2**power, last) for power in range(last.bit_length() + 1)}):
        targets, paid = [], []  # by seed; what was paid: by name, in bytes and in seconds
        for seed in seeds:
            best = runs["fed-avg", seed]["perplexity"].to_numpy(float)[: number + 1].min()
            targets.append(best)
            paid.append([[paid_at(runs[name, seed], of, best) for of in PAID[:2]] for name in ("fed-avg", *others)])
        rows = list(zip(seeds, targets, paid, strict=True))
        if len(seeds) > 1:
            rows.append(("mean", np.mean(targets), np.mean(paid, axis=0)))
        for seed, target, (full, *own) in rows:
            shown = [" and ".join(_times(*pair) for pair in zip(full, of, strict=True)) for of in own]
            lines.append(f"| 1 to {number} rounds | {seed} | {target:.2f} | {' | '.join(shown)} |")
    return [*lines, "", "Times fewer bytes, and times faster; - where that, or one of the seeds, never came that far."]


def _times(full: float, own: float) -> str:
    return f"{full / own:.1f}" if own < float("inf") else "-"


def draw(rounds: pd.DataFrame, runs: pd.DataFrame, path: Path) -> None:
    """Perplexity against bytes, virtual time and energy, and against the memory a device needs."""
    figure = Figure((14, 3.8), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    units = ((1e6, "MB sent, both ways"), (1.0, "virtual seconds"), (1e3, "kJ on devices"))
    for axes, column, (unit, label) in zip(panels, PAID, units, strict=False):
        for name, of in rounds.groupby("name", sort=False):
            for seed, run in of.groupby("seed"):
                shown = str(name) if seed == of["seed"].min() else None
                axes.plot(run[column] / unit, run["perplexity"], color=COLOURS[str(name)], marker=".", label=shown)
        axes.set_xscale("symlog", linthresh=min(value for value in rounds[column].to_list() if value > 0) / unit)
        axes.set_xlabel(label)
    for name, of in runs.groupby("name", sort=False):
        panels[3].scatter(of["memory_bytes"] / 1e6, of["perplexity"], color=COLOURS[str(name)], s=40)
    panels[3].set_xlabel("MB a device needs")
    panels[0].set_ylabel("held-out perplexity")
    panels[0].legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
