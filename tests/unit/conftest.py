"""What tests of whole runs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import whole_runs

from fedpeat_ray import Simulation, SimulationConfig


@pytest.fixture
def run(tiny: SimulationConfig, tmp_path: Path) -> Callable[..., Path]:
    """Runs the module's tiny configuration with some settings changed; returns the run directory."""

    def run(name: str = "run", **changes: Any) -> Path:
        Simulation(whole_runs.changed(tiny, out=tmp_path / name, **changes)).run()
        return tmp_path / name

    return run
