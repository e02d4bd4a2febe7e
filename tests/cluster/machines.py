"""Two pretend machines on this one: Linux namespaces, each with processes, a network, mounts and a name of its own.

Much of Ray and Slurm is a whole machine's: `ray stop` ends every Ray it sees, `ray start` writes down its address in
/tmp/ray, daemons listen on fixed ports. Here each of two has its own, and what is started there cannot outlive it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

NAMESPACES = ("--pid", "--net", "--mount", "--uts")

# The shell stays the first process: it reaps what others leave, and ends, with all others, when its input does.
FIRST_PROCESS = """set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mkdir -p -m 777 /tmp/ray "$2/$1"
mount --bind "$2/$1" /tmp/ray
mount -t tmpfs tmpfs /dev/shm
echo there
read -r
"""


@dataclass(frozen=True)
class Machine:
    """One of the two."""

    name: str
    address: str
    process_id: int
    """Of its first process, as seen from outside."""

    def command(self, *words: object, folder: Path = Path("/")) -> list[str]:
        """The command line that runs a command there, in a folder, with this environment."""
        enter = ("nsenter", f"--target={self.process_id}", *NAMESPACES, f"--wdns={folder}")
        return [*enter, *map(str, words)]

    def run(self, *words: object, folder: Path = Path("/"), environment: dict[str, str] | None = None) -> str:
        """What a command there says; fails the test if its status is not 0."""
        command = self.command(*words, folder=folder)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{words} on {self.name}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, out: Path, *words: object, environment: dict[str, str] | None = None) -> None:
        """A command that runs on until the machine ends, with its output in a file."""
        with out.open("ab") as file:
            subprocess.Popen(self.command(*words), env=environment, stdout=file, stderr=file)

    def listens(self, port: int) -> bool:
        """Whether somebody there listens on a port."""
        return bool(self.run("ss", "--listening", "--tcp", "--numeric", "--no-header", f"sport = :{port}"))

    def processes(self) -> set[tuple[int, str]]:
        """All that run there, but the first."""
        there, found = Path(f"/proc/{self.process_id}/ns/pid").readlink(), set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                if process.pid != self.process_id and Path(f"/proc/{process.pid}/ns/pid").readlink() == there:
                    found.add((process.pid, process.name()))
        return found


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """n1 at 10.77.0.1 and n2 at 10.77.0.2, joined by a cable; they share this machine's files, but for /tmp/ray (in
    `folder`) and /dev/shm. At the end all that runs on them is killed. Skips the test where they cannot be made."""
    need("unshare", "nsenter", "ip", "hostname")
    if os.geteuid() != 0:
        pytest.skip("pretend machines want root")
    names = {f"n{number}": f"10.77.0.{number}" for number in (1, 2)}
    hosts = {"localhost": "127.0.0.1", **names}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
    with contextlib.ExitStack() as stack:
        outside = [stack.enter_context(_first_process(name, folder)) for name in names]
        ends = [f"eth0 netns {each.pid}" for each in outside]
        subprocess.run(f"ip link add {ends[0]} type veth peer name {ends[1]}".split(), check=True)
        machines = []
        for (name, address), each in zip(names.items(), outside, strict=True):
            (inside,) = psutil.Process(each.pid).children()
            machine = Machine(name, address, inside.pid)
            machine.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                machine.run("ip", "link", "set", device, "up")
            machines.append(machine)
        first, second = machines
        yield first, second


@contextlib.contextmanager
def _first_process(name: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = ["unshare", "--fork", "--kill-child", *NAMESPACES, "--mount-proc"]
    command += ["bash", "-c", FIRST_PROCESS, "first", name, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        said = process.stdout.readline()
        if said != "there\n":
            pytest.skip(f"this system makes no pretend machines: {said}")
        yield process
        # its input ends, and so does all of it


def need(*programs: str) -> None:
    """Skips the test if one of them is not installed."""
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 60) -> None:
    """Until it holds; fails the test after this time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s:g} s not yet: {what}"
        time.sleep(0.2)
