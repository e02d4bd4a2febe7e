"""Train a controller for FedPEAT in a simulated fleet: who takes part in a round, on which emulator.

    python workloads/train_controller.py                  1,000 candidates, minutes on two cores
    ray job submit -- python workloads/train_controller.py
    python workloads/train_controller.py --resume DIR     go on with an interrupted training

Then, in any run of FedPEAT: --control.kind learned --control.policy DIR/policy --control.candidates 1000
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from fedpeat_ray.config import EmulatorConfig, FleetConfig, FoundationConfig, SimulationConfig
from fedpeat_ray.control.environment import TERMS, Response, Setting, Shift, Weights
from fedpeat_ray.control.learned import SHIPPED
from fedpeat_ray.control.policy import About
from fedpeat_ray.control.ppo import PPOSettings
from fedpeat_ray.errors import ConfigError, FedPeatError
from fedpeat_ray.files import written_whole
from fedpeat_ray.settings import Positive, PositiveInt, check, from_plain, to_plain


@dataclass(frozen=True)
class TrainConfig:
    iterations: PositiveInt = 150
    """Of PPO; with --resume in all, those before included."""
    candidates: PositiveInt = 1000
    """Devices that the controller chooses from in a round."""
    cohort_size: PositiveInt = 100
    """Devices that can complete a round."""
    smallest_cohort: PositiveInt | None = None
    """If given, every episode draws its cohort size between this and cohort_size."""
    over_sample: Positive = 1.25
    """Times the cohort that rules of thumb ask."""
    rounds: PositiveInt = 20
    """Of an episode."""
    deadline_s: Positive | None = None
    """Of a round."""
    weights: Weights = field(default_factory=Weights)
    shift: Shift | None = None
    """A change in the middle of every episode."""
    fleet: FleetConfig = field(default_factory=lambda: FleetConfig(memory_scale=0.045))
    emulator: EmulatorConfig = field(default_factory=EmulatorConfig)
    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    response: Path = SHIPPED / "response.json"
    """What perplexity answers to training, from workloads/fit_surrogate.py."""
    ppo: PPOSettings = field(default_factory=PPOSettings)
    seed: int = 0
    checkpoint_every: PositiveInt = 10
    """Iterations between checkpoints."""
    out: Path | None = None
    """Directory; unset: a new one under runs."""
    resume: Path | None = None
    """Directory of an interrupted training."""


def main(config: TrainConfig) -> int:
    """Train; returns the exit status."""
    try:
        directory, config = begun(config)
        print(f"{config.candidates:,} candidates, {config.iterations} iterations; loading RLlib", flush=True)
        train(config, setting_of(config, directory), directory)
    except FedPeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; go on with --resume {directory}", file=sys.stderr)
        return 130
    print(directory)
    return 0


def begun(config: TrainConfig) -> tuple[Path, TrainConfig]:
    """The directory, with config.json in it; what a resumed training was begun with, for more iterations if asked."""
    check(config)
    if config.resume:
        path = config.resume / "config.json"
        if not path.exists():
            raise ConfigError.of("resume", str(config.resume), "a directory of train_controller.py, with config.json")
        before = from_plain(TrainConfig, json.loads(path.read_text(encoding="utf-8")))
        return config.resume, dataclasses.replace(before, iterations=max(before.iterations, config.iterations))
    if config.candidates > config.fleet.num_devices:
        allowed = f"at most fleet.num_devices = {config.fleet.num_devices}"
        raise ConfigError.of("candidates", config.candidates, allowed)
    if not config.ppo.minibatch_rounds <= config.ppo.rounds_per_iteration:
        allowed = f"at most ppo.rounds_per_iteration = {config.ppo.rounds_per_iteration}"
        raise ConfigError.of("ppo.minibatch_rounds", config.ppo.minibatch_rounds, allowed)
    directory = config.out or Path("runs") / f"controller-{time.strftime('%Y%m%d-%H%M%S')}"
    if (directory / "config.json").exists():
        raise ConfigError.of("out", str(directory), "a directory without config.json; or --resume it")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(to_plain(config), indent=1) + "\n")
    return directory, config


def setting_of(config: TrainConfig, directory: Path) -> Setting:
    """Costs of the ladder and sizes of devices' data as a run of FedPEAT would have them."""
    from fedpeat_ray.world import prepare

    run = SimulationConfig(
        algorithm="fed-peat",
        cohort_size=config.cohort_size,
        fleet=config.fleet,
        emulator=config.emulator,
        foundation=config.foundation,
        seed=config.seed,
    )
    run.validate()
    world = prepare(run, directory)
    emulators = world.algorithm.emulators  # type: ignore[attr-defined]
    response = Response.load(config.response)
    if len(response.gain_L) != len(emulators.levels):
        allowed = f"fitted for {len(emulators.levels)} levels, not for {len(response.gain_L)}"
        raise ConfigError.of("response", str(config.response), allowed)
    some = np.arange(min(500, config.fleet.num_devices))
    num_tokens = tuple(int(task.num_tokens) for task in world.data.assignments(some, round=1))
    return Setting(
        emulators.costs,
        tuple(emulators.levels),
        response,
        config.fleet,
        config.cohort_size,
        config.candidates,
        config.rounds,
        config.smallest_cohort,
        config.over_sample,
        config.deadline_s,
        config.emulator.realign_every,
        num_tokens,
        config.weights,
        config.shift,
    )


def train(config: TrainConfig, setting: Setting, directory: Path) -> None:
    """Iterations, each a line; checkpoint, policy and curves every so many."""
    from tensorboardX import SummaryWriter

    from fedpeat_ray.control.branching_ppo import Training
    from fedpeat_ray.runtime.host_pool import start_or_join

    start_or_join(num_cpus=1 + config.ppo.num_env_runners)
    checkpoint, table = directory / "checkpoint", directory / "progress.csv"
    rows = pd.read_csv(table).to_dict("records") if checkpoint.exists() else []
    training = Training(setting, config.ppo, config.seed, checkpoint if checkpoint.exists() else None)
    rows = rows[: training.iteration]  # what came after the checkpoint is played anew
    console, writer = Console(soft_wrap=True), SummaryWriter(str(directory / "tensorboard"))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=config.iterations, completed=len(rows))
        while len(rows) < config.iterations:
            started = time.perf_counter()
            figures = training.iterate()
            number = len(rows) + 1
            row = {"iteration": number, "rounds": number * config.ppo.rounds_per_iteration}
            rows.append(row | figures | {"wall_s": time.perf_counter() - started})
            for name, value in figures.items():
                writer.add_scalar(name, value, row["rounds"])
            progress.console.print(line_of(rows, config.iterations), highlight=False)
            progress.update(bar, completed=number)
            if number % config.checkpoint_every == 0 or number == config.iterations:
                training.save(checkpoint)
                save(config, training, rows, directory)
    writer.close()
    training.close()


def line_of(rows: list[dict], iterations: int) -> str:
    """How an iteration went."""
    row, terms = rows[-1], "  ".join(f"{name} {rows[-1][name]:.2f}" for name in TERMS)
    left_s = (iterations - len(rows)) * sum(each["wall_s"] for each in rows) / len(rows)
    place = f"{row['iteration']:>{len(str(iterations))}}/{iterations}"
    return f"iteration {place}  reward {row['reward']:6.3f}  {terms}  {row['wall_s']:.1f} s  {left_s / 60:.1f} min left"


def save(config: TrainConfig, training, rows: list[dict], directory: Path) -> None:  # type: ignore[no-untyped-def]
    """progress.csv, curves.png, and the policy as runs use it."""
    frame = pd.DataFrame(rows)
    with written_whole(directory / "progress.csv") as path:
        frame.to_csv(path, index=False)
    draw(frame, directory / "curves.png")
    if config.ppo.network == "shared":
        emulator = config.emulator
        trained = {name: value for name, value in to_plain(config).items() if name not in ("out", "resume", "response")}
        about = About(tuple(emulator.shares), emulator.give_foundation, trained | {"iterations": len(rows)})
        training.policy(about).save(directory / "policy")


def draw(frame: pd.DataFrame, path: Path) -> None:
    """The reward and each of its terms over the rounds played."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, name in zip(figure.subplots(2, 3).flat, ("reward", *TERMS), strict=True):
        axes.plot(frame["rounds"], frame[name], color="0.8")
        axes.plot(frame["rounds"], frame[name].rolling(10, min_periods=1).mean(), color="C0")
        axes.set(title=name, xlabel="rounds played")
    figure.suptitle("a round's reward, and its terms in units of what a cohort drawn by chance pays (quality: gains)")
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=100, format="png")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(TrainConfig, description=__doc__)))
