"""One client after another, with a plain loop: full fine-tuning, and LoRA through PEFT itself.

`TrainWithPeft` is the reference that client batches are tested against, and the fallback for models
whose layers cannot be stacked. `TrainAllWeights` is FedAvg's local training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from fedpeat_ray.config import LocalConfig
from fedpeat_ray.models.foundation import Backbone
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.records import NON_FINITE, ClientReport, ClientTask
from fedpeat_ray.tasks.language_modelling import LANGUAGE_MODELLING
from fedpeat_ray.tasks.task import Task, tensors_of
from fedpeat_ray.trainable.lora import Lora
from fedpeat_ray.trainable.peft_files import peft_config
from fedpeat_ray.training.client_batch import ClientUpdate, build_optimizer, usable


@dataclass(frozen=True)
class TrainAllWeights:
    """`train(backbone, start_P, tasks)`: every weight of the model is trained, one client after another."""

    layout: Layout
    local: LocalConfig
    task: Task = LANGUAGE_MODELLING

    def __call__(self, backbone: Backbone, start_P: Tensor, tasks: Sequence[ClientTask]) -> list[ClientUpdate]:
        model = backbone.exact
        weights = {name: model.get_parameter(name) for name in self.layout.names}
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            return [
                _train_from(model, self, self.layout, weights, start_P, task, backbone.while_training) for task in tasks
            ]
        finally:
            for name, weight in weights.items():
                weight.requires_grad_(False)
                weight.data.copy_(kept[name])


@dataclass(frozen=True)
class TrainWithPeft:
    """`train(backbone, start_P, tasks)`: LoRA by PEFT, one client after another."""

    lora: Lora
    local: LocalConfig
    task: Task = LANGUAGE_MODELLING

    def __call__(self, backbone: Backbone, start_P: Tensor, tasks: Sequence[ClientTask]) -> list[ClientUpdate]:
        model = get_peft_model(
            backbone.training, peft_config(self.lora, type(backbone.training).__name__, trainable=True)
        )
        assert isinstance(model, PeftModel)
        try:
            factors = {
                name: model.get_parameter(f"base_model.model.{name.removesuffix('.weight')}.default.weight")
                for name in self.lora.layout.names
            }
            layout = self.lora.layout
            return [_train_from(model, self, layout, factors, start_P, task, backbone.while_training) for task in tasks]
        finally:
            model.unload()


def _train_from(
    model: nn.Module,
    work: TrainAllWeights | TrainWithPeft,
    layout: Layout,
    trained: dict[str, nn.Parameter],
    start_P: Tensor,
    task: ClientTask,
    while_training: Callable[[], AbstractContextManager],
) -> ClientUpdate:
    """Set the trained tensors to the start, train them on one client's data, return the difference."""
    started = time.perf_counter()
    start = layout.unflatten(start_P)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    with while_training():
        loss_sum = _steps(model, work, trained, start, task)
    with torch.no_grad():
        delta_P = layout.flatten({n: p.detach().double() for n, p in trained.items()}).cpu() - start_P.double()
    failure = None if usable(delta_P.unsqueeze(0), start_P).all() else NON_FINITE
    report = ClientReport(task.device_id, loss_sum / task.num_steps, failure, time.perf_counter() - started)
    return ClientUpdate(report, float(task.num_examples), delta_P)


def _steps(
    model: nn.Module,
    work: TrainAllWeights | TrainWithPeft,
    trained: dict[str, nn.Parameter],
    start: Mapping[str, Tensor],
    task: ClientTask,
) -> float:
    """All optimizer steps of one client; returns the sum of their losses."""
    local, optimizer = work.local, build_optimizer(work.local, list(trained.values()))
    parameter, loss_sum = next(model.parameters()), 0.0
    for step in range(task.num_steps):
        batch = tensors_of(task.step(step), parameter.device, parameter.dtype)
        loss_N, count_N = work.task.losses(model, batch)
        loss = loss_N.sum() / count_N.sum().clamp(min=1)
        loss.backward()
        if local.prox_mu:
            for name, parameter in trained.items():
                assert parameter.grad is not None
                parameter.grad.add_(parameter.detach() - start[name].to(parameter), alpha=local.prox_mu)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.item()
    return loss_sum
