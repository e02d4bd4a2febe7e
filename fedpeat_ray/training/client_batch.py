"""Many clients' LoRA trained at once on one frozen backbone.

The clients of a batch share every product with a frozen weight; their factors are stacked and
multiplied by `bmm`. Losses are per client and summed, so each client's gradient is the one it would
have alone, and AdamW acts element by element: the updates are those of training one after another.

Legend: K clients, S steps, B sequences a step, T tokens, N = B T rows of a client, I input width,
O output width, R rank, P trained elements a client, V vocabulary, D model width.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpeat_ray.config import LocalConfig
from fedpeat_ray.models.foundation import Backbone, is_sharded, plain_head
from fedpeat_ray.models.lora import Lora
from fedpeat_ray.records import NON_FINITE, ClientReport, ClientTask, TextBatch

IGNORED = -100  # label of padding
_FLOAT32_DIGITS = 2.0**24  # a number this much smaller than another is lost when they are added
HEAD_LOGITS = {"cpu": 2**20, "cuda": 2**26}  # logits that exist at one time: on a CPU, what its cache holds


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends: its trained tensors minus those it was given."""

    report: ClientReport
    weight: float
    delta_P: Tensor
    """float64, so that start + delta is exactly what the client had; of the elements that its level has."""
    level: int | None = None
    """Of the emulator it was trained on; None: the foundation, which has all elements."""


@dataclass(frozen=True)
class TrainClientBatch:
    """`train(backbone, start_P, tasks)`: local training of all clients of one batch."""

    lora: Lora
    local: LocalConfig

    def __call__(self, backbone: Backbone, start_P: Tensor, tasks: Sequence[ClientTask]) -> list[ClientUpdate]:
        started = time.perf_counter()
        order = sorted(range(len(tasks)), key=lambda i: -tasks[i].num_steps)  # those done early are at the end
        by_steps = [tasks[i] for i in order]
        with backbone.while_training():
            theta_KP, losses_K = train_stacked(backbone.training, self.lora, self.local, start_P, by_steps)
        delta_KP = theta_KP.double().sub_(start_P.to(theta_KP.device).double())
        usable_K = usable(delta_KP, start_P).tolist()
        wall_s = (time.perf_counter() - started) / len(tasks)
        updates: dict[int, ClientUpdate] = {}
        for row, i in enumerate(order):
            report = ClientReport(
                tasks[i].device_id, float(losses_K[row]), None if usable_K[row] else NON_FINITE, wall_s
            )
            updates[i] = ClientUpdate(report, float(tasks[i].num_examples), delta_KP[row].cpu())
        return [updates[i] for i in range(len(tasks))]


def usable(delta_KP: Tensor, start_P: Tensor) -> Tensor:
    """Which updates (K,) a server can use: of those in float64, the ones that are numbers and not absurdly long.

    An update that is more than 2^24 times as long (L2) as what it starts from, or as 1 if that is shorter, leaves
    nothing of the start in their float32 sum: it is no change of the model any more, however finite.
    """
    longest = _FLOAT32_DIGITS * max(1.0, float(torch.linalg.vector_norm(start_P.double())))
    return torch.linalg.vector_norm(delta_KP, dim=1) <= longest  # False also for NaN


def train_stacked(
    backbone: PreTrainedModel, lora: Lora, local: LocalConfig, start_P: Tensor, tasks: Sequence[ClientTask]
) -> tuple[Tensor, Tensor]:
    """Train clients sorted by falling number of steps; returns theta (K, P) and mean losses (K,).

    At step s only the clients that have a step s are in the batch: a prefix of all.
    """
    device = next(backbone.parameters()).device
    start_P = start_P.to(device, training_dtype(backbone))
    theta_KP = start_P.repeat(len(tasks), 1)
    losses_K = torch.zeros(len(tasks), dtype=torch.float64, device=device)
    num_steps_K = np.array([task.num_steps for task in tasks])
    optimizer, num_active = None, -1
    with stacked_lora(backbone, lora) as set_factors:
        for step in range(num_steps_K.max()):
            if (active := int((num_steps_K > step).sum())) != num_active:
                num_active = active
                optimizer = _next_optimizer(local, theta_KP[:num_active], optimizer)
            assert optimizer is not None
            theta = optimizer.param_groups[0]["params"][0]
            tokens_KBT = _stack([task.tokens_SBT[step] for task in tasks[:num_active]], device)
            lengths_KB = _stack([task.lengths_SB[step] for task in tasks[:num_active]], device)
            labels_KN = next_token_labels(tokens_KBT, lengths_KB).flatten(1)
            set_factors(theta)
            loss_K = summed_losses(backbone, tokens_KBT, labels_KN)
            loss_K = loss_K / (labels_KN != IGNORED).sum(dim=1).clamp(min=1)
            loss_K.sum().backward()
            if local.prox_mu:
                theta.grad.add_(theta.detach() - start_P, alpha=local.prox_mu)
            optimizer.step()
            optimizer.zero_grad()
            losses_K[:num_active] += loss_K.detach()
    return theta_KP, losses_K / torch.from_numpy(num_steps_K).to(device)


def training_dtype(backbone: PreTrainedModel) -> torch.dtype:
    """Of what is trained: float32, or float64 as the backbone."""
    return torch.float64 if next(backbone.parameters()).dtype == torch.float64 else torch.float32


def _stack(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(arrays).astype(np.int64)).to(device)


def _next_optimizer(local: LocalConfig, theta: Tensor, previous: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
    """An optimizer over the first rows of theta, going on with the state of the one before."""
    parameter = nn.Parameter(theta)  # the same memory
    optimizer = build_optimizer(local, [parameter])
    if previous is not None:
        for name, value in previous.state[previous.param_groups[0]["params"][0]].items():
            per_client = torch.is_tensor(value) and value.ndim == 2
            optimizer.state[parameter][name] = value[: len(theta)] if per_client else value
    return optimizer


def build_optimizer(local: LocalConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The device's optimizer, as the configuration says."""
    assert local.learning_rate != "auto", "it stands for a number that depends on the algorithm"
    if local.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=local.learning_rate, weight_decay=local.weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr=local.learning_rate, weight_decay=local.weight_decay)


class StackedLoraLinear(nn.Module):
    """A frozen linear layer in which every client of the batch has its own low-rank update."""

    def __init__(self, frozen: nn.Module, scaling: float):
        super().__init__()
        self.weight_IO = frozen.weight if isinstance(frozen, Conv1D) else frozen.weight.T
        self.bias_O = frozen.bias
        self.scaling = scaling
        self.factors: tuple[Tensor, Tensor] | None = None  # A (K, R, I), B (K, O, R): set before a forward

    def forward(self, x: Tensor) -> Tensor:
        assert self.factors is not None
        a_KRI, b_KOR = self.factors
        x_KNI = x.reshape(len(a_KRI), -1, x.shape[-1])
        y_KNO = _StackedLora.apply(x_KNI, self.weight_IO, self.bias_O, a_KRI, b_KOR, self.scaling)
        return y_KNO.view(*x.shape[:-1], -1)


class CalledLoraLinear(nn.Module):
    """The same through a call of the frozen layer, for layers whose weights are only there while they are called."""

    def __init__(self, frozen: nn.Module, scaling: float):
        super().__init__()
        self.frozen = frozen
        self.scaling = scaling
        self.factors: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.factors is not None
        a_KRI, b_KOR = self.factors
        h_KNR = torch.bmm(x.reshape(len(a_KRI), -1, x.shape[-1]), a_KRI.transpose(1, 2))
        y_KNO = torch.bmm(h_KNR, b_KOR.transpose(1, 2)) * self.scaling
        return self.frozen(x) + y_KNO.view(*x.shape[:-1], -1)


class _StackedLora(torch.autograd.Function):
    """y = x W + b + scaling * x A^T B^T, written out: the low-rank part is added in place, both ways."""

    @staticmethod
    def forward(ctx, x_KNI, weight_IO, bias_O, a_KRI, b_KOR, scaling):
        rows = x_KNI.flatten(0, 1)
        y = rows @ weight_IO if bias_O is None else torch.addmm(bias_O, rows, weight_IO)
        y_KNO = y.view(*x_KNI.shape[:2], -1)
        h_KNR = torch.bmm(x_KNI, a_KRI.transpose(1, 2))
        y_KNO.baddbmm_(h_KNR, b_KOR.transpose(1, 2), alpha=scaling)
        ctx.save_for_backward(x_KNI, weight_IO, a_KRI, b_KOR, h_KNR)
        ctx.scaling = scaling
        return y_KNO

    @staticmethod
    def backward(ctx, grad_KNO):  # type: ignore[override]  # torch annotates any number of gradients
        x_KNI, weight_IO, a_KRI, b_KOR, h_KNR = ctx.saved_tensors
        grad_h_KNR = torch.bmm(grad_KNO, b_KOR).mul_(ctx.scaling)
        grad_b_KOR = torch.bmm(grad_KNO.transpose(1, 2), h_KNR).mul_(ctx.scaling)
        grad_a_KRI = torch.bmm(grad_h_KNR.transpose(1, 2), x_KNI)
        grad_x_KNI = None
        if ctx.needs_input_grad[0]:
            grad_x_KNI = (grad_KNO.flatten(0, 1) @ weight_IO.T).view(x_KNI.shape)
            grad_x_KNI.baddbmm_(grad_h_KNR, a_KRI)
        return grad_x_KNI, None, None, grad_a_KRI, grad_b_KOR, None


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed next-token losses per client under a frozen head, a chunk of rows of logits at a time.

    The gradient of the hidden states is worked out on the way, so no logits are kept: K B T V floats
    would be most of the memory of a step.
    """

    @staticmethod
    def forward(ctx, hidden_KND, head_VD, labels_KN):
        hidden, labels = hidden_KND.flatten(0, 1), labels_KN.flatten()
        loss = torch.zeros(len(hidden), dtype=_loss_dtype(hidden), device=hidden.device)
        grad = torch.zeros_like(hidden) if hidden_KND.requires_grad else None
        rows = torch.nonzero(labels != IGNORED).squeeze(1)
        for chunk in rows.split(max(1, HEAD_LOGITS[hidden.device.type] // len(head_VD))):
            logits = (hidden[chunk] @ head_VD.T).to(loss.dtype)
            target = labels[chunk].unsqueeze(1)
            top = logits.amax(dim=1, keepdim=True)
            target_logit = logits.gather(1, target) - top
            probabilities = logits.sub_(top).exp_()  # in place: fresh pages cost more than the arithmetic
            normaliser = probabilities.sum(dim=1, keepdim=True)
            loss[chunk] = (normaliser.log() - target_logit).squeeze(1)
            if grad is not None:
                probabilities.div_(normaliser)
                probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=loss.dtype))
                grad[chunk] = probabilities.to(hidden.dtype) @ head_VD
        if grad is not None:
            ctx.save_for_backward(grad.view_as(hidden_KND))
        return loss.view(labels_KN.shape).sum(dim=1)

    @staticmethod
    def backward(ctx, grad_K):  # type: ignore[override]
        (grad_KND,) = ctx.saved_tensors
        return grad_KND * grad_K.to(grad_KND.dtype)[:, None, None], None, None


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def tensors(batch: TextBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) and lengths (B,) as int64 on the device."""
    return (
        torch.from_numpy(batch.tokens_BT.astype(np.int64)).to(device),
        torch.from_numpy(batch.lengths_B.astype(np.int64)).to(device),
    )


def next_token_labels(tokens_KBT: Tensor, lengths_KB: Tensor) -> Tensor:
    """Labels (K, B, T): the token after each position, IGNORED at the last valid one and in padding."""
    positions = torch.arange(tokens_KBT.shape[-1], device=tokens_KBT.device)
    shifted = tokens_KBT.roll(-1, dims=-1)
    return shifted.masked_fill(positions >= lengths_KB.unsqueeze(-1) - 1, IGNORED)


def summed_losses(backbone: PreTrainedModel, tokens_KBT: Tensor, labels_KN: Tensor) -> Tensor:
    """Next-token loss of each client (K,), summed. Rows are padded on the right and attention is causal, so
    padding needs no mask."""
    tokens, head_VD = tokens_KBT.flatten(0, 1), plain_head(backbone)
    if head_VD is not None:
        hidden = backbone.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return _FrozenHeadLoss.apply(hidden.view(*labels_KN.shape, -1), head_VD, labels_KN)
    logits = backbone(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    logits = logits.to(_loss_dtype(logits))
    losses = nn.functional.cross_entropy(logits, labels_KN.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels_KN.shape).sum(dim=1)


@contextlib.contextmanager
def stacked_lora(backbone: PreTrainedModel, lora: Lora, called: bool = False) -> Iterator[Callable[[Tensor], None]]:
    """Put stacked LoRA into the backbone's linear layers, and take it out again at the end.

    Gives `set_factors(theta_KP)`: from then on the backbone's inputs are K clients' rows, one after the
    other. Autograd reaches theta only. `called`: leave the products to the frozen layers, as sharded
    ones always are.
    """
    kind = CalledLoraLinear if called or is_sharded(backbone) else StackedLoraLinear
    layers = {name: kind(backbone.get_submodule(name), lora.scaling) for name, _, _ in lora.modules}
    frozen = {name: backbone.get_submodule(name) for name in layers}
    dtype = next(backbone.parameters()).dtype

    def set_factors(theta_KP: Tensor) -> None:
        factors = lora.layout.unflatten(theta_KP.to(dtype))
        for name, layer in layers.items():
            layer.factors = (factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"])

    try:
        for name, layer in layers.items():
            backbone.set_submodule(name, layer)
        yield set_factors
    finally:
        for name, module in frozen.items():
            backbone.set_submodule(name, module)
