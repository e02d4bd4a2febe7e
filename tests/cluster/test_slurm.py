"""Both batch scripts, under a real Slurm of two nodes."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from machines import Machine, need, wait_until
from tiny_runs import REPOSITORY
from whole_runs import assert_same_bits

pytestmark = pytest.mark.cluster

SCRIPTS = [REPOSITORY / "cluster" / "slurm" / f"{name}.sbatch" for name in ("symmetric", "head_and_workers")]

CONFIGURATION = """
ClusterName=desk
SlurmctldHost=n1(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName=n[1-2] NodeAddr=10.77.0.[1-2] CPUs=1 RealMemory=8000 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES
"""
"""No cgroups, which would end all that a job leaves behind: our scripts have to."""


@dataclass(frozen=True)
class Slurm:
    """A Slurm whose controller is on the first machine."""

    machines: tuple[Machine, Machine]
    environment: dict[str, str]
    daemons: tuple[set[tuple[int, str]], ...] = ()

    def says(self, *words: object, folder: Path = Path("/")) -> str:
        """What one of its commands says."""
        return self.machines[0].run(*words, folder=folder, environment=self.environment)

    def submit(self, folder: Path, *words: object) -> Job:
        """A job from a folder that has what it needs of a checkout."""
        if not folder.exists():
            folder.mkdir()
            (folder / "workloads").symlink_to(REPOSITORY / "workloads")
        return Job(self, self.says("sbatch", "--parsable", *words, folder=folder).strip(), folder)

    def nothing_else_runs(self) -> bool:
        """Whether its nodes have no process but its daemons."""
        return all(machine.processes() == own for machine, own in zip(self.machines, self.daemons, strict=True))


@dataclass(frozen=True)
class Job:
    """One that was submitted."""

    slurm: Slurm
    number: str
    folder: Path

    def fact(self, name: str) -> str:
        """What Slurm knows of it by this name."""
        found = re.search(rf"\b{name}=(\S+)", self.slurm.says("scontrol", "show", "job", self.number))
        assert found
        return found[1]

    def end(self) -> str:
        """Wait for it; its status, and the signal that ended it."""
        under_way = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
        wait_until(lambda: self.fact("JobState") not in under_way, f"the end of job {self.number}", 300)
        return self.fact("ExitCode")

    def said(self) -> str:
        """Its output so far."""
        out = self.folder / f"fedpeat-{self.number}.out"
        return out.read_text() if out.exists() else ""

    def wait_for(self, said: str) -> None:
        """Wait until it said this."""
        wait_until(lambda: said in self.said() or self.fact("JobState") == "FAILED", f"job {self.number}: {said}", 300)
        assert said in self.said(), self.said()


@pytest.fixture(scope="module")
def slurm(machines: tuple[Machine, Machine], folder: Path, environment: dict[str, str]) -> Slurm:
    need("slurmctld", "slurmd", "munged", "sbatch")
    folder.chmod(0o755)  # munged wants its socket within everybody's reach
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "state").mkdir()
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    slurm = Slurm(machines, {**environment, "SLURM_CONF": str(folder / "slurm.conf")})

    def start(machine: Machine, *words: str) -> None:
        machine.start(folder / f"{words[0]}.{machine.name}.log", *words, environment=slurm.environment)

    files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
    start(machines[0], "munged", "--foreground", f"--socket={folder}/munge.sock", *files)
    wait_until((folder / "munge.sock").exists, "munged")
    start(machines[0], "slurmctld", "-D")
    wait_until(lambda: "UP" in slurm.says("sh", "-c", "scontrol ping || true"), "slurmctld")
    for machine in machines:
        start(machine, "slurmd", "-D", "-N", machine.name)
    wait_until(lambda: slurm.says("sinfo", "--noheader", "--format=%D %T") == "2 idle\n", "two nodes")
    return replace(slurm, daemons=tuple(machine.processes() for machine in machines))


ON_RAY = ("--hosts.backend", "ray", "--hosts.num-gpus", 0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_on_two_nodes_uses_both_and_gives_the_bits_of_a_run_here(
    script, slurm, tiny_arguments, uninterrupted, tmp_path
):
    folder = tmp_path / "checkout"
    job = slurm.submit(folder, "--gpus-per-node=1", script, *tiny_arguments(*ON_RAY))
    assert job.end() == "0:0", job.said()
    assert re.search(r"^Ray at 10.77.0.1:6379: nodes 2, CPUs 2, GPUs 2$", job.said(), re.M)
    (directory,) = (folder / "runs").iterdir()
    assert json.loads((directory / "config.json").read_text())["resolved"]["num_hosts"] == 2  # of a core: one a node
    assert_same_bits(uninterrupted, directory)
    wait_until(slurm.nothing_else_runs, "the end of all processes")


def test_the_status_of_a_run_is_that_of_its_job(slurm, tmp_path):
    wrong = ("--cohort-size", 5, "--fleet.num-devices", 4)
    jobs = [slurm.submit(tmp_path / script.stem, "--nodes=1", script, *wrong) for script in SCRIPTS]
    for job in jobs:
        assert job.end() == "2:0", job.said()
        assert "error: cohort_size = 5 is not allowed: at most fleet.num_devices = 4" in job.said()


def test_a_run_that_is_told_to_stop_says_how_to_go_on(slurm, tiny_arguments, tmp_path):
    endless = tiny_arguments(*ON_RAY, "--rounds", 100_000)
    jobs = [slurm.submit(tmp_path / script.stem, "--nodes=1", script, *endless) for script in SCRIPTS]
    for job in jobs:
        job.wait_for("2/100000")
        slurm.says("scancel", "--batch", "--signal=TERM", job.number)  # as Slurm does before the time is up
    for job in jobs:
        assert job.end() == "143:0", job.said()
        (directory,) = (job.folder / "runs").iterdir()
        assert f"go on with: python workloads/large_scale.py --resume {directory}\n" in job.said()
    wait_until(slurm.nothing_else_runs, "the end of all processes")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_is_cancelled_leaves_no_process_on_either_node(script, slurm, tiny_arguments, tmp_path):
    job = slurm.submit(tmp_path / "checkout", script, *tiny_arguments(*ON_RAY, "--rounds", 100_000))
    job.wait_for("2/100000")
    assert all(machine.processes() > own for machine, own in zip(slurm.machines, slurm.daemons, strict=True))
    slurm.says("scancel", job.number)
    job.end()
    assert job.fact("JobState") == "CANCELLED"
    wait_until(slurm.nothing_else_runs, "the end of all processes")
