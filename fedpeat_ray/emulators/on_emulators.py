"""Work on emulators through the seam: any training on the level each task names, and what the ladder needs to know.

Legend: L blocks, B sequences, T tokens, D model width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedpeat_ray.emulators.ladder import Ladder, on_emulator
from fedpeat_ray.models.foundation import Backbone
from fedpeat_ray.records import Arrays
from fedpeat_ray.tasks.task import Batch, Task, tensors_of
from fedpeat_ray.training.adapters import Adapter
from fedpeat_ray.training.client_batch import ClientUpdate
from fedpeat_ray.training.collect import Result


@dataclass(frozen=True)
class OnEmulators:
    """`train(backbone, adapter_P, tasks)`: each task on the emulator of its level, and of its age if that is stale.

    Tasks of one emulator that follow one another are one batch; a task of level None has the foundation.
    """

    ladder: Ladder
    whole: Callable
    """The training (or evaluation) on the foundation."""
    parts: tuple[tuple[Callable, Tensor], ...]
    """By level: training of what lies in the blocks of that level, and its places in the whole adapter."""
    stale: tuple[tuple[int, Ladder], ...] = ()
    """The ladders of emulators that some devices still have, by their age."""

    @property
    def files(self) -> list[Path]:
        """What emulators are read from."""
        return sorted({path for ladder in self._by_age.values() for path in ladder.files})

    @property
    def _by_age(self) -> dict[int, Ladder]:
        return {0: self.ladder, **dict(self.stale)}

    def __call__(self, backbone: Backbone, adapter_P: Tensor, tasks: Sequence[Any]) -> list[Any]:
        updates: list[Any] = []
        by_age = self._by_age
        for outdated in backbone.stand_ins.keys() - set(self.files):
            del backbone.stand_ins[outdated]
        for (level, age), group in itertools.groupby(tasks, key=lambda task: (task.level, getattr(task, "age", 0))):
            if level is None:
                updates += self.whole(backbone, adapter_P, list(group))
                continue
            train, places = self.parts[level - 1]
            with on_emulator(backbone, self.ladder.block_list, by_age[age].rungs[level - 1]):
                for update in train(backbone, adapter_P[places], list(group)):
                    is_training = isinstance(update, ClientUpdate)
                    updates.append(dataclasses.replace(update, level=level) if is_training else update)
        return updates


@dataclass(frozen=True)
class InExactType:
    """`train(backbone, shared, tasks)`: the same work against the exact weights, as on a sharded foundation."""

    train: Callable

    def __call__(self, backbone: Backbone, shared: Any, tasks: Sequence[Any]) -> list[Any]:
        return self.train(Backbone(backbone.exact, backbone.exact), shared, tasks)


@dataclass(frozen=True)
class MiddleOutput:
    """`train(backbone, adapter_P, batches)` on the foundation: the output (B, T, D) of its last middle block.

    With the adapter plugged in, if there is one; products in bfloat16 if `dtype` says so.
    """

    ladder: Ladder
    adapter: Adapter
    dtype: str

    def __call__(self, backbone: Backbone, adapter_P: Tensor | None, batches: Sequence[Arrays]) -> list[Result]:
        model, kept = backbone.exact, []
        last = self.ladder.num_blocks - self.ladder.last - 1
        with contextlib.ExitStack() as around:
            around.enter_context(torch.no_grad())
            around.enter_context(half_precision(model, self.dtype))
            around.enter_context(output_of(model.get_submodule(f"{self.ladder.block_list}.{last}"), kept.append))
            if adapter_P is not None:
                around.enter_context(self.adapter.plugged(model, adapter_P))
            for batch in batches:
                without_head(model, self.adapter.task, on_model(batch, model))
        return [Result(hidden.float().cpu()) for hidden in kept]


@dataclass(frozen=True)
class BlockInfluence:
    """`train(backbone, None, batches)` on the foundation: 1 - cos(input, output) of every block, a mean over tokens.

    (L,) a batch. How much a block changes what goes through it, without any training: CRaSh (Zhang et
    al. 2023) and ScaleOT (Yao et al. 2025) judge blocks by the likeness of their representations.
    """

    ladder: Ladder
    task: Task

    def __call__(self, backbone: Backbone, shared: None, batches: Sequence[Arrays]) -> list[Result]:
        model, results = backbone.exact, []
        blocks = [model.get_submodule(f"{self.ladder.block_list}.{i}") for i in range(self.ladder.num_blocks)]
        for batch in (on_model(arrays, model) for arrays in batches):
            scores: list[float] = []

            def score(_: nn.Module, arguments: Any, keywords: Any, out: Any, *, scores=scores, batch=batch) -> None:
                before = arguments[0] if arguments else keywords["hidden_states"]
                after: Tensor = out[0] if isinstance(out, tuple) else out
                valid = valid_positions(after, batch)
                cosine = nn.functional.cosine_similarity(before[valid].float(), after[valid].float(), dim=-1)
                scores.append(1 - cosine.double().mean().item())

            hooks = [block.register_forward_hook(score, with_kwargs=True) for block in blocks]
            try:
                with torch.no_grad():
                    without_head(model, self.task, batch)
            finally:
                for hook in hooks:
                    hook.remove()
            results.append(Result(np.array(scores)))
        return results


def on_model(arrays: Arrays, model: PreTrainedModel) -> Batch:
    """A batch on the model's device."""
    parameter = next(model.parameters())
    return tensors_of(arrays, parameter.device, parameter.dtype)


def without_head(model: PreTrainedModel, task: Task, batch: Batch) -> None:
    """The batch goes through the blocks, for those who listen there."""
    model.base_model(**task.inputs(model, batch))


def valid_positions(hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Which positions (B, T) are no padding."""
    return torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device) < batch["lengths"][:, None]


@contextlib.contextmanager
def output_of(block: nn.Module, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Hands over what the block puts out, in each forward pass."""

    def hand_over(_: nn.Module, __: Any, out: Any) -> None:
        keep(out[0] if isinstance(out, tuple) else out)

    hook = block.register_forward_hook(hand_over)
    try:
        yield
    finally:
        hook.remove()


def half_precision(model: PreTrainedModel, dtype: str) -> contextlib.AbstractContextManager:
    """Products in bfloat16 if that is the type to train in; weights and sums stay as they are."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=dtype == "bfloat16")
