"""Federated fine-tuning of foundation models on a simulated fleet of heterogeneous devices, on Ray."""

import gc

_collects = gc.isenabled()
gc.disable()  # what is being loaded is no garbage, and looking for some in it takes a sixth of the time

from fedpeat_ray.config import SimulationConfig  # noqa: E402
from fedpeat_ray.simulation import Simulation  # noqa: E402

if _collects:
    gc.enable()

__version__ = "0.1.0"
__all__ = ["Simulation", "SimulationConfig", "__version__"]
