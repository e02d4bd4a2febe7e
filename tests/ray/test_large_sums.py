"""Sums that are too large to go through the main process: hosts merge them, and a lost one is made again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ObjectLostError
from torch import Tensor

from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.config import HostsConfig
from fedpeat_ray.models.foundation import load_backbone, prepare
from fedpeat_ray.records import ClientReport
from fedpeat_ray.runtime import ray_hosts
from fedpeat_ray.runtime.host_jobs import Away, HostJobs, Job
from fedpeat_ray.runtime.ray_hosts import Facts, RayHosts
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.training.client_batch import ClientUpdate

pytestmark = pytest.mark.usefixtures("local_ray")
NUM_ELEMENTS = 2**17 + 1  # a sum of just over a mebibyte


@dataclass(frozen=True)
class Large:
    """`train(backbone, shared, device ids)`: an update of numbers that are rounded when they are added."""

    def __call__(self, backbone: Any, shared: Tensor, device_ids: Sequence[int]) -> list[ClientUpdate]:
        return [
            ClientUpdate(ClientReport(i, float(i), None, 0.0), i + 1.0, shared.double() / (i + 3)) for i in device_ids
        ]


@pytest.fixture(scope="module")
def foundation(gpt2_dir):
    return prepare(str(gpt2_dir), "float32")


@pytest.fixture(scope="module")
def hosts(pool, foundation) -> Iterator[RayHosts]:
    with RayHosts(HostsConfig(num_hosts=2), foundation, lambda kind, **facts: None, pool=pool) as hosts:
        yield hosts


@pytest.fixture
def expected(foundation):
    return Serial(load_backbone(foundation))(Large(), shared(), range(37), WeightedMean(), 2)


def shared() -> Tensor:
    return torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(0))


def test_hosts_merge_them_and_the_main_process_receives_one(hosts, expected, monkeypatch):
    parts: list[tuple[Job, Any]] = []
    done = HostJobs.done

    def watched(jobs: HostJobs, job: Job, part: Any, reports: Sequence[Any]) -> None:
        parts.append((job, part))
        done(jobs, job, part, reports)

    monkeypatch.setattr(HostJobs, "done", watched)
    mean, reports = hosts(Large(), shared(), range(37), WeightedMean(), 2)
    assert mean.result().equal(expected[0].result()) and reports == expected[1]
    assert all(isinstance(part, Away) for _, part in parts)
    trained = [job for job, _ in parts if job.parts is None]
    assert len(parts) == 2 * len(trained) - 1, "each merge takes two and leaves one"


def test_sums_that_went_with_their_node_are_made_again(hosts, expected, monkeypatch):
    get, lost = ray.get, []

    def get_with_losses(ref: Any, **options: Any) -> Any:
        value = get(ref, **options)
        merged = isinstance(value, Facts) and value.what == "merge"
        if (merged and len(lost) < 2) or (isinstance(value, WeightedMean) and len(lost) == 2):
            lost.append(ref)
            raise ObjectLostError(ref.hex(), None, "")
        return value

    monkeypatch.setattr(ray_hosts.ray, "get", get_with_losses)
    mean, reports = hosts(Large(), shared(), range(37), WeightedMean(), 2)
    assert len(lost) == 3, "two merges, and the total"
    assert mean.result().equal(expected[0].result()) and reports == expected[1]
