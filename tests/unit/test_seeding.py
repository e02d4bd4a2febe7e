"""Draws that depend on what they are for, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeat_ray.seeding import derive_seed, exponentials, generator, normals, uniforms


def test_a_seed_is_the_same_on_every_machine_and_in_every_version():
    assert derive_seed(0, "cohort", 1) == 9037807981105676339
    assert derive_seed(7, "lora init transformer.h.0") == 3922155926540213293
    assert uniforms(3, np.array([0, 1, 10**9])).tolist() == [0.1134503420571546, 0.7002935135929025, 0.4326900362948409]


def test_every_part_of_the_name_counts():
    seeds = [
        derive_seed(0, "a"),
        derive_seed(1, "a"),
        derive_seed(0, "b"),
        derive_seed(0, "a", 0),
        derive_seed(0, "a", 1),
        derive_seed(0, "a", 0, 1),
        derive_seed(0, "a", 1, 0),
        derive_seed(0, "a", 10),
        derive_seed(0, "a", 1, 0, 0),
        derive_seed(0, "a1"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a", *np.array([3])) == derive_seed(0, "a", 3)
    assert generator(0, "a", 3).random() == generator(0, "a", 3).random() != generator(0, "a", 4).random()


@pytest.mark.parametrize("draw", [uniforms, normals, exponentials])
def test_the_draw_of_a_device_is_its_own(draw):
    everyone = draw(5, np.arange(1000))
    assert draw(5, np.arange(10)).tolist() == everyone[:10].tolist()
    assert draw(5, np.array([999, 3, 3])).tolist() == everyone[[999, 3, 3]].tolist()
    assert draw(5, np.arange(1000, dtype=np.int32)).tolist() == everyone.tolist()
    assert len(np.unique(everyone)) == 1000
    assert not np.isin(draw(6, np.arange(1000)), everyone).any()
    assert draw(5, np.array([], dtype=np.int64)).shape == (0,)


def test_draws_follow_their_distributions():
    ids = np.arange(200_000)
    even, normal, waiting = uniforms(1, ids), normals(1, ids), exponentials(1, ids)
    assert even.min() > 0 and even.max() < 1
    for values, mean, deviation in ((even, 0.5, 12**-0.5), (normal, 0.0, 1.0), (waiting, 1.0, 1.0)):
        assert values.dtype == np.float64
        assert values.mean() == pytest.approx(mean, abs=0.01)
        assert values.std() == pytest.approx(deviation, rel=0.01)
    assert np.mean(normal**4) == pytest.approx(3.0, rel=0.05)
    counts = np.histogram(even, bins=50, range=(0, 1))[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 100  # chi squared with 49 degrees of freedom: p about 2e-5


def test_draws_of_neighbours_and_of_other_seeds_are_unrelated():
    ids = np.arange(100_000)
    one = normals(1, ids)
    for other in (one[1:], normals(2, ids)[:-1], normals(derive_seed(1, "again"), ids)[:-1]):
        assert abs(np.corrcoef(one[:-1], other)[0, 1]) < 0.015
