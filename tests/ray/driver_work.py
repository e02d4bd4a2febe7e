"""What the ranks of a sharded foundation are given to do. They import it by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from patience import OutOfPatience
from torch import Tensor, distributed, nn

from fedpeat_ray.models.foundation import Backbone


@dataclass(frozen=True)
class Result:
    """The update of a task: what the model made of it."""

    value: Any
    report: int


@dataclass(frozen=True)
class Values:
    """An aggregator that lists what was added, in batches and in order."""

    values: tuple[Any, ...] = ()

    def add(self, updates: Sequence[Result]) -> Values:
        return Values((*self.values, [update.value for update in updates]))

    def merge(self, other: Values) -> Values:
        return Values(self.values + other.values)

    def result(self) -> list[Any]:
        return list(self.values)


def logits(backbone: Backbone, shared: int, tasks: Sequence[Tensor]) -> list[Result]:
    """The model's output for the tokens of each task."""
    with torch.no_grad():
        return [Result(backbone.exact(input_ids=tokens + shared).logits, len(tokens)) for tokens in tasks]


class Adapted(nn.Module):
    """A frozen layer and a trainable product of two small matrices beside it."""

    def __init__(self, frozen: nn.Module, a: Tensor, b: Tensor):
        super().__init__()
        self.frozen, self.a, self.b = frozen, a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + x @ self.a.T @ self.b.T


def gradients(backbone: Backbone, shared: dict[str, tuple[Tensor, Tensor]], tasks: Sequence[Tensor]) -> list[Result]:
    """Gradients of small matrices beside some layers, by plain backward passes with a step of descent after each."""
    model, results = backbone.exact, []
    frozen = {name: model.get_submodule(name) for name in shared}
    adapters = {name: [matrix.clone().requires_grad_() for matrix in pair] for name, pair in shared.items()}
    matrices = [matrix for pair in adapters.values() for matrix in pair]
    try:
        for name, (a, b) in adapters.items():
            model.set_submodule(name, Adapted(frozen[name], a, b))
        for tokens in tasks:
            logits = model(input_ids=tokens).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            for matrix in matrices:
                matrix.grad = None
            loss.backward()
            results.append(Result([matrix.grad for matrix in matrices], len(tokens)))
            with torch.no_grad():
                for matrix in matrices:
                    matrix.sub_(matrix.grad, alpha=0.1)  # type: ignore[arg-type]
    finally:
        for name, module in frozen.items():
            model.set_submodule(name, module)
    return results


def by_hand(backbone: Backbone, shared: None, tasks: Sequence[Tensor]) -> list[Result]:
    """Block after block without the model around them; the output, and the gradient of what goes in."""
    model, results = backbone.exact, []
    for tokens in tasks:
        start = model.get_submodule("transformer.wte")(tokens).requires_grad_()
        hidden = start
        for block in model.get_submodule("transformer.h").children():
            hidden = block(hidden)
        logits = model.get_submodule("lm_head")(model.get_submodule("transformer.ln_f")(hidden))
        logits.sum().backward()
        results.append(Result([logits.detach(), start.grad], len(tokens)))
    return results


def lose_patience(backbone: Backbone, shared: str, tasks: Sequence[Tensor]) -> list[Result]:
    """Raises in the middle of the model, before this block."""

    def hook(*_: object) -> None:
        raise OutOfPatience("this took too long")

    handle = backbone.exact.get_submodule(shared).register_forward_pre_hook(hook)
    try:
        return logits(backbone, 0, tasks)
    finally:
        handle.remove()


def kill(backbone: Backbone, shared: int, tasks: Sequence[Tensor]) -> list[Result]:
    """Rank `shared` is killed after the first task; the others go on."""
    first = logits(backbone, 0, tasks[:1])
    if distributed.get_rank() == shared:
        os.kill(os.getpid(), signal.SIGKILL)
    return first + logits(backbone, 0, tasks[1:])
