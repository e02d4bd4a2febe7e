"""Emulators: the foundation with blocks of its middle left out, as views of one resident copy.

The first l and the last r blocks are the adapter blocks: every emulator has them, and what is trained
lies in them. Level 1, 2, … keeps a growing part of the blocks between, and the top level keeps all: it
is the foundation. Blocks keep the foundation's numbers at every level, so an adapter fits all levels
and plugging it back in is no operation at all. Offsite-tuning (Xiao et al. 2023, section 3).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from fedpeat_ray.config import SHARES, EmulatorConfig
from fedpeat_ray.errors import ConfigError, ModelError
from fedpeat_ray.models.foundation import Backbone, Blocks, block_list_name, block_view
from fedpeat_ray.models.weight_files import Shapes
from fedpeat_ray.trainable.lora import Lora
from fedpeat_ray.training.adapters import Adapter

_ENDS = ((2, 2, 4), (1, 1, 1), (1, 0, 1))
"""Adapter blocks at start and end, where these are auto: the first that leave so many between."""

Within = TypeVar("Within", Adapter, Lora)

SCALE = ".scale"  # after the name of an 8-bit matrix: the file's entry with the scale of each row


@dataclass(frozen=True)
class Rung:
    """One level of a ladder."""

    level: int
    blocks: tuple[int, ...]
    """Numbers of the blocks that are kept, adapter blocks included, rising."""
    weights: Path | None = None
    """File with the weights of the kept middle blocks; None: the foundation's own."""


@dataclass(frozen=True)
class Ladder:
    """All emulators of one foundation; `rungs[level - 1]`."""

    block_list: str
    """Name of the list of blocks, e.g. `transformer.h`."""
    num_blocks: int
    first: int
    last: int
    rungs: tuple[Rung, ...]

    @property
    def top(self) -> int:
        """The level that is the foundation."""
        return len(self.rungs)

    @property
    def adapter_blocks(self) -> tuple[int, ...]:
        """The first l and the last r."""
        return (*range(self.first), *range(self.num_blocks - self.last, self.num_blocks))

    @property
    def middle_blocks(self) -> tuple[int, ...]:
        """Those between."""
        return tuple(range(self.first, self.num_blocks - self.last))

    @property
    def files(self) -> list[Path]:
        """Weights of emulators that are not the foundation's own."""
        return sorted({rung.weights for rung in self.rungs if rung.weights})

    def part(self, adapter: Within, level: int) -> Within:
        """What of an adapter (or its LoRA) lies in the blocks of a level."""
        return adapter.within(self.block_list, self.rungs[level - 1].blocks)

    def kept_middle(self, level: int) -> tuple[int, ...]:
        """The middle blocks that a level keeps."""
        return tuple(i for i in self.rungs[level - 1].blocks if i in self.middle_blocks)


def numbers(config: EmulatorConfig, num_blocks: int) -> tuple[int, int, tuple[float, ...]]:
    """First, last and shares in a model of so many blocks. Raises ConfigError where none are left between."""

    def end(number: int | Literal["auto"], auto: int) -> int:
        return auto if number == "auto" else number

    ends = [(end(config.first, first), end(config.last, last), least) for first, last, least in _ENDS]
    fitting = [(first, last) for first, last, least in ends if num_blocks - first - last >= least]
    if not fitting:
        first, last, _ = ends[0]
        working = f"--emulator.first 1 --emulator.last {min(1, num_blocks - 2)}, or " if num_blocks > 1 else ""
        allowed = f"with emulator.last = {last}, fewer than {num_blocks} blocks, which are all that the model has; use "
        raise ConfigError.of("emulator.first", first, f"{allowed}{working}--algorithm fed-peft")
    first, last = fitting[0]
    num_middle = num_blocks - first - last
    if config.shares != "auto":
        return first, last, config.shares
    first_of = {_kept(share, num_middle): share for share in reversed(SHARES)}
    return first, last, tuple(sorted(share for kept, share in first_of.items() if kept < num_middle))


def _kept(share: float, num_middle: int) -> int:
    return round(share * num_middle)


def build_ladder(model: PreTrainedModel, config: EmulatorConfig, influence: Sequence[float] | None = None) -> Ladder:
    """The levels that the configuration asks for.

    Args:
        model: the foundation; only its structure is read.
        influence: a score for every block; the middle blocks with the highest are kept. None: evenly spread.

    Raises ConfigError where levels and depth do not go together, ModelError for blocks of different kinds.
    """
    if len(set(getattr(model.config, "layer_types", None) or ["one"])) > 1:
        raise ModelError(f"{type(model).__name__} has blocks of several kinds: none can be left out")
    num_blocks = model.config.num_hidden_layers
    first, last, shares = numbers(config, num_blocks)
    middle = range(first, num_blocks - last)
    kept = [_kept(share, len(middle)) for share in shares] + [len(middle)]
    if sorted(set(kept)) != kept:
        allowed = f"rising shares that keep different numbers of the {len(middle)} middle blocks, not {kept[:-1]}"
        raise ConfigError.of("emulator.shares", config.shares, allowed)
    rungs = []
    for level, count in enumerate(kept, start=1):
        if influence is None:
            chosen = uniform_blocks(len(middle), count)
        else:
            chosen = most_influential([influence[i] for i in middle], count)
        ends = (*range(first), *(first + i for i in chosen), *range(num_blocks - last, num_blocks))
        rungs.append(Rung(level, ends))
    return Ladder(block_list_name(model), num_blocks, first, last, tuple(rungs))


def uniform_blocks(num_blocks: int, num_kept: int) -> tuple[int, ...]:
    """round(i (L - 1) / (S - 1)) for S of L blocks: always both ends; of a single one, the one in the middle.

    Offsite-tuning's rule, whose released code divides by zero for S = 1.
    """
    if num_kept == 1:
        return (num_blocks // 2,)
    return tuple(round(i * (num_blocks - 1) / (num_kept - 1)) for i in range(num_kept))


def most_influential(influence: Sequence[float], num_kept: int) -> tuple[int, ...]:
    """The blocks with the highest scores, the earlier one of equals."""
    return tuple(sorted(sorted(range(len(influence)), key=lambda i: (-influence[i], i))[:num_kept]))


@contextlib.contextmanager
def emulated(model: PreTrainedModel, block_list: str, rung: Rung, stand_ins: Blocks | None = None) -> Iterator[None]:
    """The model with a level's blocks only, those in `stand_ins` in place of its own; whole again at the end."""
    blocks = model.get_submodule(block_list)
    model.set_submodule(block_list, block_view(blocks, rung.blocks, stand_ins))
    try:
        yield
    finally:
        model.set_submodule(block_list, blocks)


@contextlib.contextmanager
def on_emulator(backbone: Backbone, block_list: str, rung: Rung) -> Iterator[None]:
    """Both models of the backbone as the emulator of a level; blocks with weights of their own are loaded once."""
    exact, training = _stand_ins(backbone, block_list, rung.weights) if rung.weights else ({}, {})
    with contextlib.ExitStack() as views:
        views.enter_context(emulated(backbone.exact, block_list, rung, exact))
        if backbone.training is not backbone.exact:
            views.enter_context(emulated(backbone.training, block_list, rung, training))
        yield


def _stand_ins(backbone: Backbone, block_list: str, path: Path) -> tuple[Blocks, Blocks]:
    if path not in backbone.stand_ins:
        exact = load_blocks(backbone.exact, block_list, path)
        training = exact
        if backbone.training is not backbone.exact:
            dtype = next(backbone.training.parameters()).dtype
            training = {number: copy.deepcopy(block).to(dtype) for number, block in exact.items()}
        backbone.stand_ins[path] = (exact, training)
    return backbone.stand_ins[path]


def load_blocks(model: PreTrainedModel, block_list: str, path: Path) -> Blocks:
    """The frozen blocks of a file, made like the model's own and in its type; 8-bit matrices are expanded."""
    own = model.get_submodule(block_list)
    parameter = next(own.parameters())
    blocks: Blocks = {}
    for number, state in _block_states(load_file(path, str(parameter.device)), block_list, parameter.dtype).items():
        block = copy.deepcopy(own.get_submodule(str(number)))  # some know their number, and scale by it
        block.load_state_dict(state, assign=True)
        blocks[number] = block.requires_grad_(False).eval()
    return blocks


def _block_states(weights: Mapping[str, Tensor], block_list: str, dtype: torch.dtype) -> dict[int, dict[str, Tensor]]:
    """The content of a file of blocks: {number: {name inside the block: tensor}}, 8-bit matrices expanded."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if name.endswith(SCALE):
            continue
        if tensor.dtype == torch.int8:
            tensor = tensor.to(dtype) * weights[name + SCALE].to(dtype)[:, None]
        number, inner = name.removeprefix(block_list + ".").split(".", 1)
        states.setdefault(int(number), {})[inner] = tensor.to(dtype)
    return states


def eight_bit(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A matrix (I, O) as int8 with a float32 scale for each of its I rows; anything else as it is.

    Symmetric round-to-nearest: the largest magnitude of a row becomes 127.
    """
    if tensor.ndim != 2:
        return {name: tensor}
    scale = (tensor.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny).float()
    return {name: (tensor / scale[:, None]).round().clamp(-127, 127).to(torch.int8), name + SCALE: scale}


def emulator_shapes(shapes: Shapes, ladder: Ladder, level: int, dtype: torch.dtype, quantise: bool) -> Shapes:
    """What a device downloads with an emulator: names, types and shapes of all its tensors.

    Args:
        shapes: those of the whole foundation.
        dtype: in which devices hold weights.
        quantise: middle blocks in 8 bit.
    """
    kept, middle = ladder.rungs[level - 1].blocks, ladder.kept_middle(level)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (_, shape) in shapes.items():
        number = block_number(name, ladder.block_list)
        if number is None or number in kept:
            if quantise and number in middle and len(shape) == 2:
                found |= {name: (torch.int8, shape), name + SCALE: (torch.float32, shape[:1])}
            else:
                found[name] = (dtype, shape)
    return found


def block_number(name: str, block_list: str) -> int | None:
    """Of the block that a tensor or module belongs to; None for those of no block."""
    prefix = block_list + "."
    return int(name.removeprefix(prefix).split(".", 1)[0]) if name.startswith(prefix) else None
