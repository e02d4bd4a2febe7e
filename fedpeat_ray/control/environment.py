"""Where controllers are tried and trained: rounds of a simulated fleet in which nothing is trained, one step a round.

What a round costs is the simulation's own code (control/rounds.py) on the same fleet; what it brings is a response
model of perplexity. A round is judged by

    reward = -(w_q quality + w_d delay + w_b bytes + w_m memory + w_e energy)

each term in units of what a cohort drawn by chance pays on the middle level, so that 1 means as much as that. The form
is ours: the paper's objective (Chua et al. 2023: perplexity, delay, memory) is not published in numbers.

Legend: N candidates, M of them take part, F devices of the fleet, L levels.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from fedpeat_ray.config import FleetConfig
from fedpeat_ray.control.plan import SKIP, Plan, Prospects
from fedpeat_ray.control.rounds import Held, Seen, Settled, decision, prospects, settle
from fedpeat_ray.errors import DataError
from fedpeat_ray.fleet.conditions import Conditions, build_conditions
from fedpeat_ray.fleet.levels import EmulatorCosts
from fedpeat_ray.fleet.side_by_side import SideBySide, side_by_side
from fedpeat_ray.seeding import derive_seed, generator, normals
from fedpeat_ray.settings import NonNegative, Positive, PositiveInt, Share

TERMS = ("quality", "delay", "bytes", "memory", "energy")
_ROUNDS_BY_CHANCE = 8
_OTHER_ROUNDS = 10**5  # and days: beyond the end of any episode


@dataclass(frozen=True)
class Response:
    """How perplexity answers to what was trained on: a power law of the effort of all rounds so far,

        p = start (1 + effort_1 + effort_2 + ...)^-exponent
        effort = (sum_i gain_{level of i} freshness^{age of i} novelty^{times of i} tokens_i)^power

    over the devices i that complete a round: ever more effort for the same step, as in laws of scaling; twice the
    devices bring less than twice as much (their updates are averaged), an emulator that is behind is worth less, and so
    is text that was trained on before (as epochs are in Muennighoff et al. 2023, Scaling data-constrained language
    models).
    """

    start: float
    """Perplexity before the first round."""
    exponent: float
    gain_L: tuple[float, ...]
    """A token, by level."""
    freshness: float = 0.8
    """Share of a token's gain that is left for each re-alignment that an emulator is behind."""
    power: float = 1.0
    """Of the sum over devices."""
    novelty: float = 1.0
    """Share of a token's gain that is left for each round that its device completed before."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """What fit_surrogate.py wrote. Raises DataError if it cannot be used."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            numbers = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name != "gain_L"}
            return cls(gain_L=tuple(map(float, values["gain_L"])), **{name: float(x) for name, x in numbers.items()})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a response model ({type(error).__name__}: {error})") from error

    def effort(
        self,
        tokens_N: np.ndarray,
        levels_N: np.ndarray,
        ages_N: np.ndarray,
        times_N: np.ndarray,
        completed_N: np.ndarray,
    ) -> np.ndarray:
        """Of a round in which these devices trained; (P,) for P cases of shape (P, N)."""
        fresh_N, novel_N = powers(self.freshness, ages_N), powers(self.novelty, times_N)
        gain_N = np.array([0.0, *self.gain_L])[levels_N] * fresh_N * novel_N * tokens_N
        return (gain_N * completed_N).sum(axis=-1) ** self.power

    def after(self, perplexity: float | np.ndarray, effort: np.ndarray) -> np.ndarray:
        """Perplexity after a round of that effort."""
        before = (self.start / perplexity) ** (1 / self.exponent)
        return perplexity * (before / (before + effort)) ** self.exponent


def powers(base: float, exponents_N: np.ndarray) -> np.ndarray | float:
    """(N,) from a table, as exponents are small; 1 if all are."""
    largest = exponents_N.max(initial=0)
    return 1.0 if base == 1.0 or largest == 0 else (base ** np.arange(1 + largest))[exponents_N]


@dataclass(frozen=True)
class Weights:
    """Of the terms of the reward."""

    quality: NonNegative = 3.0
    """How much ln perplexity fell. With 1, a few devices that hold their emulators are worth most, and a real run
    overfits to them."""
    delay: NonNegative = 0.5
    """Virtual seconds of the round."""
    bytes: NonNegative = 0.5
    """Both ways, of all devices."""
    memory: NonNegative = 0.25
    """Share of their memory that the devices of a round need, their mean."""
    energy: NonNegative = 0.25
    """Joules of all devices."""


@dataclass(frozen=True)
class Shift:
    """A change in the middle of an episode."""

    round: PositiveInt
    """From this one on."""
    slowed_share: Share = 0.0
    """Of the devices, by chance."""
    slowdown: Positive = 4.0
    """How much longer these take to compute."""
    link_factor: Positive = 1.0
    """Of everybody's own link figures."""


@dataclass(frozen=True)
class Setting:
    """All that episodes share; the fleet is drawn anew for each."""

    emulators: EmulatorCosts
    levels: Sequence[int]
    response: Response
    fleet: FleetConfig
    cohort_size: int
    num_candidates: int
    num_rounds: int = 20
    smallest_cohort: int | None = None
    """If given, every episode draws its cohort size between this and `cohort_size`, alike likely on a log scale."""
    over_sample: float = 1.25
    deadline_s: float | None = None
    realign_every: int = 0
    num_tokens: tuple[int, ...] = (1000,)
    """That devices train on in a round: each of an episode draws one of these."""
    weights: Weights = dataclasses.field(default_factory=Weights)
    shift: Shift | None = None
    shares: tuple[float, ...] = ()
    """Of middle blocks, kept by the levels below the foundation: for what ladder a policy is then good."""


class Episode:
    """A fleet, round by round; or E of them side by side, each with its own seed.

    episode = Episode(setting, seed)
    while not episode.is_over:
        terms = episode.step(controller.act(episode.round, episode.device_ids, episode.seen, memory))

    With several seeds every array has a leading axis E, plans and what `step` returns as well.
    """

    def __init__(self, setting: Setting, seed: int | Sequence[int], num_tokens_F: np.ndarray | None = None):
        """`num_tokens_F`: of each device's data in a round, instead of drawn ones; for one fleet."""
        self.setting, alone = setting, isinstance(seed, int)
        seeds: Sequence[int] = [seed] if isinstance(seed, int) else seed
        each = [surroundings(setting, one) for one in seeds]
        tokens = [drawn_tokens(setting, one) if num_tokens_F is None else num_tokens_F for one in seeds]
        units = [paid_by_chance(setting, *fleet) for fleet in zip(each, tokens, strict=True)]
        self.conditions = each[0] if alone else side_by_side(each)
        self.num_tokens_F = tokens[0] if alone else np.concatenate(tokens)
        self._units: dict[str, Any] = units[0] if alone else {of: np.array([one[of] for one in units]) for of in TERMS}
        nothing: Any = 0.0 if alone else np.zeros(len(seeds))
        self.now_s, self.perplexities = nothing, [setting.response.start + nothing]
        self.held, self.device_seen = Held.nothing(len(self.num_tokens_F)), Seen.nothing(len(self.num_tokens_F))
        self.round, self.version = 1, 0
        self.last: Settled
        """What came of the round before."""
        self.look()

    @property
    def is_over(self) -> bool:
        """Whether all rounds were played."""
        return self.round > self.setting.num_rounds

    def step(self, answer: Plan | np.ndarray) -> dict[str, Any]:
        """Play a round; returns the reward and its terms, each by its name and not yet weighted."""
        setting, settled = self.setting, self._settled(answer)
        terms = self._terms(settled)
        self.perplexities.append(self.perplexities[-1] * np.exp(terms["quality"] * self._units["quality"]))
        self.held = self.held.after(settled, self.version)
        self.device_seen = self.device_seen.after(settled, self.round)
        self.now_s = self.now_s + settled.admission.round_s
        if setting.realign_every and self.round % setting.realign_every == 0:
            self.version += 1
        self.last = settled
        self.round += 1
        if setting.shift and self.round == setting.shift.round:
            self.conditions = shifted(self.conditions, setting.shift)
        self.look()
        return {"reward": self._reward(terms), **terms}

    def rewards(self, levels_PN: np.ndarray, stale_PN: np.ndarray) -> np.ndarray:
        """(P,) what each of P plans would bring in this round, its true links and who is there included."""
        return self._reward(self._terms(self._settled(Plan(levels_PN, stale_PN))))

    def expected_reward(self, answer: Plan | np.ndarray, draws: int) -> np.ndarray:
        """Of this round with so many other draws of who is there and how channels fade, their mean: what a plan is
        worth with less of its luck, for training. A number; (E,) of E fleets."""
        decided, rewards = decision(self.round, self.device_ids, self.seen, answer), []
        availability = self.setting.fleet.availability
        apart_s = 0.0 if availability.kind == "trace" else _OTHER_ROUNDS * availability.day_s  # a trace is no luck
        for draw in range(1, draws + 1):
            other = dataclasses.replace(decided, round=self.round + draw * _OTHER_ROUNDS)
            now_s = self.now_s + draw * apart_s
            rewards.append(self._reward(self._terms(settle(self.setting.emulators, self.conditions, now_s, other))))
        return np.mean(rewards, axis=0)

    def look(self) -> None:
        """What the next decision is about: `device_ids` and `seen`."""
        setting = self.setting
        self.device_ids = self.conditions.sample(self.round, setting.num_candidates)
        history = self.device_seen.history(self.conditions, self.round, self.device_ids, self.perplexities[-2:])
        self.num_tokens_N, self.times_N = self.num_tokens_F[self.device_ids], history.times_N
        where = (setting.emulators, setting.levels, self.conditions, self.held, self.version)
        realigns = setting.realign_every > 0
        self.seen: Prospects = prospects(*where, self.round, self.device_ids, self.num_tokens_N, realigns, history)

    def _settled(self, answer: Plan | np.ndarray) -> Settled:
        decided = decision(self.round, self.device_ids, self.seen, answer)
        return settle(self.setting.emulators, self.conditions, self.now_s, decided)

    def _terms(self, settled: Settled) -> dict[str, Any]:
        """In their units."""
        before = self.perplexities[-1]
        effort = effort_of(self.setting.response, self.num_tokens_N, self.times_N, settled)
        after = self.setting.response.after(before, effort)
        paid = {"quality": np.log(after / before), **paid_by(settled)}
        return {name: paid[name] / self._units[name] for name in TERMS}

    def _reward(self, terms: dict[str, Any]) -> Any:
        weights = self.setting.weights
        return -sum(getattr(weights, name) * terms[name] for name in TERMS)


def surroundings(setting: Setting, seed: int) -> Conditions:
    """Of one fleet."""
    smallest, cohort_size = setting.smallest_cohort or setting.cohort_size, setting.cohort_size
    if smallest < cohort_size:
        drawn = generator(seed, "cohort size").uniform(math.log(smallest), math.log(cohort_size + 1))
        cohort_size = int(math.exp(drawn))
    return build_conditions(setting.fleet, seed, cohort_size, setting.over_sample, setting.deadline_s)


def drawn_tokens(setting: Setting, seed: int) -> np.ndarray:
    """(F,) of each device's data in a round."""
    drawn = generator(seed, "tokens").integers(len(setting.num_tokens), size=setting.fleet.size)
    return np.array(setting.num_tokens)[drawn]


def paid_by_chance(setting: Setting, conditions: Conditions, num_tokens_F: np.ndarray) -> dict[str, float]:
    """In a round by a cohort drawn by chance, on the middle level where it fits, whose devices hold nothing yet: a mean
    of some rounds, as the slowest of a cohort is a matter of luck. Quality: a round's part of what an episode of such
    rounds brings."""
    response, middle = setting.response, setting.levels[len(setting.levels) // 2]
    held, paid, efforts = Held.nothing(setting.fleet.size), [], []
    times_F = np.zeros(setting.fleet.size, int)
    for round in range(1, _ROUNDS_BY_CHANCE + 1):
        device_ids = conditions.sample(round)
        tokens = num_tokens_F[device_ids]
        where = (setting.emulators, setting.levels, conditions, held, 0)
        seen = prospects(*where, round, device_ids, tokens, realigns=False)
        levels = np.where(seen.fits_NL[:, setting.levels.index(middle)], middle, setting.levels[0])
        settled = settle(setting.emulators, conditions, 0.0, decision(round, device_ids, seen, levels))
        efforts.append(effort_of(setting.response, tokens, times_F[device_ids], settled))
        times_F[device_ids[settled.admission.completed]] += 1
        paid.append(paid_by(settled))
    means = {name: float(np.mean([each[name] for each in paid])) for name in TERMS[1:]}
    in_the_end = float(response.after(response.start, np.mean(efforts, keepdims=True) * setting.num_rounds)[0])
    means["quality"] = math.log(response.start / in_the_end) / setting.num_rounds
    return {name: max(means[name], 1e-12) for name in TERMS}


def effort_of(response: Response, num_tokens_N: np.ndarray, times_N: np.ndarray, settled: Settled) -> np.ndarray:
    """Of a round; (P,) for P cases."""
    return response.effort(num_tokens_N, settled.levels_N, settled.ages_N, times_N, settled.admission.completed)


def paid_by(settled: Settled) -> dict[str, np.ndarray]:
    """What a round takes of devices: seconds, bytes both ways, share of their memory (a mean), joules. (P,) each for P
    cases."""
    costs, asked_N = settled.costs, settled.levels_N != SKIP
    share_N = costs.memory_bytes / costs.memory_cap_bytes
    return {
        "delay": np.asarray(settled.admission.round_s),
        "bytes": (costs.download_bytes + costs.upload_bytes).sum(axis=-1),
        "memory": (share_N * asked_N).sum(axis=-1) / np.maximum(1, asked_N.sum(axis=-1)),
        "energy": costs.energy_j.sum(axis=-1),
    }


def shifted(conditions: Conditions, shift: Shift) -> Conditions:
    """The surroundings after a shift."""
    if isinstance(conditions, SideBySide):
        return side_by_side([shifted(each, shift) for each in conditions.of])
    fleet = conditions.fleet
    chance_F = normals(derive_seed(conditions.seed, "slowed"), np.arange(fleet.num_devices))
    slowed_F = np.argsort(np.argsort(chance_F)) < shift.slowed_share * fleet.num_devices
    changed = dataclasses.replace(
        fleet,
        flops_per_s=(fleet.flops_per_s / np.where(slowed_F, shift.slowdown, 1.0)).astype(np.float32),
        downlink_bytes_per_s=(fleet.downlink_bytes_per_s * shift.link_factor).astype(np.float32),
        uplink_bytes_per_s=(fleet.uplink_bytes_per_s * shift.link_factor).astype(np.float32),
    )
    return dataclasses.replace(conditions, fleet=changed)
