"""How many hosts there are: what a cluster has room for, and what a round has work for."""

from __future__ import annotations

import dataclasses
from typing import Any

import failing_hosts
import pytest
import ray
from tiny_runs import parse

from fedpeat_ray.config import HostsConfig
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.models.foundation import prepare
from fedpeat_ray.runtime import host_pool, ray_hosts, side_by_side
from fedpeat_ray.runtime.host_pool import Room, Share
from fedpeat_ray.runtime.ray_hosts import RayHosts


@pytest.mark.parametrize(
    ("nodes", "share", "room"),
    [
        ([{"CPU": 3.0}, {"CPU": 5.0}, {}], Share(2, 0, 0, 2), 3),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}], Share(1, 1, 0, 1), 4),
        ([{"GPU": 1.0}, {"GPU": 1.0}], Share(1, 0.4, 0, 1), 4),
        ([{}], Share(1, 0, 0, 1), 0),
    ],
)
def test_a_node_has_room_for_whole_hosts(monkeypatch, nodes, share, room):
    monkeypatch.setattr(host_pool, "_nodes", lambda: nodes)
    found = Room(share, 0.0, HostsConfig())
    assert found.slots() == room and found.num_hosts() == max(1, room)
    assert dataclasses.replace(found, config=HostsConfig(num_hosts=7)).num_hosts() == 7
    up_to_five = dataclasses.replace(found, config=HostsConfig(max_hosts=5))
    assert up_to_five.num_hosts() == max(1, min(5, room)), "before it is known what is needed"
    assert [up_to_five.num_hosts(needed) for needed in (1, 3, 100)] == [1, 3, 5]
    if share.num_gpus == 1:
        assert dataclasses.replace(found, taken_gpus=3.0).slots() == 1, "shards have theirs"


def test_there_are_as_many_hosts_as_there_is_work_for_and_no_more(pool, monkeypatch, tiny_arguments):
    monkeypatch.setattr(ray_hosts, "_LOOK_EVERY_S", 0.0)
    numbers: list[int] = []

    def on_event(kind: str, **facts: Any) -> None:
        numbers.append(facts["num_hosts"])

    foundation = prepare(parse(tiny_arguments()).foundation.name, "float32")
    numbered = failing_hosts.EndsItsHost(number=-1, once=None)
    with RayHosts(HostsConfig(max_hosts=2), foundation, on_event, pool=pool) as hosts:
        assert numbers == [1, 2], "there is room for both"
        for _ in range(ray_hosts._CALLS):
            hosts(numbered, None, [0], failing_hosts.Text())
        assert numbers == [1, 2, 1], "the second had nothing to do"
        while numbers[-1] < 2:
            hosts(numbered, None, list(range(50)), failing_hosts.Text())
        assert numbers == [1, 2, 1, 2]


def test_a_number_of_hosts_and_a_largest_number_are_not_both_given(tiny_arguments):
    config = parse(tiny_arguments("--hosts.num-hosts", 2, "--hosts.max-hosts", 3))
    with pytest.raises(ConfigError, match=r"hosts.max_hosts = 3 is not allowed: unset together with hosts.num_hosts"):
        config.validate()


@pytest.mark.parametrize(
    ("config", "nodes", "at_once", "each"),
    [
        (HostsConfig(), [{"CPU": 2.0}], 2, HostsConfig("serial")),
        (HostsConfig(), [{"CPU": 8.0}], 2, HostsConfig(num_hosts=4)),
        (HostsConfig(), [{"CPU": 1.0}, {"CPU": 1.0}], 2, HostsConfig(num_hosts=1)),
        (HostsConfig(), [{}], 1, HostsConfig(num_hosts=1)),
        (HostsConfig(max_hosts=6), [{"CPU": 1.0}], 2, HostsConfig(max_hosts=3)),
    ],
    ids=["a core for each", "more cores", "two nodes", "no core", "an autoscaler's"],
)
def test_simulations_side_by_side_share_the_hosts_that_there_are_or_may_be(monkeypatch, config, nodes, at_once, each):
    monkeypatch.setattr(host_pool, "_nodes", lambda: nodes)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True} for _ in nodes])
    room = Room(Share(1, 0, 0, 1), 0.0, config)
    assert side_by_side._share(room, room.num_hosts(at_once), at_once) == each
