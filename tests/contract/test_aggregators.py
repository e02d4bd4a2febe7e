"""What every aggregator promises: a monoid over updates that is never changed, so that parts may be added anywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.records import MEMORY, NON_FINITE, ClientReport
from fedpeat_ray.training.client_batch import ClientUpdate
from fedpeat_ray.training.evaluation import GroupScore, Score, ScoreSum
from fedpeat_ray.training.map_clients import Aggregator


def client_update(device_id: int, weight: float, delta_P: torch.Tensor, failure: str | None = None) -> ClientUpdate:
    return ClientUpdate(ClientReport(device_id, 1.0, failure, 0.0), weight, delta_P)


def client_updates() -> list[ClientUpdate]:
    rng = torch.Generator().manual_seed(0)
    deltas = 10.0 * torch.randn(9, 5, generator=rng, dtype=torch.float64)
    return [client_update(i, float(i % 4 + 1), delta_P) for i, delta_P in enumerate(deltas)]


def scores() -> list[GroupScore]:
    groups = ("all", "laptop", "all", "phone", "laptop", "all", "all", "phone", "all")
    return [GroupScore(group, Score(0.1 * i + 0.7, i, i + 2)) for i, group in enumerate(groups)]


def numbers(result: Any) -> Any:
    """A result as something that pytest.approx compares."""
    if isinstance(result, dict):
        return {
            f"{group} {field}": getattr(score, field)
            for group, score in result.items()
            for field in ("loss", "num_correct", "num_tokens")
        }
    return None if result is None else result.tolist()


KINDS: list[Any] = [
    pytest.param(WeightedMean, client_updates, id="WeightedMean"),
    pytest.param(ScoreSum, scores, id="ScoreSum"),
]


@pytest.mark.parametrize(("kind", "make"), KINDS)
def test_nothing_is_the_zero_of_merging_on_either_side(
    kind: Callable[[], Aggregator], make: Callable[[], Sequence[Any]]
):
    some = kind().add(make())
    assert numbers(some.merge(kind()).result()) == numbers(some.result())
    assert numbers(kind().merge(some).result()) == numbers(some.result())
    assert numbers(kind().add([]).result()) == numbers(kind().result()) == numbers(kind().merge(kind()).result())


@pytest.mark.parametrize(("kind", "make"), KINDS)
def test_merging_parts_is_adding_all(kind, make):
    updates = make()
    whole = numbers(kind().add(updates).result())
    for cut in range(len(updates) + 1):
        parts = kind().add(updates[:cut]).merge(kind().add(updates[cut:]))
        assert numbers(parts.result()) == pytest.approx(whole, rel=1e-13, abs=1e-13)
        assert numbers(kind().add(updates[:cut]).add(updates[cut:]).result()) == pytest.approx(whole, rel=1e-13)


@pytest.mark.parametrize(("kind", "make"), KINDS)
def test_merging_is_associative_up_to_rounding(kind, make):
    a, b, c = (kind().add(make()[start::3]) for start in range(3))
    assert numbers(a.merge(b).merge(c).result()) == pytest.approx(numbers(a.merge(b.merge(c)).result()), rel=1e-13)


@pytest.mark.parametrize(("kind", "make"), KINDS)
def test_the_same_parts_merged_in_the_same_order_give_the_same_bits(kind, make):
    def total() -> Any:
        result = kind()
        for start in range(0, 9, 2):
            result = result.merge(kind().add(make()[start : start + 2]))
        return numbers(result.result())

    assert total() == total()


@pytest.mark.parametrize(("kind", "make"), KINDS)
def test_neither_aggregators_nor_updates_are_ever_changed(kind, make):
    updates = make()
    zero, left, right = kind(), kind().add(updates[:4]), kind().add(updates[4:])
    before = copy.deepcopy([numbers(each.result()) for each in (zero, left, right)])
    left.merge(right).merge(left).add(updates).result()
    right.add(updates[:1]).merge(zero)
    zero.merge(left)
    assert [numbers(each.result()) for each in (zero, left, right)] == before
    if kind is WeightedMean:
        assert all(update.delta_P.equal(same.delta_P) for update, same in zip(updates, make(), strict=True))


def test_the_mean_is_weighted_and_in_float64():
    one, two = torch.tensor([1.0, 1e-9], dtype=torch.float64), torch.tensor([4.0, 0.0], dtype=torch.float64)
    mean = WeightedMean().add([client_update(0, 1.0, one), client_update(1, 3.0, two)]).result()
    assert mean is not None and mean.dtype == torch.float64
    assert mean.tolist() == pytest.approx([3.25, 0.25e-9], rel=1e-15)


@pytest.mark.parametrize("failure", [NON_FINITE, MEMORY])
def test_updates_that_failed_are_left_out_of_the_mean(failure):
    good = client_updates()
    broken = client_update(99, 1e9, torch.full((5,), float("nan"), dtype=torch.float64), failure)
    expected = WeightedMean().add(good).result()
    for updates in ([broken, *good], [*good, broken]):
        mean = WeightedMean().add(updates).result()
        assert mean is not None and expected is not None and mean.equal(expected)
    assert WeightedMean().add([broken]).result() is None
    assert WeightedMean().result() is None
    alone = WeightedMean().add([broken]).merge(WeightedMean().add(good)).result()
    assert alone is not None and expected is not None and alone.equal(expected)


def test_groups_of_scores_are_kept_apart():
    result = ScoreSum().add(scores()).result()
    assert set(result) == {"all", "laptop", "phone"}
    assert (result["phone"].num_correct, result["phone"].num_tokens) == (10, 14)
    assert result["phone"].loss == pytest.approx(2.4)
    assert result["phone"].token_accuracy == 10 / 14
    assert Score(loss=5 * 1e6, num_correct=0, num_tokens=5).perplexity < float("inf"), "no overflow"
