"""A fleet is arrays, not objects: a million devices are no more work than the cohort."""

from __future__ import annotations

from tiny_runs import parse
from whole_runs import summary, table

from fedpeat_ray import Simulation


def test_a_million_devices_can_be_simulated(tiny_arguments, tmp_path):
    size = ("--fleet.num-devices", 1_000_000, "--cohort-size", 8, "--rounds", 2)
    Simulation(parse(tiny_arguments("--out", tmp_path / "run", *size))).run()
    device_ids = table(tmp_path / "run", "clients")["device_id"].tolist()
    assert max(device_ids) > 100_000
    assert summary(tmp_path / "run")["num_completed"] == 16
