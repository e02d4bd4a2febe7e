"""Many clients' LoRA, or other small tensors, trained at once on one frozen backbone.

The clients of a batch share every product with a frozen weight; what is theirs is stacked (fedpeat_ray/trainable).
Losses are per client and summed, so each client's gradient is the one it would have alone, and AdamW acts element by
element: the updates are those of training one after another.

Legend: K clients, S steps, B rows a step, P trained elements a client.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedpeat_ray.config import LocalConfig
from fedpeat_ray.models.foundation import Backbone
from fedpeat_ray.records import NON_FINITE, Arrays, ClientReport, ClientTask
from fedpeat_ray.tasks.language_modelling import LANGUAGE_MODELLING
from fedpeat_ray.tasks.task import Batch, Task, tensors_of
from fedpeat_ray.trainable.part import Part, stacked

_FLOAT32_DIGITS = 2.0**24  # a number this much smaller than another is lost when they are added


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends: its trained tensors minus those it was given."""

    report: ClientReport
    weight: float
    delta_P: Tensor
    """float64, so that start + delta is exactly what the client had; of the elements that its level has."""
    level: int | None = None
    """Of the emulator it was trained on; None: the foundation, which has all elements."""


@dataclass(frozen=True)
class TrainClientBatch:
    """`train(backbone, start_P, tasks)`: local training of all clients of one batch."""

    part: Part
    local: LocalConfig
    task: Task = field(default=LANGUAGE_MODELLING, kw_only=True)

    def __call__(self, backbone: Backbone, start_P: Tensor, tasks: Sequence[ClientTask]) -> list[ClientUpdate]:
        started = time.perf_counter()
        order = sorted(range(len(tasks)), key=lambda i: -tasks[i].num_steps)  # those done early are at the end
        by_steps = [tasks[i] for i in order]
        with backbone.while_training():
            theta_KP, losses_K = train_stacked(backbone.training, self.part, self.local, start_P, by_steps, self.task)
        delta_KP = theta_KP.double().sub_(start_P.to(theta_KP.device).double())
        usable_K = usable(delta_KP, start_P).tolist()
        wall_s = (time.perf_counter() - started) / len(tasks)
        updates: dict[int, ClientUpdate] = {}
        for row, i in enumerate(order):
            report = ClientReport(
                tasks[i].device_id, float(losses_K[row]), None if usable_K[row] else NON_FINITE, wall_s
            )
            updates[i] = ClientUpdate(report, float(tasks[i].num_examples), delta_KP[row].cpu())
        return [updates[i] for i in range(len(tasks))]


def usable(delta_KP: Tensor, start_P: Tensor) -> Tensor:
    """Which updates (K,) a server can use: of those in float64, the ones that are numbers and not absurdly long.

    An update that is more than 2^24 times as long (L2) as what it starts from, or as 1 if that is shorter, leaves
    nothing of the start in their float32 sum: it is no change of the model any more, however finite.
    """
    longest = _FLOAT32_DIGITS * max(1.0, float(torch.linalg.vector_norm(start_P.double())))
    return torch.linalg.vector_norm(delta_KP, dim=1) <= longest  # False also for NaN


def train_stacked(
    backbone: PreTrainedModel, part: Part, local: LocalConfig, start_P: Tensor, tasks: Sequence[ClientTask], task: Task
) -> tuple[Tensor, Tensor]:
    """Train clients sorted by falling number of steps; returns theta (K, P) and mean losses (K,).

    At step s only the clients that have a step s are in the batch: a prefix of all.
    """
    device = next(backbone.parameters()).device
    start_P = start_P.to(device, training_dtype(backbone))
    theta_KP = start_P.repeat(len(tasks), 1)
    losses_K = torch.zeros(len(tasks), dtype=torch.float64, device=device)
    num_steps_K = np.array([task.num_steps for task in tasks])
    optimizer, num_active = None, -1
    with stacked(backbone, part) as set_tensors:
        for step in range(num_steps_K.max()):
            if (active := int((num_steps_K > step).sum())) != num_active:
                num_active = active
                optimizer = _next_optimizer(local, theta_KP[:num_active], optimizer)
            assert optimizer is not None
            theta = optimizer.param_groups[0]["params"][0]
            batch = together([client.step(step) for client in tasks[:num_active]], backbone)
            set_tensors(theta)
            loss_K = mean_losses(task, backbone, batch, num_active)
            loss_K.sum().backward()
            if local.prox_mu:
                theta.grad.add_(theta.detach() - start_P, alpha=local.prox_mu)
            optimizer.step()
            optimizer.zero_grad()
            losses_K[:num_active] += loss_K.detach()
    return theta_KP, losses_K / torch.from_numpy(num_steps_K).to(device)


def together(batches: Sequence[Arrays], model: PreTrainedModel) -> Batch:
    """The rows of several clients' batches, one after the other, on the model's device."""
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    parameter = next(model.parameters())
    return tensors_of(rows, parameter.device, parameter.dtype)


def mean_losses(task: Task, model: PreTrainedModel, batch: Batch, num_clients: int) -> Tensor:
    """Mean loss a label of each client (K,), whose rows follow one another; 0 without labels."""
    loss_N, count_N = task.losses(model, batch)
    loss_K, count_K = (values.view(num_clients, -1).sum(dim=1) for values in (loss_N, count_N))
    return loss_K / count_K.clamp(min=1)


def training_dtype(backbone: PreTrainedModel) -> torch.dtype:
    """Of what is trained: float32, or float64 as the backbone."""
    return torch.float64 if next(backbone.parameters()).dtype == torch.float64 else torch.float32


def _next_optimizer(local: LocalConfig, theta: Tensor, previous: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
    """An optimizer over the first rows of theta, going on with the state of the one before."""
    parameter = nn.Parameter(theta)  # the same memory
    optimizer = build_optimizer(local, [parameter])
    if previous is not None:
        for name, value in previous.state[previous.param_groups[0]["params"][0]].items():
            per_client = torch.is_tensor(value) and value.ndim == 2
            optimizer.state[parameter][name] = value[: len(theta)] if per_client else value
    return optimizer


def build_optimizer(local: LocalConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The device's optimizer, as the configuration says."""
    assert local.learning_rate != "auto", "it stands for a number that depends on the algorithm"
    if local.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=local.learning_rate, weight_decay=local.weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr=local.learning_rate, weight_decay=local.weight_decay)
