"""FedPT's server: the large model, steered by the small one, teaches the small one on public text.

    loss = (1 - lambda) CE(labels) + lambda T^2 KL(softmax(l_proxy / T) || softmax(l_small / T))

over tokens that are not padding; only the small model's LoRA is trained. The weights and T^2 are the
standard form of distillation (Hinton et al. 2015, section 2.1); which one FedPT (Gao et al. 2024) uses
is not known to us. The large model is a black box: it is called, and nothing else.

Legend: B sequences, T tokens, V vocabulary, N predicted tokens, Q tokens kept of the teacher's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedpeat_ray.config import ProxyConfig
from fedpeat_ray.fleet.costs import ServerCosts, forward_flops, training_flops
from fedpeat_ray.fleet.memory import ModelShape, training_memory
from fedpeat_ray.models.foundation import Backbone, Foundation, load
from fedpeat_ray.models.proxy import proxy_logits
from fedpeat_ray.records import Arrays
from fedpeat_ray.tasks.language_modelling import IGNORED, next_token_labels, score_of
from fedpeat_ray.tasks.task import tensors_of
from fedpeat_ray.trainable.lora import Lora
from fedpeat_ray.trainable.part import stacked
from fedpeat_ray.training.collect import Result
from fedpeat_ray.training.evaluation import EvaluationTask, GroupScore

ROWS_AT_A_TIME = 2  # sequences whose logits of three models exist at one time


@dataclass(frozen=True)
class SmallModel:
    """The small model that steers, as it was and with an adapter."""

    foundation: Foundation
    lora: Lora

    @contextlib.contextmanager
    def pair(self, adapter_P: Tensor) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """Gives `logits(tokens_BT) -> (tuned, original)`, each (B, T, V)."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tuned, original = _loaded(self.foundation, device, 0), _loaded(self.foundation, device, 1)
        with torch.no_grad(), stacked(tuned, self.lora) as set_factors:
            set_factors(adapter_P.to(device).unsqueeze(0))

            def logits(tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
                tokens_BT = tokens_BT.to(device)
                return tuple(model(input_ids=tokens_BT, use_cache=False).logits for model in (tuned, original))

            yield logits


@functools.lru_cache(maxsize=2)
def _loaded(foundation: Foundation, device: str, which: int) -> PreTrainedModel:
    """A process's own copies of the small model."""
    return load(foundation, device)


@dataclass(frozen=True)
class EvaluateProxy:
    """`train(backbone, adapter_P, tasks)` on the large model: teacher-forced scores of the proxy-tuned one."""

    small: SmallModel
    alpha: float

    @property
    def files(self) -> list[Path]:
        """The small model's weights."""
        return [self.small.foundation.weights]

    def __call__(self, backbone: Backbone, adapter_P: Tensor, tasks: Sequence[EvaluationTask]) -> list[GroupScore]:
        with self.small.pair(adapter_P) as pair:

            def logits(tokens_BT: Tensor, wanted: Tensor) -> Tensor:
                parts = tokens_BT.split(ROWS_AT_A_TIME)
                found = torch.cat([_steered(backbone.exact, pair, part, self.alpha) for part in parts]).flatten(0, 1)
                return found[wanted.to(found.device)]

            batches = [tensors_of(task.arrays, "cpu", torch.float32) for task in tasks]
            return [GroupScore(task.group, score_of(logits, batch)) for task, batch in zip(tasks, batches, strict=True)]


@dataclass(frozen=True)
class TeacherLogits:
    """`train(backbone, adapter_P, batches)` on the large model: what it teaches with the small one's help.

    The Q likeliest tokens of every position, as (values, tokens), each (B, T, Q); all in order without `top_k`.
    """

    small: SmallModel
    alpha: float
    top_k: int | None

    @property
    def files(self) -> list[Path]:
        """The small model's weights."""
        return [self.small.foundation.weights]

    def __call__(self, backbone: Backbone, adapter_P: Tensor, batches: Sequence[Arrays]) -> list[Result]:
        results = []
        with self.small.pair(adapter_P) as pair:
            for batch in batches:
                parts: list[tuple[Tensor, Tensor | None]] = []
                for tokens_BT in torch.from_numpy(batch["tokens"]).long().split(ROWS_AT_A_TIME):
                    logits_BTV = _steered(backbone.exact, pair, tokens_BT, self.alpha).cpu()
                    if self.top_k is None or self.top_k >= logits_BTV.shape[-1]:
                        parts.append((logits_BTV, None))
                    else:
                        parts.append(tuple(logits_BTV.topk(self.top_k, dim=-1)))
                values, tokens = zip(*parts, strict=True)
                results.append(Result((torch.cat(values), None if tokens[0] is None else torch.cat(tokens))))
        return results


def _steered(large: Callable[..., Any], pair: Callable, tokens_BT: Tensor, alpha: float) -> Tensor:
    tuned, original = pair(tokens_BT)
    with torch.no_grad():
        logits = large(input_ids=tokens_BT.to(tuned.device), use_cache=False).logits
    return proxy_logits(logits, tuned, original, alpha)


def step_costs(proxy: ProxyConfig, large: ModelShape, small: ModelShape, lora: Lora) -> ServerCosts:
    """Of one step of distillation: three forward passes for the teacher, and a step of the small model."""
    tokens, length = proxy.batch_size * proxy.sequence_length, proxy.sequence_length
    teacher = tokens * (forward_flops(large, length) + 2 * forward_flops(small, length))
    student = training_flops(small, tokens, length, "lora", lora.layout.num_elements)
    memory = training_memory(
        small,
        batch_size=proxy.batch_size,
        sequence_length=length,
        trainable="lora",
        lora_rank=lora.rank,
    )
    weights = large.num_parameters * large.weight_bytes + 2 * small.num_parameters * small.weight_bytes
    return ServerCosts(float(teacher + student), int(weights + memory.peak_bytes))


def distil_small(
    student: PreTrainedModel,
    lora: Lora,
    adapter_P: Tensor,
    batches: Sequence[Arrays],
    taught: Iterable[tuple[Tensor, Tensor | None]],
    config: ProxyConfig,
) -> Tensor:
    """The adapter after a step of AdamW on each batch, of which `taught` is what `TeacherLogits` gives."""
    device, dtype = next(student.parameters()).device, next(student.parameters()).dtype
    theta_KP = nn.Parameter(adapter_P.to(device, dtype).unsqueeze(0).clone())
    optimizer = torch.optim.AdamW([theta_KP], lr=config.learning_rate, weight_decay=0.0, fused=True)
    with stacked(student, lora) as set_factors:
        for batch, logits in zip(batches, taught, strict=True):
            rows_B = tensors_of(batch, device, dtype)
            labels_N = next_token_labels(rows_B["tokens"], rows_B["lengths"]).flatten()
            rows = labels_N != IGNORED
            set_factors(theta_KP)
            logits_NV = student(input_ids=rows_B["tokens"], use_cache=False).logits.flatten(0, 1)[rows]
            values, tokens = (part if part is None else part.to(device).flatten(0, 1)[rows] for part in logits)
            assert values is not None
            loss = distillation_loss(logits_NV, labels_N[rows], values, tokens, config.kl_weight, config.temperature)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return theta_KP.detach()[0].to(adapter_P)


def distillation_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    teacher_NQ: Tensor,
    teacher_tokens_NQ: Tensor | None,
    kl_weight: float,
    temperature: float,
) -> Tensor:
    """(1 - lambda) CE + lambda T^2 KL, means over tokens; where only the teacher's likeliest tokens are known, both
    distributions are normalised over these."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    student_NQ = (
        logits_NV[:, : teacher_NQ.shape[1]] if teacher_tokens_NQ is None else logits_NV.gather(1, teacher_tokens_NQ)
    )
    kl = nn.functional.kl_div(
        nn.functional.log_softmax(student_NQ / temperature, dim=1),
        nn.functional.log_softmax(teacher_NQ.to(student_NQ.dtype) / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    labels_loss = nn.functional.cross_entropy(logits_NV, labels_N)
    return (1 - kl_weight) * labels_loss + kl_weight * temperature**2 * kl
