"""Safetensors files one tensor at a time: for models that no process holds whole, and for sizes without data.

The bytes are those that `safetensors.torch.save_file` writes for the same tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_DTYPES = {  # in the order of the data: by type, then by name
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


def write(path: Path, shapes: Shapes, tensor: Callable[[str], Tensor]) -> None:
    """Write a file, asking for each tensor once, in the order of `order(shapes)`.

    Raises ValueError for a tensor that is not of the announced type and shape.
    """
    with path.open("wb") as file:
        file.write(_header(shapes))
        for name in order(shapes):
            value = tensor(name)
            if (value.dtype, tuple(value.shape)) != shapes[name]:
                raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, not {shapes[name]}")
            file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def order(shapes: Shapes) -> list[str]:
    """The names in the order in which the file has the tensors."""
    return sorted(shapes, key=lambda name: (_RANK[shapes[name][0]], name))


def num_bytes(shapes: Shapes) -> int:
    """Size of the file."""
    return len(_header(shapes)) + sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes.values())


def shapes_of(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of a file's tensors, from its header."""
    types = {text: dtype for dtype, text in _DTYPES.items()}
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: (types[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()}


def read(path: Path, name: str) -> Tensor:
    """One tensor. No more of the file stays mapped than this tensor needs, and that only while it is held."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _header(shapes: Shapes) -> bytes:
    entries, end = {}, 0
    for name in order(shapes):
        dtype, shape = shapes[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
