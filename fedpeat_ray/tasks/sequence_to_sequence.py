"""Sequence to sequence: what to write for a text, by an encoder with a decoder.

Legend: N examples, B of a batch, T tokens of a text, U tokens of a target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedpeat_ray.config import DataConfig
from fedpeat_ray.data.batches import IGNORED, single_texts
from fedpeat_ray.data.corpus import Corpus, load_corpus
from fedpeat_ray.models.architecture import TARGET_LENGTH
from fedpeat_ray.records import Arrays
from fedpeat_ray.tasks.score import Score
from fedpeat_ray.tasks.task import Batch, Task, label_losses, padding_tokenizer, scored, text_inputs


@dataclass(frozen=True)
class SequenceToSequence(Task):
    """A text to be read and one to be written: `data.target_column`, or the name of the class."""

    auto = "AutoModelForSeq2SeqLM"
    metric = "exact_match"
    about = "sequence to sequence"

    def reader(self, directory: Path) -> PreTrainedTokenizerBase:
        """The tokenizer, with the padding that the model knows."""
        return padding_tokenizer(directory)

    def load(self, config: DataConfig, reader: Any, public: bool = False) -> Corpus:
        """Texts, and targets behind them."""
        return load_corpus(config, reader, public=public, one_by_one=True, with_targets=True)

    def lengths(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Of the texts to be read, which the decoder looks at too."""
        assert corpus.num_source is not None
        return np.minimum(corpus.num_source[np.asarray(documents)], length)

    def rows(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> Arrays:
        """tokens (N, T), labels (N, U)."""
        targets = single_texts(corpus, documents, TARGET_LENGTH, target=True)
        padding = np.arange(TARGET_LENGTH) >= targets["lengths"][:, None]
        return {**single_texts(corpus, documents, length), "labels": np.where(padding, IGNORED, targets["tokens"])}

    def inputs(self, model: Any, batch: Batch) -> dict[str, Any]:
        """The text to be read, and of what is to be written each token's predecessor."""
        config, before_BU = model.config, batch["labels"].roll(1, dims=1)
        start = config.pad_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
        before_BU = before_BU.masked_fill(before_BU == IGNORED, start)
        before_BU[:, 0] = start
        return {**text_inputs(batch), "decoder_input_ids": before_BU}

    def losses(self, model: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of the target's tokens, each after those before it."""
        labels_BU, logits_BUV = batch["labels"], model(**self.inputs(model, batch)).logits
        return label_losses(logits_BUV, labels_BU).sum(dim=1), (labels_BU != IGNORED).sum(dim=1)

    def score(self, model: Callable, batch: Batch) -> Score:
        """With how many targets are written as they are, and of how many.

        If each token of a target is the likeliest after those before it, then greedy decoding writes this target.
        """
        labels_BU = batch["labels"]
        wanted_BU = labels_BU != IGNORED
        logits_BUV = model(**self.inputs(model, batch)).logits
        right_B = ((logits_BUV.argmax(dim=-1) == labels_BU) | ~wanted_BU).all(dim=1) & wanted_BU.any(dim=1)
        counts = np.array([int(right_B.sum()), int(wanted_BU.any(dim=1).sum())])
        return scored(logits_BUV[wanted_BU], labels_BU[wanted_BU], counts)

    def metrics(self, score: Score) -> dict[str, float]:
        """Exact match under greedy decoding, and perplexity and accuracy by token."""
        exact = 0.0 if score.counts is None else float(score.counts[0] / score.counts[1])
        return {"exact_match": exact, "perplexity": score.perplexity, "token_accuracy": score.token_accuracy}
