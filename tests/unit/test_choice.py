"""Who takes part is a controller's choice among candidates, and so is who goes on with a stale emulator."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whole_runs
from whole_runs import ENDS, EVERYBODY, SIX, Unsettled, assert_same_bits, changed, summary, table

from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.config import (
    ChannelConfig,
    ControlConfig,
)
from fedpeat_ray.control.plan import SKIP, History, Memory, Plan, Prospects
from fedpeat_ray.emulators.on_emulators import OnEmulators
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.models.foundation import load_backbone
from fedpeat_ray.models.foundation import prepare as find_foundation
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.training.client_batch import ClientUpdate
from fedpeat_ray.training.map_clients import Call
from fedpeat_ray.training.with_data import WithData


@pytest.fixture
def tiny(deep_gpt2_dir: Path, text_dir: Path) -> SimulationConfig:
    """Three rounds, two emulators of a model of seven blocks, re-aligned after each."""
    realigned = dataclasses.replace(ENDS, weights="elastic", realign_every=1)
    return whole_runs.tiny(deep_gpt2_dir, text_dir, emulator=realigned, cohort_size=3, over_sample=1.0)


# Who


@pytest.mark.parametrize("kind", ["fixed", "random", "greedy"])
def test_without_a_choice_chance_picks_the_cohort_from_the_candidates(kind, run):
    directory = run(control=ControlConfig(kind, candidates=10), emulator={"realign_every": 0})
    clients = table(directory, "clients")
    assert clients.groupby("round").size().tolist() == [10, 10, 10]
    skipped = clients["outcome"] == "skipped"
    assert (~skipped).groupby(clients["round"]).sum().tolist() == [3, 3, 3]
    asked = clients[~skipped].groupby("round")["device_id"]
    assert len({tuple(ids) for _, ids in asked}) == 3, "another cohort every round"


def test_candidates_that_are_the_cohort_change_nothing(run):
    assert_same_bits(run("one"), run("other", control=ControlConfig("greedy", candidates=3)))


def test_the_whole_of_a_small_fleet_may_be_candidates_and_fewer_than_a_cohort_may_not(run, tiny):
    clients = table(run(control=ControlConfig("fixed", candidates=99)), "clients")
    assert clients.groupby("round").size().tolist() == [14] * 3
    with pytest.raises(ConfigError, match=r"control.candidates = 2 is not allowed: at least 3"):
        Simulation(changed(tiny, control=ControlConfig("fixed", candidates=2)))


def test_a_controller_chooses_by_what_the_server_knows_of_a_device(tiny, tmp_path):
    class MostText(Unsettled):
        def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> Plan:
            few = np.argsort(-np.asarray(prospects.num_tokens_N), kind="stable")[2:]
            levels = np.ones(len(device_ids), int)
            levels[few] = SKIP
            return Plan(levels)

    config = changed(tiny, out=tmp_path / "run", fleet=SIX, control={"candidates": 6})
    Simulation(config, controller=MostText).run()
    clients = table(tmp_path / "run", "clients")
    for _, rows in clients.groupby("round"):
        taken = rows[rows["outcome"] == "completed"]
        assert len(taken) == 2 and taken["num_tokens"].min() >= rows["num_tokens"].nlargest(2).min()


def test_what_the_server_saw_of_devices_is_told_and_survives_a_resume(tiny, tmp_path):
    seen: list[tuple[int, np.ndarray, History]] = []

    class Curious(Unsettled):
        wants_history = True

        def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> np.ndarray:
            assert prospects.history is not None
            seen.append((round, device_ids, prospects.history))
            return np.where(device_ids % 2 == round % 2, 1, SKIP)

    config = changed(
        tiny,
        out=tmp_path / "run",
        rounds=2,
        fleet=dataclasses.replace(SIX, channel=ChannelConfig(kind="rayleigh")),
        control={"candidates": 6},
        evaluation={"every": 1},
    )
    Simulation(config, controller=Curious).run()
    Simulation(changed(config, out=None, resume=tmp_path / "run", rounds=3), controller=Curious).run()
    assert [round for round, *_ in seen] == [1, 2, 3]
    clients, rounds = table(tmp_path / "run", "clients"), table(tmp_path / "run", "rounds")
    (_, ids, first), (_, _, second), (_, _, third) = seen
    assert first.rounds_since_N.tolist() == [1] * 6 and not first.times_N.any() and first.perplexity is None
    assert second.rounds_since_N.tolist() == [1 if i % 2 else 2 for i in ids]
    assert third.rounds_since_N.tolist() == [2 if i % 2 else 1 for i in ids]
    assert [third.perplexity_before, third.perplexity] == rounds["perplexity"].tolist()[:2]
    rows = clients[(clients["round"] == 1) & (clients["outcome"] == "completed")]
    rates = (rows["download_bytes"] / rows["download_s"]).tolist()
    assert second.downlink_bytes_per_s_N[rows["device_id"].to_numpy()].tolist() == pytest.approx(rates, rel=1e-6)
    assert second.downlink_bytes_per_s_N[0] == first.downlink_bytes_per_s_N[0], "its tier's until it took part"


# With what


class GoesOn(Unsettled):
    """Devices of even number go on with the emulator they have, the others download afresh."""

    def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> Plan:
        stale = prospects.stale
        assert stale is not None
        goes_on = (device_ids % 2 == 0) & (stale.level_N > 0)
        return Plan(np.where(goes_on, stale.level_N, 1 + device_ids % 2), goes_on)


def test_a_device_may_go_on_with_a_stale_emulator_and_pays_no_exchange(tiny, tmp_path, monkeypatch):
    config = changed(tiny, out=tmp_path / "run", **EVERYBODY)
    trained: list[tuple[int, int, int]] = []
    work = OnEmulators.__call__

    def watched(self: OnEmulators, backbone: Any, adapter_P: torch.Tensor, tasks: Any) -> list[Any]:
        updates = work(self, backbone, adapter_P, tasks)
        trained.extend((t.device_id, t.level, t.age) for t in tasks if hasattr(t, "age"))
        return updates

    monkeypatch.setattr(OnEmulators, "__call__", watched)
    Simulation(config, controller=GoesOn).run()
    clients = table(tmp_path / "run", "clients")
    even = clients["device_id"].to_numpy(int) % 2 == 0
    assert (clients["outcome"] == "completed").all()
    assert clients[even]["emulator_age"].tolist() == [0] * 3 + [1] * 3 + [2] * 3, "one from before the first round"
    assert (clients[~even]["emulator_age"] == 0).all()
    assert ((clients["emulator_bytes"] == 0).to_numpy() == (even & (clients["round"] > 1).to_numpy())).all()
    rows = zip(clients["device_id"], clients["level"], clients["emulator_age"], strict=True)
    assert sorted(trained) == sorted(rows)


def test_it_trains_on_the_version_that_it_has(tiny, tmp_path):
    config = changed(tiny, out=tmp_path / "run", **EVERYBODY)
    simulation = Simulation(config, controller=GoesOn)
    updates: dict[int, torch.Tensor] = {}
    run = Serial.run

    def kept(self: Serial, call: Call) -> Any:
        if call.tasks and hasattr(call.tasks[0], "age") and call.tasks[0].round == 3:
            for task in call.tasks:
                (update,) = call.train(self.backbone, call.shared, [task])
                if isinstance(update, ClientUpdate):
                    updates[task.device_id] = update.delta_P
            assert isinstance(call.train, WithData) and isinstance(call.train.train, OnEmulators)
            stale, by_age = call.train.train, dict(call.train.train.stale)
            plain = OnEmulators(by_age[2], stale.whole, stale.parts)
            task = next(task for task in call.tasks if task.age == 2)
            backbone = load_backbone(world_foundation)
            as_new = [call.train.data.task(dataclasses.replace(task, age=0))]
            (own,) = plain(backbone, call.shared, as_new)
            (other,) = stale(backbone, call.shared, as_new)
            assert not torch.equal(own.delta_P, other.delta_P)
            assert torch.equal(updates[task.device_id], own.delta_P)
        return run(self, call)

    world_foundation = find_foundation(config.foundation.name, "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Serial, "run", kept)
        simulation.run()
    assert len(updates) == 6


def test_a_run_with_stale_emulators_goes_on_to_the_same_bits(tiny, tmp_path):
    config = changed(tiny, **EVERYBODY, evaluation={"every": 1})
    Simulation(changed(config, out=tmp_path / "whole"), controller=GoesOn).run()
    Simulation(changed(config, out=tmp_path / "parts", rounds=1), controller=GoesOn).run()
    Simulation(changed(config, resume=tmp_path / "parts"), controller=GoesOn).run()
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    assert summary(tmp_path / "whole")["num_completed"] == 18
