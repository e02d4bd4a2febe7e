"""Tasks on Ray: the bits of a serial run."""

from __future__ import annotations

from pathlib import Path

import pytest
from task_models import CASES, MODELS, tiny_task, write_family_for_tasks
from whole_runs import assert_same_bits

from fedpeat_ray import Simulation
from fedpeat_ray.config import HostsConfig
from fedpeat_ray.runtime.host_pool import HostPool

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize("case", ["roberta", pytest.param("roberta masked", marks=pytest.mark.full), "t5", "vit"])
def test_two_hosts_give_the_bits_of_a_serial_run(case: str, pool: HostPool, tmp_path: Path):
    family, _ = CASES[case]
    assert family in MODELS
    families = {family: write_family_for_tasks(tmp_path / family, family)}
    serial = tiny_task(families, case, "float32", rounds=2, out=tmp_path / "serial")
    hosts = HostsConfig("ray", num_hosts=2)
    Simulation(serial).run()
    Simulation(tiny_task(families, case, "float32", rounds=2, hosts=hosts, out=tmp_path / "ray")).run(pool)
    assert_same_bits(tmp_path / "serial", tmp_path / "ray")
