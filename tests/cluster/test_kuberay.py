"""The manifests for KubeRay: valid by its own schemas, and what no schema says.

The schemas are KubeRay's custom resource definitions. They are not ours to ship: the tests read them from the directory
$KUBERAY_CRDS, which has `ray.io_rayjobs.yaml` and `ray.io_rayclusters.yaml` (or these, gzipped) of the folder
`helm-chart/kuberay-operator/crds` of https://github.com/ray-project/kuberay, and skip where it is not set.
"""

from __future__ import annotations

import gzip
import json
import os
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.scripts.scripts import start as ray_start

from fedpeat_ray.command_line import parsed
from fedpeat_ray.config import SimulationConfig

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
Manifest = dict[str, Any]


def read(text: str) -> Manifest:
    """A manifest or a schema; by the parser in C, as these are long."""
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


MANIFESTS = {path.stem: read(path.read_text()) for path in sorted((ROOT / "cluster/kuberay").glob("*.yaml"))}
OF_RAY = [name for name, manifest in MANIFESTS.items() if manifest["apiVersion"] == "ray.io/v1"]
JOBS = [name for name in OF_RAY if MANIFESTS[name]["kind"] == "RayJob"]


def closed(schema: Any) -> Any:
    """The schema with unknown fields as errors, as `kubectl apply` has it."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    open_to_all = schema.get("x-kubernetes-preserve-unknown-fields")
    unknown = {"additionalProperties": False} if "properties" in schema and not open_to_all else {}
    return unknown | {key: closed(value) for key, value in schema.items()}


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """The strict schema of every kind."""
    if "KUBERAY_CRDS" not in os.environ:
        pytest.skip("KUBERAY_CRDS is not set: the folder of KubeRay's ray.io_rayjobs.yaml and ray.io_rayclusters.yaml")
    found = {}
    for path in sorted(Path(os.environ["KUBERAY_CRDS"]).glob("ray.io_ray*s.yaml*")):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        definition = read(data.decode())["spec"]
        [version] = [version for version in definition["versions"] if version["name"] == "v1"]
        schema = closed(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}  # the server's own
        found[definition["names"]["kind"]] = schema
    return found


def problems(manifest: Manifest, schemas: dict[str, Any]) -> list[str]:
    """What its schema has against a manifest, and where."""
    errors = jsonschema.Draft202012Validator(schemas[manifest["kind"]]).iter_errors(manifest)
    return sorted(f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors)


@pytest.mark.parametrize("name", OF_RAY)
def test_manifests_fit_the_strict_schemas_of_kuberay(name, schemas):
    assert problems(MANIFESTS[name], schemas) == []


def misspelt(job: Manifest) -> None:
    job["spec"]["shutdownAfterJobFinish"] = job["spec"].pop("shutdownAfterJobFinishes")


def no_number(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] = "three"


def nameless(job: Manifest) -> None:
    del job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]


def no_unit(job: Manifest) -> None:
    hosts = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    hosts["resources"]["limits"]["memory"] = "8GiB"


def no_mode(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "password"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (misspelt, "spec: Additional properties are not allowed ('shutdownAfterJobFinish' was unexpected)"),
        (no_number, "spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas: 'three' is not of type 'integer'"),
        (nameless, "spec.rayClusterSpec.workerGroupSpecs.0: 'groupName' is a required property"),
        (no_unit, "containers.0.resources.limits.memory: '8GiB' does not match"),
        (no_mode, "spec.rayClusterSpec.authOptions.mode: 'password' is not one of ['disabled', 'token']"),
    ],
)
def test_broken_manifests_are_found(spoil: Callable[[Manifest], None], expected: str, schemas: dict[str, Any]):
    job = json.loads(json.dumps(MANIFESTS["rayjob_cpu"]))  # what anchors share becomes several
    spoil(job)
    [problem] = problems(job, schemas)
    assert expected in problem


def test_manifests_of_kubernetes_fit_its_strict_schemas():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    volume = MANIFESTS["runs_volume"]
    assert set(MANIFESTS) - set(OF_RAY) == {"runs_volume"}
    kubernetes_validate.validate(volume, kubernetes_validate.latest_version(), strict=True)
    wrong = volume | {"spec": volume["spec"] | {"accessMode": ["ReadWriteMany"]}}
    with pytest.raises(kubernetes_validate.ValidationError, match="accessMode"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def cluster(name: str) -> Manifest:
    """The part about the cluster."""
    spec = MANIFESTS[name]["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> Iterator[Manifest]:
    """Every pod of a manifest: head, hosts, and who submits the job."""
    yield cluster(name)["headGroupSpec"]["template"]["spec"]
    for group in cluster(name)["workerGroupSpecs"]:
        yield group["template"]["spec"]
    if name in JOBS:
        yield MANIFESTS[name]["spec"]["submitterPodTemplate"]["spec"]


@pytest.mark.parametrize("name", OF_RAY)
def test_versions_are_those_of_the_project(name):
    assert cluster(name)["rayVersion"] == ray.__version__
    tag = f"{VERSION}-cuda" if name.endswith("_gpu") else VERSION
    assert {pod["containers"][0]["image"] for pod in pods(name)} == {f"fedpeat-ray:{tag}"}


@pytest.mark.parametrize("name", OF_RAY)
def test_volumes_are_mounted_where_runs_go(name):
    for pod in pods(name):
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
    head = next(pods(name))
    [container], [volume] = head["containers"], head["volumes"]
    assert container["env"] == [{"name": "FEDPEAT_RUNS", "value": container["volumeMounts"][0]["mountPath"]}]
    assert volume["persistentVolumeClaim"]["claimName"] == MANIFESTS["runs_volume"]["metadata"]["name"]


@pytest.mark.parametrize("name", OF_RAY)
def test_pods_get_what_they_ask_for_and_no_more_rights_than_they_need(name):
    contexts = [container["securityContext"] for pod in pods(name) for container in pod["containers"]]
    for context in [*contexts, cluster(name)["autoscalerOptions"]["securityContext"]]:
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for pod in pods(name):
        user = pod["securityContext"]
        assert user["runAsNonRoot"] and user["seccompProfile"] == {"type": "RuntimeDefault"}
        assert f"USER {user['runAsUser']}:{user['runAsGroup']}" in (ROOT / "cluster/image/Dockerfile").read_text()
        assert user["fsGroup"] == user["runAsGroup"]
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
    head, *others = pods(name)
    assert "automountServiceAccountToken" not in head  # the autoscaler needs it
    assert not any(pod["automountServiceAccountToken"] for pod in others)


@pytest.mark.parametrize("name", OF_RAY)
def test_ray_is_started_with_options_it_has_and_scales_between_bounds(name):
    options = {option for parameter in ray_start.params for option in parameter.opts}
    for group in (cluster(name)["headGroupSpec"], *cluster(name)["workerGroupSpecs"]):
        assert {f"--{key}" for key in group["rayStartParams"]} <= options
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in cluster(name)["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == (name in JOBS)
        assert group["replicas"] < group["maxReplicas"]


@pytest.mark.parametrize("name", JOBS)
def test_jobs_run_what_there_is_once_and_not_for_ever(name):
    spec = MANIFESTS[name]["spec"]
    python, script, *arguments = shlex.split(spec["entrypoint"])
    assert python == "python" and (ROOT / script).exists()
    config = parsed(SimulationConfig, arguments)
    config.validate()
    [hosts] = cluster(name)["workerGroupSpecs"]
    limits = hosts["template"]["spec"]["containers"][0]["resources"]["limits"]
    a_pod = limits["nvidia.com/gpu"] if config.hosts.num_gpus else limits["cpu"]
    assert config.hosts.max_hosts == hosts["maxReplicas"] * int(a_pod)
    modes = {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}  # any word to the schema
    assert spec["submissionMode"] in modes
    assert spec["shutdownAfterJobFinishes"] and spec["activeDeadlineSeconds"] > 0 and spec["backoffLimit"] == 0
