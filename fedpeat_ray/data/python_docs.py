"""Real text without a network: the docstrings of the Python that is running and of our dependencies.

Sources are read with `ast`, nothing is imported. A document is one docstring; its `source` is its
package and second-level module (`scipy.stats`), so a split over devices by source is naturally
non-IID. PUBLIC packages are what a server would have (pre-training, distillation); PRIVATE ones play
the devices' own data, a domain of its own: numerical and scientific documentation.

Documents that for the most part repeat others are left out (data/repeats.py): of the private ones all, of
the public ones those held out. So what the embedded foundations were trained on stays what it was.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedpeat_ray.data.repeats import grams_of, repeats
from fedpeat_ray.errors import DataError
from fedpeat_ray.files import sha256_of, user_cache_dir, written_whole

STDLIB = "stdlib"
PUBLIC_PACKAGES = (STDLIB, "torch", "transformers")
PRIVATE_PACKAGES = ("scipy", "sympy", "pandas", "networkx", "numpy", "matplotlib", "ray")

MIN_CHARS = 40  # a shorter docstring ("Return x.") teaches a language model nothing
HELDOUT_SHARE = 0.1  # of the documents of every source, at least one
EXTRACTOR_VERSION = 2  # part of the cache key: raise it when what is extracted changes

_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "testing", "site-packages", "__pycache__", "idlelib", "lib2to3", "thirdparty_files")
)
SCHEMA = pa.schema(
    [
        ("package", pa.string()),
        ("source", pa.string()),
        ("name", pa.string()),
        ("public", pa.bool_()),
        ("heldout", pa.bool_()),
        ("repeat", pa.bool_()),  # not used
        ("text", pa.string()),
    ]
)


def load(cache_dir: Path | None = None) -> pa.Table:
    """The documents as a table with SCHEMA, without repeats (see `load_all`)."""
    table = load_all(cache_dir)
    return table.filter(~table["repeat"].to_numpy())


def load_all(cache_dir: Path | None = None) -> pa.Table:
    """All documents as a table with SCHEMA, from the cache if this set of versions was read before.

    Takes under half a minute on two cores the first time. Raises DataError if a package is missing.
    """
    key = hashlib.sha256(repr((EXTRACTOR_VERSION, sorted(package_versions().items()))).encode())
    path = (cache_dir or user_cache_dir()) / f"python_docs-{key.hexdigest()[:16]}.parquet"
    if path.exists():
        return pq.read_table(path)
    table = extract()
    with written_whole(path) as part:
        pq.write_table(table, part, compression="zstd")
    return table


def package_versions() -> dict[str, str]:
    """The version of each package whose documentation is read: what the text depends on."""
    versions = {STDLIB: platform.python_version()}
    for package in (*PUBLIC_PACKAGES, *PRIVATE_PACKAGES):
        if package != STDLIB:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                raise DataError(f"python_docs reads the documentation of {package}, which is not installed") from None
    return versions


def digest(table: pa.Table) -> str:
    """SHA-256 of names and texts in order: two runs with the same digest saw the same data."""
    return sha256_of([*table["name"].to_pylist(), *table["text"].to_pylist()])


def extract() -> pa.Table:
    """Read every source file (all cores), drop equal texts, mark what is held out and what are repeats."""
    files = [(package, str(root), str(path)) for package, root in _roots().items() for path in _source_files(root)]
    chunks = [files[start : start + 64] for start in range(0, len(files), 64)]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        rows = [row for found in pool.map(_read_files, chunks) for row in found]
    rows.sort(key=lambda row: (row[0], row[1], row[2]))
    seen: set[str] = set()
    unique = [row for row in rows if not (row[3] in seen or seen.add(row[3]))]
    package, source, name, text = (list(column) for column in zip(*unique, strict=True))
    public = np.array([item in PUBLIC_PACKAGES for item in package])
    heldout = np.array(mark_heldout(source, name, HELDOUT_SHARE, every_source=True))
    grams, repeat = grams_of(text), np.zeros(len(text), dtype=bool)
    for side in (public, ~public):
        repeat[side] = repeats(grams.of(side), heldout[side], may_go=(heldout | ~public)[side])
    table = pa.table([package, source, name, public, heldout, repeat, text], schema=SCHEMA)
    return table.combine_chunks()


def select(table: pa.Table, *, public: bool, heldout: bool) -> pa.Table:
    """The documents of one side (public or private) and one split."""
    return table.filter((table["public"].to_numpy() == public) & (table["heldout"].to_numpy() == heldout))


def mark_heldout(sources: list[str], names: list[str], share: float, *, every_source: bool = False) -> list[bool]:
    """Of every source, the `share` of its documents whose names have the smallest hashes, but not all of them.

    Sources so small that this is none are taken together: of their documents the share is held out,
    at most one a source, the one with the smallest hash, of the sources that come first by that hash. With
    `every_source` each of them has one held out instead. At least one document is held out in all.

    A function of the names, not of the order: adding documents moves few others. Shapes: (D,), (D,) -> (D,).
    """
    heldout = [False] * len(names)
    small: list[list[tuple[bytes, int]]] = []
    for documents in _hashed_by_source(sources, names).values():
        count = min(round(share * len(documents)), len(documents) - 1)
        if every_source:
            count = max(1, round(share * len(documents)))
        for _, i in documents[:count]:
            heldout[i] = True
        if not count:
            small.append(documents)
    wanted = max(round(share * sum(map(len, small))), 0 if any(heldout) else 1)
    for _, i in sorted(documents[0] for documents in small)[:wanted]:
        heldout[i] = True
    return heldout


def mark_heldout_sources(sources: list[str], share: float) -> list[bool]:
    """Whole sources, those whose names have the smallest hashes, until they have the `share` of the documents."""
    by_hash = sorted(_hashed_by_source(sources, sources).values())
    wanted, marked = share * len(sources), 0
    heldout = [False] * len(sources)
    for documents in by_hash:
        if marked >= wanted:
            break
        marked += len(documents)
        for _, i in documents:
            heldout[i] = True
    return heldout


def _hashed_by_source(sources: list[str], names: list[str]) -> dict[str, list[tuple[bytes, int]]]:
    """Of every source (hash of the name, index) of its documents, sorted."""
    found: dict[str, list[tuple[bytes, int]]] = {}
    for i, (source, name) in enumerate(zip(sources, names, strict=True)):
        found.setdefault(source, []).append((hashlib.sha256(name.encode("utf-8", "replace")).digest(), i))
    return {source: sorted(documents) for source, documents in found.items()}


def _roots() -> dict[str, Path]:
    roots = {STDLIB: Path(sysconfig.get_paths()["stdlib"])}
    for package in (*PUBLIC_PACKAGES, *PRIVATE_PACKAGES):
        if package != STDLIB:
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                raise DataError(f"python_docs cannot find the source of {package}")
            roots[package] = Path(next(iter(spec.submodule_search_locations)))
    return roots


def _source_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith("test_"):
                yield Path(folder, name)


def _read_files(files: list[tuple[str, str, str]]) -> list[tuple[str, str, str, str]]:
    """(package, source, name, text) for every docstring in these files; runs in a worker process."""
    gc.disable()  # syntax trees are many small objects without cycles: collecting them doubles the time
    warnings.simplefilter("ignore")  # invalid escapes in other people's strings
    rows = []
    for package, root, path in files:
        parts = Path(path).relative_to(root).with_suffix("").parts
        module = ".".join((package, *(part for part in parts if part != "__init__")))
        source = ".".join(module.split(".")[:2])
        try:
            tree = ast.parse(Path(path).read_bytes())
        except (SyntaxError, ValueError):  # a template, or another Python version's file
            continue
        if module == f"{STDLIB}.pydoc_data.topics":
            rows += [(package, source, f"{module}.{name}", text) for name, text in _topics(tree)]
        rows += [(package, source, f"{module}{name}", text) for name, text in _docstrings(tree, "")]
    return rows


def _docstrings(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node, clean=False) if isinstance(node, _DOCUMENTED) else None
    if text is not None and len(text := inspect.cleandoc(text).strip()) >= MIN_CHARS:
        yield prefix, text.encode("utf-8", "replace").decode()
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.If | ast.Try):
            yield from _docstrings(child, prefix)
        elif isinstance(child, _NAMED):
            yield from _docstrings(child, f"{prefix}.{child.name}")


_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_DOCUMENTED = (ast.Module, *_NAMED)


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The language reference that `help()` shows: a dictionary of strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield str(key.value), value.value.strip()


if __name__ == "__main__":
    sys.stdout.write(load().group_by("package").aggregate([("text", "count")]).to_pandas().to_string() + "\n")
