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
from fedpeat_ray.models.lora import Lora, peft_config
from fedpeat_ray.records import NON_FINITE, ClientReport, ClientTask
from fedpeat_ray.training.client_batch import IGNORED, ClientUpdate, build_optimizer, next_token_labels, usable


@dataclass(frozen=True)
class TrainAllWeights:
    """`train(backbone, start_P, tasks)`: every weight of the model is trained, one client after another."""

    layout: Layout
    local: LocalConfig

    def __call__(self, backbone: Backbone, start_P: Tensor, tasks: Sequence[ClientTask]) -> list[ClientUpdate]:
        model = backbone.exact
        weights = {name: model.get_parameter(name) for name in self.layout.names}
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            return [
                _train_from(model, self.layout, weights, self.local, start_P, task, backbone.while_training)
                for task in tasks
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

    def __call__(self, backbone: Backbone, start_P: Tensor, tasks: Sequence[ClientTask]) -> list[ClientUpdate]:
        model = get_peft_model(backbone.training, peft_config(self.lora, base_model=None, trainable=True))
        assert isinstance(model, PeftModel)
        try:
            factors = {
                name: model.get_parameter(f"base_model.model.{name.removesuffix('.weight')}.default.weight")
                for name in self.lora.layout.names
            }
            layout = self.lora.layout
            return [
                _train_from(model, layout, factors, self.local, start_P, task, backbone.while_training)
                for task in tasks
            ]
        finally:
            model.unload()


def _train_from(
    model: Callable,
    layout: Layout,
    trained: dict[str, nn.Parameter],
    local: LocalConfig,
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
        loss_sum = _steps(model, trained, start, local, task)
    with torch.no_grad():
        delta_P = layout.flatten({n: p.detach().double() for n, p in trained.items()}).cpu() - start_P.double()
    failure = None if usable(delta_P.unsqueeze(0), start_P).all() else NON_FINITE
    report = ClientReport(task.device_id, loss_sum / task.num_steps, failure, time.perf_counter() - started)
    return ClientUpdate(report, float(task.num_examples), delta_P)


def _steps(
    model: Callable,
    trained: dict[str, nn.Parameter],
    start: Mapping[str, Tensor],
    local: LocalConfig,
    task: ClientTask,
) -> float:
    """All optimizer steps of one client; returns the sum of their losses."""
    optimizer = build_optimizer(local, list(trained.values()))
    loss_sum = 0.0
    for tokens_BT, lengths_B in zip(task.tokens_SBT, task.lengths_SB, strict=True):
        tokens = torch.from_numpy(tokens_BT).long().to(next(iter(trained.values())).device)
        labels_BT = next_token_labels(tokens, torch.from_numpy(lengths_B).to(tokens.device))
        loss = mean_loss(model(input_ids=tokens, use_cache=False).logits, labels_BT)
        loss.backward()
        if local.prox_mu:
            for name, parameter in trained.items():
                assert parameter.grad is not None
                parameter.grad.add_(parameter.detach() - start[name].to(parameter), alpha=local.prox_mu)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.item()
    return loss_sum


def mean_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy over labels that are not IGNORED, in float32 at least; zero if there are none."""
    logits = logits_BTV.flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = nn.functional.cross_entropy(logits, labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels_BT != IGNORED).sum().clamp(min=1)
