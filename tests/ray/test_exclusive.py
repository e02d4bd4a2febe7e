"""An actor of its own for every device, with a real cap on its memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.config import FleetConfig, HostsConfig, LocalConfig, LoraConfig
from fedpeat_ray.fleet.population import build_fleet
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.lora import find_lora
from fedpeat_ray.records import MEMORY, ClientTask
from fedpeat_ray.runtime.ray_hosts import ExclusiveHosts
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.training.client_batch import TrainClientBatch


@pytest.mark.usefixtures("local_ray")
def test_a_device_that_runs_into_its_cap_is_reported_and_the_others_train_the_same_bits(gpt2_dir):
    foundation = foundations.prepare(str(gpt2_dir), "float32")
    lora = find_lora(foundations.load(foundation), LoraConfig(rank=2))
    start_P, train = lora.init(0), TrainClientBatch(lora, LocalConfig(learning_rate=2e-3))
    rng = np.random.default_rng(0)
    # Only this many sequences at once need more than a device of 64 MiB has.
    tasks = [
        ClientTask(device_id, 1, rng.integers(0, 257, (1, size, 64)), np.full((1, size), 64))
        for device_id, size in ((3, 2), (5, 4096))
    ]
    fleet = build_fleet(FleetConfig(num_devices=10), seed=0)
    fleet = dataclasses.replace(fleet, memory_cap_bytes=np.full(10, 64 * 2**20))
    with ExclusiveHosts(HostsConfig(), foundation, lambda *_, **__: None, fleet) as hosts:
        mean, (fits, too_large) = hosts(train, start_P, tasks, WeightedMean())
    assert fits.failure is None
    assert (too_large.device_id, too_large.failure, too_large.train_loss) == (5, MEMORY, None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected, _ = Serial(foundations.load_backbone(foundation))(train, start_P, tasks[:1], WeightedMean())
    torch.set_num_threads(threads)
    assert torch.equal(mean.result(), expected.result())
