"""From documents to sequences and batches: packing, shuffling, padding.

Documents are put one after the other, each with its end token, and cut into sequences of one length,
so no compute is spent on padding. What padding there is has length 0 or lies past a row's length, and
counts no tokens: a row of length n has n - 1 tokens to predict.

Shapes: N sequences, S steps, B sequences a batch, T tokens a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedpeat_ray.config import LocalConfig
from fedpeat_ray.data.corpus import Corpus
from fedpeat_ray.errors import DataError
from fedpeat_ray.records import Arrays
from fedpeat_ray.seeding import generator

IGNORED = -100
"""The label of what is not to be predicted."""


def client_sequences(
    corpus: Corpus, documents: Sequence[int] | np.ndarray, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The documents, in the order given, packed into sequences.

    The last sequence is padded with the end token. If it would be a single token, which predicts
    nothing, it is left out; but there is always at least one sequence.

    Returns tokens_NT int64 and lengths_N int64, the tokens of each sequence that are not padding.
    """
    stored = np.asarray(corpus.tokens)  # slices of a memory map are slow as such
    documents = np.asarray(documents)
    starts, stops = corpus.offsets[documents].tolist(), corpus.offsets[documents + 1].tolist()
    pieces = [stored[start:stop] for start, stop in zip(starts, stops, strict=True)]
    tokens = np.concatenate(pieces) if pieces else stored[:0]
    lengths_N = sequence_lengths(len(tokens), sequence_length)
    tokens = tokens[: lengths_N.sum()]
    tokens_NT = np.full((len(lengths_N), sequence_length), corpus.eos_id, dtype=np.int64)
    tokens_NT.ravel()[: len(tokens)] = tokens
    return tokens_NT, lengths_N


def sequence_lengths(num_tokens: int, sequence_length: int) -> np.ndarray:
    """Lengths (N,) of the sequences into which so many tokens are packed (see `client_sequences`)."""
    num_sequences = max(1, math.ceil((num_tokens - 1) / sequence_length))
    lengths_N = np.full(num_sequences, sequence_length, dtype=np.int64)
    lengths_N[-1] = min(num_tokens - (num_sequences - 1) * sequence_length, sequence_length)
    return lengths_N


def single_texts(corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int, target: bool = False) -> Arrays:
    """The documents, or with `target` what is to be written for them, a row each: tokens (N, length) and lengths (N,).

    Those that are longer are cut off, but keep their last token if the tokenizer puts it there.
    """
    documents = np.asarray(documents)
    starts, stops = corpus.offsets[documents], corpus.offsets[documents + 1]
    if corpus.num_source is not None:
        between = starts + corpus.num_source[documents]
        starts, stops = (between, stops) if target else (starts, between)
    stored = np.asarray(corpus.tokens)
    lengths_N = np.minimum(stops - starts, length)
    tokens_NT = np.full((len(documents), length), corpus.pad_id, dtype=np.int64)
    for row, start, stop, kept in zip(tokens_NT, starts.tolist(), stops.tolist(), lengths_N.tolist(), strict=True):
        row[:kept] = stored[start : start + kept]
        if corpus.keeps_end:
            row[kept - 1] = stored[stop - 1]
    return {"tokens": tokens_NT, "lengths": lengths_N}


def num_steps(num_sequences: int, local: LocalConfig) -> int:
    """Optimizer steps of a client: min(max_steps, ceil(epochs * num_sequences / batch_size)), at least 1."""
    steps = local.epochs * num_sequences / local.batch_size
    return max(1, math.ceil(min(local.max_steps, steps - 1e-9)))  # 0.1 * 30 is 3, and not just above it


def client_batches(rows: Arrays, num_steps: int, batch_size: int, rng: np.random.Generator) -> Arrays:
    """The batches of `num_steps` steps, in the order of `batch_order`; rows of length 0 fill up what it leaves free.

    From arrays (N, ...) of examples, arrays (S, B, ...).
    """
    order_SB = batch_order(len(rows["lengths"]), num_steps, batch_size, rng)
    num_rows, batches = order_SB.shape[1], {}
    for name, array in rows.items():
        empty = IGNORED if name == "labels" else 0
        batches[name] = np.full((num_steps, batch_size, *array.shape[1:]), empty, array.dtype)
        batches[name][:, :num_rows] = array[order_SB]
    return batches


def batch_order(num_sequences: int, num_steps: int, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Which sequences each step has (S, min(batch_size, N)): pass after pass over all, each pass in a new order.

    A batch that a pass cannot fill goes on with the next pass, beginning with sequences it does not
    have yet. With fewer sequences than `batch_size`, every batch is one pass. So no sequence counts twice in a
    step, and after k passes each has counted k times.
    """
    num_rows = min(batch_size, num_sequences)
    order = rng.permutation(num_sequences)
    while len(order) < num_steps * num_rows:
        begun = order[len(order) // num_rows * num_rows :]
        fresh = rng.permutation(num_sequences)
        repeats = np.isin(fresh, begun)
        order = np.concatenate([order, fresh[~repeats], fresh[repeats]])
    return order[: num_steps * num_rows].reshape(num_steps, num_rows)


def heldout_order(corpus: Corpus, seed: int) -> np.ndarray:
    """The held-out documents in an order in which every group has its share.

    Documents of a group, in random order, are spread evenly over (0, 1), each group with an offset
    of its own; in the order of these positions every prefix is proportional over groups.

    Raises DataError if nothing is held out.
    """
    documents = np.flatnonzero(corpus.heldout)
    if not len(documents):
        raise DataError("no document is held out, so nothing can be evaluated")
    rng = generator(seed, "held-out sample")
    documents = rng.permutation(documents)
    documents = documents[np.argsort(corpus.group[documents], kind="stable")]
    sizes_G = np.bincount(corpus.group[documents], minlength=len(corpus.group_names))
    offset_G = rng.random(len(sizes_G))
    group = corpus.group[documents]
    rank = np.arange(len(documents)) - (np.cumsum(sizes_G) - sizes_G)[group]
    return documents[np.argsort((rank + offset_G[group]) / sizes_G[group], kind="stable")]


def enough_documents(corpus: Corpus, documents: np.ndarray, num_tokens: int) -> np.ndarray:
    """The first of these documents, as many as have so many tokens together."""
    return documents[: np.searchsorted(np.cumsum(corpus.num_tokens[documents]), num_tokens) + 1]


def heldout_sequences(
    corpus: Corpus, num_sequences: int, sequence_length: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A fixed sample of held-out text in which every group has its share (see `heldout_order`).

    Returns tokens_NT and lengths_N as `client_sequences`; fewer than `num_sequences` if the text ends.
    Raises DataError if nothing is held out.
    """
    return first_sequences(corpus, heldout_order(corpus, seed), num_sequences, sequence_length)


def first_sequences(
    corpus: Corpus, documents: np.ndarray, num_sequences: int, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first so many of the sequences that `client_sequences` gives."""
    documents = enough_documents(corpus, documents, num_sequences * sequence_length)
    tokens_NT, lengths_N = client_sequences(corpus, documents, sequence_length)
    return tokens_NT[:num_sequences], lengths_N[:num_sequences]
