"""A Ray that a run starts itself is nobody else's."""

from __future__ import annotations

from pathlib import Path

import psutil
from processes import forked


def listening() -> int:
    """Print where a Ray of its own listens."""
    import ray

    from fedpeat_ray.runtime.host_pool import some_ray

    with some_ray(1):
        ray.get(ray.remote(lambda: None).remote())
        for process in psutil.Process().children(recursive=True):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    print(process.name(), connection.laddr.ip, flush=True)
    return 0


def test_a_ray_of_ones_own_listens_on_the_loopback_address_alone(tmp_path: Path):
    said = tmp_path / "said"
    assert forked(said, tmp_path / "error", listening) == 0
    lines = [line.split(" ", 1) for line in said.read_text().splitlines()]
    assert {"gcs_server", "raylet"} <= {name for name, _ in lines}
    assert {address.removeprefix("::ffff:") for _, address in lines} == {"127.0.0.1"}
