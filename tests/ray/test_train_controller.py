"""A controller is trained by RLlib: what it leaves, how it goes on, and that runs decide as RLlib's module does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from whole_runs import ENDS, SHARES

from fedpeat_ray.config import DataConfig, FleetConfig, FoundationConfig, LocalConfig, LoraConfig
from fedpeat_ray.control.branching_ppo import Training
from fedpeat_ray.control.environment import TERMS, Episode
from fedpeat_ray.control.learned import Learned
from fedpeat_ray.control.policy import About, Policy
from fedpeat_ray.control.ppo import PPOSettings
from fedpeat_ray.control.trial import player
from fedpeat_ray.control_training import TrainConfig, begun, settings_for
from fedpeat_ray.errors import ConfigError, FedPeatError
from workloads.train_controller import main, run

PPO = PPOSettings(width=8, rounds_per_iteration=20, epochs=1, minibatch_rounds=20, num_envs=2)
pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def config(deep_gpt2_dir: Path, text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Three iterations with twelve candidates."""
    directory = tmp_path_factory.mktemp("controller")
    response = {"start": 160.0, "exponent": 0.2, "gain_L": [1e-3, 2e-3], "freshness": 0.8, "power": 0.7, "novelty": 0.9}
    (directory / "response.json").write_text(json.dumps(response))
    return TrainConfig(
        iterations=3,
        candidates=12,
        cohort_size=4,
        smallest_cohort=None,
        rounds=5,
        realign_every=(0, 2),
        fleet=FleetConfig(num_devices=14),
        emulator=ENDS,
        foundation=FoundationConfig(str(deep_gpt2_dir), dtype="float32"),
        local=LocalConfig(sequence_length=32, max_steps=3, learning_rate=0.02),
        lora=LoraConfig(rank=2),
        data=DataConfig(str(text_dir), public_name=str(text_dir.with_name("public"))),
        response=directory / "response.json",
        ppo=PPO,
        checkpoint_every=2,
        out=directory / "run",
    )


@pytest.fixture(scope="module")
def trained(config: TrainConfig) -> Path:
    assert run(config) == 0
    assert config.out is not None
    return config.out


def test_it_leaves_figures_curves_and_a_policy(trained, config):
    progress = pd.read_csv(trained / "progress.csv")
    assert progress["iteration"].tolist() == [1, 2, 3] and progress["rounds"].tolist() == [20, 40, 60]
    assert progress[["reward", *TERMS, "entropy", "sampling_s", "learning_s"]].to_numpy(float).all()
    weights = dataclasses.asdict(config.weights)
    summed = -sum(weights[name] * progress[name] for name in TERMS)
    assert np.allclose(progress["reward"], summed)
    assert progress["validation"].notna().tolist() == [False, True, True]
    assert (trained / "curves.png").stat().st_size > 10_000 and any((trained / "tensorboard").iterdir())
    about = Policy.load(trained / "policy").about
    assert about.shares == SHARES and about.trained["iterations"] in (2, 3) and about.trained["candidates"] == 12


def test_it_goes_on_from_its_last_checkpoint(trained, config):
    before = pd.read_csv(trained / "progress.csv")
    longer = before.copy()
    longer.loc[3] = longer.loc[2]  # as if it had been killed after an iteration without a checkpoint
    longer.to_csv(trained / "progress.csv", index=False)
    assert main(["--resume", str(trained), "--iterations", "5"]) == 0
    after = pd.read_csv(trained / "progress.csv")
    assert after["iteration"].tolist() == [1, 2, 3, 4, 5]
    pd.testing.assert_frame_equal(after.iloc[:3], before)
    with pytest.raises(ConfigError, match=r"out = .* go on with it"):
        begun(config)
    again = dataclasses.replace(config, resume=trained)
    for name, value, allowed in (("seed", 7, "0"), ("iterations", 2, "at least 3")):
        with pytest.raises(ConfigError, match=f"{name} = {value} .*{allowed}, as"):
            begun(dataclasses.replace(again, **{name: value}))


@pytest.mark.parametrize("ppo", [PPO, dataclasses.replace(PPO, ratio="joint", penalty=1.0)], ids=["branch", "joint"])
def test_an_exported_policy_decides_exactly_as_the_module_does(ppo, config):
    settings = settings_for(config)
    training = Training(settings, dataclasses.replace(ppo, learning_rate=0.05), iterations=2, seed=1)
    figures = [training.iterate() for _ in range(2)]
    assert figures[0]["policy_loss"] != figures[1]["policy_loss"]
    module, exported = training.player(), player(Learned(training.policy(About(SHARES, False, {}))))
    decided = 0
    for seed in range(10):
        episode = Episode(settings[seed % 2], seed)
        while not episode.is_over:
            one, other = module(episode), exported(episode)
            if ppo.penalty is None:  # runs always mask
                assert (one.levels_N == other.levels_N).all() and np.array_equal(one.stale_N, other.stale_N)  # type: ignore[union-attr]
            decided += int((one.levels_N > 0).sum())  # type: ignore[union-attr]
            episode.step(one)
    assert decided > 0
    training.close()


def test_independent_heads_train_and_are_not_exported(config):
    training = Training(settings_for(config)[:1], dataclasses.replace(PPO, network="independent"), iterations=1, seed=1)
    training.iterate()
    episode = Episode(settings_for(config)[0], 0)
    assert len(training.player()(episode).levels_N) == 12  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="independent"):
        training.policy(About(SHARES, False, {}))
    training.close()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"candidates": 15}, "candidates"),
        ({"cohort_size": 13}, "cohort_size"),
        ({"smallest_cohort": 5}, "smallest_cohort"),
        ({"realign_every": ()}, "realign_every"),
        ({"ppo": dataclasses.replace(PPO, minibatch_rounds=21)}, "ppo.minibatch_rounds"),
        ({"response": Path("nowhere.json")}, "nowhere.json"),
        ({"resume": Path("nowhere")}, "resume"),
    ],
)
def test_bad_settings_are_told_before_anything_starts(changes, field, config, tmp_path):
    with pytest.raises(FedPeatError, match=field) as raised:
        run(dataclasses.replace(config, out=tmp_path / "run", **changes))
    assert "\n" not in str(raised.value)


def test_a_training_that_is_begun_by_default_can_be_gone_on_with_from_another_checkout(tmp_path):
    directory = begun(TrainConfig(out=tmp_path / "run"))
    assert str(Path(__file__).parents[2]) not in (directory / "config.json").read_text()


def test_an_error_is_one_line(capsys):
    assert main(["--resume", "nowhere"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: resume = 'nowhere'") and "\n" not in error
