"""Distil the emulators of a foundation, and say what each is worth before any tuning.

python workloads/distil_emulators.py [--foundation.name NAME] [--ship DIR]

Runs with the same settings find the result in the cache. `--ship` writes it to a directory beside a
model, in bfloat16, where every installation finds it: that is how the embedded ones were made.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
import tyro
from rich import print
from rich.table import Table
from safetensors.torch import load_file, save_file

from fedpeat_ray.algorithms.algorithm import ALL, level_group
from fedpeat_ray.algorithms.fed_peat import FedPEAT
from fedpeat_ray.config import (
    DataConfig,
    EmulatorConfig,
    EvaluationConfig,
    FoundationConfig,
    HostsConfig,
    SimulationConfig,
)
from fedpeat_ray.errors import FedPeatError
from fedpeat_ray.files import written_with_hash
from fedpeat_ray.runtime.progress import Progress
from fedpeat_ray.simulation import evaluate
from fedpeat_ray.world import World, furnished, hosts, prepare


@dataclass(frozen=True)
class Settings:
    """What to distil."""

    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    emulator: EmulatorConfig = field(default_factory=EmulatorConfig)
    num_sequences: int = 128
    """Held-out private sequences of 128 tokens that the emulators are judged by."""
    num_threads: int = 2
    """CPU threads; the last bits depend on it."""
    ship: Path | None = None
    """Directory of the model for which the weights are to be written too."""


def main(settings: Settings) -> int:
    """Distil, judge, and write what is asked for; returns the exit status."""
    config = SimulationConfig(
        algorithm="fed-peat",
        foundation=settings.foundation,
        data=settings.data,
        emulator=settings.emulator,
        evaluation=EvaluationConfig(num_sequences=settings.num_sequences),
        hosts=HostsConfig(backend="serial", num_threads=settings.num_threads),
    )
    try:
        config.validate()
        with TemporaryDirectory() as directory, Progress(num_rounds=1) as progress:
            world = furnished(prepare(config, Path(directory)), None, progress)
            progress.stage("judging emulators")
            print(judged(world))
    except FedPeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if settings.ship:
        ship(world, settings.ship)
    return 0


def judged(world: World) -> Table:
    """Held-out perplexity of the foundation and of each emulator."""
    algorithm = cast(FedPEAT, world.algorithm)
    with hosts(world, lambda kind, **facts: None) as (map_clients, _):
        scores = evaluate(world, map_clients, algorithm.init(0), algorithm.levels)
    table = Table("level", "blocks", "emulator, MB", "perplexity")
    for level in algorithm.levels:
        megabytes = algorithm.emulators.costs.emulator_bytes_L[level - 1] / 1e6
        blocks = " ".join(map(str, algorithm.emulators.ladder.rungs[level - 1].blocks))
        table.add_row(str(level), blocks, f"{megabytes:.1f}", f"{scores[level_group(level)].perplexity:.2f}")
    table.add_row("", "the foundation", "", f"{scores[ALL].perplexity:.2f}")
    return table


def ship(world: World, directory: Path) -> None:
    """Write the distilled weights of all levels to a directory, in bfloat16, under the names they are looked for."""
    algorithm = cast(FedPEAT, world.algorithm)
    for path in algorithm.emulators.ladder.files:
        group = [rung for rung in algorithm.emulators.ladder.rungs if rung.weights == path]
        target = directory / "emulators" / algorithm.emulators.workshop.shipped(algorithm.emulators.ladder, group).name
        if target != path:
            with written_with_hash(target) as part:
                save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}, part)
        print(target)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
