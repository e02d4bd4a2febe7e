"""Language modelling: the next token of packed text, by a model that reads from left to right.

Legend: B sequences, T tokens a sequence, M predicted tokens, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedpeat_ray.config import DataConfig
from fedpeat_ray.data.batches import IGNORED, client_sequences, enough_documents, sequence_lengths
from fedpeat_ray.data.corpus import Corpus, load_corpus
from fedpeat_ray.models.foundation import plain_head
from fedpeat_ray.records import Arrays
from fedpeat_ray.tasks.score import Score
from fedpeat_ray.tasks.task import Batch, Task, label_losses, scored

HEAD_LOGITS = {"cpu": 2**20, "cuda": 2**26}  # logits that exist at one time: on a CPU, what its cache holds


@dataclass(frozen=True)
class LanguageModelling(Task):
    """Documents are put one after the other and cut into sequences (data/batches.py)."""

    auto = "AutoModelForCausalLM"
    metric = "perplexity"
    higher_is_better = False
    self_supervised = True
    about = "language modelling: the next token"

    def load(self, config: DataConfig, reader: Any, public: bool = False) -> Corpus:
        """Text, each document with its end token."""
        return load_corpus(config, reader, public=public)

    def lengths(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Of the sequences."""
        documents = np.asarray(documents)
        return sequence_lengths(int((corpus.offsets[documents + 1] - corpus.offsets[documents]).sum()), length)

    def rows(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> Arrays:
        """Sequences: tokens (N, T)."""
        return dict(zip(("tokens", "lengths"), client_sequences(corpus, documents, length), strict=True))

    def enough(self, corpus: Corpus, documents: np.ndarray, num_rows: int, length: int) -> np.ndarray:
        """By their tokens."""
        return enough_documents(corpus, documents, num_rows * length)

    def inputs(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Rows are padded on the right and attention is causal, so padding needs no mask."""
        return {"input_ids": batch["tokens"], "use_cache": False}

    def losses(self, model: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of next tokens, without the logits of others if that can be."""
        labels_BT = next_token_labels(batch["tokens"], batch["lengths"])
        counts_B = (labels_BT != IGNORED).sum(dim=1)
        if (head_VD := frozen_head(model)) is not None:
            assert isinstance(model, PreTrainedModel)
            hidden_BTD = model.base_model(**self.inputs(model, batch)).last_hidden_state
            return _FrozenHeadLoss.apply(hidden_BTD, head_VD, labels_BT), counts_B
        logits_BTV = model(**self.inputs(model, batch)).logits
        return label_losses(logits_BTV, labels_BT).sum(dim=1), counts_B

    def score(self, model: Callable, batch: Batch) -> Score:
        """Of all next tokens."""
        return score_of(model_logits(model), batch)

    def metrics(self, score: Score) -> dict[str, float]:
        """Perplexity, and the share of next tokens guessed."""
        return {"perplexity": score.perplexity, "token_accuracy": score.token_accuracy}


LANGUAGE_MODELLING = LanguageModelling()


def next_token_labels(tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Labels (..., B, T): the token after each position, IGNORED at the last valid one and in padding."""
    positions = torch.arange(tokens_BT.shape[-1], device=tokens_BT.device)
    shifted = tokens_BT.roll(-1, dims=-1)
    return shifted.masked_fill(positions >= lengths_B.unsqueeze(-1) - 1, IGNORED)


def frozen_head(model: Callable) -> Tensor | None:
    """The output layer (V, D) where logits are hidden states times its transpose, and it is not trained."""
    head = plain_head(model) if isinstance(model, PreTrainedModel) else None
    return None if head is None or head.requires_grad else head


def model_logits(model: Callable) -> Callable[[Tensor, Tensor], Tensor]:
    """Gives `logits(tokens_BT, wanted) -> (M, V)`: of the wanted positions, a mask (B T,), without the others' if that
    can be."""

    def logits(tokens_BT: Tensor, wanted: Tensor) -> Tensor:
        if (head_VD := frozen_head(model)) is not None:
            assert isinstance(model, PreTrainedModel)
            hidden = model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
            return hidden.flatten(0, 1)[wanted] @ head_VD.T
        return model(input_ids=tokens_BT, use_cache=False).logits.flatten(0, 1)[wanted]

    return logits


def score_of(logits: Callable[[Tensor, Tensor], Tensor], batch: Batch) -> Score:
    """The score of anything that gives logits (M, V) for tokens (B, T) and a mask (B T,) of M wanted positions."""
    labels = next_token_labels(batch["tokens"], batch["lengths"]).flatten()
    wanted = labels != IGNORED
    found = logits(batch["tokens"], wanted)
    return scored(found, labels[wanted].to(found.device))


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed next-token losses of each sequence under a frozen head, a chunk of rows of logits at a time.

    The gradient of the hidden states is worked out on the way, so no logits are kept: B T V floats
    would be most of the memory of a step.
    """

    @staticmethod
    def forward(ctx, hidden_BTD, head_VD, labels_BT):
        hidden, labels = hidden_BTD.flatten(0, 1), labels_BT.flatten()
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        grad = torch.zeros_like(hidden) if hidden_BTD.requires_grad else None
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
            ctx.save_for_backward(grad.view_as(hidden_BTD))
        return loss.view(labels_BT.shape).sum(dim=1)

    @staticmethod
    def backward(ctx, grad_B):  # type: ignore[override]  # torch annotates any number of gradients
        (grad_BTD,) = ctx.saved_tensors
        return grad_BTD * grad_B.to(grad_BTD.dtype)[:, None, None], None, None
