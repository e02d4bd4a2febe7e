"""What the embedded foundations are worth: held-out perplexity, and whether the blocks of each matter.

python workloads/check_foundation.py [--num-sequences 128]
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import tyro
from rich import print
from rich.table import Table
from transformers import PreTrainedModel

from fedpeat_ray.config import DataConfig
from fedpeat_ray.data.batches import heldout_sequences
from fedpeat_ray.data.corpus import load_corpus
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.records import sequences
from fedpeat_ray.training.evaluation import EvaluateWeights, ScoreSum, evaluation_tasks

NUM_END_BLOCKS = 2  # at each end, of those that are never left out
SEQUENCE_LENGTH = 256


@dataclass(frozen=True)
class Quality:
    """Held-out perplexities of one model."""

    public: float
    private: float
    private_half_middle: float
    """With every second middle block left out."""


def quality(name: str, num_sequences: int) -> Quality:
    """Measure an embedded model on held-out public and private text."""
    foundation = foundations.prepare(name, "float32")
    model = foundations.load(foundation)
    private = heldout_text(foundation, num_sequences, public=False)
    return Quality(
        perplexity(model, *heldout_text(foundation, num_sequences, public=True)),
        perplexity(model, *private),
        perplexity(half_middle(model), *private),
    )


def heldout_text(
    foundation: foundations.Foundation, num_sequences: int, *, public: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (N, T) of one side of the embedded text, and the length of each sequence."""
    corpus = load_corpus(DataConfig(), foundations.load_tokenizer(foundation.config_dir), public=public)
    return heldout_sequences(corpus, num_sequences, SEQUENCE_LENGTH, seed=0)


def perplexity(model: PreTrainedModel, tokens_NT: np.ndarray, lengths_N: np.ndarray) -> float:
    layout = foundations.weights_layout(model)
    weights_P = layout.flatten(dict(model.named_parameters()))
    tasks = evaluation_tasks("all", sequences(tokens_NT, lengths_N))
    scores = EvaluateWeights(layout)(foundations.Backbone(model, model), weights_P, tasks)
    return ScoreSum().add(scores).result()["all"].perplexity


def half_middle(model: PreTrainedModel) -> PreTrainedModel:
    """The model without every second block between its ends."""
    shorter = copy.deepcopy(model)
    name = foundations.block_list_name(shorter)
    blocks = shorter.get_submodule(name)
    num_blocks = len(list(blocks.children()))
    first, last = NUM_END_BLOCKS, num_blocks - NUM_END_BLOCKS
    kept = [i for i in range(num_blocks) if not (first <= i < last and (i - first) % 2)]
    shorter.set_submodule(name, foundations.block_view(blocks, kept))
    return shorter


def main(num_sequences: int = 128) -> None:
    """Print the table.

    Args:
        num_sequences: held-out sequences of 256 tokens a figure.
    """
    table = Table("model", "public", "private", "private, half of the middle left out", "ratio")
    found = {name: quality(name, num_sequences) for name in foundations.PAIR}
    for name, q in found.items():
        row = (q.public, q.private, q.private_half_middle, q.private_half_middle / q.private)
        table.add_row(name, *(f"{figure:.2f}" for figure in row))
    print(table)
    base, small = found.values()
    print(f"private perplexity of pydoc-base over that of pydoc-small: {base.private / small.private:.3f}")


if __name__ == "__main__":
    tyro.cli(main)
