"""Distilled emulators: the kept middle blocks learn, on public text, to stand in for the whole middle.

Offsite-tuning (Xiao et al. 2023, section 3.3, and their released code): only the student's middle is
trained, by

    loss = LM loss + 30 * MSE(student's middle output, teacher's) / RMS(teacher's)

where both middles see the same input, as the blocks before them are the same and frozen. Where the labels are the
devices' own (classes, for example), a server's data has none of them, and the first term is left out. Elastic, which
is ours: one set of weights serves all levels; every step trains the emulator of one level, drawn at
random. With an adapter plugged into both sides it is a re-alignment after FedBiOT (Wu et al. 2024).

Legend: B sequences, T tokens, D model width, N tokens of a batch that are not padding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedpeat_ray.config import DistilConfig
from fedpeat_ray.emulators.ladder import Ladder, Rung, emulated
from fedpeat_ray.emulators.on_emulators import half_precision, on_model, output_of, valid_positions, without_head
from fedpeat_ray.models.foundation import Blocks
from fedpeat_ray.records import Arrays
from fedpeat_ray.seeding import generator
from fedpeat_ray.tasks.task import Task

WARM_UP = 0.1  # share of the steps with a rising learning rate; it falls to zero in half a cosine


def distil(
    student: PreTrainedModel,
    ladder: Ladder,
    rungs: Sequence[Rung],
    task: Task,
    start: Blocks,
    batches: Sequence[Arrays],
    targets: Iterable[Tensor],
    config: DistilConfig,
    dtype: str,
    on_step: Callable[[int], None] = lambda step: None,
    plugged: Callable[[Rung], AbstractContextManager] = lambda rung: nullcontext(),
) -> Blocks:
    """Train copies of the blocks in `start`, a batch a step; returns them, frozen.

    Args:
        student: the frozen model; its own blocks stay at the ends.
        rungs: the levels to be trained, one of them a step.
        task: what the model is for.
        start: all middle blocks that these levels keep.
        targets: what the foundation's last middle block puts out (B, T, D), for each batch.
        dtype: bfloat16 for products in it.
        on_step: is told the number of each step, from 1.
        plugged: puts an adapter into the student, which is the emulator of the rung by then.
    """
    middle = {i: copy.deepcopy(block).requires_grad_(True) for i, block in start.items()}
    parameters = [parameter for block in middle.values() for parameter in block.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)
    levels = generator(config.seed, "distilled level").integers(len(rungs), size=len(batches))
    for step, (batch, target_BTD) in enumerate(zip(batches, targets, strict=True)):
        optimizer.param_groups[0]["lr"] = config.learning_rate * learning_rate_factor(step, len(batches))
        rung = rungs[levels[step]]
        with emulated(student, ladder.block_list, rung, middle), plugged(rung):
            with half_precision(student, dtype):
                loss = distillation_loss(student, ladder, rung, task, batch, target_BTD, config.output_weight)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1)
    return {i: block.requires_grad_(False) for i, block in middle.items()}


def distillation_loss(
    student: PreTrainedModel,
    ladder: Ladder,
    rung: Rung,
    task: Task,
    arrays: Arrays,
    target_BTD: Tensor,
    output_weight: float,
) -> Tensor:
    """The student's loss on a batch; the student is the emulator of the rung."""
    batch, hidden = on_model(arrays, student), list[Tensor]()
    last_before_end = rung.blocks[len(rung.blocks) - ladder.last - 1]
    with output_of(student.get_submodule(f"{ladder.block_list}.{last_before_end}"), hidden.append):
        if task.self_supervised:
            losses_B, counts_B = task.losses(student, batch)
            own_loss = losses_B.sum() / counts_B.sum()
        else:
            without_head(student, task, batch)
            own_loss = 0.0
    valid_BT = valid_positions(hidden[0], batch)
    output_ND, target_ND = hidden[0][valid_BT].float(), target_BTD.to(valid_BT.device)[valid_BT].float()
    return own_loss + output_weight * nn.functional.mse_loss(output_ND, target_ND) / target_ND.square().mean().sqrt()


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear rise, then half a cosine to zero; `step` counts from 0."""
    warm_up = max(1, round(WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))
