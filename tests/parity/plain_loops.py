"""The reference: transformers, PEFT and torch.optim in the loops of their own tutorials, nothing of ours.

A client alone, on a model of its own, a step after the other. Tensors go in and out by the names that
they have in the model, with or without PEFT's prefix and adapter name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Steps = tuple[np.ndarray, np.ndarray]  # tokens (S, B, T) and lengths (S, B)


def train_lora(
    model_dir: Path,
    start: Mapping[str, Tensor],
    steps: Steps,
    optimizer: Optimizer,
    *,
    rank: int,
    alpha: float,
    dtype: torch.dtype,
    mu: float = 0.0,
    targets: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Train LoRA factors from `start`; returns where they got to, and the mean loss. `targets`: unset, the family's."""
    base = _load(model_dir, dtype)
    family: str = base.config.model_type
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # annotated int
        target_modules=list(targets or TARGETS[family]),
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).eval()
    factors = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return _train(model, factors, start, steps, optimizer, mu)


def train_all_weights(
    model_dir: Path,
    start: Mapping[str, Tensor],
    steps: Steps,
    optimizer: Optimizer,
    *,
    dtype: torch.dtype,
    mu: float = 0.0,
) -> tuple[dict[str, Tensor], float]:
    """Train every weight of the model from `start`; returns where they got to, and the mean loss."""
    model = _load(model_dir, dtype)
    return _train(model, dict(model.named_parameters()), start, steps, optimizer, mu)


def _load(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """In float64 with the attention that the engine takes, as transformers' eager one has its softmax in float32, and
    with experts one by one, as the grouped kernel knows no float64."""
    eager = dtype == torch.float64 and not torch.cuda.is_available()
    attention = "eager" if eager else "sdpa"
    experts = {"experts_implementation": "eager"} if eager else {}
    kinds = {"attn_implementation": attention, **experts}
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, **kinds).eval()


def _train(
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    start: Mapping[str, Tensor],
    steps: Steps,
    build_optimizer: Optimizer,
    mu: float,
) -> tuple[dict[str, Tensor], float]:
    assert trained.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer, losses = build_optimizer(list(trained.values())), []
    for tokens_BT, lengths_B in zip(*steps, strict=True):
        tokens = torch.from_numpy(tokens_BT[lengths_B > 0]).long()
        padding = torch.arange(tokens.shape[1]) >= torch.from_numpy(lengths_B[lengths_B > 0]).unsqueeze(1)
        loss = _loss(model, tokens, tokens.masked_fill(padding, -100))
        losses.append(loss.item())
        proximal = sum(((trained[name] - before[name]) ** 2).sum() for name in trained)
        (loss + mu / 2 * proximal if mu else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in trained.items()}, float(np.mean(losses))


def _loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """transformers' loss; in float64 the same by hand, as transformers rounds logits to float32 first."""
    if next(model.parameters()).dtype != torch.float64:
        return model(input_ids=tokens, labels=labels).loss
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
