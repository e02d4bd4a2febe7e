"""How much held-out text of python_docs is also in what is trained on, before and after repeats are left out.

python workloads/check_data.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tyro
from rich import print
from rich.table import Table

from fedpeat_ray.config import DataConfig
from fedpeat_ray.data import python_docs
from fedpeat_ray.data.corpus import load_corpus
from fedpeat_ray.data.repeats import Grams, grams_of, repeats
from fedpeat_ray.models import foundation as foundations

THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0)


@dataclass(frozen=True)
class Text:
    """All documents of python_docs, repeats too."""

    public: np.ndarray
    """(D,) bool."""
    heldout: np.ndarray
    """(D,) bool."""
    repeat: np.ndarray
    """(D,) bool: not used by runs."""
    num_chars: np.ndarray
    """(D,) int64."""
    grams: Grams

    def share_in(self, documents: np.ndarray, others: np.ndarray) -> tuple[float, float]:
        """Of the grams of some documents (a mask), the share that others have, and the largest of a document."""
        of_documents = self.grams.of(documents)
        share_D = of_documents.share_in(self.grams.of(others).hashes)
        return float(np.average(share_D, weights=np.diff(of_documents.offsets))), float(share_D.max())


def read() -> Text:
    """The text that is installed here."""
    table = python_docs.load_all()
    public, heldout, repeat = (table[name].to_numpy() for name in ("public", "heldout", "repeat"))
    texts = table["text"].to_pylist()
    return Text(public, heldout, repeat, np.array(list(map(len, texts))), grams_of(texts))


def sides(text: Text) -> Table:
    """Documents, characters and grams of both sides, before and after."""
    table = Table("", "documents", "characters", "held-out 13-word grams in training text", "most of a document")
    for name, side in (("public", text.public), ("private", ~text.public)):
        for when, kept in (("before", text.repeat | True), ("after", ~text.repeat)):
            training, heldout = side & kept & ~text.heldout, side & kept & text.heldout
            share, most = text.share_in(heldout, training)
            for split, documents in (("training", training), ("held-out", heldout)):
                row = [f"{documents.sum():,}", f"{text.num_chars[documents].sum():,}"]
                row += [f"{share:.2%}", f"{most:.0%}"] if split == "held-out" else ["", ""]
                table.add_row(f"{name}, {split}, {when}", *row)
    return table


def across(text: Text) -> Table:
    """What the sides have in common, after."""
    table = Table("of", "in", "13-word grams", "most of a document", "documents of more than 20 %")
    used = ~text.repeat
    public, private = used & text.public, used & ~text.public
    for names, (documents, others) in {
        ("private held-out", "public training"): (private & text.heldout, public & ~text.heldout),
        ("public training", "private held-out"): (public & ~text.heldout, private & text.heldout),
    }.items():
        share, most = text.share_in(documents, others)
        count = (text.grams.of(documents).share_in(text.grams.of(others).hashes) > 0.2).sum()
        table.add_row(*names, f"{share:.2%}", f"{most:.0%}", f"{count} of {documents.sum():,}")
    return table


def thresholds(text: Text) -> Table:
    """Private text for other values of `repeats.MOST_REPEATED`."""
    table = Table(
        "threshold", "training left out", "characters", "held-out left out", "characters", "grams in training"
    )
    private = ~text.public
    heldout, num_chars, grams = text.heldout[private], text.num_chars[private], text.grams.of(private)
    for most in THRESHOLDS:
        gone = repeats(grams, heldout, may_go=heldout | True, most=most)
        share = []
        for split in (~heldout, heldout):
            chars = num_chars[gone & split].sum() / num_chars[split].sum()
            share += [f"{(gone & split).sum():,}", f"{chars:.1%}"]
        kept = grams.of(~gone & heldout)
        in_training = kept.share_in(grams.of(~gone & ~heldout).hashes)
        table.add_row(f"{most:g}", *share, f"{np.average(in_training, weights=np.diff(kept.offsets)):.2%}")
    return table


def tokens() -> Table:
    """Documents and tokens that runs on the embedded foundations read."""
    table = Table("", "documents", "tokens")
    tokenizer = foundations.load_tokenizer(foundations.model_dir("pydoc-base"))
    for name, public in (("public", True), ("private", False)):
        corpus = load_corpus(DataConfig(), tokenizer, public=public)
        for split, documents in (("training", ~corpus.heldout), ("held-out", corpus.heldout)):
            table.add_row(f"{name}, {split}", f"{documents.sum():,}", f"{corpus.num_tokens[documents].sum():,}")
    return table


def main() -> None:
    """Print the tables of docs/data.md."""
    text = read()
    for table in (sides(text), across(text), thresholds(text), tokens()):
        print(table)


if __name__ == "__main__":
    tyro.cli(main)
