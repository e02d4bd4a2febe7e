"""A cluster of two nodes that share no disk: what work reads comes to the second through the object store."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_runs
from clusters import environment_with_token, head, node
from processes import forked
from tiny_runs import main_at, parse
from whole_runs import events, summary, table

from fedpeat_ray import Simulation

pytestmark = pytest.mark.cluster


@dataclass(frozen=True)
class Cluster:
    """A cluster of two nodes of a core each."""

    environment: dict[str, str]
    address: str
    second: int
    """Process of the second, which has an empty folder in place of all that this session writes."""

    def run(self, arguments: list[str], out: Path) -> None:
        """Run large_scale.py on the first node."""
        folder, said = out.parent, out.with_name("said")
        arguments = [*arguments, "--hosts.address", self.address, "--out", str(out)]
        status = forked(said, said, main_at, folder, self.environment, arguments, timeout_s=300)
        assert status == 0, said.read_text()
        if "--foundation.num-shards" not in arguments:  # otherwise shards come first
            assert f"Ray at {self.address}: nodes 2, CPUs 2, GPUs 0" in said.read_text()

    def files(self, directory: Path) -> dict[str, bytes]:
        """Of a directory on the second node."""
        seen = Path(f"/proc/{self.second}/root{directory}")
        return {path.name: path.read_bytes() for path in seen.iterdir()}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try_out = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", tmp_path_factory.mktemp("own")]
    if not shutil.which("unshare") or subprocess.run(try_out, capture_output=True).returncode:
        pytest.skip("this system gives no process a disk of its own (unshare --mount)")
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        environment = environment_with_token(folder)
        hidden = tmp_path_factory.getbasetemp()
        # shards take memory, and only the second node says that it has some
        with (
            head(environment, folder, "--num-cpus=1", "--memory=1", "--include-dashboard=false") as (address, _),
            node(environment, address, folder, "--num-cpus=1", f"--memory={2**30}", hidden=hidden) as second,
        ):
            yield Cluster(environment, address, second)


ON_BOTH = ("--hosts.backend", "ray", "--hosts.num-hosts", 2)


def same_as_in_this_process(
    cluster: Cluster, directory: Path, arguments: Callable[..., list[str]], *hosts: object
) -> None:
    """The run on the cluster, in directory/run, ends with the adapter of the run here, and nothing is lost."""
    cluster.run(arguments("--foundation.num-shards", 2, *hosts), directory / "run")
    Simulation(parse(arguments("--out", directory / "here"))).run()
    one, other = summary(directory / "here"), summary(directory / "run")
    assert one["adapter_sha256"] == other["adapter_sha256"]
    assert table(directory / "here", "clients").equals(table(directory / "run", "clients"))
    assert not events(directory / "run", "host_lost")


def test_realigned_emulators_come_to_every_node(cluster, deep_gpt2_dir, text_dir, public_dir, tmp_path):
    words = """--algorithm fed-peat --control.kind random --emulator.first 1 --emulator.last 1 --emulator.shares 0.2 0.6
        --emulator.realign-every 1 --emulator.realign-steps 2 --emulator.distil.steps 4 --emulator.distil.batch-size 2
        --emulator.distil.sequence-length 16 --rounds 2"""
    own = [*words.split(), "--data.public-name", public_dir]
    arguments = functools.partial(tiny_runs.arguments, deep_gpt2_dir, text_dir, *own)
    same_as_in_this_process(cluster, tmp_path, arguments, *ON_BOTH)
    here = {path.name: path.read_bytes() for path in (tmp_path / "run/emulators").iterdir()}
    assert cluster.files(tmp_path / "run/emulators") == here and len(here) == 2


def test_the_small_model_comes_to_the_shards_of_the_large_one(
    cluster, deep_llama_dir, gpt2_dir, text_dir, public_dir, tmp_path
):
    words = """--algorithm fed-pt --rounds 2 --proxy.steps 2 --proxy.batch-size 2 --proxy.sequence-length 24
        --foundation.dtype float32"""
    own = [*words.split(), "--proxy.small", gpt2_dir, "--data.public-name", public_dir]
    arguments = functools.partial(tiny_runs.arguments, deep_llama_dir, text_dir, *own)
    same_as_in_this_process(cluster, tmp_path, arguments)
