"""Nodes of clusters that tests start with `ray start`, and end."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from processes import below, living

RAY = str(Path(sys.executable).parent / "ray")


def environment_with_token(folder: Path) -> dict[str, str]:
    """Of a cluster and of those who use it: one token, kept in the folder, and this Python."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@contextlib.contextmanager
def head(
    environment: dict[str, str], folder: Path, *arguments: str, port: int | None = None
) -> Iterator[tuple[str, str]]:
    """The first node, with its files in a folder of a short name; gives the addresses of Ray and of the dashboard."""
    gcs, dashboard, client = free_ports(3)
    gcs = port or gcs
    command = [
        *(RAY, "start", "--head", f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", f"--port={gcs}"),
        *(f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", *arguments),
    ]
    with _node(command, environment, folder):
        yield f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"


@contextlib.contextmanager
def node(
    environment: dict[str, str], address: str, folder: Path, *arguments: str, hidden: Path | None = None
) -> Iterator[int]:
    """One more node, for which the hidden folder is an empty one of its own; gives its process id."""
    mount = f'mount -t tmpfs tmpfs "{hidden}" && exec "$@"'
    alone = ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh") if hidden else ()
    command = [*alone, RAY, "start", f"--address={address}", *arguments]
    with _node(command, environment, folder) as process_id:
        yield process_id


@contextlib.contextmanager
def _node(command: Sequence[str], environment: dict[str, str], folder: Path) -> Iterator[int]:
    agent, agent_rpc, metrics = free_ports(3)
    common = [
        *("--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_rpc}"),
        *(f"--metrics-export-port={metrics}", f"--object-store-memory={128 * 2**20}"),
    ]
    process = subprocess.Popen(
        [*command, *common], env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("".join(said))
        yield process.pid
    finally:
        started = below(process.pid)
        process.send_signal(signal.SIGTERM)  # it ends what it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        left = living(started, timeout_s=30)
        for each in left:
            os.kill(each.process_id, signal.SIGKILL)
        process.kill()
        assert not left, "ray start left processes behind"


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on just now, among those that neither the system nor Ray gives away by itself."""
    free: list[int] = []
    while len(free) < number:
        port = random.SystemRandom().randrange(
            20_000, 32_768
        )  # Ray's workers have those below, the system's own is above
        with socket.socket() as each, contextlib.suppress(OSError):
            each.bind(("127.0.0.1", port))
            free += [port] if port not in free else []
    return free
