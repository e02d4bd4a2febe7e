"""Which documents a run may read: those of one side, without repeats and without text of the other side.

Held-out text is worth something only if nothing like it is trained on, be it by a device or by the
server. So what repeats other documents is left out, and public text that is private text too. docs/data.md
says what is removed of python_docs, and with what effect.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fedpeat_ray.config import DataConfig
from fedpeat_ray.data import hub, python_docs
from fedpeat_ray.data.repeats import MOST_REPEATED, NUM_WORDS, grams_of, private_text, repeats
from fedpeat_ray.errors import ConfigError, DataError
from fedpeat_ray.files import sha256_of, user_cache_dir, written_whole

PYTHON_DOCS = "python_docs"

_CACHE_VERSION = 1  # part of the cache key: raise it when other documents are left out


@dataclass(frozen=True)
class Removed:
    """How many documents of a side are left out, by why."""

    equal: int = 0
    """Their text is that of an earlier one (hub and local data; python_docs is extracted without)."""
    repeated_training: int = 0
    """Documents to train on that for the most part repeat others (data/repeats.py)."""
    repeated_heldout: int = 0
    """Held-out documents that do."""
    private: int = 0
    """Public documents that are text of the private side."""

    @property
    def total(self) -> int:
        """All together."""
        return self.equal + self.repeated_training + self.repeated_heldout + self.private

    def __str__(self) -> str:
        counts = {
            "equal to others": self.equal,
            "repeats to train on": self.repeated_training,
            "held-out repeats": self.repeated_heldout,
            "private text": self.private,
        }
        return ", ".join(f"{count} {why}" for why, count in counts.items() if count) or "none"


def load_documents(
    config: DataConfig, *, public: bool = False, cache_dir: Path | None = None
) -> tuple[pa.Table, Removed]:
    """The private documents (or those of the server) as a table with hub.SCHEMA, and how many were left out.

    All hub and local data of `config.name` is private, and the server has the text of `config.public_name`; of
    python_docs, under either name, each side has its half. Those halves are disjoint by construction; otherwise
    public documents that are private text are left out. The label of python_docs is the package.

    Raises DataError if there is no such text, or nothing of it is left to train on or held out; ConfigError
    if whole sources of python_docs are to be held out.
    """
    if not public:
        return _private(config, cache_dir)
    name = config.public_name or config.name
    if name != PYTHON_DOCS and config.public_name is None:
        raise DataError(
            f"data.name = {name!r} has no public part: name the server's text by data.public_name, or "
            "let nothing learn from it (--emulator.weights foundation, --proxy.steps 0)"
        )
    if name == config.name == PYTHON_DOCS:
        return _half(public=True, cache_dir=cache_dir)
    return _public(config, cache_dir)


def _private(config: DataConfig, cache_dir: Path | None) -> tuple[pa.Table, Removed]:
    if config.name == PYTHON_DOCS:
        if config.heldout_by == "source":
            allowed = "'document' with data.name = 'python_docs', of which documents of every source are held out"
            raise ConfigError.of("data.heldout_by", "source", allowed)
        return _half(public=False, cache_dir=cache_dir)
    table, num_equal = hub.load(config)
    table, removed = _sifted(table, Removed(equal=num_equal), None, cache_dir)
    if not table["heldout"].to_numpy().any():
        raise DataError(
            f"data.name = {config.name!r} has nothing left to hold out: of each held-out document, "
            f"{removed.repeated_heldout} in all, more than {MOST_REPEATED:.0%} is in documents to train on"
        )
    return table, removed


def _public(config: DataConfig, cache_dir: Path | None) -> tuple[pa.Table, Removed]:
    if config.public_name == PYTHON_DOCS:
        table, removed = _half(public=True, cache_dir=cache_dir)
    else:
        assert config.public_name is not None
        named = dataclasses.replace(config, name=config.public_name, heldout_by="document")
        table, num_equal = hub.load(named, "data.public_name")
        removed = Removed(equal=num_equal)
    if config.name == PYTHON_DOCS:
        private = python_docs.load_all(cache_dir)
        private = private.filter(~private["public"].to_numpy())
    else:
        private, _ = hub.load(config)
    num_documents = table.num_rows
    table, removed = _sifted(table, removed, private, cache_dir, keep_training=config.public_name == PYTHON_DOCS)
    if table["heldout"].to_numpy().all():
        raise DataError(
            f"data.public_name = {config.public_name!r} has nothing left to train on: {removed.private} of its "
            f"{num_documents} documents are text of data.name = {config.name!r}"
        )
    return table, removed


def _half(public: bool, cache_dir: Path | None) -> tuple[pa.Table, Removed]:
    """The public or the private part of python_docs."""
    table = python_docs.load_all(cache_dir)
    table = table.filter(table["public"].to_numpy() == public)
    heldout, repeat = table["heldout"].to_numpy(), table["repeat"].to_numpy()
    removed = Removed(repeated_training=int((repeat & ~heldout).sum()), repeated_heldout=int((repeat & heldout).sum()))
    table = table.filter(~repeat).rename_columns({"package": "label"})
    table = table.append_column("target", pa.nulls(table.num_rows, pa.string()))
    return table.select(hub.SCHEMA.names), removed


def _sifted(
    table: pa.Table,
    removed: Removed,
    private: pa.Table | None,
    cache_dir: Path | None,
    keep_training: bool = False,
) -> tuple[pa.Table, Removed]:
    """The table without private text (if there is any to compare with) and then without repeats.

    What goes is cached by all that it depends on: hashing takes about a second per 10 MB of text.
    """
    tables = [table] if private is None else [table, private]
    texts = [part["text"].to_pylist() for part in tables]
    marks = [part["heldout"].to_numpy() for part in tables]
    heldout = marks[0]
    facts = (_CACHE_VERSION, NUM_WORDS, MOST_REPEATED, keep_training, len(heldout))
    key = sha256_of(
        [repr(facts), *(mark.tobytes().hex() for mark in marks), *(text for part in texts for text in part)]
    )
    path = (cache_dir or user_cache_dir()) / f"repeats-{key[:16]}.npy"
    if path.exists():
        is_private, is_repeat = np.load(path, allow_pickle=False)
    else:
        grams = grams_of(texts[0])
        is_private, is_repeat = np.zeros((2, len(heldout)), dtype=bool)
        if private is not None:
            is_private = private_text(grams, grams_of(texts[1]), marks[1])
        rest = ~is_private
        is_repeat[rest] = repeats(grams.of(rest), heldout[rest], may_go=(heldout | (not keep_training))[rest])
        with written_whole(path) as part, part.open("wb") as file:
            np.save(file, np.stack([is_private, is_repeat]))
    removed = dataclasses.replace(
        removed,
        private=int(is_private.sum()),
        repeated_training=removed.repeated_training + int((is_repeat & ~heldout).sum()),
        repeated_heldout=removed.repeated_heldout + int((is_repeat & heldout).sum()),
    )
    return table.filter(~(is_private | is_repeat)), removed
