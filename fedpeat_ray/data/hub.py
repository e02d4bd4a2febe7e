"""Your own text: a dataset of the Hugging Face hub, local files of Parquet, CSV, JSON lines or text, or a function.

Hub datasets go through `datasets.load_dataset`, which runs no code of theirs; files are plain
reads. Either becomes one table with SCHEMA, held in memory. Which side it is, private or public, is for
the caller to say (data/documents.py).
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.json as pj
import pyarrow.parquet as pq

from fedpeat_ray import own
from fedpeat_ray.config import DataConfig
from fedpeat_ray.data.python_docs import mark_heldout, mark_heldout_sources
from fedpeat_ray.errors import DataError

SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("label", pa.string()),  # null without data.label_column
        ("heldout", pa.bool_()),
        ("text", pa.string()),
        ("target", pa.string()),  # null without data.target_column
    ]
)


class Document(NamedTuple):
    """What a function of your own gives for data.name: `documents(config: DataConfig) -> Iterable[Document]`."""

    text: str
    source: str = "own"
    """Where it comes from: what dirichlet, by_source, shards and natural group by."""
    label: str | None = None
    target: str | None = None
    """What is to be written for it, where that is the task."""


FORMATS = (".parquet", ".csv", ".jsonl", ".json", ".txt")  # .json: JSON lines too

_BLOCK_BYTES = 2**30  # read at once of CSV and JSON, and the most a line may have; pyarrow counts in 32 bits


def load(config: DataConfig, field: str = "data.name") -> tuple[pa.Table, int]:
    """The documents of `config.name` as a table with SCHEMA, in the order of the files, and how many were equal.

    Documents without text are left out, and so are texts equal to an earlier one: one that is both trained
    on and held out would flatter the evaluation. The share `config.heldout_share` is held out, by
    documents or by whole sources. `field` is the setting that `config.name` comes from.

    Raises DataError, with field, value and what is there, if nothing can be read, a column is missing
    or of the wrong type, or no document is left to train on.
    """
    if own.is_import_path(config.name):
        table = _own(config, field)
    else:
        table = pa.concat_tables(_columns(part, config, name, field) for name, part in tables(config, field))
    rows = table.to_pydict()
    filled = [i for i, text in enumerate(rows["text"]) if text.strip()]
    if not filled:
        raise DataError(f"{field} = {config.name!r} has no text: {table.num_rows} documents, all empty")
    seen: set[str] = set()
    kept = [i for i in filled if not (rows["text"][i] in seen or seen.add(rows["text"][i]))]
    source, label, text, target = ([rows[name][i] for i in kept] for name in ("source", "label", "text", "target"))
    if config.heldout_by == "source":
        heldout = mark_heldout_sources(source, config.heldout_share)
    else:
        heldout = mark_heldout(source, text, config.heldout_share)
    if all(heldout):
        raise DataError(
            f"{field} = {config.name!r} has nothing left to train on: all of its documents, {len(kept)} of "
            f"{len(set(source))} sources, are held out (data.heldout_by = {config.heldout_by!r}, data.heldout_share = "
            f"{config.heldout_share}); in .txt files a blank line ends a document"
        )
    return pa.table([source, label, heldout, text, target], schema=SCHEMA), len(filled) - len(kept)


def tables(config: DataConfig, field: str = "data.name") -> Iterator[tuple[str, pa.Table]]:
    """(name, rows) of each local file, or of the dataset of the hub, that `config.name` names. Raises DataError."""
    path = Path(config.name)
    with contextlib.suppress(RuntimeError):  # nobody has that name
        path = path.expanduser()
    if path.exists():
        paths = _files(path, config.name, field) if path.is_dir() else [_file(path, config.name, field)]
        yield from ((path.stem, _read(path, field)) for path in paths)
    elif config.name.startswith((".", "/", "~")) or path.suffix in FORMATS:
        raise DataError(f"{field} = {config.name!r} is neither a file nor a directory: there is no {path.absolute()}")
    else:
        yield config.name, _load_dataset(config, field)


def _own(config: DataConfig, field: str) -> pa.Table:
    """The documents that a function of the user's gives, as `_columns`."""
    documents = list(own.find(field, config.name, {})(config))
    if not documents or not all(isinstance(document, Document) for document in documents):
        kinds = ", ".join(sorted({type(document).__name__ for document in documents})) or "nothing"
        raise DataError(f"{field} = {config.name!r} gives {kinds}, not documents ({Document.__module__}.Document)")
    texts, sources, labels, targets = zip(*documents, strict=True)
    strings = (("source", sources, pa.string()), ("label", labels, pa.string()), ("text", texts, pa.large_string()))
    strings += (("target", targets, pa.string()),)
    try:
        return pa.table({name: pa.array(values, kind) for name, values, kind in strings})
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"{field} = {config.name!r} gives documents whose parts are no strings: {error}") from error


def _files(directory: Path, name: str, field: str) -> list[Path]:
    """Every file of a supported format below the directory, sorted; hidden ones and `_SUCCESS`-like ones are not."""
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.suffix in FORMATS and path.is_file())
    files = [directory / path for path in sorted(paths) if not any(part[0] in "._" for part in path.parts)]
    if not files:
        raise DataError(f"{field} = {name!r} is a directory without a file to read: {', '.join(FORMATS)}")
    return files


def _file(path: Path, name: str, field: str) -> Path:
    """One file, if its format is supported."""
    if path.suffix not in FORMATS or not path.is_file():
        raise DataError(f"{field} = {name!r} is not a file that can be read: {', '.join(FORMATS)}")
    return path


def _read(path: Path, field: str) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pq.ParquetFile(path).read()
        if path.suffix == ".txt":
            return pa.table({"text": re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))})
        if path.stat().st_size == 0:
            return pa.table({})
        block_bytes = min(path.stat().st_size + 1, _BLOCK_BYTES)
        if path.suffix == ".csv":
            return _read_csv(path, block_bytes)
        return pj.read_json(path, read_options=pj.ReadOptions(block_size=block_bytes))
    except (pa.ArrowException, csv.Error, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        if "straddling" in reason:
            reason = f"a line has more than {_BLOCK_BYTES} bytes"
        raise DataError(f"{field}: {path} cannot be read: {reason}") from error


def _read_csv(path: Path, block_bytes: int) -> pa.Table:
    """Every column as strings, so that a user's id of 007 stays what it is; what is empty is null."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(filter(None, csv.reader(file)), [])
    strings = dict.fromkeys(names, pa.string())
    return pcsv.read_csv(
        path,
        pcsv.ReadOptions(block_size=block_bytes),
        pcsv.ParseOptions(newlines_in_values=True),
        pcsv.ConvertOptions(column_types=strings, null_values=[""], strings_can_be_null=True),
    )


def _load_dataset(config: DataConfig, field: str) -> pa.Table:
    import datasets  # a second to import, and only hub datasets need it

    try:
        dataset = datasets.load_dataset(config.name, config.subset, split=config.split)
    except Exception as error:  # of many libraries and types: network, names, splits, formats
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"{field} = {config.name!r} with data.split = {config.split!r} is neither a local file or directory "
            f"nor a dataset that the hub gives: {reason}"
        ) from error
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"data.split = {config.split!r} is not one split of {field} = {config.name!r}")
    table: pa.Table = dataset.with_format("arrow")[:]
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.ClassLabel):
            names = [None if i is None or i < 0 else feature.int2str(i) for i in table[name].to_pylist()]
            table = table.set_column(table.column_names.index(name), name, pa.array(names, pa.string()))
    return table


def _columns(table: pa.Table, config: DataConfig, name: str, field: str) -> pa.Table:
    """Source, label and text of one file or dataset, all strings; `name` names it, and is the default source."""
    place = name if field == "data.name" else f"{name} of {field}"
    if table.num_rows == 0:
        raise DataError(f"{field} = {config.name!r} is empty: {name} has no rows")
    text = column(table, "data.text_column", config.text_column, place)
    if not (pa.types.is_string(text.type) or pa.types.is_large_string(text.type)):
        raise DataError(f"data.text_column = {config.text_column!r} has type {text.type} in {place}: must be string")
    source = pa.array([name] * len(text))
    if config.source_column is not None:
        source = names(table, "data.source_column", config.source_column, place).fill_null("unknown")
    label = pa.nulls(len(text), pa.string())
    if config.label_column is not None:
        label = names(table, "data.label_column", config.label_column, place).fill_null("unknown")
    target = pa.nulls(len(text), pa.string())
    if config.target_column is not None:
        target = names(table, "data.target_column", config.target_column, place).fill_null("")
    text = text.cast(pa.large_string()).fill_null("")
    return pa.table({"source": source, "label": label, "text": text, "target": target})


def column(table: pa.Table, field: str, name: str, place: str) -> pa.ChunkedArray:
    """A column, without a dictionary. Raises DataError."""
    if name not in table.column_names:
        raise DataError(f"{field} = {name!r} is not a column of {place}, which has {', '.join(table.column_names)}")
    if table.column_names.count(name) > 1:
        raise DataError(f"{field} = {name!r} is the name of several columns of {place}")
    found = table[name]
    return pc.cast(found, found.type.value_type) if pa.types.is_dictionary(found.type) else found


def names(table: pa.Table, field: str, name: str, place: str) -> pa.ChunkedArray:
    """A column that groups documents: strings, or whole numbers (such as user ids) as strings."""
    found = column(table, field, name, place)
    kind = found.type
    named = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)
    if not (named or pa.types.is_integer(kind)):
        raise DataError(f"{field} = {name!r} has type {kind} in {place}: must be string, whole number or boolean")
    return pc.cast(found, pa.string())
