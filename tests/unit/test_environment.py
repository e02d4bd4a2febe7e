"""The environment and the simulation are one: the same plans on the same fleet cost the same."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import pytest
import whole_runs
from gymnasium.utils.env_checker import check_env
from whole_runs import changed, table

from fedpeat_ray import Simulation
from fedpeat_ray.config import (
    AvailabilityConfig,
    ChannelConfig,
    ControlConfig,
    DistilConfig,
    EmulatorConfig,
    FleetConfig,
)
from fedpeat_ray.control.environment import TERMS, Episode, Response, Setting, Shift
from fedpeat_ray.control.find import OURS, find_controller
from fedpeat_ray.control.fleet_env import FleetEnv, FleetVectorEnv
from fedpeat_ray.control.observation import may_stay, observe
from fedpeat_ray.control.plan import SKIP, Controller, Memory, Plan, Prospects
from fedpeat_ray.fleet.costs import ServerCosts
from fedpeat_ray.fleet.levels import EmulatorCosts
from fedpeat_ray.world import prepare

EMULATORS = EmulatorCosts(
    emulator_bytes_L=np.array([4_000_000, 8_000_000, 12_000_000]),
    adapter_bytes_L=np.array([100_000] * 3),
    memory_bytes_L=np.array([40, 55, 70]) * 10**6,
    weights_bytes_L=np.array([20, 30, 40]) * 10**6,
    flops_per_token_L=np.array([2e7, 3e7, 4e7]),
    server_tuning=ServerCosts(),
    realignment=ServerCosts(),
)
RESPONSE = Response(start=40.0, exponent=0.05, gain_L=(2e-4, 3e-4, 4e-4), novelty=0.7)


def setting(**changes: object) -> Setting:
    """Twenty rounds of a fleet of 200, some of which have too little memory for more than the first level."""
    fleet = FleetConfig(num_devices=200, memory_scale=0.045)
    plain = Setting(EMULATORS, (1, 2, 3), RESPONSE, fleet, cohort_size=10, num_candidates=40, realign_every=4)
    plain = dataclasses.replace(plain, num_tokens=(200, 700, 1000, 3000))
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def chance(seen: Prospects, rng: np.random.Generator) -> Plan:
    """Any plan that is allowed."""
    levels = np.array([rng.choice(np.flatnonzero([True, *fits])) for fits in seen.fits_NL])
    stale = may_stay(seen) & (rng.random(len(levels)) < 0.5)
    return Plan(np.where(stale, seen.stale.level_N if seen.stale else 0, levels), stale)


def test_the_same_plans_cost_the_same_as_in_a_simulation(deep_gpt2_dir: Path, text_dir: Path, tmp_path: Path):
    plans: list[Plan] = []

    class ByChance(Controller):
        @classmethod
        def build(cls, config: ControlConfig, seed: int) -> Self:
            return cls()

        def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> Plan:
            plans.append(chance(prospects, np.random.default_rng(round)))
            return plans[-1]

    emulator = EmulatorConfig(1, 1, (0.2, 0.6), weights="elastic", realign_every=2, realign_steps=2)
    emulator = dataclasses.replace(emulator, distil=DistilConfig(steps=2, batch_size=2, sequence_length=16))
    config = whole_runs.tiny(deep_gpt2_dir, text_dir, rounds=5, emulator=emulator, control={"candidates": 12})
    config = changed(config, out=tmp_path / "run", cohort_size=4, deadline_s=0.8)
    Simulation(config, controller=ByChance).run()
    rounds, clients = table(tmp_path / "run", "rounds"), table(tmp_path / "run", "clients")
    costs = prepare(changed(config, algorithm="fed-peat"), tmp_path).algorithm.emulators.costs  # type: ignore[attr-defined]

    same = Setting(
        costs, (1, 2), Response(40.0, 0.2, (1e-4, 1e-4)), config.fleet, 4, 12, num_rounds=5, deadline_s=0.8,
        over_sample=config.over_sample, realign_every=2,
    )  # fmt: skip
    tokens = np.zeros(14, int)
    episode = Episode(same, config.seed, num_tokens_F=tokens)
    for round, plan in enumerate(plans, start=1):
        rows = clients[clients["round"] == round]
        tokens[rows["device_id"].to_numpy(int)] = rows["num_tokens"].to_numpy(int)
        episode.look()
        assert episode.device_ids.tolist() == rows["device_id"].tolist()
        episode.step(plan)
        settled, asked = episode.last.of(plan.levels_N != SKIP), rows[rows["outcome"] != "skipped"]
        for name in ("download_bytes", "upload_bytes", "download_s", "compute_s", "upload_s", "energy_j"):
            assert getattr(settled.costs, name).tolist() == asked[name].tolist(), name
        assert settled.levels_N.tolist() == asked["level"].tolist()
        assert settled.ages_N.tolist() == asked["emulator_age"].tolist()
        assert settled.emulator_bytes_N.tolist() == asked["emulator_bytes"].tolist()
        reasons = [None if pd.isna(reason) else reason for reason in asked["drop_reason"]]
        assert settled.admission.drop_reason.tolist() == reasons
        assert episode.now_s == rounds["virtual_s"].iloc[round - 1]
    assert (clients["emulator_age"] > 0).any() and (clients["outcome"] == "skipped").any()
    assert clients["group"].isin(["harbour", "kitchen", "workshop"]).all(), "also of those skipped"
    assert episode.is_over


@pytest.mark.parametrize("kind", OURS)
def test_our_controllers_play_and_chance_pays_about_one_of_each_unit(kind):
    controller, memory = find_controller(kind).build(ControlConfig(kind, level=2), seed=0), {}
    played = []
    for seed in range(5):
        episode = Episode(setting(realign_every=0), seed)
        while not episode.is_over:
            played.append(episode.step(controller.act(episode.round, episode.device_ids, episode.seen, memory)))
        assert episode.perplexities[0] == 40.0 and 20.0 < episode.perplexities[-1] < 40.0
    least = 0.0 if kind == "learned" else 0.05  # it was trained to pay little
    for name in ("bytes", "memory", "energy"):
        assert least < np.mean([terms[name] for terms in played]) < 5, name


def test_the_reward_is_the_weighted_sum_of_its_terms_and_a_round_without_devices_costs_nothing():
    episode = Episode(setting(), 3)
    nobody = episode.step(np.full(40, SKIP))
    assert {name: nobody[name] for name in ("quality", "bytes", "memory", "energy")} == dict.fromkeys(
        ("quality", "bytes", "memory", "energy"), 0.0
    )
    terms = episode.step(chance(episode.seen, np.random.default_rng(0)))
    weights = dataclasses.asdict(episode.setting.weights)
    assert terms["reward"] == pytest.approx(-sum(weights[name] * terms[name] for name in TERMS))
    assert terms["quality"] < 0 < min(terms[name] for name in TERMS[1:])


def test_an_episode_is_a_function_of_its_seed_and_its_plans():
    def play(seed: int) -> list[float]:
        episode, rng = Episode(setting(), seed), np.random.default_rng(1)
        return [episode.step(chance(episode.seen, rng))["reward"] for _ in range(20)]

    assert play(5) == play(5) != play(6)


def test_what_is_not_allowed_is_what_the_memory_does_not_hold():
    episode, rng = Episode(setting(), 0), np.random.default_rng(2)
    while not episode.is_over:
        seen = episode.seen
        stays = may_stay(seen)
        assert seen.stale is not None and (seen.stale.level_N[stays] > 0).all()
        episode.step(chance(seen, rng))
        assert "memory" not in episode.last.admission.drop_reason.tolist()
    assert episode.version == 5


def test_a_shift_slows_devices_and_links_from_its_round_on():
    shift = Shift(round=3, slowed_share=0.5, slowdown=10.0, link_factor=0.1)
    episode, still = Episode(setting(shift=shift), 4), Episode(setting(), 4)
    for _ in range(2):
        plan = chance(episode.seen, np.random.default_rng(0))
        assert episode.step(plan) == still.step(plan)
    slower = still.conditions.fleet.flops_per_s / episode.conditions.fleet.flops_per_s
    assert sorted(set(np.round(slower, 3).tolist())) == [1.0, 10.0] and (slower > 1).sum() == 100
    assert (episode.seen.total_s_NL > still.seen.total_s_NL).all()


def test_the_response_is_a_power_law_of_all_effort_and_less_on_stale_emulators_and_on_text_seen_before():
    tokens, level, new, yes = np.array([1000.0]), np.array([2]), np.array([0]), np.array([True])
    effort = RESPONSE.effort(tokens, level, new, new, yes)
    once = RESPONSE.after(40.0, effort)
    assert once == pytest.approx(40 * (1 + 0.3) ** -0.05) and effort == pytest.approx(0.3)
    assert RESPONSE.after(float(once), effort) == pytest.approx(40 * 1.6**-0.05)
    assert RESPONSE.effort(tokens, level, new + 2, new, yes) == pytest.approx(0.64 * effort)
    assert RESPONSE.effort(tokens, level, new, new + 2, yes) == pytest.approx(0.49 * effort)
    assert RESPONSE.effort(tokens, np.array([3]), new, new, yes) > effort
    assert not RESPONSE.effort(tokens, level, new, new, ~yes) and not RESPONSE.effort(tokens, 0 * level, new, new, yes)
    rooted = dataclasses.replace(RESPONSE, power=0.5)
    zeros = np.zeros(4, int)
    one, four = (rooted.effort(np.full(n, 9.0), zeros[:n] + 2, zeros[:n], zeros[:n], np.full(n, True)) for n in (1, 4))
    assert four == pytest.approx(2 * one)


def test_fleets_side_by_side_are_each_what_they_are_alone():
    same = setting(realign_every=3, deadline_s=20.0, smallest_cohort=4, shift=Shift(round=4, slowed_share=0.5))
    seeds, rng = [3, 11, 5], np.random.default_rng(0)
    together, alone = Episode(same, seeds), [Episode(same, seed) for seed in seeds]
    for _ in range(8):
        rows = observe(together.round, together.seen)
        for one, its_rows in zip(alone, rows, strict=True):
            np.testing.assert_allclose(its_rows, observe(one.round, one.seen), rtol=1e-6)
        plans = [chance(one.seen, rng) for one in alone]
        terms = together.step(Plan(*(np.stack(each) for each in zip(*map(dataclasses.astuple, plans), strict=True))))
        for number, (one, plan) in enumerate(zip(alone, plans, strict=True)):
            own = one.step(plan)
            assert {name: of[number] for name, of in terms.items()} == pytest.approx(own, rel=1e-12)
            assert one.now_s == together.now_s[number]
            ids = together.last.device_ids[number] - 200 * number
            assert ids.tolist() == one.last.device_ids.tolist()
            reasons = together.last.admission.drop_reason[number]
            assert reasons.tolist() == one.last.admission.drop_reason.tolist()
    assert len({one.conditions.cohort_size for one in alone}) > 1


def test_an_expected_reward_is_a_mean_over_luck_and_changes_nothing():
    """Where links are nominal and everybody is there, there is no luck."""
    known = FleetConfig(200, memory_scale=0.045, availability=AvailabilityConfig("always"))
    plan = Plan(np.tile([1, 0, 0, 0], (2, 10)))
    for channel in ("nominal", "rayleigh"):
        episode = Episode(setting(fleet=dataclasses.replace(known, channel=ChannelConfig(channel))), [1, 2])
        many, few = episode.expected_reward(plan, draws=40), [episode.expected_reward(plan, draws=1) for _ in range(2)]
        own = episode.step(plan)["reward"]
        assert many.shape == (2,) and few[0].tolist() == few[1].tolist()
        assert (many.tolist() == pytest.approx(own.tolist(), rel=1e-12)) == (channel == "nominal")


@pytest.mark.filterwarnings("ignore:.*A Box observation space")
def test_it_is_an_environment_as_gymnasium_has_them():
    settings = [setting(num_rounds=3, realign_every=every) for every in (0, 2)]
    check_env(FleetEnv({"settings": settings}), skip_render_check=True)
    several = FleetVectorEnv({"settings": settings, "num_envs": 5})
    observations, _ = several.reset(seed=1)
    assert several.observation_space.contains(observations) and len(several.episodes) == 2
    skip = np.zeros(several.action_space.shape, int)  # type: ignore[arg-type]
    for over in (False, False, True, False, False):
        observations, rewards, ended, cut_off, terms = several.step(skip)
        assert observations.shape[:2] == (5, 40) and not ended.any() and cut_off.tolist() == [over] * 5
        assert not terms or terms["delay"].shape == rewards.shape == (5,)


def test_many_plans_judged_at_once_bring_what_each_brings_alone():
    episode, rng = Episode(setting(realign_every=2), 2), np.random.default_rng(0)
    for _ in range(5):
        plans = [chance(episode.seen, rng) for _ in range(7)]
        together = episode.rewards(np.stack([p.levels_N for p in plans]), np.stack([p.stale_N for p in plans]))
        alone = [copy.deepcopy(episode).step(plan)["reward"] for plan in plans]
        assert together.tolist() == pytest.approx(alone, rel=1e-12)
        episode.step(plans[0])
    assert len(set(alone)) == 7
