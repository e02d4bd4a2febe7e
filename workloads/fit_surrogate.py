"""How perplexity answers to who trained on what: real FedPEAT runs, and a response model fitted to their round logs.

    python workloads/fit_surrogate.py

Some runs are fitted, others are only predicted: the error reported is that on runs that the fit never saw. Controllers
are trained against the model (workloads/train_controller.py); finished runs are not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import tyro
from matplotlib.figure import Figure

from analysis.load import load_run
from fedpeat_ray.config import (
    SHARES,
    ControlConfig,
    EmulatorConfig,
    EvaluationConfig,
    FleetConfig,
    HostsConfig,
    SimulationConfig,
)
from fedpeat_ray.control.environment import Response
from fedpeat_ray.control.observation import may_stay
from fedpeat_ray.control.plan import Controller, Memory, Plan, Prospects, asked
from fedpeat_ray.seeding import generator
from fedpeat_ray.sweep import Sweep, report


@dataclass(frozen=True)
class Settings:
    rounds: int = 12
    long_rounds: int = 30
    """Of the runs that are to tell what text is worth that was trained on before."""
    num_devices: int = 60
    cohort_sizes: tuple[int, ...] = (4, 12, 24)
    num_sequences: int = 128
    """Held-out sequences of 128 tokens, after every round."""
    realign_every: int = 3
    """Rounds between re-alignments, in the runs that are to tell what a stale emulator is worth."""
    foundation: str = "pydoc-base"
    hosts: HostsConfig = field(default_factory=HostsConfig)
    out: Path = Path("runs/surrogate")


@dataclass(frozen=True)
class AnyPlan(Controller):
    """A level by chance; every other device that could goes on with a stale emulator."""

    seed: int

    @classmethod
    def build(cls, config: ControlConfig, seed: int) -> Self:
        """See Controller."""
        return cls(seed)

    def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> Plan:
        """See Controller."""
        rng = generator(self.seed, "any plan", round)
        levels_N = rng.integers(1, prospects.fits_NL.sum(axis=1).clip(1), endpoint=True)
        stale_N = may_stay(prospects) & (rng.random(len(levels_N)) < 0.5)
        if prospects.stale:
            levels_N = np.where(stale_N, prospects.stale.level_N, levels_N)
        return Plan(asked(levels_N, prospects), stale_N)


def main(settings: Settings) -> int:
    """Run, fit, write and draw; returns the exit status."""

    def study(sweep: Sweep) -> str:
        found = sweep.run_all(configurations(settings))
        runs = {
            name: steps_of(directory, summary["perplexity"]["zero_shot"])
            for name, (summary, directory) in found.items()
        }
        seen = {name: run for name, run in runs.items() if not name.startswith("unseen")}
        unseen = {name: run for name, run in runs.items() if name.startswith("unseen")}
        response = fitted(list(seen.values()), num_levels=len(SHARES))
        errors = [
            (name, name in seen, one_round(response, run), whole_run(response, run)[0]) for name, run in runs.items()
        ]
        draw(response, unseen, sweep.out / "surrogate.png")
        held_out = [whole for _, fitted_to, _, whole in errors if not fitted_to]
        about = {"fitted_to": sorted(seen), "held_out_error": float(np.mean(held_out))}
        written = dataclasses.asdict(response) | {"about": about}
        (sweep.out / "response.json").write_text(json.dumps(written, indent=1) + "\n")
        return markdown(response, errors)

    return report(Sweep(settings.out, settings.hosts), "surrogate.md", study)


def configurations(settings: Settings) -> dict[str, SimulationConfig]:
    """Runs of every level, of several cohort sizes, with and without re-alignment, with the same fast devices again and
    again; all devices have the memory."""
    middle = sorted(settings.cohort_sizes)[len(settings.cohort_sizes) // 2]

    def config(kind: str, cohort_size: int, seed: int, realign_every: int = 0, level: int = 1) -> SimulationConfig:
        return SimulationConfig(
            algorithm="fed-peat",
            rounds=settings.rounds,
            cohort_size=cohort_size,
            client_batch_size=8,  # not what a machine measures: the last digits depend on it
            seed=seed,
            foundation=dataclasses.replace(SimulationConfig().foundation, name=settings.foundation),
            fleet=FleetConfig(num_devices=settings.num_devices),
            control=ControlConfig(kind, level),
            emulator=EmulatorConfig(realign_every=realign_every),
            evaluation=EvaluationConfig(num_sequences=settings.num_sequences, centralised=False),
        )

    def of_same_devices(cohort_size: int, seed: int) -> SimulationConfig:
        plain = config("greedy-by-time", cohort_size, seed)
        control = dataclasses.replace(plain.control, candidates=settings.num_devices)
        return dataclasses.replace(plain, rounds=settings.long_rounds, control=control)

    def long(cohort_size: int, seed: int) -> SimulationConfig:
        return dataclasses.replace(config(any_plan, cohort_size, seed), rounds=settings.long_rounds)

    any_plan, every = f"{Path(__file__).resolve()}:AnyPlan", settings.realign_every
    levels = range(1, 1 + len(SHARES))
    return {
        **{f"level {level}": config("fixed", middle, 0, level=level) for level in levels},
        **{f"any level, cohort {size}": config(any_plan, size, 0) for size in settings.cohort_sizes},
        "stale emulators": config(any_plan, middle, 0, every),
        "the same devices, long": of_same_devices(middle, 0),
        "any level, long": long(middle, 3),
        **{f"unseen, any level, cohort {size}": config(any_plan, size, 1) for size in settings.cohort_sizes},
        "unseen, stale emulators": config(any_plan, middle, 2, every),
        "unseen, the same devices, long": of_same_devices(middle, 1),
        "unseen, any level, long": long(middle, 4),
    }


@dataclass(frozen=True)
class Steps:
    """The rounds of a run: R rounds, M devices that completed, L levels."""

    perplexities: np.ndarray
    """(R + 1,), before the first round included."""
    devices: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
    """For each round tokens, levels, ages and rounds completed before (M,)."""


def steps_of(directory: Path, zero_shot: float) -> Steps:
    """From a run directory."""
    run = load_run(directory)
    done = run.clients.query("outcome == 'completed'")
    done = done.assign(times=done.sort_values("round").groupby("device_id").cumcount())
    columns = ("num_tokens", "level", "emulator_age", "times")
    devices = [
        tuple(done[done["round"] == round][name].to_numpy(int) for name in columns) for round in run.rounds["round"]
    ]
    return Steps(np.array([zero_shot, *run.rounds["perplexity"].astype(float)]), devices)


def after(response: Response, perplexity: float, devices: tuple[np.ndarray, ...]) -> float:
    """Perplexity after a round of a run."""
    tokens, levels, ages, times = devices
    return float(response.after(perplexity, response.effort(tokens, levels, ages, times, np.full(len(tokens), True))))


def fitted(runs: list[Steps], num_levels: int) -> Response:
    """Least squares of ln perplexity over whole runs, each predicted from its first perplexity alone. What runs do not
    tell of freshness and novelty stays near 1: one that is 0 costs as much as a round that is 5 % off."""
    start = float(np.mean([run.perplexities[0] for run in runs]))

    def of(parameters: np.ndarray) -> Response:
        exponent, power, freshness, novelty, *gains = parameters
        gain_L = tuple(float(gain) for gain in np.exp(gains))
        fresh, novel = (float(1 / (1 + np.exp(-logit))) for logit in (freshness, novelty))
        return Response(start, float(np.exp(exponent)), gain_L, fresh, float(np.exp(power)), novel)

    def residuals(parameters: np.ndarray) -> np.ndarray:
        response = of(parameters)
        pull = 0.05 * np.array([1 - response.freshness, 1 - response.novelty])
        return np.concatenate([*(whole_run(response, run)[1] for run in runs), pull])

    first = [np.log(0.05), np.log(0.5), 3.0, 3.0, *([np.log(1e-3)] * num_levels)]
    from scipy.optimize import least_squares  # loaded once settings are read

    return of(least_squares(residuals, np.array(first), x_scale="jac").x)


def one_round(response: Response, run: Steps) -> float:
    """Root mean square of the error of ln perplexity, a round from what it really was before."""
    pairs = zip(run.perplexities[:-1], run.devices, strict=True)
    predicted = np.array([after(response, float(before), devices) for before, devices in pairs])
    return float(np.sqrt(np.mean(np.log(predicted / run.perplexities[1:]) ** 2)))


def whole_run(response: Response, run: Steps) -> tuple[float, np.ndarray]:
    """(the same of all rounds predicted from the first perplexity alone, their errors (R,))."""
    predicted = [float(run.perplexities[0])]
    for devices in run.devices:
        predicted.append(after(response, predicted[-1], devices))
    errors = np.log(np.array(predicted[1:]) / run.perplexities[1:])
    return float(np.sqrt(np.mean(errors**2))), errors


def draw(response: Response, runs: dict[str, Steps], path: Path) -> None:
    """What runs that the fit never saw did, and what it says of them."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, run) in enumerate(runs.items()):
        errors, rounds = whole_run(response, run)[1], np.arange(1, len(run.perplexities))
        axes.plot(rounds, run.perplexities[1:], "o", color=f"C{number}", label=name)
        axes.plot(rounds, run.perplexities[1:] * np.exp(errors), "-", color=f"C{number}")
    axes.set(xlabel="round", ylabel="perplexity", title="unseen runs (dots) and the fitted model (lines)")
    axes.legend()
    figure.savefig(path, dpi=120)


def markdown(response: Response, errors: Sequence[tuple[str, bool, float, float]]) -> str:
    """The fit and its errors."""
    gains = ", ".join(f"{gain:.3g}" for gain in response.gain_L)
    fit = f"exponent {response.exponent:.4f}, power {response.power:.2f}, freshness {response.freshness:.2f}, "
    fit += f"novelty {response.novelty:.3f}"
    lines = [
        f"{fit}, gain {gains}",
        "",
        "| run | fitted | error a round | error of the whole run |",
        "|---|---|---|---|",
    ]
    for name, fitted_to, a_round, whole in errors:
        lines.append(f"| {name} | {'yes' if fitted_to else 'no'} | {a_round:.2%} | {whole:.2%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
