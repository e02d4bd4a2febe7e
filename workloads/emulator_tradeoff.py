"""How much of the middle must an emulator keep? Scores of plug-in and emulator over the share of blocks kept.

    python workloads/emulator_tradeoff.py [--seeds 0 1 2] [--out DIR]
    python workloads/emulator_tradeoff.py --task images --foundation glyph-vit --data digits \\
        --public workloads/pretrain_vit.py:letters

For every seed and every kind of emulator, the adapter (LoRA in the end blocks) is tuned on emulators of
several depths by one client that has all private text, and judged on the emulator and plugged into the
foundation. Kinds: uniform (evenly spread blocks, as they are), influence (those that change their input
most), distilled (uniform, each depth distilled by itself), elastic (uniform, one distillation for all
depths; as many steps as one of the others). A classifier's new head is tuned with the adapter. Writes
tradeoff.csv, tradeoff.md and tradeoff.png.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from fedpeat_ray.algorithms.algorithm import ALL, level_group
from fedpeat_ray.algorithms.fed_peat import FedPEAT
from fedpeat_ray.config import (
    DataConfig,
    DistilConfig,
    EmulatorConfig,
    EvaluationConfig,
    FoundationConfig,
    HostsConfig,
    LocalConfig,
    SimulationConfig,
)
from fedpeat_ray.emulators.ladder import Ladder
from fedpeat_ray.emulators.on_emulators import OnEmulators
from fedpeat_ray.runtime.metric import metric_words, written_metric
from fedpeat_ray.runtime.progress import Progress
from fedpeat_ray.sweep import Sweep, report
from fedpeat_ray.tasks.find import find_task
from fedpeat_ray.tasks.task import Task
from fedpeat_ray.training.client_batch import ClientUpdate
from fedpeat_ray.training.evaluation import EvaluationTask, ScoreSum
from fedpeat_ray.training.map_clients import MapClients
from fedpeat_ray.world import World, furnished, hosts, prepare

KINDS = {
    "uniform": EmulatorConfig(choice="uniform", weights="foundation"),
    "influence": EmulatorConfig(choice="influence", weights="foundation"),
    "distilled": EmulatorConfig(choice="uniform", weights="per_level"),
    "elastic": EmulatorConfig(choice="uniform", weights="elastic"),
}
COLOURS = {"uniform": "#888888", "influence": "#c47a2c", "distilled": "#2f6db3", "elastic": "#2f9e62"}


@dataclass(frozen=True)
class Settings:
    """What to compare, and how long to train."""

    task: str = "language-modelling"
    foundation: str = "pydoc-base"
    data: str = "python_docs"
    public: str | None = None
    """What emulators are distilled on; unset: the public part of python_docs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Draw the text of distillation and tuning, and the start of LoRA."""
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the middle blocks that are kept."""
    distil: DistilConfig = field(default_factory=lambda: DistilConfig(steps=200))
    num_steps: int = 120
    """Optimizer steps of tuning."""
    batch_size: int = 8
    """Sequences a step of tuning."""
    learning_rate: float = 2e-3
    """Of tuning."""
    num_sequences: int = 128
    """Held-out private examples."""
    sequence_length: int = 128
    """Tokens of each, of text."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    out: Path = Path("runs/emulator_tradeoff")
    """Directory for table and figure."""


@dataclass(frozen=True)
class Deltas:
    """Aggregator: what every task learnt, in order."""

    values: tuple[Tensor, ...] = ()

    def add(self, updates: Sequence[ClientUpdate]) -> Deltas:
        return Deltas((*self.values, *(update.delta_P for update in updates)))

    def merge(self, other: Deltas) -> Deltas:
        return Deltas(self.values + other.values)

    def result(self) -> tuple[Tensor, ...]:
        return self.values


def main(settings: Settings) -> int:
    """Run everything and write the results; returns the exit status."""

    def study(sweep: Sweep) -> str:
        frames = []
        with Progress(num_rounds=len(settings.seeds)) as progress:
            for seed in settings.seeds:
                frames.append(one_seed(settings, sweep, seed, progress))
                table = pd.concat(frames)
                table.to_csv(sweep.out / "tradeoff.csv", index=False)
        metric = find_task(settings.task).metric
        draw(table, sweep.out / "tradeoff.png", metric)
        return markdown(table, metric)

    return report(Sweep(settings.out, settings.hosts), "tradeoff.md", study)


def one_seed(settings: Settings, sweep: Sweep, seed: int, progress: Progress) -> pd.DataFrame:
    """A row a kind and depth, and one of kind `foundation`, where the adapter is tuned on the whole model."""
    worlds = {kind: world_of(settings, kind, seed, progress) for kind in KINDS}
    names = [(kind, share) for kind in KINDS for share in settings.shares]
    rungs = [
        dataclasses.replace(rung, level=number)
        for number, rung in enumerate(
            (r for kind in KINDS for r in peat(worlds[kind]).emulators.ladder.rungs[:-1]), start=1
        )
    ]
    world = worlds["uniform"]
    algorithm = peat(world)
    ladder = dataclasses.replace(algorithm.emulators.ladder, rungs=(*rungs, algorithm.emulators.ladder.rungs[-1]))
    levels = [rung.level for rung in rungs]
    progress.stage(f"seed {seed}: tuning on {len(rungs)} emulators and on the foundation")
    with hosts(world, lambda kind, **facts: None, pool=sweep.pool) as (map_clients, _):
        state = algorithm.init(seed)
        task = world.data.pooled_task(settings.num_steps, settings.batch_size)
        tasks = [dataclasses.replace(task, level=level) for level in (None, *levels)]
        train = on_all(ladder, algorithm.adapter.trainer(world.config.local), algorithm)
        deltas = map_clients(train, state.model_P, tasks, Deltas())[0].result()
        tuned = [(state.model_P.double() + delta_P).float() for delta_P in deltas]
        progress.stage(f"seed {seed}: judging them")
        evaluator = on_all(ladder, algorithm.adapter.evaluator(), algorithm)
        score = partial(scores, world.task, map_clients, evaluator)
        zero_shot = score(state.model_P, by_level(world, levels))
        rows = []
        for (kind, share), rung, adapter_P in zip(names, rungs, tuned[1:], strict=True):
            own = level_group(rung.level)
            after = score(adapter_P, by_level(world, [rung.level]))
            row = {"seed": seed, "kind": kind, "share": share, "blocks": " ".join(map(str, rung.blocks))}
            row |= {"emulator_zero_shot": zero_shot[own], "emulator_tuned": after[own]}
            rows.append(row | {"plug_in": after[ALL], "zero_shot": zero_shot[ALL]})
        bound = score(tuned[0], by_level(world, []))[ALL]
    return pd.DataFrame(rows).assign(centralised=bound)


def world_of(settings: Settings, kind: str, seed: int, progress: Progress) -> World:
    """The world with the emulators of one kind."""
    length = settings.sequence_length
    distil = dataclasses.replace(settings.distil, seed=seed, sequence_length=length)
    config = SimulationConfig(
        task=settings.task,
        algorithm="fed-peat",
        seed=seed,
        client_batch_size=1,
        foundation=FoundationConfig(settings.foundation),
        data=DataConfig(settings.data, public_name=settings.public),
        local=LocalConfig(sequence_length=length, learning_rate=settings.learning_rate),
        emulator=dataclasses.replace(KINDS[kind], shares=settings.shares, distil=distil),
        evaluation=EvaluationConfig(num_sequences=settings.num_sequences, sequence_length=length),
        hosts=settings.hosts,
    )
    config.validate()
    progress.stage(f"seed {seed}: {kind} emulators")
    return furnished(prepare(config, settings.out), None, progress)


def peat(world: World) -> FedPEAT:
    """Its algorithm."""
    return cast(FedPEAT, world.algorithm)


def on_all(ladder: Ladder, work, algorithm: FedPEAT) -> OnEmulators:
    """The same work on every rung: what is trained lies in the end blocks and behind them, which all have."""
    everything = torch.arange(algorithm.layout.num_elements)
    return OnEmulators(ladder, work, tuple((work, everything) for _ in ladder.rungs))


def by_level(world: World, levels: Sequence[int]) -> list[EvaluationTask]:
    """What is held out for the foundation, and for each level."""
    return [*world.heldout, *world.heldout_by_level(levels)]


def scores(task: Task, map_clients: MapClients, evaluator: OnEmulators, adapter_P: Tensor, tasks) -> dict[str, float]:
    """Held-out scores by group, in the task's metric."""
    found = map_clients(evaluator, adapter_P, tasks, ScoreSum())[0].result()
    return {group: task.metrics(score)[task.metric] for group, score in found.items()}


def markdown(table: pd.DataFrame, metric: str) -> str:
    """Mean over seeds, and the range of the plug-in."""
    groups = table.groupby(["kind", "share"], sort=False).agg(
        {"emulator_zero_shot": "mean", "emulator_tuned": "mean", "plug_in": ["mean", "min", "max"]}
    )
    lines = ["| emulator | share kept | zero-shot | tuned | plug-in | plug-in, range |", "|---|---|---|---|---|---|"]
    for key, row in groups.iterrows():
        (kind, share), values = cast(tuple[str, float], key), [written_metric(metric, value) for value in row]
        lines.append(f"| {kind} | {share:g} | {' | '.join(values[:3])} | {values[3]} to {values[4]} |")
    ends = table.groupby("seed")[["zero_shot", "centralised"]].first().mean()
    zero_shot, bound = (written_metric(metric, ends[name]) for name in ("zero_shot", "centralised"))
    lines.append("")
    lines.append(
        f"{metric_words(metric).capitalize()} of the foundation zero-shot {zero_shot}, with the adapter tuned on it "
        f"{bound}; means of {table['seed'].nunique()} seeds."
    )
    return "\n".join(lines) + "\n"


def draw(table: pd.DataFrame, path: Path, metric: str) -> None:
    """Two panels: the foundation with the adapter, and the emulators before and after tuning."""
    figure = Figure((10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, rows in table.groupby("kind", sort=False):
        over = rows.groupby("share")
        colour = COLOURS[str(kind)]
        left.plot(over["plug_in"].mean(), color=colour, marker="o", label=kind)
        left.fill_between(over.groups.keys(), over["plug_in"].min(), over["plug_in"].max(), color=colour, alpha=0.15)
        right.plot(over["emulator_tuned"].mean(), color=colour, marker="o", label=f"{kind}, tuned")
        right.plot(over["emulator_zero_shot"].mean(), color=colour, marker=".", linestyle=":")
    ends = table.groupby("seed")[["zero_shot", "centralised"]].first().mean()
    for axes in (left, right):
        axes.axhline(ends["zero_shot"], color="black", linewidth=0.8, linestyle="--")
        axes.axhline(ends["centralised"], color="black", linewidth=0.8)
        axes.set_xlabel("share of the middle blocks kept")
        axes.set_xticks(sorted(table["share"].unique()))
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel(f"held-out {metric_words(metric)}")
    left.set_title("adapter plugged into the foundation", fontsize=10)
    right.set_title("on the emulator (dotted: before tuning)", fontsize=10)
    if metric == "perplexity":
        right.set_yscale("log")
    start = table["share"].min()
    left.annotate("foundation, zero-shot", (start, ends["zero_shot"]), fontsize=8, va="bottom")
    left.annotate("adapter tuned on the foundation", (start, ends["centralised"]), fontsize=8, va="bottom")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
