"""The files for `ray up`, held to what Ray and EC2 take; nothing is started, nobody is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from tiny_runs import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
LABORATORY, AWS = (CLUSTER / "ray_up" / f"{name}.yaml" for name in ("laboratory", "aws"))


def read(path: Path) -> dict[str, Any]:
    """One of the files for `ray up`."""
    return yaml.safe_load(path.read_text())


def check(config: dict[str, Any]) -> None:
    """What `ray up` checks before it starts anything."""
    validate_config(prepare_config(config))


@pytest.mark.parametrize("path", [LABORATORY, AWS], ids=lambda path: path.name)
def test_ray_up_understands_the_file(path):
    check(read(path))


@pytest.mark.parametrize("path", [LABORATORY, AWS], ids=lambda path: path.name)
def test_the_cluster_asks_for_a_token_and_has_the_autoscaler_that_was_tried(path):
    config = read(path)
    (head,) = (command for command in config["head_start_ray_commands"] if "ray start" in command)
    (worker,) = (command for command in config["worker_start_ray_commands"] if "ray start" in command)
    assert "RAY_AUTH_MODE=token" in head and "RAY_AUTH_MODE=token" in worker
    assert "RAY_enable_autoscaler_v2=0" in head
    assert "~/.ray/auth_token" in config["file_mounts"]


def rename(*path: str) -> Callable[[dict[str, Any]], None]:
    """Spells the last of these keys wrongly."""

    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1] + "s"] = config.pop(path[-1])

    return change


def put(value: object, *path: str) -> Callable[[dict[str, Any]], None]:
    """Puts a value where these keys lead."""

    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "breaks"),
    [
        (LABORATORY, rename("auth")),
        (LABORATORY, rename("provider", "worker_ips")),
        (LABORATORY, rename("provider", "head_ip")),
        (LABORATORY, put("ray stop", "head_start_ray_commands")),
        (LABORATORY, put({"InstanceType": "m7i.xlarge"}, "head_node")),
        (AWS, rename("provider", "type")),
        (AWS, put("eight", "max_workers")),
        (AWS, put("header", "head_node_type")),
        (AWS, rename("available_node_types", "hosts", "node_config")),
        (AWS, put(9, "available_node_types", "hosts", "min_workers")),
        (AWS, put("ray stop", "worker_start_ray_commands")),
    ],
)
def test_ray_up_does_not_understand_a_broken_one(path, breaks):
    config = read(path)
    breaks(config)
    with pytest.raises((jsonschema.ValidationError, click.ClickException, ValueError, KeyError)):
        check(config)


def refused_by_ec2(config: dict[str, Any]) -> str:
    """What the API that starts machines says of those of a file, by its description, which boto3 brings along."""
    session = pytest.importorskip("botocore.session", reason="botocore is not installed")
    from botocore.validate import ParamValidator

    ec2 = session.Session().get_service_model("ec2")
    said = []
    for kind in config["available_node_types"].values():
        wanted = {"MinCount": 1, "MaxCount": 1, **kind["node_config"]}
        said.append(
            ParamValidator().validate(wanted, ec2.operation_model("RunInstances").input_shape).generate_report()
        )
        if wanted["InstanceType"] not in ec2.shape_for("InstanceType").enum:
            said.append(f"no machine is called {wanted['InstanceType']}")
    return "".join(said)


def test_ec2_knows_the_machines_and_their_parameters():
    assert refused_by_ec2(read(AWS)) == ""


@pytest.mark.parametrize(
    "breaks",
    [
        rename("available_node_types", "hosts", "node_config", "InstanceMarketOptions"),
        put({"MarketTypes": "spot"}, "available_node_types", "hosts", "node_config", "InstanceMarketOptions"),
        put("g6.tiny", "available_node_types", "hosts", "node_config", "InstanceType"),
        put({"HttpTokens": True}, "available_node_types", "head", "node_config", "MetadataOptions"),
    ],
)
def test_ec2_does_not_know_broken_ones(breaks):
    config = read(AWS)
    breaks(config)
    assert refused_by_ec2(config)
