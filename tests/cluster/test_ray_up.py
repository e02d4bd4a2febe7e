"""`ray up` of laboratory.yaml over ssh, from the second machine: the first becomes the head, the second a worker."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from machines import Machine, need, wait_until
from tiny_runs import REPOSITORY
from whole_runs import assert_same_bits

pytestmark = pytest.mark.cluster


@dataclass(frozen=True)
class Laboratory:
    """Two machines that let one another in by ssh, and a file of their cluster."""

    machines: tuple[Machine, Machine]
    file: Path
    environment: dict[str, str]
    """Of who types on the second machine."""

    def says(self, *words: object, folder: Path = Path("/")) -> str:
        """What a command there says."""
        return self.machines[1].run(*words, folder=folder, environment=self.environment)

    def running(self) -> set[str]:
        """Names of processes on both, but for those of ssh."""
        names = {name for machine in self.machines for _, name in machine.processes()}
        return {name for name in names if name not in ("sshd", "ssh", "sshd-session")}


@pytest.fixture
def laboratory(machines: tuple[Machine, Machine], folder: Path, environment: dict[str, str]) -> Iterator[Laboratory]:
    need("sshd", "ssh", "ssh-keygen", "rsync", "ss", "pkill")
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    sshd = shutil.which("sshd", path=environment["PATH"])
    for machine in machines:
        home = folder / f"home.{machine.name}"
        home.mkdir()
        exported = ("PATH", "PYTHONPATH", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "RAY_prestart_worker_first_driver")
        (home / ".bashrc").write_text("".join(f"export {name}={environment[name]}\n" for name in exported))
        options = {
            "ListenAddress": machine.address,
            "HostKey": folder / "host",
            "AuthorizedKeysFile": folder / "key.pub",
            "PermitRootLogin": "yes",
            "PasswordAuthentication": "no",
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
        }
        passwd = folder / f"passwd.{machine.name}"
        users = Path("/etc/passwd").read_text()
        passwd.write_text(re.sub(r"^(root:.*):[^:]*:[^:]*$", rf"\1:{home}:/bin/bash", users, flags=re.M))
        machine.run("mount", "--bind", passwd, "/etc/passwd")
        machine.run("sh", "-c", "mount -t tmpfs tmpfs /run && mkdir /run/sshd")
        words = [f"-o{name}={value}" for name, value in options.items()]
        machine.start(folder / f"sshd.{machine.name}", sshd, "-D", "-e", "-f", "/dev/null", *words)
    # that the head is gone a worker notices after this time; by default after a minute
    with (folder / "home.n2/.bashrc").open("a") as file:
        file.write("export RAY_gcs_rpc_server_reconnect_timeout_s=5\n")

    config = yaml.safe_load((REPOSITORY / "cluster/ray_up/laboratory.yaml").read_text())
    config["cluster_name"] = folder.name
    config["provider"] |= {"head_ip": machines[0].address, "worker_ips": [machines[1].address]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    del config["file_mounts"]["~/wheels"]  # all share this Python
    config["setup_commands"] = [
        words for words in config["setup_commands"] if "pip" not in words and "venv" not in words
    ]
    for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[kind] = [words.replace("ray start", "ray start --num-cpus=1") for words in config[kind]]
    (folder / "laboratory.yaml").write_text(yaml.safe_dump(config))
    (folder / "home.user").mkdir()
    own = {**environment, "HOME": str(folder / "home.user"), "RAY_AUTH_MODE": "token"}
    yield Laboratory(machines, folder / "laboratory.yaml", own)
    user, cluster = (hashlib.sha256(name.encode()).hexdigest()[:10] for name in (getpass.getuser(), folder.name))
    sockets = Path(f"/tmp/ray_ssh_{user}")  # of ssh, which Ray leaves there
    shutil.rmtree(sockets / cluster, ignore_errors=True)
    with contextlib.suppress(OSError):  # others' are there
        sockets.rmdir()


def test_ray_up_makes_a_cluster_of_two_whose_jobs_give_the_bits_of_a_run_here(
    laboratory, folder, tiny_arguments, uninterrupted, tmp_path
):
    laboratory.says("ray", "get-auth-token", "--generate")
    laboratory.says("ray", "up", "--yes", "--no-config-cache", laboratory.file)
    status = ("ray", "exec", laboratory.file, "RAY_AUTH_MODE=token ray status")
    wait_until(lambda: "2 local.cluster.node" in laboratory.says(*status), "two nodes", 180)
    tokens = [folder / f"home.{name}/.ray/auth_token" for name in ("user", "n1", "n2")]
    assert len({token.read_text() for token in tokens}) == 1
    assert all(token.stat().st_mode & 0o077 == 0 for token in tokens[1:])

    here = laboratory.machines[1]
    here.start(folder / "dashboard.log", "ray", "dashboard", laboratory.file, environment=laboratory.environment)
    wait_until(lambda: here.listens(8265), "the way to the dashboard")
    shutil.copytree(REPOSITORY / "workloads", tmp_path / "checkout/workloads")
    runtime_env = json.dumps({"env_vars": {"FEDPEAT_RUNS": str(tmp_path / "runs")}})
    on_both = tiny_arguments("--hosts.backend", "ray", "--hosts.num-hosts", 2)  # a host is a core, and so is a node
    said = laboratory.says(
        *("ray", "job", "submit", "--working-dir", ".", "--runtime-env-json", runtime_env),
        *("--", "python", "workloads/large_scale.py", *on_both),
        folder=tmp_path / "checkout",
    )
    assert "Ray at 10.77.0.1:6379: nodes 2, CPUs 2, GPUs 0" in said
    (directory,) = (tmp_path / "runs").iterdir()
    assert_same_bits(uninterrupted, directory)

    here.run("pkill", "--full", "^ssh -tt -L 8265")  # as Ctrl-C would
    laboratory.says("ray", "down", "--yes", laboratory.file)
    wait_until(lambda: not laboratory.running(), "the end of all processes")
