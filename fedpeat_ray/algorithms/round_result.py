"""What every algorithm is, and what one round of it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from fedpeat_ray.aggregation.server_optimizer import ServerState
from fedpeat_ray.data.client_data import ClientData
from fedpeat_ray.fleet.conditions import Conditions
from fedpeat_ray.fleet.costs import Admission, Costs, ServerCosts
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.records import Assignment, ClientReport
from fedpeat_ray.training.map_clients import MapClients


@dataclass(frozen=True)
class RoundResult:
    """The facts of one round, a device a position; `reports` of those that trained."""

    device_ids: np.ndarray
    tasks: Sequence[Assignment]
    costs: Costs
    admission: Admission
    reports: Sequence[ClientReport]
    lora_rank: int | None = None
    levels: np.ndarray | None = None
    """Of the emulators, if there are any."""
    emulator_bytes: np.ndarray | None = None
    """The part of what was downloaded that is emulators."""
    server: ServerCosts = field(default_factory=ServerCosts)
    refused: str | None = None
    """UPDATES or DISTILLATION if the server's state would not have been finite with them."""


class Algorithm(Protocol):
    """A federated algorithm: a state, and a round that takes it to the next."""

    @property
    def layout(self) -> Layout:
        """The tensors that are trained and sent."""
        ...

    def init(self, seed: int) -> ServerState:
        """The state before the first round."""
        ...

    def run_round(
        self,
        state: ServerState,
        round: int,
        now_s: float,
        conditions: Conditions,
        data: ClientData,
        map_clients: MapClients,
    ) -> tuple[ServerState, RoundResult]:
        """One round, from the sampling of devices to the server's step; `round` counts from 1."""
        ...

    @property
    def levels(self) -> Sequence[int]:
        """Levels of the emulators that devices may get; empty without emulators."""
        ...

    def trainer(self, state: ServerState) -> Callable:
        """`train(backbone, model_P, tasks)` of clients in the next round."""
        ...

    def evaluator(self, state: ServerState) -> Callable:
        """`train(backbone, model_P, tasks)` that scores held-out sequences with the current model."""
        ...

    def save(self, directory: Path, model_P: Tensor) -> None:
        """Write the current model so that others can load it."""
        ...
