"""Which Ray a run is on: it is said, and an address of none is refused at once."""

from __future__ import annotations

import socket

import pytest
import ray

from fedpeat_ray.errors import ConfigError
from fedpeat_ray.runtime import host_pool


def test_which_ray_it_is_is_said_and_which_it_is_not(monkeypatch, pool):
    used = ray.get_runtime_context().gcs_address
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = f"127.0.0.1:{server.getsockname()[1]}"
        for written, more in ((None, ""), (used, ""), (other, f"; not the cluster at {other}, which")):
            monkeypatch.setattr(host_pool, "read_ray_address", lambda written=written: written)
            line = pool.about
            assert line.startswith(f"Ray at {used}: nodes 1, CPUs ") and ("; not" in line) == bool(more)
            assert more in line
    assert "; not" not in pool.about, "a cluster that is gone"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_an_address_where_nothing_answers_is_refused(address):
    with pytest.raises(ConfigError, match=f"hosts.address = '{address}' .*; nothing answers there"):
        host_pool.start_or_join(1, address)
