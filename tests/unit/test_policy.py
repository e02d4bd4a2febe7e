"""The learned controller: what it sees and decides, as a file and in a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import whole_runs
from test_environment import chance, setting
from whole_runs import ENDS, SHARES, assert_same_bits, changed, table

from fedpeat_ray import Simulation
from fedpeat_ray.config import ControlConfig, EmulatorConfig, SimulationConfig
from fedpeat_ray.control.environment import Episode
from fedpeat_ray.control.find import find_controller
from fedpeat_ray.control.learned import SHIPPED, Learned
from fedpeat_ray.control.observation import Columns, may_stay, observe, plan_of
from fedpeat_ray.control.oracle import best_plan
from fedpeat_ray.control.plan import SKIP, Plan, Prospects
from fedpeat_ray.control.policy import About, Policy
from fedpeat_ray.control.trial import compare, mean_rewards, play, player
from fedpeat_ray.errors import ConfigError, DataError, RunDirError


def untrained(shares: tuple[float, ...], seed: int = 0, width: int = 16) -> Policy:
    """Any parameters."""
    columns, rng = Columns(len(shares)), np.random.default_rng(seed)
    sizes = [columns.num_features, width, 2 * width, 2 * width, width, sum(columns.num_choices)]
    pairs = [(sizes[0], width), (width, width), (2 * width, width), (2 * width, width), (width, sizes[-1])]
    weights = {}
    for name, (num_in, num_out) in zip(("device_1", "device_2", "context", "joint", "choice"), pairs, strict=True):
        weights[f"{name}.weight"] = (rng.normal(size=(num_out, num_in)) / np.sqrt(num_in)).astype(np.float32)
        weights[f"{name}.bias"] = rng.normal(size=num_out).astype(np.float32)
    return Policy(About(shares, False, {}), weights)


@pytest.fixture(scope="module")
def states() -> list[tuple[int, Prospects]]:
    """What there is to decide on, in rounds of several fleets."""
    found = []
    for seed in range(4):
        episode = Episode(setting(realign_every=2, deadline_s=30.0), seed)
        for _ in range(10):
            found.append((episode.round, episode.seen))
            episode.step(chance(episode.seen, np.random.default_rng(seed)))
    return found


def test_the_columns_are_what_the_rows_hold(states):
    round, seen = states[-1]
    names, rows = Columns(3).names, observe(round, seen)
    assert rows.shape == (40, len(names)) and rows.dtype == np.float32 and np.isfinite(rows).all()
    of = {name: rows[:, names.index(name)] for name in names}
    assert (of["may take 3"] == seen.fits_NL[:, 2]).all() and (of["holds 1"] == (seen.held_level_N == 1)).all()
    assert (of["may stay"] == may_stay(seen)).all() and of["may stay"].any() and not of["may stay"].all()
    assert (of["stale_age"] > 0).any() and (of["in_time 3"] <= of["in_time 1"]).all()
    assert of["candidates_per_place"][0] == pytest.approx(np.log(4)) and of["rounds_so_far"][0] == pytest.approx(
        np.log(10)
    )
    assert of["perplexity_change"][0] > 0
    assert np.median(of["tokens"]) == pytest.approx(0.0, abs=1e-6)
    assert (observe(round, seen, masked=False)[:, names.index("may take 1") :][:, :3] == 1).all()


def test_permuted_candidates_get_permuted_choices(states):
    policy, rng = untrained((0.2, 0.5, 0.9)), np.random.default_rng(0)
    for round, seen in states:
        rows = observe(round, seen)
        order = rng.permutation(len(rows))
        assert (policy.choose(rows[order]) == policy.choose(rows)[order]).all()


def test_what_may_not_be_chosen_never_is():
    columns, rng = Columns(3), np.random.default_rng(0)
    policies = [untrained((0.2, 0.5, 0.9), seed) for seed in range(5)]
    for number in range(10_000):
        rows = rng.normal(0, 3, (6, len(columns.names))).astype(np.float32)
        masks = rng.integers(0, 2, (6, 6))
        masks[:, 0] = masks[:, 4] = 1  # to skip and to renew
        rows[:, columns.num_features :] = masks
        levels_N, exchange_N = policies[number % 5].choose(rows).T
        assert (masks[np.arange(6), levels_N] == 1).all() and (masks[np.arange(6), 4 + exchange_N] == 1).all()
        assert (levels_N > SKIP).any() == masks[:, 1:4].any()  # somebody takes part wherever somebody can


def test_as_many_take_part_as_there_are_places_before_anything_is_learned(states):
    policy = untrained((0.2, 0.5, 0.9))
    even = {name: np.zeros_like(value) for name, value in policy.weights.items()}
    even["choice.bias"] = np.log(np.array([3, 1, 1, 1, 1, 1], np.float32))  # one level or none: even odds
    policy = dataclasses.replace(policy, weights=even)
    for round, seen in states[:10]:
        everything = dataclasses.replace(seen, memory_bytes_L=np.ones(3, int), num_places=10)
        assert (policy.choose(observe(round, everything))[:, 0] > SKIP).sum() == 10


def test_a_device_that_stays_keeps_its_stale_level(states):
    _, seen = next(each for each in states if may_stay(each[1]).any())
    stays = may_stay(seen)
    plan = plan_of(np.tile([1, 1], (40, 1)), seen)
    assert seen.stale is not None and np.array_equal(plan.stale_N, stays)
    assert (plan.levels_N == np.where(stays, seen.stale.level_N, 1)).all()
    nobody = plan_of(np.tile([SKIP, 1], (40, 1)), seen)
    assert not nobody.levels_N.any() and not np.any(nobody.stale_N)


def test_a_policy_is_read_back_as_it_was_written(states, tmp_path):
    policy = untrained((0.2, 0.5, 0.9))
    policy.save(tmp_path)
    again = Policy.load(tmp_path)
    assert again.about == policy.about
    for state in states[:3]:
        assert (again.logits(observe(*state)) == policy.logits(observe(*state))).all()


@pytest.mark.parametrize("damage", ["weights", "cut", "json", "format", "columns", "shapes", "nothing there"])
def test_a_damaged_policy_is_refused_with_what_is_wrong(damage, tmp_path):
    policy = untrained((0.2, 0.5, 0.9))
    if damage == "shapes":
        policy = dataclasses.replace(policy, weights={**policy.weights, "joint.weight": np.zeros((3, 3), np.float32)})
    policy.save(tmp_path)
    weights, about = tmp_path / "policy.safetensors", tmp_path / "policy.json"
    said = json.loads(about.read_text())
    if damage == "weights":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "json":
        about.write_text(about.read_text()[:50])
    elif damage == "format":
        about.write_text(json.dumps(said | {"format": 99}))
    elif damage == "columns":
        about.write_text(json.dumps(said | {"columns": said["columns"][1:]}))
    elif damage == "nothing there":
        about.unlink()
    with pytest.raises(DataError, match=str(tmp_path)) as caught:
        Policy.load(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="control.policy"):
        Learned.build(ControlConfig("learned", policy=tmp_path), seed=0)


def test_a_policy_of_another_ladder_is_refused_before_anything_starts(tmp_path):
    untrained((0.2, 0.5)).save(tmp_path)
    config = SimulationConfig(algorithm="fed-peat", control=ControlConfig("learned", policy=tmp_path))
    with pytest.raises(ConfigError, match=r"control.policy .*\(0.2, 0.5\).*\(0.25, 0.5, 0.75\)"):
        Learned.check(config)
    Learned.check(dataclasses.replace(config, emulator=EmulatorConfig(shares=(0.2, 0.5))))


def test_the_shipped_policy_is_for_the_default_ladder_and_beats_the_rules_on_a_small_fleet():
    Learned.check(SimulationConfig(algorithm="fed-peat", control=ControlConfig("learned")))
    policy = Policy.load(SHIPPED)
    players = {name: player(find_controller(name).build(ControlConfig(name), 0)) for name in ("random", "greedy")}
    rows = compare(setting(realign_every=0), players | {"learned": player(Learned(policy))}, seeds=range(6))
    means = mean_rewards(rows)
    assert max(means, key=means.__getitem__) == "learned"


def test_a_run_with_a_policy_has_the_same_bits_after_a_resume(deep_gpt2_dir: Path, text_dir: Path, tmp_path: Path):
    untrained(SHARES).save(tmp_path / "policy")
    control = {"kind": "learned", "policy": tmp_path / "policy", "candidates": 10}
    emulator = dataclasses.replace(ENDS, weights="elastic", realign_every=1)
    config = whole_runs.tiny(
        deep_gpt2_dir,
        text_dir,
        algorithm="fed-peat",
        emulator=emulator,
        control=control,
        rounds=4,
        evaluation={"every": 2},
    )
    Simulation(changed(config, out=tmp_path / "one")).run()
    Simulation(changed(config, out=tmp_path / "two", rounds=2)).run()
    Simulation(changed(config, resume=tmp_path / "two")).run()
    assert_same_bits(tmp_path / "one", tmp_path / "two")
    clients = table(tmp_path / "one", "clients")
    assert (clients["outcome"] == "skipped").any() and clients["level"].notna().any()
    began = json.loads((tmp_path / "two" / "config.json").read_text())["resolved"]["policy_sha256"]
    assert began == hashlib.sha256((tmp_path / "policy" / "policy.safetensors").read_bytes()).hexdigest()
    untrained(SHARES, seed=1).save(tmp_path / "policy")
    with pytest.raises(RunDirError, match=f"policy_sha256 was {began[:12]}"):
        Simulation(changed(config, resume=tmp_path / "two", rounds=5)).run()


def test_the_best_plan_is_the_best_of_all_and_of_its_neighbours():
    six = setting(num_candidates=6, cohort_size=3, realign_every=2)
    episode = Episode(dataclasses.replace(six, fleet=dataclasses.replace(six.fleet, num_devices=6)), 1)
    rng = np.random.default_rng(0)
    for _ in range(4):
        best = best_plan(episode)
        others = [chance(episode.seen, rng) for _ in range(50)]
        rewards = episode.rewards(*stacked([best, *others]))
        assert rewards[0] == rewards.max()
        episode.step(best)
    large = Episode(setting(), 0)
    best = best_plan(large)
    assert large.rewards(*stacked([best, *(changed_at(best, i) for i in range(40))])).argmax() == 0


def stacked(plans: list[Plan]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([plan.levels_N for plan in plans]), np.stack([np.asarray(plan.stale_N) for plan in plans])


def changed_at(plan: Plan, candidate: int) -> Plan:
    """With one candidate left out, or asked for the lowest level."""
    levels_N = plan.levels_N.copy()
    levels_N[candidate] = SKIP if levels_N[candidate] else 1
    return Plan(levels_N, plan.stale_N)


def test_an_episode_is_as_long_as_its_setting_says():
    assert len(play(setting(num_rounds=3), 0, lambda episode: np.ones(40, int))) == 3
