"""The documentation is held to the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.fleet.tiers import TIERS
from fedpeat_ray.settings import get

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_table_of_tiers_has_the_figures_of_the_code():
    rows = (ROOT / "docs/fleet.md").read_text().splitlines()
    for tier in TIERS:
        figures = (
            tier.share, tier.float32_flops_per_s / 1e9, tier.float16_flops_per_s / 1e9, tier.memory_cap_bytes / 2**20,
            tier.gpu_fraction, tier.downlink_bytes_per_s * 8e-6, tier.uplink_bytes_per_s * 8e-6,
            tier.compute_power_w, tier.radio_power_w,
        )  # fmt: skip
        row = f"| {tier.name} | {tier.description} | " + " | ".join(f"{figure:g}" for figure in figures) + " |"
        assert row in rows
        assert f"- **{tier.name}**: {tier.sources}" in rows


def test_the_file_map_of_the_readme_is_the_tree():
    tree = README.split("```\nfedpeat_ray/\n")[1].split("```")[0]
    named = set(re.findall(r"^ {2}(\w+)/ ", tree, re.M)) | set(re.findall(r"(\w+)\.py", tree))
    package = ROOT / "fedpeat_ray"
    there = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    there |= {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert named == there
    for folder in re.findall(r"^(\w+)/ ", tree, re.M):
        assert (ROOT / folder).is_dir()


def test_links_of_the_documentation_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "LOG.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/cluster.md", "docs/foundation.md", "LOG.md"])
def test_flags_in_the_documentation_exist(page):
    config = SimulationConfig()
    for line in (ROOT / page).read_text().splitlines():
        if "large_scale.py" in line:
            for flag in re.findall(r"--([a-z][\w.-]*)", line.split("large_scale.py", 1)[1]):
                if flag != "help":
                    get(config, re.sub(r"(^|\.)no-", r"\1", flag).replace("-", "_"))
