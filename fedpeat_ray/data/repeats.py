"""Text that comes again: which documents are, for the most part, pieced together from others.

Documents are compared by their grams, runs of 13 words, as contamination is found by Brown et al. 2020
("Language Models are Few-Shot Learners", appendix C). A document is a repeat if more than a share of its
grams occur in documents kept before it, in whichever of them. So a docstring pieced together from three
others is found; a comparison of pairs (MinHash for Jaccard similarity) does not see it. And as every
document is compared with all that is kept before it, the share is a bound that holds for what is kept.

Shapes: D documents, M grams of all documents.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np

NUM_WORDS = 13
MOST_REPEATED = 0.2
"""Share of a document's grams that others may have (docs/data.md says how it was chosen)."""

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: no power of it is 0 modulo 2**64


@dataclass(frozen=True)
class Grams:
    """Hashes of runs of words; those of document d are `hashes[offsets[d] : offsets[d + 1]]`, at least one."""

    hashes: np.ndarray
    """(M,) uint64."""
    offsets: np.ndarray
    """(D + 1,) int64."""

    def of(self, documents: np.ndarray) -> Grams:
        """Those of some documents, given by a mask (D,)."""
        num_grams = np.diff(self.offsets)
        offsets = np.concatenate([[0], np.cumsum(num_grams[documents])])
        return Grams(self.hashes[np.repeat(documents, num_grams)], offsets)

    def share_in(self, hashes: np.ndarray) -> np.ndarray:
        """(D,) the share of each document's grams that are among `hashes`."""
        hits = np.concatenate([[0], np.cumsum(np.isin(self.hashes, hashes))])
        return (hits[self.offsets[1:]] - hits[self.offsets[:-1]]) / np.diff(self.offsets)


def grams_of(texts: list[str]) -> Grams:
    """The grams of each text: of its words, in lower case, without what is between them.

    A text of fewer than 13 words is one gram of all its words; one without words is a gram as it stands.
    """
    number_of: dict[str, int] = {}
    pieces: list[np.ndarray] = []
    for text in texts:
        words = _WORD.findall(text.lower()) or [text]
        pieces.append(np.array([number_of.setdefault(word, len(number_of)) for word in words], dtype=np.int32))
    hash_of = np.array([_hash(word) for word in number_of], dtype=np.uint64)
    counts = np.array([len(piece) for piece in pieces], dtype=np.int64)
    return _runs(hash_of[np.concatenate(pieces)] if pieces else hash_of, counts)


def repeats(grams: Grams, heldout: np.ndarray, may_go: np.ndarray, most: float = MOST_REPEATED) -> np.ndarray:
    """(D,) bool: the repeats among the documents, those to train on first and then those held out.

    So no held-out document that is kept has more than the share `most` of its grams in what is trained on.

    Args:
        grams: of the documents.
        heldout: (D,) bool, kept for evaluation.
        may_go: (D,) bool; another document is kept whatever it repeats.
        most: share of a document's grams that others may have.
    """
    _, ids = np.unique(grams.hashes, return_inverse=True)
    seen = np.zeros(len(ids), dtype=bool)
    gone = np.zeros(len(heldout), dtype=bool)
    for d in np.argsort(heldout, kind="stable"):
        own = ids[grams.offsets[d] : grams.offsets[d + 1]]
        gone[d] = may_go[d] and seen[own].mean() > most
        seen[own] |= not gone[d]
    return gone


def private_text(public: Grams, private: Grams, private_heldout: np.ndarray) -> np.ndarray:
    """(D,) bool: the public documents that are private text.

    They have more than `MOST_REPEATED` of their grams in private documents; or they have, in a longer text,
    grams of a held-out private document of which all the others together would show more than that.
    """
    gone = public.share_in(private.hashes) > MOST_REPEATED
    heldout = private.of(private_heldout)
    shown = heldout.share_in(public.of(~gone).hashes) > MOST_REPEATED
    return gone | (public.share_in(heldout.of(shown).hashes) > 0)


def _runs(word_hashes: np.ndarray, num_words: np.ndarray) -> Grams:
    """Polynomial hashes, modulo 2**64, of the runs of words that lie in one document."""
    num_grams = np.maximum(num_words - NUM_WORDS + 1, 1)
    offsets = np.concatenate([[0], np.cumsum(num_grams)])
    stops = np.cumsum(num_words)
    first = np.arange(offsets[-1]) + np.repeat(stops - num_words - offsets[:-1], num_grams)
    stop = np.repeat(stops, num_grams)
    padded = np.concatenate([word_hashes, np.zeros(NUM_WORDS, dtype=np.uint64)])
    hashes = np.zeros(len(first), dtype=np.uint64)
    for k in range(NUM_WORDS):
        hashes = hashes * _FACTOR + np.where(first + k < stop, padded[first + k], np.uint64(0))
    return Grams(hashes, offsets)


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
