"""Federated fine-tuning of foundation models on a simulated fleet of heterogeneous devices, on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpeat_ray.config import (
    AvailabilityConfig,
    ChannelConfig,
    ControlConfig,
    DataConfig,
    DistilConfig,
    EmulatorConfig,
    EvaluationConfig,
    FleetConfig,
    FoundationConfig,
    HostsConfig,
    LocalConfig,
    LoraConfig,
    PartitionConfig,
    ProxyConfig,
    ServerConfig,
    SimulationConfig,
    WatchConfig,
)
from fedpeat_ray.loading import loading

if TYPE_CHECKING:
    from fedpeat_ray.simulation import Simulation

__version__ = "0.1.0"
__all__ = [
    "AvailabilityConfig",
    "ChannelConfig",
    "ControlConfig",
    "DataConfig",
    "DistilConfig",
    "EmulatorConfig",
    "EvaluationConfig",
    "FleetConfig",
    "FoundationConfig",
    "HostsConfig",
    "LocalConfig",
    "LoraConfig",
    "PartitionConfig",
    "ProxyConfig",
    "ServerConfig",
    "Simulation",
    "SimulationConfig",
    "WatchConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Simulation is loaded when it is asked for: with PyTorch and transformers, that takes seconds."""
    if name != "Simulation":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with loading():
        from fedpeat_ray.simulation import Simulation
    return Simulation
