"""Distilled emulators: the kept middle blocks learn, on public text, to stand in for the whole middle.

Offsite-tuning (Xiao et al. 2023, section 3.3, and their released code): only the student's middle is
trained, by

    loss = LM loss + 30 * MSE(student's middle output, teacher's) / RMS(teacher's)

where both middles see the same input, as the blocks before them are the same and frozen. Elastic, which
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
from fedpeat_ray.emulators.on_emulators import half_precision, output_of
from fedpeat_ray.models.foundation import Blocks
from fedpeat_ray.records import TextBatch
from fedpeat_ray.seeding import generator
from fedpeat_ray.tasks.language_modelling import IGNORED, next_token_labels, tensors

WARM_UP = 0.1  # share of the steps with a rising learning rate; it falls to zero in half a cosine


def distil(
    student: PreTrainedModel,
    ladder: Ladder,
    rungs: Sequence[Rung],
    start: Blocks,
    batches: Sequence[TextBatch],
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
                loss = distillation_loss(student, ladder, rung, batch, target_BTD, config.output_weight)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1)
    return {i: block.requires_grad_(False) for i, block in middle.items()}


def distillation_loss(
    student: PreTrainedModel, ladder: Ladder, rung: Rung, batch: TextBatch, target_BTD: Tensor, output_weight: float
) -> Tensor:
    """The student's loss on a batch; the student is the emulator of the rung."""
    device = next(student.parameters()).device
    tokens_BT, lengths_B = tensors(batch, device)
    last_before_end = rung.blocks[len(rung.blocks) - ladder.last - 1]
    hidden: list[Tensor] = []
    with output_of(student.get_submodule(f"{ladder.block_list}.{last_before_end}"), hidden.append):
        logits_BTV = student(input_ids=tokens_BT, use_cache=False).logits
    labels_BT = next_token_labels(tokens_BT, lengths_B)
    lm_loss = nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED)
    valid_BT = torch.arange(tokens_BT.shape[1], device=device) < lengths_B[:, None]
    output_ND, target_ND = hidden[0][valid_BT].float(), target_BTD.to(device)[valid_BT].float()
    return lm_loss + output_weight * nn.functional.mse_loss(output_ND, target_ND) / target_ND.square().mean().sqrt()


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear rise, then half a cosine to zero; `step` counts from 0."""
    warm_up = max(1, round(WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))
