"""Classification: what class a text, or an image, is of.

Legend: N examples, B of a batch, T tokens, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fedpeat_ray.config import DataConfig
from fedpeat_ray.data.batches import IGNORED, single_texts
from fedpeat_ray.data.corpus import Corpus, load_corpus
from fedpeat_ray.data.images import ImageFormat, image_format, load_images
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.models.architecture import Head
from fedpeat_ray.records import Arrays
from fedpeat_ray.tasks.score import Score
from fedpeat_ray.tasks.task import Batch, Task, label_losses, padding_tokenizer, scored, text_inputs


@dataclass(frozen=True)
class Classification(Task):
    """Examples with a label each; the model has an output for each class."""

    def head(self, corpus: Corpus) -> Head:
        """An output for each class of the documents."""
        return Head(self.auto, corpus.label_names)

    def losses(self, model: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        """One label an example."""
        return label_losses(model(**self.inputs(model, batch)).logits, batch["labels"]), (
            batch["labels"] != IGNORED
        ).long()

    def score(self, model: Callable, batch: Batch) -> Score:
        """With how often each class (rows) was taken for each (columns)."""
        real_B = batch["labels"] != IGNORED
        logits_BC, labels_B = model(**self.inputs(model, batch)).logits[real_B], batch["labels"][real_B]
        num_classes = logits_BC.shape[1]
        pairs = labels_B * num_classes + logits_BC.argmax(dim=1)
        counts = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
        return scored(logits_BC, labels_B, counts.cpu().numpy())

    def metrics(self, score: Score) -> dict[str, float]:
        """Accuracy, and precision, recall and F1 as means over classes (of those that occur or are guessed)."""
        from sklearn.metrics import precision_recall_fscore_support

        if score.counts is None:  # nothing was guessed
            return {"accuracy": score.token_accuracy}
        actual, guessed = np.nonzero(score.counts)
        often = score.counts[actual, guessed]
        means: Any = precision_recall_fscore_support(
            actual, guessed, average="macro", sample_weight=often, zero_division=0
        )
        names = ("macro_precision", "macro_recall", "macro_f1")
        return {"accuracy": score.token_accuracy} | {
            name: float(value) for name, value in zip(names, means, strict=False)
        }


@dataclass(frozen=True)
class TextClassification(Classification):
    """Documents, cut off where they are too long."""

    auto = "AutoModelForSequenceClassification"
    about = "classification of texts"

    def load(self, config: DataConfig, reader: Any, public: bool = False) -> Corpus:
        """Texts with the special tokens of the model. Raises ConfigError where there are no labels."""
        corpus = load_corpus(config, reader, public=public, one_by_one=True)
        if corpus.label is None and not public:
            raise ConfigError.of("data.label_column", config.label_column, "a column with the class of each text")
        return corpus

    def reader(self, directory: Path) -> PreTrainedTokenizerBase:
        """The tokenizer, with the padding that the model knows."""
        return padding_tokenizer(directory)

    def lengths(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Of the documents."""
        return np.minimum(corpus.num_tokens[np.asarray(documents)], length)

    def rows(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> Arrays:
        """tokens (N, T), and labels (N,) where there are any: a server's texts are of other classes, or of none."""
        rows = single_texts(corpus, documents, length)
        return rows if corpus.label is None else {**rows, "labels": corpus.label[np.asarray(documents)]}

    def inputs(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Tokens, and a mask where there is padding."""
        return text_inputs(batch)


@dataclass(frozen=True)
class ImageClassification(Classification):
    """Images; an example has as many tokens as the model cuts it into patches."""

    format: ImageFormat = field(default_factory=lambda: ImageFormat((3, 224, 224)))
    auto = "AutoModelForImageClassification"
    about = "classification of images"

    def reader(self, directory: Path) -> ImageFormat:
        """Size and scale of the model's images."""
        return image_format(directory)

    def reading(self, reader: ImageFormat) -> Self:
        """With these images."""
        return dataclasses.replace(self, format=reader)

    def fixed_length(self, config: PretrainedConfig) -> int:
        """Patches of an image, and the token that stands for the whole."""
        return (config.image_size // config.patch_size) ** 2 + 1

    def load(self, config: DataConfig, reader: ImageFormat, public: bool = False) -> Corpus:
        """Images with their classes."""
        return load_images(config, reader, public)

    def lengths(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """The same of each."""
        return np.full(len(documents), length, dtype=np.int64)

    def rows(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> Arrays:
        """pixels (N, C, H, W) uint8, labels (N,)."""
        assert corpus.label is not None and corpus.image_shape is not None
        documents = np.asarray(documents)
        pixels = np.asarray(corpus.tokens).reshape(-1, *corpus.image_shape)[documents]
        lengths = self.lengths(corpus, documents, length)
        return {"pixels": pixels, "lengths": lengths, "labels": corpus.label[documents]}

    def inputs(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Pixels on the scale that the model was pre-trained on."""
        pixels, scale = batch["pixels"], (self.format.mean, self.format.std)
        mean, std = (pixels.new_tensor(values).view(1, -1, 1, 1) for values in scale)
        return {"pixel_values": (pixels / 255 - mean) / std}
