"""What is trainable: tensors of which every client of a batch has its own, in a frozen model that they share.

A part knows its tensors (`layout`), how they start, and how to be put into a model for K clients at a time: as layers
that take the place of the model's own, or as hooks around it. The model's inputs are then the rows of K clients, one
after the other.

Legend: K clients, N rows of a client, P trained elements a client, I input width, O output width.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.models.layout import Layout

SetTensors = Callable[[Tensor], None]
"""From then on the model has these tensors, (K, P)."""


class StackedLayer(nn.Module):
    """Takes the place of a frozen layer, and has tensors of each client."""

    names: tuple[str, ...] = ()
    """Of its tensors in the layout."""
    tensors: Sequence[Tensor] = ()
    """Those, (K, ...) each: set before a forward."""

    def __init__(self, frozen: nn.Module):
        super().__init__()
        self.frozen = frozen

    @property
    def weight(self) -> Tensor:
        """Of the type of the frozen one, which some models look at; empty, so that none multiplies with it."""
        return self.frozen.get_parameter("weight").new_empty(0)


class Part(ABC):
    """Immutable, and travels to hosts."""

    if TYPE_CHECKING:  # what is read only: a field of one part, a property of another

        @property
        def layout(self) -> Layout:
            """Its tensors, of one client."""

    @abstractmethod
    def init(self, seed: int) -> Tensor:
        """Their start, flat (P,), float32 at least."""

    def within(self, block_list: str, blocks: Container[int]) -> Self:
        """What of it is in some blocks of the model, or in none at all."""
        return self

    def layers(self, model: PreTrainedModel, called: bool = False) -> Mapping[str, StackedLayer]:
        """The layers that have its tensors, by the names of those whose place they take. `called`: leave the products
        to the frozen layers, as their weights are only there while they are called."""
        return {}

    @contextlib.contextmanager
    def stacked(self, model: PreTrainedModel, called: bool = False) -> Iterator[SetTensors]:
        """Put it into the model, and take it out again at the end. Autograd reaches its tensors only."""
        layers = self.layers(model, called)
        frozen = {name: model.get_submodule(name) for name in layers}

        def set_tensors(theta_KP: Tensor) -> None:
            tensors = self.layout.unflatten(theta_KP)
            for layer in layers.values():
                layer.tensors = [tensors[name] for name in layer.names]

        try:
            for name, layer in layers.items():
                model.set_submodule(name, layer)
            yield set_tensors
        finally:
            for name, module in frozen.items():
                model.set_submodule(name, module)


@dataclass(frozen=True)
class Parts(Part):
    """Several parts that are trained together, such as LoRA and the head."""

    parts: tuple[Part, ...]

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]  # a property elsewhere
        """Of one after the other."""
        names = tuple(name for part in self.parts for name in part.layout.names)
        return Layout(names, tuple(shape for part in self.parts for shape in part.layout.shapes))

    def init(self, seed: int) -> Tensor:
        """Each with its own."""
        return torch.cat([part.init(seed) for part in self.parts])

    def within(self, block_list: str, blocks: Container[int]) -> Parts:
        """Of each."""
        return Parts(tuple(part.within(block_list, blocks) for part in self.parts))

    @contextlib.contextmanager
    def stacked(self, model: PreTrainedModel, called: bool = False) -> Iterator[SetTensors]:
        """All of them."""
        with contextlib.ExitStack() as stack:
            setters = [stack.enter_context(part.stacked(model, called)) for part in self.parts]
            sizes = [part.layout.num_elements for part in self.parts]

            def set_tensors(theta_KP: Tensor) -> None:
                for set_part, theta in zip(setters, theta_KP.split(sizes, dim=-1), strict=True):
                    set_part(theta)

            yield set_tensors


@contextlib.contextmanager
def stacked(model: PreTrainedModel, part: Part, called: bool = False) -> Iterator[SetTensors]:
    """A part in a model, its tensors in the type of the model."""
    dtype = next(model.parameters()).dtype
    with part.stacked(model, called) as set_tensors:
        yield lambda theta_KP: set_tensors(theta_KP.to(dtype))


def read_weights(foundation: Foundation, layout: Layout) -> Tensor:
    """Tensors of the foundation, flat."""
    with safe_open(foundation.weights, framework="pt") as file:
        return layout.flatten({name: file.get_tensor(name) for name in layout.names})


def is_within(name: str, block_list: str, blocks: Container[int]) -> bool:
    """Whether a module or tensor is in one of some blocks of a list, or outside of the list."""
    inside = name.removeprefix(f"{block_list}.")
    return inside == name or int(inside.split(".", 1)[0]) in blocks


def rows_of(x: Tensor, num_clients: int) -> Tensor:
    """(K N, ..., I) as (K, N ..., I)."""
    return x.reshape(num_clients, -1, x.shape[-1])
