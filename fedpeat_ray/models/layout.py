"""Named tensors as one flat vector: what is trained, sent, averaged and hashed.

A client's trained tensors are one row, a client batch's are the matrix of its rows, and a server
optimizer needs no names at all.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors.torch import save
from torch import Tensor

from fedpeat_ray.models import weight_files


@dataclass(frozen=True)
class Layout:
    """Names and shapes of tensors, in the order in which they lie in the flat vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def sizes(self) -> list[int]:
        """Number of elements of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def num_elements(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector (..., num_elements) as {name: (..., *shape)}; one split, so cheap to differentiate."""
        parts = flat.split(self.sizes, dim=-1)
        lead = flat.shape[:-1]
        return {
            name: part.view((*lead, *shape)) for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The flat vector of {name: tensor}, a copy. Raises KeyError or ValueError if a tensor does not fit."""
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"tensor {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def part(self, names: Container[str]) -> tuple[Layout, Tensor]:
        """The layout of some of the tensors, and the places (Q,) of their elements in the whole vector."""
        ends = itertools.accumulate(self.sizes)
        kept = [i for i, name in enumerate(self.names) if name in names]
        spans = [torch.arange(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        places = torch.cat([spans[i] for i in kept]) if kept else torch.empty(0, dtype=torch.int64)
        return Layout(tuple(self.names[i] for i in kept), tuple(self.shapes[i] for i in kept)), places

    def serialize(self, flat: Tensor) -> bytes:
        """The safetensors file of a flat vector: the real payload of a transfer."""
        return save({name: tensor.contiguous() for name, tensor in self.unflatten(flat).items()})

    def payload_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Length of `serialize`, header included."""
        return weight_files.num_bytes(
            {name: (dtype, shape) for name, shape in zip(self.names, self.shapes, strict=True)}
        )

    def sha256(self, flat: Tensor) -> str:
        """Hash of the safetensors file."""
        return hashlib.sha256(self.serialize(flat)).hexdigest()
