"""Federated fine-tuning of foundation models on a simulated fleet of heterogeneous devices, on Ray."""

from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.simulation import Simulation

__version__ = "0.1.0"
__all__ = ["Simulation", "SimulationConfig", "__version__"]
