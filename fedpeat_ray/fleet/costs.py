"""What a round costs each device, who completes it, and when it ends. Policies as data, no training.

    total_s = download_bytes / downlink + flops / flops_per_s + upload_bytes / uplink
    energy_j = compute_power_w * compute_s + radio_power_w * (download_s + upload_s)

the usual model of federated learning over wireless networks (e.g. Tran et al. 2019), with
the power a device draws in place of kappa f^2 cycles, which would ask for figures nobody publishes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedpeat_ray.fleet.memory import ModelShape, Trainable
from fedpeat_ray.fleet.population import Fleet
from fedpeat_ray.records import DEADLINE, DROP_REASONS, LINK, MEMORY, NOT_NEEDED, UNAVAILABLE

COMPLETES, NOT_ASKED = -1, -2
"""In place of the position of a reason to drop out."""

Figure = float | np.ndarray
"""One number for all devices, or an array (N,) with one a device."""


@dataclass(frozen=True)
class Task:
    """What the devices of a round are asked to do."""

    download_bytes: Figure
    upload_bytes: Figure
    flops: Figure
    memory_bytes: Figure
    """Peak training memory."""


@dataclass(frozen=True)
class Costs:
    """What the task costs each device. Every array has shape (N,): bytes int64, the rest float64."""

    download_bytes: np.ndarray
    upload_bytes: np.ndarray
    download_s: np.ndarray
    compute_s: np.ndarray
    upload_s: np.ndarray
    compute_power_w: np.ndarray
    radio_power_w: np.ndarray
    memory_bytes: np.ndarray
    memory_cap_bytes: np.ndarray

    @property
    def total_s(self) -> np.ndarray:
        """From the start of the round to the end of the upload: the three phases follow one another."""
        return self.download_s + self.compute_s + self.upload_s

    @property
    def energy_j(self) -> np.ndarray:
        """Computing and radio."""
        return self.compute_power_w * self.compute_s + self.radio_power_w * (self.download_s + self.upload_s)

    def of(self, chosen_N: np.ndarray) -> Costs:
        """Those of some of the devices."""
        return Costs(**{name: figures[chosen_N] for name, figures in vars(self).items()})


@dataclass(frozen=True)
class ServerCosts:
    """What the server's own training and distillation take."""

    flops: float = 0.0
    memory_bytes: int = 0
    """Weights, and what a step adds to them."""

    def times(self, num_steps: int) -> ServerCosts:
        """Of so many steps."""
        return ServerCosts(num_steps * self.flops, self.memory_bytes if num_steps else 0)

    def then(self, other: ServerCosts) -> ServerCosts:
        """Of both, one after the other."""
        return ServerCosts(self.flops + other.flops, max(self.memory_bytes, other.memory_bytes))


@dataclass(frozen=True)
class Admission:
    """Who completes a round, and how long it lasts."""

    reason: np.ndarray
    """int8 (N,): position in `records.DROP_REASONS`, or COMPLETES, or NOT_ASKED."""
    round_s: float
    """Virtual seconds from the start of the round to its end; an array (P,) for P cases at a time."""

    @property
    def completed(self) -> np.ndarray:
        """Bool array (N,): True where there is no reason to drop."""
        return self.reason == COMPLETES

    @property
    def drop_reason(self) -> np.ndarray:
        """Object array (N,): None if the device completes, else one of `records.DROP_REASONS`."""
        return np.array([*DROP_REASONS, None, None], object)[self.reason]


def task_costs(fleet: Fleet, device_ids: np.ndarray, task: Task, downlink: np.ndarray, uplink: np.ndarray) -> Costs:
    """Time, energy, bytes and memory of the task on each device, were all to go through with it.

    Shapes: device_ids (N,), downlink and uplink (N,) in bytes per second, above 0 -> arrays (N,); with figures of the
    task and links of shape (P, N), for P cases at a time -> what depends on them is (P, N).
    """

    def each(figure: Figure, dtype: type) -> np.ndarray:
        return np.asarray(figure, dtype) if np.ndim(figure) else np.full(device_ids.shape, figure, dtype)

    download_bytes, upload_bytes = each(task.download_bytes, np.int64), each(task.upload_bytes, np.int64)
    download_s, compute_s, upload_s = task_s(fleet, device_ids, task, downlink, uplink)
    return Costs(
        download_bytes=download_bytes,
        upload_bytes=upload_bytes,
        download_s=download_s,
        compute_s=compute_s,
        upload_s=upload_s,
        compute_power_w=fleet.compute_power_w[device_ids].astype(np.float64),
        radio_power_w=fleet.radio_power_w[device_ids].astype(np.float64),
        memory_bytes=each(task.memory_bytes, np.int64),
        memory_cap_bytes=fleet.memory_cap_bytes[device_ids],
    )


def task_s(
    fleet: Fleet, device_ids: np.ndarray, task: Task, downlink: np.ndarray, uplink: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds of downloading, computing and uploading. Shapes as in `task_costs`; or figures of a task of shape
    (P, N), for P tasks at a time -> arrays (P, N)."""
    computing = task.flops / fleet.flops_per_s[device_ids].astype(np.float64)
    return task.download_bytes / downlink, computing, task.upload_bytes / uplink


def admit(
    costs: Costs,
    available: np.ndarray,
    link_ok: np.ndarray,
    cohort_size: int | np.ndarray,
    deadline_s: float | None,
    asked: np.ndarray | bool = True,
) -> Admission:
    """Decide a round: the first reason that applies drops a device, in the order below.

    unavailable; memory (it does not fit); link (outage); deadline (it would be late). Of those left, the
    `cohort_size` fastest complete, ties by position, hence by device id in a sorted sample; the rest are
    not needed (over-selection, Bonawitz et al. 2019).

    The round ends with the upload of the slowest device that completes. If fewer than `cohort_size` do and
    some device asked could still have come (it was late, or nobody completed), the server waits in vain until
    `deadline_s`. Without a deadline, a round that nobody completes takes 0 s: when to try again is the
    caller's choice.

    Shapes: available (N,) bool, link_ok (N,) bool; asked (P, N) for P cases at a time, with cohort_size one number or
    (P, 1).
    """
    total_s = costs.total_s
    late = total_s > (math.inf if deadline_s is None else deadline_s)
    too_large = costs.memory_bytes > costs.memory_cap_bytes
    reason = np.full(total_s.shape, COMPLETES, np.int8)
    # the last to be written counts
    for name, failed in ((DEADLINE, late), (LINK, ~link_ok), (MEMORY, too_large), (UNAVAILABLE, ~available)):
        reason = overwritten(reason, failed, DROP_REASONS.index(name))
    reason = overwritten(reason, ~np.asarray(asked), NOT_ASKED)
    able = reason == COMPLETES
    if (able.sum(axis=-1, keepdims=True) > cohort_size).any():
        by_speed = np.argsort(np.where(able, total_s, np.inf), axis=-1, kind="stable")
        able_by_speed = np.take_along_axis(able, by_speed, axis=-1)
        too_slow = np.zeros_like(able)
        np.put_along_axis(too_slow, by_speed, able_by_speed & (np.arange(able.shape[-1]) >= cohort_size), axis=-1)
        reason[too_slow] = DROP_REASONS.index(NOT_NEEDED)

    completed = reason == COMPLETES
    round_s: Any = np.minimum(total_s, all_or_nothing(completed)).max(axis=-1, initial=0.0)
    if deadline_s is not None:
        num_completed = completed.sum(axis=-1, keepdims=True)
        some_late = (reason == DROP_REASONS.index(DEADLINE)).any(axis=-1, keepdims=True)
        missed = (num_completed == 0) | ((num_completed < cohort_size) & some_late)
        round_s = np.where(missed.any(axis=-1), deadline_s, round_s)[()]
    return Admission(reason, round_s)


def overwritten(codes_N: np.ndarray, which_N: np.ndarray, code: int) -> np.ndarray:
    """(N,) integers, with this one in place of some; as a sum, as np.where takes ten times as long where nobody can
    predict which."""
    return codes_N + (code - codes_N) * which_N


def all_or_nothing(which_N: np.ndarray) -> np.ndarray:
    """(N,) the largest that a figure of a device may be: infinite or 0."""
    return np.take([0.0, np.inf], which_N)


def spent(costs: Costs, admission: Admission) -> Costs:
    """What the devices really spent, as it is logged.

    Completed: everything. Unavailable, memory, link: nothing, as they are told apart before anything is sent.
    Deadline, not needed: each phase as far as it got when the round ended, the download's bytes in proportion;
    `upload_bytes` is 0, as a part of an update is of no use, but the time and energy it took count.
    """
    completed = admission.completed
    if completed.all():
        return costs
    late, not_needed = (admission.reason == DROP_REASONS.index(name) for name in (DEADLINE, NOT_NEEDED))
    cut_short = late | not_needed
    some_cut_short = cut_short.any()
    left_s = all_or_nothing(completed)
    if some_cut_short:
        left_s = np.where(cut_short, np.expand_dims(admission.round_s, -1), left_s)
    download_s = np.minimum(costs.download_s, left_s)
    compute_s = np.minimum(costs.compute_s, left_s - download_s)
    upload_s = np.minimum(costs.upload_s, left_s - download_s - compute_s)
    download_bytes = costs.download_bytes * completed
    if some_cut_short:
        worked = completed | cut_short
        part = np.divide(download_s, costs.download_s, out=worked.astype(np.float64), where=costs.download_s > 0)
        download_bytes = np.round(costs.download_bytes * part).astype(np.int64)
    return replace(
        costs,
        download_bytes=download_bytes,
        upload_bytes=costs.upload_bytes * completed,
        download_s=download_s,
        compute_s=compute_s,
        upload_s=upload_s,
    )


def training_flops(
    shape: ModelShape,
    num_tokens: Figure,
    sequence_length: int,
    trainable: Trainable,
    lora_parameters: Figure = 0,
    *,
    num_blocks: Figure | None = None,
    adapter_blocks: tuple[int, int] | None = None,
    learned_tokens: Figure = 0,
) -> Figure:
    """Floating point operations of training on `num_tokens` tokens.

    Per token, with N = L * used_parameters + head (looking up an embedding is free; of experts, those that a token is
    sent to; the head is head_parameters, and a share of output_products for each of the T tokens of a sequence),
    T = sequence_length and D = attention_width, the forward pass through L = num_blocks (default: all) takes
    2 N + 4 L T D: a multiplication and an addition a weight, and the two products of attention, with no discount for
    the causal mask (Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B). The backward pass takes

        2 n + 8 l T D    for the gradients of the activations, n and l as N and L but of the blocks behind the
                         first one that is trained, and it: all, or the last `adapter_blocks` if there are no first
        2 w              for those of w trained weights: N with "all", those of the adapter blocks with "blocks",
                         none frozen; 6 lora_parameters with "lora", forward included; a "bias" costs next to
                         nothing, hence 0

    So all weights: 6 N + 12 L T D; LoRA on all blocks: 4 N + 6 lora_parameters + 12 L T D. `lora_parameters` are those
    of Houlsby's adapters too, which tokens are multiplied with in the same way (`added_parameters`).

    A classifier's head has gradients of its weights in any case, and with "head" nothing else has any. What is before
    the blocks (input_products) is only multiplied with, or trained with "all". M `learned_tokens` of a "prompt" go
    through the blocks as others do, T + M for T tokens; of a "prefix" they are attended to only. What IA3's factors
    take is next to nothing, hence 0. LoRA in a decoder behind the blocks counts as if it met every token of the
    encoder, of which there are more.

    Shapes: num_tokens, lora_parameters, num_blocks and learned_tokens are numbers or arrays (N,), and so is the result.
    """
    blocks = shape.num_blocks if num_blocks is None else num_blocks
    first, last = (0, blocks) if adapter_blocks is None else adapter_blocks
    block, head = shape.used_parameters, shape.head_parameters + shape.output_products / sequence_length
    stem = shape.input_products / sequence_length
    crossed = 0 if trainable == "head" else blocks if first else last
    trained = {"all": blocks * block + head + stem, "blocks": (first + last) * block}.get(trainable, 0)
    if shape.task_head_parameters and trainable != "all":
        trained = trained + head
    seen = 1 + (learned_tokens / sequence_length if trainable == "prompt" else 0)
    weights = (blocks + crossed) * block * seen + (1 + (trainable != "head")) * head + stem + trained
    attention = (4 * blocks + 8 * crossed) * seen * (sequence_length + learned_tokens) * shape.attention_width
    return num_tokens * (1.0 * (2 * weights + attention) + 6.0 * lora_parameters)


def added_parameters(shape: ModelShape, trainable: Trainable, num_trained: Figure) -> Figure:
    """Of all elements that are trained, those of matrices put into the blocks, LoRA's and Houlsby's."""
    return num_trained - shape.task_head_parameters if trainable in ("lora", "houlsby") else 0


def forward_flops(shape: ModelShape, sequence_length: int) -> float:
    """Floating point operations of a forward pass a token (see `training_flops`)."""
    weights = shape.num_blocks * shape.used_parameters + shape.head_parameters
    once = (shape.input_products + shape.output_products) / sequence_length
    return 2.0 * (weights + once) + 4.0 * shape.num_blocks * sequence_length * shape.attention_width
