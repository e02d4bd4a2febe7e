"""What a learned controller is worth: against rules of thumb, an oracle, other ways of training, and changing fleets.

    python workloads/controller_study.py                        all parts in simulated fleets
    python workloads/controller_study.py --parts oracle ratios  some of them
    python workloads/controller_study.py --parts table          the policy that comes with the package; trains nothing

Trainings and runs that are finished are not repeated, interrupted ones go on.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from fedpeat_ray.config import AvailabilityConfig, ChannelConfig, ControlConfig
from fedpeat_ray.control.environment import TERMS, Setting, Shift
from fedpeat_ray.control.find import find_controller
from fedpeat_ray.control.learned import SHIPPED, Learned
from fedpeat_ray.control.oracle import best_plan
from fedpeat_ray.control.policy import Policy
from fedpeat_ray.control.trial import HELD_OUT, Player, compare, mean_rewards, play, player
from fedpeat_ray.control_training import TrainConfig, begun, settings_for, train
from fedpeat_ray.errors import FedPeatError
from fedpeat_ray.settings import PositiveInt

RULES = ("random", "greedy", "greedy-by-time", "greedy-by-holding")
SIZES = {  # candidates: (cohort, iterations, PPO's rounds an iteration)
    8: (4, 60, 1000),
    100: (10, 50, 800),
    1000: (100, 40, 400),
    5000: (500, 20, 200),
}
USUAL = "a ratio a branch"
Part = Literal["table", "oracle", "sizes", "ratios", "shift"]


@dataclass(frozen=True)
class Settings:
    parts: tuple[Part, ...] = ("table", "oracle", "sizes", "ratios", "shift")
    fleets: PositiveInt = 20
    """Held-out ones, on which controllers are compared."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings whose learning curves are compared."""
    sizes: tuple[int, ...] = (8, 100, 1000)
    """Candidates, of the learning curves."""
    largest: PositiveInt = 5000
    """Candidates on which a policy of 100 is tried."""
    shrink: PositiveInt = 1
    """Divides all iterations: a quick look at everything."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """What all trainings share."""
    out: Path = Path("runs/controller_study")


@dataclass(frozen=True)
class Study:
    """Settings, and what each part needs of them."""

    settings: Settings
    of_run: Setting
    """With the costs of the ladder and the tokens of devices."""

    def setting(self, candidates: int, **changes: Any) -> Setting:
        """Half of a fleet to choose from; all of one of eight."""
        fleet = dataclasses.replace(self.of_run.fleet, num_devices=candidates if candidates < 100 else 2 * candidates)
        plain: dict[str, Any] = {"smallest_cohort": None, "realign_every": 0, "fleet": fleet}
        size: dict[str, Any] = {"cohort_size": SIZES[candidates][0], "num_candidates": candidates}
        return dataclasses.replace(self.of_run, **(plain | size | changes))

    def trained(self, name: str, settings: Sequence[Setting], seed: int = 0, times: int = 1, **ppo: object) -> Path:
        """The directory of a training, with what it wrote; so many times as long as usual."""
        _, iterations, rounds = SIZES[settings[0].num_candidates]
        iterations = max(1, times * iterations // self.settings.shrink)
        directory = self.settings.out / "trainings" / name
        batches = {"minibatch_rounds": rounds // 2, "num_envs": max(1, rounds // self.of_run.num_rounds)}
        config = dataclasses.replace(
            self.settings.train,
            iterations=iterations,
            seed=seed,
            ppo=dataclasses.replace(self.settings.train.ppo, rounds_per_iteration=rounds, **batches, **ppo),  # type: ignore[arg-type]
            candidates=settings[0].num_candidates,
            cohort_size=settings[0].cohort_size,
            smallest_cohort=None,
            fleet=settings[0].fleet,
        )
        if (directory / "config.json").exists():
            config = dataclasses.replace(config, resume=directory)
        else:
            config = dataclasses.replace(config, out=directory)
        directory = begun(config)
        done = directory / "progress.csv"
        if not done.exists() or len(pd.read_csv(done)) < iterations:
            print(f"training {name}", flush=True)
            train(config, settings, directory)
        return directory

    def trained_at(self, candidates: int) -> Player:
        """What was trained in the usual way with so many."""
        return learned(self.trained(f"{candidates} {USUAL} seed 0", [self.setting(candidates)]))

    @property
    def fleets(self) -> range:
        """Seeds of held-out fleets."""
        return range(HELD_OUT, HELD_OUT + self.settings.fleets)


def main(settings: Settings) -> int:
    """Write all tables and pictures; returns the exit status."""
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        study = Study(settings, settings_for(settings.train)[0])
        from fedpeat_ray.runtime.host_pool import some_ray  # Ray is loaded once settings are read

        with some_ray(1):
            for part in settings.parts:
                text = PARTS[part](study)
                (settings.out / f"{part}.md").write_text(text)
                print(f"\n{text}", flush=True)
    except FedPeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was finished is in {settings.out}", file=sys.stderr)
        return 130
    print(settings.out)
    return 0


def rules(levels: Sequence[int]) -> dict[str, Player]:
    """All controllers that learn nothing."""
    found = {name: player(find_controller(name).build(ControlConfig(name), 0)) for name in RULES}
    fixed = find_controller("fixed")
    return found | {f"fixed {level}": player(fixed.build(ControlConfig("fixed", level), 0)) for level in levels}


def learned(directory: Path) -> Player:
    """What was trained there."""
    return player(Learned(Policy.load(directory / "policy")))


def table(study: Study) -> str:
    """The policy that comes with the package against every rule: a thousand candidates in several scenarios, and fleets
    of other sizes."""
    of_1000, of_100 = study.setting(1000), study.setting(100)
    small = dataclasses.replace(study.of_run.fleet, num_devices=60)
    of_60 = dataclasses.replace(of_100, fleet=small, num_candidates=60, cohort_size=12)
    of_40 = dataclasses.replace(of_60, num_candidates=40, cohort_size=32)
    scenarios = {
        "1,000 of 2,000 devices, 100 places": of_1000,
        "the same, emulators re-aligned every 5 rounds": dataclasses.replace(of_1000, realign_every=5),
        "the same, with a deadline": dataclasses.replace(of_1000, deadline_s=deadline_of(of_1000)),
        "100 of 200 devices, 10 places": of_100,
        "100 of 200 devices, emulators re-aligned every 5 rounds": dataclasses.replace(of_100, realign_every=5),
        "all 60 devices of a fleet, 12 places": of_60,
        "40 of 60 devices, 32 places": of_40,
    }
    text = []
    for name, setting in scenarios.items():
        players = rules(setting.levels) | {"learned": player(Learned(Policy.load(SHIPPED)))}
        text.append(f"{name}:\n\n{paired(compare(setting, players, study.fleets))}")
    return "\n".join(text)


def deadline_of(setting: Setting) -> float:
    """Seconds: what chance takes in half of its rounds."""
    rounds = play(setting, HELD_OUT - 1, rules(setting.levels)["random"])
    return float(np.median(np.diff([0.0, *(each["now_s"] for each in rounds)])))


def paired(rows: Sequence[Mapping[str, Any]], who: str = "learned") -> str:
    """A line a controller: terms, and by how much one of them is better on the same fleets, with 95 % confidence."""
    from scipy import stats  # a second to load, once settings are read

    figures = (*TERMS, "perplexity")
    of = {name: [row for row in rows if row["controller"] == name] for name in mean_rewards(rows)}
    best = np.array([row["reward"] for row in of[who]])
    lines = [f"| controller | reward | {' | '.join(figures)} | {who} is better by |", "|---" * 9 + "|"]
    for name, own in of.items():
        rewards = np.array([row["reward"] for row in own])
        half = stats.t.ppf(0.975, len(best) - 1) * np.std(best - rewards, ddof=1) / np.sqrt(len(best))
        by = "" if name == who else f"{np.mean(best - rewards):.3f} ± {half:.3f}"
        means = " | ".join(f"{np.mean([row[figure] for row in own]):.2f}" for figure in figures)
        lines.append(f"| {name} | {rewards.mean():.3f} | {means} | {by} |")
    return "\n".join(lines) + "\n"


def oracle(study: Study) -> str:
    """Eight devices, where the best plan of a round can be found by trying all."""
    known = {"availability": AvailabilityConfig("always"), "channel": ChannelConfig("nominal")}
    text = []
    for name, changes in {"links and presence are known": known, "default fleet": {}}.items():
        plain = study.setting(8)
        setting = dataclasses.replace(plain, fleet=dataclasses.replace(plain.fleet, **changes))  # type: ignore[arg-type]
        policy = learned(study.trained(f"8 {name}", [setting], times=3))
        players = rules(setting.levels) | {"learned": policy, "oracle": best_plan}
        rows = compare(setting, players, study.fleets)
        pd.DataFrame(rows).to_csv(study.settings.out / f"oracle {name}.csv", index=False)
        mean = mean_rewards(rows)
        share = (mean["learned"] - mean["random"]) / (mean["oracle"] - mean["random"])
        text.append(f"8 devices, cohorts of 4, {name}:\n\n{paired(rows)}")
        text.append(f"Learned has {share:.1%} of the oracle's advantage over random.\n")
    return "\n".join(text)


def sizes(study: Study) -> str:
    """A policy of 100 candidates where there are more, beside one that was trained there, the one that comes with the
    package, and the rules."""
    lines, tables = ["| candidates | random | trained at 100 | there | share of the advantage |", "|---" * 5 + "|"], []
    of_100 = study.trained_at(100)
    for size in (1000, study.settings.largest):
        setting = study.setting(size)
        shipped = player(Learned(Policy.load(SHIPPED)))
        policies = {"shipped": shipped, "trained there": study.trained_at(size), "trained at 100": of_100}
        rows = compare(setting, rules(setting.levels) | policies, study.fleets)
        pd.DataFrame(rows).to_csv(study.settings.out / f"sizes {size}.csv", index=False)
        mean = mean_rewards(rows)
        share = (mean["trained at 100"] - mean["random"]) / (mean["trained there"] - mean["random"])
        figures = " | ".join(f"{mean[name]:.3f}" for name in ("random", "trained at 100", "trained there"))
        lines.append(f"| {size:,} | {figures} | {share:.1%} |")
        tables.append(f"{size:,} candidates:\n\n{paired(rows, 'trained at 100')}")
    return "\n".join([*lines, "", *tables])


def ratios(study: Study) -> str:
    """Learning curves: a ratio a branch, one for the whole action, and a head for each device."""
    kinds: dict[str, dict[str, Any]] = {
        USUAL: {},
        "joint ratio": {"ratio": "joint"},
        "independent heads": {"network": "independent"},
    }
    lines = ["| candidates | training | last reward, by seed | mean | clipped |", "|" + "---|" * 5]
    settings = study.settings
    figure = Figure(figsize=(4.5 * len(settings.sizes), 4), layout="constrained")
    for axes, size in zip(np.atleast_1d(figure.subplots(1, len(settings.sizes))), settings.sizes, strict=True):
        for number, (name, ppo) in enumerate(kinds.items()):
            ends, clipped = [], []
            for seed in settings.seeds:
                directory = study.trained(f"{size} {name} seed {seed}", [study.setting(size)], seed, **ppo)
                curve = pd.read_csv(directory / "progress.csv")
                smooth = curve["reward"].rolling(5, min_periods=1).mean()
                label = name if seed == settings.seeds[0] else None
                axes.plot(curve["rounds"] / 1000, smooth, color=f"C{number}", label=label)
                ends.append(float(curve["reward"].to_numpy(float)[-5:].mean()))
                clipped.append(float(curve["clipped_share"].to_numpy(float).mean()))
            by_seed = ", ".join(f"{end:.3f}" for end in ends)
            lines.append(f"| {size:,} | {name} | {by_seed} | {np.mean(ends):.3f} | {np.mean(clipped):.1%} |")
        axes.set(title=f"{size:,} candidates", xlabel="thousand rounds played", ylabel="reward of a round")
        axes.legend()
    figure.savefig(settings.out / "ratios.png", dpi=120)
    return "\n".join(lines) + "\n"


def shift(study: Study) -> str:
    """In the middle of an episode a third of the devices become four times as slow, and all links half as fast."""
    size = 100 if 100 in study.settings.sizes else study.settings.sizes[-1]
    plain = study.setting(size)
    middle = plain.num_rounds // 2 + 1
    changing = dataclasses.replace(plain, shift=Shift(middle, slowed_share=1 / 3, slowdown=4.0, link_factor=0.5))
    policies = {
        "learned, shipped": player(Learned(Policy.load(SHIPPED))),
        "learned, here": study.trained_at(size),
        "learned, here and on changing fleets": learned(study.trained(f"{size} changing", [plain, changing])),
    }
    players = rules(plain.levels) | policies
    lines = ["| controller | reward before | after | of it lost |", "|---|---|---|---|"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, decide in players.items():
        rewards = np.array([[each["reward"] for each in play(changing, seed, decide)] for seed in study.fleets])
        still = np.array([[each["reward"] for each in play(plain, seed, decide)] for seed in study.fleets])
        before, after = rewards[:, : middle - 1].mean(), rewards[:, middle - 1 :].mean()
        lost = still[:, middle - 1 :].mean() - after
        lines.append(f"| {name} | {before:.3f} | {after:.3f} | {lost:.3f} |")
        if name in (*policies, "greedy", "greedy-by-time", "fixed 1"):
            axes.plot(range(1, plain.num_rounds + 1), (still - rewards).mean(axis=0).cumsum(), label=name)
    axes.axvline(middle - 0.5, color="0.7", linestyle="--")
    axes.set(xlabel="round", ylabel="sum of reward lost to the change", title="a third slow down, all links get slower")
    axes.legend()
    figure.savefig(study.settings.out / "shift.png", dpi=120)
    return f"{size:,} candidates:\n\n" + "\n".join(lines) + "\n"


PARTS: dict[str, Callable[[Study], str]] = {
    "table": table,
    "oracle": oracle,
    "sizes": sizes,
    "ratios": ratios,
    "shift": shift,
}


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
