"""A training of a controller: its settings, its directory, an iteration a line; what workloads share.

config.json       what it was begun with
progress.csv      a row an iteration: the reward of a round, its terms, PPO's own figures, seconds
curves.png        the same, drawn
policy/           the policy as runs use it (control.kind = learned), the best so far on fleets for validation
checkpoint/       RLlib's, to go on with; contains pickles, so resume only what is your own
tensorboard/      the same figures as progress.csv
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedpeat_ray.config import (
    DataConfig,
    EmulatorConfig,
    EvaluationConfig,
    FleetConfig,
    FoundationConfig,
    LocalConfig,
    LoraConfig,
    SimulationConfig,
)
from fedpeat_ray.control.environment import TERMS, Response, Setting, Shift, Weights
from fedpeat_ray.control.learned import SHIPPED
from fedpeat_ray.control.policy import About
from fedpeat_ray.control.ppo import PPOSettings
from fedpeat_ray.control.trial import VALIDATION, Player, compare
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.files import written_whole
from fedpeat_ray.settings import NonNegativeInt, Positive, PositiveInt, check, differences, from_plain, to_plain

if TYPE_CHECKING:
    import pandas as pd

    from fedpeat_ray.control.branching_ppo import Training


@dataclass(frozen=True)
class TrainConfig:
    """What a controller is trained on, and how."""

    iterations: PositiveInt = 50
    """Of PPO; with --resume in all, those before included."""
    candidates: PositiveInt = 1000
    """Devices that the controller chooses from in a round."""
    cohort_size: PositiveInt = 400
    """Devices that can complete a round."""
    smallest_cohort: PositiveInt | None = 20
    """If given, every episode draws its cohort size between this and cohort_size."""
    over_sample: Positive = 1.25
    """Times the cohort that rules of thumb ask."""
    rounds: PositiveInt = 40
    """Of an episode."""
    deadline_s: Positive | None = None
    """Of a round."""
    realign_every: tuple[NonNegativeInt, ...] = (0, 5)
    """Rounds between re-alignments of emulators, 0: never; each episode has one of these."""
    weights: Weights = field(default_factory=Weights)
    shift: Shift | None = None
    """A change in the middle of every episode."""
    fleet: FleetConfig = field(default_factory=lambda: FleetConfig(memory_scale=0.045))
    emulator: EmulatorConfig = field(default_factory=EmulatorConfig)
    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    response: Path | None = None
    """What perplexity answers to training, from workloads/fit_surrogate.py; unset: as fitted for the default ladder."""
    ppo: PPOSettings = field(default_factory=PPOSettings)
    seed: NonNegativeInt = 0
    checkpoint_every: PositiveInt = 10
    """Iterations between checkpoints, at each of which the policy is tried on fleets that training does not draw."""
    validation_fleets: PositiveInt = 8
    """So many; the policy that is kept is the best of these trials."""
    out: Path | None = None
    """Directory; unset: a new one under runs."""
    resume: Path | None = None
    """Directory of an interrupted training."""

    def validate(self) -> None:
        """Raise ConfigError for the first setting that cannot be used."""
        check(self)
        self.fleet.check_has("candidates", self.candidates, self.data.partition)
        if self.cohort_size > self.candidates:
            raise ConfigError.of("cohort_size", self.cohort_size, f"at most candidates = {self.candidates}")
        if self.smallest_cohort and self.smallest_cohort > self.cohort_size:
            allowed = f"unset, or at most cohort_size = {self.cohort_size}"
            raise ConfigError.of("smallest_cohort", self.smallest_cohort, allowed)
        if not self.realign_every:
            raise ConfigError.of("realign_every", self.realign_every, "at least one number of rounds, or 0")
        if self.ppo.minibatch_rounds > self.ppo.rounds_per_iteration:
            allowed = f"at most ppo.rounds_per_iteration = {self.ppo.rounds_per_iteration}"
            raise ConfigError.of("ppo.minibatch_rounds", self.ppo.minibatch_rounds, allowed)


def stored(directory: Path) -> TrainConfig:
    """What the training there was begun with. Raises ConfigError."""
    path = directory / "config.json"
    if not path.exists():
        raise ConfigError.of("resume", str(directory), "a directory of train_controller.py, with config.json")
    return dataclasses.replace(from_plain(TrainConfig, json.loads(path.read_text(encoding="utf-8"))), out=None)


def begun(config: TrainConfig) -> Path:
    """The directory, with config.json in it. A training that is resumed may get more iterations; nothing else of it may
    differ. Raises ConfigError."""
    config.validate()
    if config.resume:
        before = stored(config.resume)
        for path, was, now in differences(before, config):
            if path not in ("iterations", "out", "resume"):
                raise ConfigError.of(path, now, f"{was!r}, as in the training that is resumed, {config.resume}")
        if config.iterations < before.iterations:
            allowed = f"at least {before.iterations}, as many as {config.resume} has"
            raise ConfigError.of("iterations", config.iterations, allowed)
        return config.resume
    directory = config.out or Path("runs") / f"controller-{time.strftime('%Y%m%d-%H%M%S')}"
    if (directory / "config.json").exists():
        raise ConfigError.of("out", str(directory), "a directory without a training; or go on with it: --resume")
    directory.mkdir(parents=True, exist_ok=True)
    with written_whole(directory / "config.json") as path:
        path.write_text(json.dumps(to_plain(config), indent=1) + "\n")
    return directory


def settings_for(config: TrainConfig) -> list[Setting]:
    """What episodes are drawn from: costs of the ladder and sizes of devices' data as a run of FedPEAT has them."""
    from fedpeat_ray.world import prepare  # loads PyTorch

    run = SimulationConfig(
        algorithm="fed-peat",
        cohort_size=config.cohort_size,
        fleet=config.fleet,
        emulator=config.emulator,
        foundation=config.foundation,
        local=config.local,
        lora=config.lora,
        data=config.data,
        evaluation=EvaluationConfig(num_sequences=1, sequence_length=config.local.sequence_length),  # nothing is judged
        seed=config.seed,
    )
    run.validate()
    response_file = config.response or SHIPPED / "response.json"
    response = Response.load(response_file)
    world = prepare(run, Path())
    fleet = world.config.fleet
    fleet.check_has("candidates", config.candidates, config.data.partition)
    emulators = world.algorithm.emulators  # type: ignore[attr-defined]  # FedPEAT's
    if len(response.gain_L) != len(emulators.levels):
        allowed = f"one fitted for {len(emulators.levels)} levels, not for {len(response.gain_L)}"
        raise ConfigError.of("response", str(response_file), allowed)
    shares = world.config.emulator.shares
    assert shares != "auto"
    some = np.arange(min(500, fleet.size))
    setting = Setting(
        emulators.costs,
        tuple(emulators.levels),
        response,
        fleet,
        config.cohort_size,
        config.candidates,
        config.rounds,
        config.smallest_cohort,
        config.over_sample,
        config.deadline_s,
        num_tokens=tuple(int(task.num_tokens) for task in world.data.assignments(some, round=1)),
        weights=config.weights,
        shift=config.shift,
        shares=shares,
    )
    return [dataclasses.replace(setting, realign_every=every) for every in config.realign_every]


def train(config: TrainConfig, settings: Sequence[Setting], directory: Path) -> None:
    """Iterations from where the directory's checkpoint is; checkpoint, policy and curves every so many. Needs a running
    Ray (`runtime.host_pool.some_ray`)."""
    import pandas as pd
    from rich.console import Console
    from rich.progress import Progress
    from tensorboardX import SummaryWriter

    from fedpeat_ray.control.branching_ppo import Training

    checkpoint, table = directory / "checkpoint", directory / "progress.csv"
    rows = cast(list[dict[str, Any]], pd.read_csv(table).to_dict("records")) if checkpoint.exists() else []
    training = Training(
        settings, config.ppo, config.iterations, config.seed, checkpoint if checkpoint.exists() else None
    )
    rows = rows[: training.iteration]  # what came after the checkpoint is played anew
    shutil.rmtree(directory / "tensorboard", ignore_errors=True)
    console, writer = Console(soft_wrap=True), SummaryWriter(str(directory / "tensorboard"))
    try:
        for row in rows:
            _show(writer, row)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("training", total=config.iterations, completed=len(rows))
            while len(rows) < config.iterations:
                started, number = time.perf_counter(), len(rows) + 1
                place = {"iteration": number, "rounds": number * config.ppo.rounds_per_iteration}
                rows.append(place | training.iterate() | {"wall_s": time.perf_counter() - started})
                due = number % config.checkpoint_every == 0 or number == config.iterations
                if due:
                    rows[-1]["validation"] = validated(training.player(), settings, config.validation_fleets)
                _show(writer, rows[-1])
                progress.console.print(_line(rows, config.iterations), highlight=False)
                console.file.flush()
                progress.update(bar, completed=number)
                if due:
                    training.save(checkpoint)
                    _save(config, settings[0].shares, training, pd.DataFrame(rows), directory)
    finally:
        writer.close()
        training.close()


def validated(decide: Player, settings: Sequence[Setting], num_fleets: int) -> float:
    """Mean reward of a round, in every setting on fleets that neither training nor comparisons draw."""
    seeds = range(VALIDATION, VALIDATION + num_fleets)
    return float(np.mean([each["reward"] for setting in settings for each in compare(setting, {"": decide}, seeds)]))


def _show(writer: Any, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if name not in ("iteration", "rounds"):
            writer.add_scalar(name, value, row["rounds"])


def _line(rows: list[dict[str, Any]], iterations: int) -> str:
    """How an iteration went."""
    row, terms = rows[-1], "  ".join(f"{name} {rows[-1][name]:.2f}" for name in TERMS)
    left_s = (iterations - len(rows)) * sum(each["wall_s"] for each in rows) / len(rows)
    place = f"{row['iteration']:>{len(str(iterations))}}/{iterations}"
    tried = f"  validation {row['validation']:.3f}" if "validation" in row else ""
    done = f"iteration {place}  reward {row['reward']:6.3f}  {terms}{tried}"
    return f"{done}  {row['wall_s']:.1f} s  {left_s / 60:.1f} min left"


def _save(
    config: TrainConfig, shares: tuple[float, ...], training: Training, frame: pd.DataFrame, directory: Path
) -> None:
    with written_whole(directory / "progress.csv") as path:
        frame.to_csv(path, index=False)
    with written_whole(directory / "curves.png") as path:
        draw_curves(frame, path)
    if config.ppo.network == "shared" and frame["validation"].iloc[-1] == frame["validation"].max():
        said = {name: value for name, value in to_plain(config).items() if name not in ("out", "resume", "response")}
        about = About(shares, config.emulator.give_foundation, said | {"iterations": len(frame)})
        training.policy(about).save(directory / "policy")


def draw_curves(frame: pd.DataFrame, path: Path) -> None:
    """The reward and each of its terms over the rounds played."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    frame = frame.assign(thousands=frame["rounds"] / 1000)
    for axes, name in zip(figure.subplots(2, 3).flat, ("reward", *TERMS), strict=True):
        axes.plot(frame["thousands"], frame[name], color="0.8")
        axes.plot(frame["thousands"], frame[name].rolling(10, min_periods=1).mean(), color="C0")
        if name == "reward":
            tried = frame.dropna(subset="validation")
            axes.plot(tried["thousands"], tried["validation"], "o-", color="C1", label="likeliest choices")
            axes.legend()
        axes.set(title=name, xlabel="thousand rounds played")
    figure.suptitle("a round's reward and its terms, each in units of what a cohort drawn by chance pays")
    figure.savefig(path, dpi=100, format="png")
