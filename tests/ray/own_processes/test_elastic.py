"""Hosts follow the cluster: nodes that come and go change nothing but the time a run takes. A lost head ends it."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import failing_hosts
import pytest
from clusters import environment_with_token, free_ports, head, node
from processes import forked
from tiny_runs import batches, main_at
from whole_runs import assert_same_bits, events

from fedpeat_ray.runtime.head_watch import STATUS
from workloads.large_scale import main

pytestmark = pytest.mark.cluster


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of a short name, as Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:
        yield Path(name)


def run_with(
    train: type, values: dict[str, object], folder: Path, environment: dict[str, str], words: list[str]
) -> int:
    """The status of large_scale.py with another training, one of failing_hosts."""
    from fedpeat_ray.training import adapters

    adapters.TrainClientBatch = functools.partial(train, **values)  # type: ignore[misc,assignment]
    return main_at(folder, environment, words)


def later_devices(directory: Path) -> tuple[int, ...]:
    """Those that train, but not in the first round."""
    ids = [{device_id for batch in batches(directory, round) for device_id in batch} for round in range(1, 5)]
    return tuple(set().union(*ids[1:]) - ids[0])


def test_a_node_that_is_gone_for_good_is_not_waited_for(tiny_arguments, uninterrupted, folder, tmp_path):
    environment, said = environment_with_token(folder), tmp_path / "said"
    with (
        head(environment, folder, "--num-cpus=1", "--include-dashboard=false") as (address, _),
        node(environment, address, folder, "--num-cpus=1"),
    ):
        words = tiny_arguments("--out", tmp_path / "run", "--hosts.backend", "ray", "--hosts.address", address)
        values = {"devices": later_devices(uninterrupted), "head": False}
        status = forked(said, said, run_with, failing_hosts.EndsItsNode, values, tmp_path, environment, words)
    assert status == 0, said.read_text()
    assert_same_bits(uninterrupted, tmp_path / "run")
    (lost,) = events(tmp_path / "run", "host_lost")
    assert lost["with_node"] and lost["num_hosts"] == 1
    assert len({event["node"] for event in events(tmp_path / "run", "host_joined")}) == 2


def test_a_lost_head_ends_the_run_with_one_line_and_it_goes_on_elsewhere(
    tiny_arguments, uninterrupted, folder, tmp_path
):
    environment, out, said = environment_with_token(folder), tmp_path / "out", tmp_path / "said"
    environment |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "4"}
    with head(environment, folder, "--num-cpus=1", "--include-dashboard=false") as (address, _):
        words = tiny_arguments("--out", tmp_path / "run", "--hosts.backend", "ray", "--hosts.address", address)
        values = {"devices": later_devices(uninterrupted), "head": True}
        status = forked(out, said, run_with, failing_hosts.EndsItsNode, values, tmp_path, environment, words)
    assert status == STATUS, said.read_text()
    (line,) = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert "the head of Ray at" in line and "go on with: python workloads/large_scale.py --resume" in line
    assert main(["--resume", str(tmp_path / "run"), "--hosts.backend", "serial"]) == 0
    assert_same_bits(uninterrupted, tmp_path / "run")


AUTOSCALED = {
    "cluster_name": "test",
    "max_workers": 2,
    "upscaling_speed": 10.0,
    "idle_timeout_minutes": 0.05,
    "auth": {},
    "docker": {},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "host": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node": {},
    "worker_nodes": {},
    **{name: [] for name in ("initialization_commands", "setup_commands", "head_setup_commands")},
    **{name: [] for name in ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
}


def wait_until_alone(environment: dict[str, str], address: str) -> int:
    """0 once the cluster has one node."""
    os.environ.update(environment)
    import ray

    ray.init(address=address, log_to_driver=False)
    while sum(each["Alive"] for each in ray.nodes()) > 1:
        ray.wait([ray.put(0)], num_returns=1, timeout=0.1)
    return 0


def test_an_autoscaler_brings_the_nodes_that_a_round_has_work_for_and_takes_them_back(
    tiny_arguments, uninterrupted, folder, tmp_path
):
    environment, said = environment_with_token(folder), tmp_path / "said"
    later = {device_id for round in (2, 3, 4) for batch in batches(uninterrupted, round) for device_id in batch}
    head_id, (port,) = "f" * 51 + "00000", free_ports(1)
    provider = {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True}
    provider |= {"disable_launch_config_check": True, "gcs_address": f"127.0.0.1:{port}", "head_node_id": head_id}
    (folder / "autoscaled.json").write_text(json.dumps(AUTOSCALED | {"provider": provider}))
    autoscaler = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "0"}
    devices = tuple(next(each for each in batch if each not in later) for batch in batches(uninterrupted, round=1))
    pipes = tuple(tmp_path / f"pipe {number}" for number in range(len(devices) - 1))
    for pipe in pipes:
        os.mkfifo(pipe)
    with head(
        environment | autoscaler | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": head_id},
        folder,
        *("--num-cpus=1", "--include-dashboard=false", f"--autoscaling-config={folder}/autoscaled.json"),
        port=port,
    ) as (address, _):
        hosts = ("--hosts.backend", "ray", "--hosts.address", address, "--hosts.max-hosts", 3)
        values = {"devices": devices, "pipes": pipes}
        words = tiny_arguments("--out", tmp_path / "run", *hosts)
        status = forked(said, said, run_with, failing_hosts.OneAfterAnother, values, tmp_path, environment, words)
        assert status == 0, said.read_text()
        assert forked(said, said, wait_until_alone, environment, address) == 0
    assert_same_bits(uninterrupted, tmp_path / "run")
    assert len({event["node"] for event in events(tmp_path / "run", "host_joined")}) == 3
    assert not events(tmp_path / "run", "host_lost")
