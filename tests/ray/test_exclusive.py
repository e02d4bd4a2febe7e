"""An actor of its own for every device, with a real cap on its memory."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whole_runs
from transformers import GPT2Config, GPT2LMHeadModel

from fedpeat_ray import Simulation
from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.config import AvailabilityConfig, FleetConfig, HostsConfig, LocalConfig, LoraConfig
from fedpeat_ray.fleet.memory import training_memory
from fedpeat_ray.fleet.population import build_fleet
from fedpeat_ray.fleet.tiers import TIERS
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.records import MEMORY, ClientTask, sequences
from fedpeat_ray.runtime.ray_hosts import ExclusiveHosts
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.trainable.lora import find_lora
from fedpeat_ray.trainable.shape import model_shape
from fedpeat_ray.training.client_batch import TrainClientBatch
from fedpeat_ray.world import prepare


def test_a_device_that_runs_into_its_cap_is_reported_and_the_others_train_the_same_bits(pool, gpt2_dir):
    foundation = foundations.prepare(str(gpt2_dir), "float32")
    lora = find_lora(foundations.load(foundation), LoraConfig(rank=2))
    start_P, train = lora.init(0), TrainClientBatch(lora, LocalConfig(learning_rate=2e-3))
    rng = np.random.default_rng(0)
    # Only this many sequences at once need more than a device of 64 MiB has.
    tasks = [
        ClientTask(device_id, 1, sequences(rng.integers(0, 257, (1, size, 64)), np.full((1, size), 64)))
        for device_id, size in ((3, 2), (5, 4096))
    ]
    fleet = build_fleet(FleetConfig(num_devices=10), seed=0)
    fleet = dataclasses.replace(fleet, memory_cap_bytes=np.full(10, 64 * 2**20))
    told: Any = (foundation, lambda *_, **__: None, fleet, lambda level: 2**20)
    with ExclusiveHosts(HostsConfig(), *told, pool=pool) as hosts:
        mean, (fits, too_large) = hosts(train, start_P, tasks, WeightedMean())
    assert fits.failure is None
    assert (too_large.device_id, too_large.failure, too_large.train_loss) == (5, MEMORY, None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected, _ = Serial(foundations.load_backbone(foundation))(train, start_P, tasks[:1], WeightedMean())
    torch.set_num_threads(threads)
    assert torch.equal(mean.result(), expected.result())


@pytest.fixture(scope="module")
def heavy_dir(tmp_path_factory: pytest.TempPathFactory, gpt2_dir: Path) -> Path:
    """A GPT-2 whose weights, 25 MB, are as much as training adds to them."""
    directory = tmp_path_factory.mktemp("heavy")
    config = GPT2Config(
        vocab_size=257, n_positions=64, n_embd=256, n_layer=8, n_head=4, bos_token_id=256, eos_token_id=256
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    for path in gpt2_dir.glob("token*"):
        shutil.copy(path, directory)
    return directory


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.full), "bfloat16"])
def test_a_device_that_the_memory_model_just_admits_trains_and_one_that_is_too_small_does_not(pool, heavy_dir, dtype):
    foundation = foundations.prepare(str(heavy_dir), dtype)
    model = foundations.load(foundation)
    lora, local = find_lora(model, LoraConfig(rank=2)), LocalConfig(8, 64, learning_rate=2e-3)
    start_P, train = lora.init(0), TrainClientBatch(lora, local)
    shape = model_shape(model, weight_bytes=4)
    need = training_memory(shape, batch_size=8, sequence_length=64, trainable="lora", lora_rank=2)
    weights_bytes, rest_bytes = int(need.weights_bytes), int(need.peak_bytes - need.weights_bytes)
    tokens = np.random.default_rng(0).integers(0, 257, (2, 8, 64))
    tasks = [ClientTask(device_id, 1, sequences(tokens, np.full((2, 8), 64))) for device_id in (0, 1)]
    caps = np.array([weights_bytes + rest_bytes, weights_bytes // 2])
    fleet = dataclasses.replace(build_fleet(FleetConfig(num_devices=2), seed=0), memory_cap_bytes=caps)
    told: Any = (foundation, lambda *_, **__: None, fleet, lambda level: weights_bytes)
    with ExclusiveHosts(HostsConfig(), *told, pool=pool) as hosts:
        _, reports = hosts(train, start_P, tasks, WeightedMean())
    assert [report.failure for report in reports] == [None, MEMORY]


def test_devices_that_can_hold_an_emulator_and_not_the_foundation_train_on_it(pool, heavy_dir, text_dir, tmp_path):
    config = whole_runs.tiny(
        heavy_dir,
        text_dir,
        rounds=1,
        cohort_size=2,
        over_sample=1.0,
        client_batch_size=1,
        data={"public_name": None},
        emulator={"first": 1, "last": 1, "shares": (0.2,), "weights": "foundation"},
        fleet={"num_devices": 2, "availability": AvailabilityConfig("always"), "tier_shares": {"laptop": 1}},
    )
    need = prepare(whole_runs.changed(config, emulator={"give_foundation": True}), tmp_path).fits.memory_bytes
    laptop = next(tier for tier in TIERS if tier.name == "laptop")
    scale = 1.02 * need["level 1"] / laptop.memory_cap_bytes
    assert 2 * need["level 1"] < need["level 2"]
    fleet = {"memory_scale": scale, "spread": 0.0}
    for name, hosts in (("serial", {}), ("exclusive", {"backend": "ray", "exclusive": True})):
        Simulation(whole_runs.changed(config, out=tmp_path / name, fleet=fleet, hosts=hosts)).run(pool)
    whole_runs.assert_same_bits(tmp_path / "serial", tmp_path / "exclusive")
    assert whole_runs.summary(tmp_path / "exclusive")["num_completed"] == 2
