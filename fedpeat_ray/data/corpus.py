"""The documents of a run, tokenised once: flat arrays that every process can share without a copy. A document may be
an image too; its tokens are then its pixels.

A corpus is one side of the data: the private text that devices hold, or the public text that a
server has. Keeping them apart means no device can train on public text by mistake.

Shapes: D documents, N tokens of all documents, G groups.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fedpeat_ray.config import DataConfig
from fedpeat_ray.data.documents import Removed, load_documents
from fedpeat_ray.errors import ConfigError, ModelError
from fedpeat_ray.files import sha256_of, user_cache_dir, written_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CACHE_VERSION = 2  # part of the cache key: raise it when what is stored changes
_TEXTS_A_CALL = 4096  # bounds the memory of the tokenizer's own results


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents; document d is `tokens[offsets[d] : offsets[d + 1]]` and ends with `eos_id`."""

    tokens: np.ndarray
    """(N,) uint16, or uint32 for vocabularies of more than 65,536 entries."""
    offsets: np.ndarray
    """(D + 1,) int64."""
    group: np.ndarray
    """(D,) int32 index into `group_names`."""
    group_names: tuple[str, ...]
    """Sources or labels (data.partition.group_by), sorted."""
    heldout: np.ndarray
    """(D,) bool: kept for evaluation."""
    eos_id: int
    """Token that ends a document, and pads sequences."""
    digest: str
    """SHA-256 of texts, groups, held-out marks and tokenizer: the same digest means the same data."""
    removed: Removed = field(default_factory=Removed)
    """Documents that are not among these, by why."""
    label: np.ndarray | None = None
    """(D,) int64 index into `label_names`; None where there are none."""
    label_names: tuple[str, ...] = ()
    """Classes, sorted."""
    num_source: np.ndarray | None = None
    """(D,) int64: so many tokens of a document are to be read, the others to be written; None: no such difference."""
    pad_id: int = 0
    """Token that fills up documents that are not packed."""
    keeps_end: bool = False
    """Whether the last token of a document is one that it is to keep when it is cut off."""
    mask_id: int | None = None
    """Token that stands for one that is to be guessed."""
    image_shape: tuple[int, int, int] | None = None
    """Channels, rows and columns of each image; None: text."""

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def files(self) -> list[Path]:
        """What other processes read the tokens from."""
        return [Path(self.tokens.filename)] if isinstance(self.tokens, np.memmap) and self.tokens.filename else []

    def __getstate__(self) -> dict[str, Any]:
        """To be sent: tokens that are mapped from a file travel as its name."""
        files = self.files
        return self.__dict__ | ({"tokens": files[0]} if files else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        tokens = state.pop("tokens")
        self.__dict__.update(state | ({"_file": tokens} if isinstance(tokens, Path) else {"tokens": tokens}))

    def __getattr__(self, name: str) -> Any:
        """Tokens that came as a file's name are mapped when they are asked for: by then the file is there."""
        if name == "tokens" and "_file" in self.__dict__:
            return mapped(self._file)
        raise AttributeError(name)

    @property
    def num_tokens(self) -> np.ndarray:
        """(D,) int64 tokens of each document, with its end."""
        return np.diff(self.offsets)

    def most_common_group(self, documents: Sequence[int]) -> str:
        """Where most of these come from; of several, the first by name."""
        groups, counts = np.unique(self.group[list(documents)], return_counts=True)
        return self.group_names[groups[counts.argmax()]]


NO_TEXT = Corpus(np.zeros(0, np.uint16), np.zeros(1, np.int64), np.zeros(0, np.int32), (), np.zeros(0, bool), 0, "")
"""No documents."""


def load_corpus(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    public: bool = False,
    cache_dir: Path | None = None,
    one_by_one: bool = False,
    with_targets: bool = False,
) -> Corpus:
    """The private documents of `config.name` (or, with `public`, those a server has), tokenised.

    Tokens are cached by what they depend on, the texts and the tokenizer. Documents may be longer
    than the model's context: packing cuts them (data/batches.py).

    Args:
        one_by_one: documents are not to be packed, so each has the special tokens that the model expects.
        with_targets: each is followed by what is to be written for it, the `target` or else the label.

    Raises DataError if there are no such documents (data/documents.py); ConfigError if the partition needs
    labels and there are none; ModelError if the tokenizer is not a fast one or has no end-of-text token.
    """
    eos_id = tokenizer.eos_token_id
    if not tokenizer.is_fast or not isinstance(eos_id, int):
        raise ModelError(f"the tokenizer of {tokenizer.name_or_path!r} must be a fast one with an end-of-text token")
    table, removed = load_documents(config, public=public, cache_dir=cache_dir)
    names = table["source"].to_pylist() if public else _groups(table, config)
    heldout = table["heldout"].to_numpy()
    texts = table["text"].to_pylist()
    targets = _targets(table, config, public) if with_targets else []
    kind = [f"{one_by_one}", *targets] if one_by_one else []
    key = sha256_of([str(_CACHE_VERSION), _tokenizer_json(tokenizer), *texts, *kind])
    path = (cache_dir or user_cache_dir()) / f"tokens-{key[:16]}.npy"
    tokens, offsets, num_source = _cached_tokens(path, texts, targets, tokenizer, one_by_one)
    return Corpus(
        tokens=tokens,
        offsets=offsets,
        eos_id=eos_id,
        removed=removed,
        num_source=num_source,
        pad_id=eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        keeps_end=one_by_one and tokenizer("a")["input_ids"][-1] in tokenizer.all_special_ids,
        **grouped(names, heldout, table["label"].to_pylist() if one_by_one else None, key),
    )


def grouped(names: list[str], heldout: np.ndarray, labels: list[str | None] | None, key: str) -> dict[str, Any]:
    """The parts of a corpus that say what its documents are, but for their content; `key` is a digest of that. Classes
    are left out where there is none for some document, or nobody asks for them."""
    group_names, group = np.unique(np.asarray(names, dtype=object), return_inverse=True)
    parts: dict[str, Any] = {"group": group.astype(np.int32), "group_names": tuple(group_names), "heldout": heldout}
    if labels is not None and None not in labels:
        label_names, label = np.unique(np.asarray(labels, dtype=object), return_inverse=True)
        parts |= {"label": label.astype(np.int64), "label_names": tuple(label_names)}
        key = sha256_of([key, *map(str, labels)])
    return parts | {"digest": sha256_of([key, *names, *map(str, heldout)])}


def _targets(table: pa.Table, config: DataConfig, public: bool) -> list[str]:
    """(D,) what is to be written for each document; nothing for the server's, where it has none."""
    column = "target" if config.target_column is not None else "label"
    if table[column].null_count and not public:
        allowed = "a column with what is to be written, or data.label_column one with classes to be named"
        raise ConfigError.of("data.target_column", config.target_column, allowed)
    return table[column].fill_null("").to_pylist()


def _groups(table: pa.Table, config: DataConfig) -> list[str]:
    """(D,) the name of each document's group."""
    if config.partition.group_by == "label" and table["label"].null_count:
        if config.partition.kind != "iid":  # iid asks for no groups; they only balance the evaluation
            allowed = f"'source', as the documents have no labels: data.label_column = {config.label_column!r}"
            raise ConfigError.of("data.partition.group_by", "label", allowed)
        return table["source"].to_pylist()
    return table[config.partition.group_by].to_pylist()


def _cached_tokens(
    path: Path, texts: list[str], targets: list[str], tokenizer: PreTrainedTokenizerBase, one_by_one: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Tokens, offsets, and with targets how many tokens of each document are not the target's."""
    offsets_path, source_path = path.with_suffix(".offsets.npy"), path.with_suffix(".source.npy")
    places = [path, offsets_path, *([source_path] if targets else [])]
    if not all(place.exists() for place in places):
        tokens, offsets = tokenise(texts, tokenizer, one_by_one)
        arrays = [tokens, offsets]
        if targets:
            arrays = _side_by_side((tokens, offsets), tokenise(targets, tokenizer, one_by_one))
        for array, place in zip(arrays, places, strict=True):
            with written_whole(place) as part, part.open("wb") as file:
                np.save(file, array)
    source = np.load(source_path, allow_pickle=False) if targets else None
    return mapped(path), np.load(offsets_path, allow_pickle=False), source


def _side_by_side(texts: tuple[np.ndarray, np.ndarray], targets: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """Each text and then its target: tokens, offsets, and the lengths of the texts."""
    pieces = [part[offsets[i] : offsets[i + 1]] for i in range(len(texts[1]) - 1) for part, offsets in (texts, targets)]
    return [np.concatenate(pieces), texts[1] + targets[1], np.diff(texts[1])]


@functools.lru_cache(maxsize=4)
def mapped(path: Path) -> np.memmap:
    """The tokens in a file, of which every process of a node has the same pages."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def tokenise(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, one_by_one: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (N,) and offsets (D + 1,) of the texts, each followed by the end-of-text token; or `one_by_one`, each with
    the tokens that the tokenizer puts around it.

    Fast tokenizers use every core, unless TOKENIZERS_PARALLELISM says otherwise.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    end = [] if one_by_one else [tokenizer.eos_token_id]
    pieces: list[np.ndarray] = []
    for start in range(0, len(texts), _TEXTS_A_CALL):
        batch = texts[start : start + _TEXTS_A_CALL]
        encoded = tokenizer(batch, add_special_tokens=one_by_one, return_attention_mask=False, verbose=False)
        pieces += [np.asarray(ids + end or [tokenizer.eos_token_id], dtype=dtype) for ids in encoded["input_ids"]]
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return np.concatenate(pieces), offsets


def _tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokens depend on; padding and truncation are left out, being the state of earlier calls."""
    backend: Any = tokenizer.backend_tokenizer
    parts = json.loads(backend.to_str())
    parts |= {"padding": None, "truncation": None, "eos_token_id": tokenizer.eos_token_id}
    return json.dumps(parts, sort_keys=True)
