"""What the server does with the mean update: SGD, Adam or Yogi on the pseudo-gradient.

Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2 (no bias correction; v starts at
tau^2, as their theory asks). With sgd, learning rate 1 and no momentum the new model is the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedpeat_ray.config import ServerConfig

UPDATES, DISTILLATION = "updates", "distillation"  # what a server may have to refuse


@dataclass(frozen=True)
class ServerState:
    """What the server keeps between rounds, on the CPU."""

    model_P: Tensor
    """The trained tensors as sent to clients: float32."""
    moments: Mapping[str, Tensor]
    """float64, by name; empty without momentum."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """Whatever else an algorithm remembers from round to round, by name."""


def init_server(config: ServerConfig, model_P: Tensor) -> ServerState:
    """The state before the first round."""
    zeros = torch.zeros_like(model_P, dtype=torch.float64)
    if config.optimizer == "sgd":
        return ServerState(model_P, {"momentum": zeros} if config.momentum else {})
    return ServerState(model_P, {"momentum": zeros, "second": torch.full_like(zeros, config.tau**2)})


def server_step(config: ServerConfig, state: ServerState, mean_delta_P: Tensor | None) -> ServerState:
    """Apply the mean update, float64 (P,); None (nobody completed) leaves everything as it is."""
    if mean_delta_P is None:
        return state
    moments, step_P = dict(state.moments), mean_delta_P
    if config.optimizer == "sgd":
        if config.momentum:
            step_P = moments["momentum"] = config.momentum * moments["momentum"] + mean_delta_P
    else:
        square_P, second_P = mean_delta_P**2, moments["second"]
        excess_P = second_P - square_P
        if config.optimizer == "yogi":
            excess_P = square_P * excess_P.sign()
        moments["second"] = second_P = second_P - (1 - config.beta2) * excess_P
        moments["momentum"] = config.momentum * moments["momentum"] + (1 - config.momentum) * mean_delta_P
        step_P = moments["momentum"] / (second_P.sqrt() + config.tau)
    model_P = state.model_P.double() + config.learning_rate * step_P
    return replace(state, model_P=model_P.to(state.model_P.dtype), moments=moments)


def accepted(before: ServerState, after: ServerState, what: str = UPDATES) -> tuple[ServerState, str | None]:
    """The state after a step, and None; if model or moments are not finite the state before it, and what is refused."""
    finite = all(bool(tensor.isfinite().all()) for tensor in (after.model_P, *after.moments.values()))
    return (after, None) if finite else (before, what)
