"""Masked language modelling: hidden tokens of packed text, by a model that reads both ways (Devlin et al. 2019).

Legend: B sequences, T tokens a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedpeat_ray.config import DataConfig
from fedpeat_ray.data.batches import IGNORED
from fedpeat_ray.data.corpus import Corpus
from fedpeat_ray.errors import ModelError
from fedpeat_ray.records import Arrays
from fedpeat_ray.tasks.language_modelling import LanguageModelling
from fedpeat_ray.tasks.score import Score
from fedpeat_ray.tasks.task import Batch, label_losses, scored, text_inputs

SHARE = 0.15
"""Of the tokens, that are hidden: each behind the mask token (no others are swapped or kept, unlike BERT)."""


@dataclass(frozen=True)
class MaskedLanguageModelling(LanguageModelling):
    """Sequences as for language modelling; which tokens are hidden is drawn anew in every round, for the evaluation
    once."""

    auto = "AutoModelForMaskedLM"
    about = "masked language modelling: hidden tokens"

    def load(self, config: DataConfig, reader: Any, public: bool = False) -> Corpus:
        """Text, each document with its end token. Raises ModelError for a tokenizer without a mask."""
        if reader.mask_token_id is None:
            raise ModelError(f"the tokenizer of {reader.name_or_path!r} has no mask token")
        return dataclasses.replace(super().load(config, reader, public), mask_id=reader.mask_token_id)

    def prepared(self, corpus: Corpus, batches: Arrays, rng: np.random.Generator) -> Arrays:
        """Hidden tokens, one at least in each row that has any: labels (..., T)."""
        assert corpus.mask_id is not None
        tokens, lengths = batches["tokens"], batches["lengths"][..., None]
        positions, drawn = np.arange(tokens.shape[-1]), rng.random(tokens.shape)
        drawn = np.where(positions < lengths, drawn, 1.0)
        lowest = np.minimum(drawn.min(axis=-1, keepdims=True), 1 - 2**-53)
        hidden = drawn <= np.maximum(SHARE, lowest)
        return {
            **batches,
            "tokens": np.where(hidden, corpus.mask_id, tokens),
            "labels": np.where(hidden, tokens, IGNORED),
        }

    def inputs(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Tokens, and a mask where there is padding."""
        return text_inputs(batch)

    def losses(self, model: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of hidden tokens."""
        inputs = self.inputs(model, batch)
        labels_BT = batch["labels"][:, : inputs["input_ids"].shape[1]]
        return label_losses(model(**inputs).logits, labels_BT).sum(dim=1), (labels_BT != IGNORED).sum(dim=1)

    def score(self, model: Callable, batch: Batch) -> Score:
        """Of hidden tokens."""
        inputs = self.inputs(model, batch)
        labels_BT = batch["labels"][:, : inputs["input_ids"].shape[1]]
        hidden_BT = labels_BT != IGNORED
        return scored(model(**inputs).logits[hidden_BT], labels_BT[hidden_BT])
