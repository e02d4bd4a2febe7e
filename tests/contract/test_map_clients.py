"""What every side of the seam promises, asked of the one in this process; tests/ray asks those on Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.records import NON_FINITE, ClientReport
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.training.client_batch import ClientUpdate
from fedpeat_ray.training.map_clients import MapClients

BACKBONE = SimpleNamespace(factor=2.0)


@pytest.fixture(params=[Serial])
def map_clients(request: pytest.FixtureRequest) -> MapClients:
    return request.param(BACKBONE)


@dataclass(frozen=True)
class Parts:
    """An aggregator that tells how it was put together: one tuple an `add`, in the order of merging."""

    parts: tuple[tuple[int, ...], ...] = ()

    def add(self, updates: Sequence[Any]) -> Parts:
        return Parts((*self.parts, tuple(update.report.device_id for update in updates)))

    def merge(self, other: Parts) -> Parts:
        return Parts(self.parts + other.parts)

    def result(self) -> tuple[tuple[int, ...], ...]:
        return self.parts


def multiply(backbone: Any, shared: torch.Tensor, tasks: Sequence[int]) -> list[ClientUpdate]:
    """An update of the backbone's and the shared values; device 5 gives none that can be used."""
    updates = []
    for device_id in tasks:
        delta_P = backbone.factor * shared.double() / (device_id + 3)
        failure = NON_FINITE if device_id == 5 else None
        report = ClientReport(device_id, float(device_id), failure, 0.0)
        updates.append(ClientUpdate(report, device_id + 1.0, delta_P * float("nan") if failure else delta_P))
    return updates


DEVICES = [4, 5, 0, 9, 2, 7, 1]
SHARED = torch.tensor([0.1, -7.0, 3.3])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_batches_are_consecutive_tasks_and_merged_in_their_order(map_clients: MapClients, batch_size: int):
    total, reports = map_clients(multiply, SHARED, DEVICES, Parts(), batch_size)
    expected = [tuple(DEVICES[start : start + batch_size]) for start in range(0, len(DEVICES), batch_size)]
    assert list(total.result()) == expected
    assert [report.device_id for report in reports] == DEVICES


def test_without_a_batch_size_clients_come_one_at_a_time(map_clients: MapClients):
    total, _ = map_clients(multiply, SHARED, DEVICES, Parts())
    assert total.result() == tuple((device_id,) for device_id in DEVICES)


def test_training_sees_the_backbone_what_is_shared_and_its_batch(map_clients: MapClients):
    mean, _ = map_clients(multiply, SHARED, [0], WeightedMean())
    assert mean.result() is not None and mean.result().equal(2.0 * SHARED.double() / 3)


def test_failed_clients_are_reported_in_their_place_and_left_out_of_the_mean(map_clients: MapClients):
    mean, reports = map_clients(multiply, SHARED, DEVICES, WeightedMean(), 3)
    assert [report.failure for report in reports] == [None, NON_FINITE, None, None, None, None, None]
    expected, _ = map_clients(multiply, SHARED, [d for d in DEVICES if d != 5], WeightedMean(), 3)
    assert torch.allclose(mean.result(), expected.result(), rtol=1e-14, atol=0)


def test_the_batch_size_changes_a_mean_by_no_more_than_rounding_and_a_repeat_changes_nothing(map_clients: MapClients):
    means = [map_clients(multiply, SHARED, DEVICES, WeightedMean(), size)[0].result() for size in (1, 2, 3, 7)]
    again = [map_clients(multiply, SHARED, DEVICES, WeightedMean(), size)[0].result() for size in (1, 2, 3, 7)]
    assert all(mean.equal(same) for mean, same in zip(means, again, strict=True))
    assert all(torch.allclose(mean, means[0], rtol=1e-14, atol=0) for mean in means)


def test_what_a_batch_gives_does_not_depend_on_those_before_it(map_clients: MapClients):
    whole, _ = map_clients(multiply, SHARED, DEVICES, WeightedMean(), 3)
    merged = WeightedMean()
    for start in range(0, len(DEVICES), 3):
        part, _ = map_clients(multiply, SHARED, DEVICES[start : start + 3], WeightedMean(), 3)
        merged = merged.merge(part)
    assert whole.result().equal(merged.result())


@pytest.mark.parametrize("zero", [WeightedMean(), Parts()])
def test_no_tasks_give_the_zero_and_no_reports(map_clients: MapClients, zero: Any):
    total, reports = map_clients(multiply, SHARED, [], zero, 3)
    assert total.result() == zero.result() and reports == []


def test_the_aggregator_that_is_passed_in_stays_as_it_was(map_clients: MapClients):
    zero = WeightedMean()
    map_clients(multiply, SHARED, DEVICES, zero, 2)
    assert zero.weight == 0.0 and zero.sum_P is None


def test_an_error_in_training_is_raised_as_it_is(map_clients: MapClients):
    train: Callable = _out_of_patience
    with pytest.raises(TimeoutError, match="device 4"):
        map_clients(train, SHARED, DEVICES, WeightedMean(), 2)


def _out_of_patience(backbone: Any, shared: Any, tasks: Sequence[int]) -> list[Any]:
    raise TimeoutError(f"device {tasks[0]}")
