"""The seam on Ray: the same bits for any number of hosts, in any order, and after a host is lost."""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import failing_hosts
import pytest
import ray
from patience import OutOfPatience
from processes import below, living
from tiny_runs import batches, parse
from whole_runs import assert_same_bits, events

from fedpeat_ray import Simulation
from fedpeat_ray.config import HostsConfig
from fedpeat_ray.errors import HostLostError
from fedpeat_ray.models.foundation import prepare
from fedpeat_ray.runtime.host_pool import HostPool
from fedpeat_ray.runtime.ray_hosts import RayHosts
from fedpeat_ray.training import adapters

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def run_on_hosts(pool: HostPool, tiny_arguments: Callable[..., list[str]], tmp_path: Path) -> Callable[[int], Path]:
    """Runs the tiny run on so many hosts; returns its directory."""

    def run(num_hosts: int) -> Path:
        hosts = ("--hosts.backend", "ray", "--hosts.num-hosts", num_hosts)
        Simulation(parse(tiny_arguments("--out", tmp_path / "run", *hosts))).run(pool)
        return tmp_path / "run"

    return run


@pytest.fixture
def train_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces local training by one of failing_hosts."""

    def replace(train: type, **values: object) -> None:
        monkeypatch.setattr(adapters, "TrainClientBatch", functools.partial(train, **values))

    return replace


@pytest.mark.parametrize("num_hosts", [1, 3])
def test_any_number_of_hosts_gives_the_bits_of_a_serial_run(num_hosts, run_on_hosts, uninterrupted):
    directory = run_on_hosts(num_hosts)
    assert_same_bits(uninterrupted, directory)
    assert not events(directory, "host_lost")
    assert ray.is_initialized(), "a Ray that was there before is left running"


@pytest.mark.parametrize("num_hosts", [pytest.param(2, marks=pytest.mark.full), 3])
def test_the_centralised_reference_does_not_depend_on_who_shares_its_steps(
    num_hosts, pool, tiny_arguments, tmp_path, monkeypatch
):
    found = {}
    for backend, number in (("serial", 1), ("ray", num_hosts)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache of {number} {backend}"))
        hosts = ("--hosts.backend", backend, "--hosts.num-hosts", number, "--evaluation.centralised")
        out = tmp_path / f"{backend} {number}"
        found[out] = Simulation(parse(tiny_arguments("--out", out, "--rounds", 1, *hosts))).run(pool)["perplexity"]
    assert len({perplexity["centralised"] for perplexity in found.values()}) == 1


def test_partial_results_are_merged_in_the_order_of_the_batches_whatever_ends_first(tiny_arguments, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    train, tasks = failing_hosts.EndsLast(first=0, last=6, pipe=tmp_path / "pipe"), list(range(7))
    foundation = prepare(parse(tiny_arguments()).foundation.name, "float32")
    with RayHosts(HostsConfig(num_hosts=2), foundation, lambda kind, **facts: None) as hosts:
        merged, reports = hosts(train, None, tasks, failing_hosts.Text(), batch_size=2)
        processes = [process for process in below() if process.process_id in hosts.process_ids()]
    assert merged.result() == "(01)(23)(45)(6)" and reports == tasks
    assert len(processes) == 2 and not living(processes), "the hosts end with the pool"


def test_a_job_that_waited_at_a_lost_host_is_not_among_what_ended_it(pool, tiny_arguments, tmp_path):
    lost, tasks = [], list(range(100))
    foundation = prepare(parse(tiny_arguments()).foundation.name, "float32")

    def on_event(kind: str, **facts: Any) -> None:
        if kind == "host_lost":
            lost.append(facts["batch"])

    with RayHosts(HostsConfig(num_hosts=1), foundation, on_event, pool=pool) as hosts:
        once = failing_hosts.EndsItsHost(number=3, once=tmp_path / "ended")
        merged, reports = hosts(once, None, tasks, failing_hosts.Text())
        assert merged.result() == "".join(f"({task})" for task in tasks) and reports == tasks
        assert lost == [0], "of its jobs the first"
        lost.clear()
        always = failing_hosts.EndsItsHost(number=3, once=None)
        with pytest.raises(HostLostError, match="batch 3 ended two hosts"):
            hosts(always, None, tasks, failing_hosts.Text())
        assert lost == [0, 3]
        assert hosts(once, None, tasks, failing_hosts.Text())[1] == tasks, "the pool can still be used"


def test_two_hosts_of_which_one_is_killed_in_a_round_give_the_same_bits(
    run_on_hosts, train_with, uninterrupted, tmp_path
):
    batch = batches(uninterrupted, round=2)[1]
    train_with(failing_hosts.KillsItsHost, device_id=_new_in_round_2(uninterrupted, batch), once=tmp_path / "killed")
    directory = run_on_hosts(2)
    assert (tmp_path / "killed").exists()
    assert_same_bits(uninterrupted, directory)
    (event,) = events(directory, "host_lost")
    assert event["device_ids"] == batch and event["batch"] == 1 and event["error"]


def test_a_batch_that_ends_two_hosts_stops_the_run_and_names_its_devices(
    run_on_hosts, train_with, uninterrupted, tmp_path
):
    batch = batches(uninterrupted, round=2)[1]
    train_with(failing_hosts.KillsItsHost, device_id=_new_in_round_2(uninterrupted, batch), once=None)
    with pytest.raises(HostLostError) as caught:
        run_on_hosts(1)
    assert str(batch) in str(caught.value) and "\n" not in str(caught.value)
    assert [event["device_ids"] for event in events(tmp_path / "run", "host_lost")] == [batch, batch]
    assert [path.name for path in sorted((tmp_path / "run" / "rounds").iterdir())] == ["00001.parquet"]


def test_an_error_in_training_code_is_raised_as_it_is_and_no_host_is_lost(
    run_on_hosts, train_with, uninterrupted, tmp_path
):
    device_id = batches(uninterrupted, round=1)[0][0]
    train_with(failing_hosts.Raises, device_id=device_id)
    with pytest.raises(OutOfPatience, match=f"device {device_id} took too long") as caught:
        run_on_hosts(1)
    shown = "".join(traceback.format_exception(caught.value))
    assert "failing_hosts.py" in shown and "in lose_patience" in shown
    assert not events(tmp_path / "run", "host_lost")


def _new_in_round_2(directory: Path, batch: list[int]) -> int:
    """A device of the batch that round 1 did not train, so that the kill is in round 2."""
    before = {device_id for ids in batches(directory, round=1) for device_id in ids}
    return next(device_id for device_id in batch if device_id not in before)
