"""Documents, shares of devices, and batches: on small tables written by the tests."""

import dataclasses
import json
import math
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedpeat_ray.config import DataConfig, LocalConfig, PartitionConfig
from fedpeat_ray.data import batches, hub, python_docs
from fedpeat_ray.data import corpus as corpus_module
from fedpeat_ray.data.corpus import Corpus, load_corpus
from fedpeat_ray.data.documents import Removed, load_documents
from fedpeat_ray.data.partition import Partition
from fedpeat_ray.errors import ConfigError, DataError, ModelError
from fedpeat_ray.files import sha256_of
from fedpeat_ray.records import sequences

EOS = 0
WORDS = [f"w{i}" for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word wi is token i + 1; the end of a text is token 0."""
    backend = Tokenizer(models.WordLevel({"<eos>": EOS} | {word: i + 1 for i, word in enumerate(WORDS)}, "<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def corpus_of(lengths: list[int], groups: list[int], heldout: list[bool]) -> Corpus:
    """Document i is the token i + 1, as often as its length says, then the end."""
    tokens = [np.array([i + 1] * length + [EOS], dtype=np.uint16) for i, length in enumerate(lengths)]
    return Corpus(
        tokens=np.concatenate(tokens),
        offsets=np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        group=np.array(groups, dtype=np.int32),
        group_names=tuple(map(str, range(max(groups) + 1))),
        heldout=np.array(heldout),
        eos_id=EOS,
        digest="",
    )


def write_documents(directory: Path, texts_by_source: dict[str, list[str]], **fields) -> DataConfig:
    """A Parquet file with source, kind and text, and the configuration that reads it."""
    rows = [(source, len(text), text) for source, texts in texts_by_source.items() for text in texts]
    source, kind, text = map(list, zip(*rows, strict=True))
    pq.write_table(pa.table({"source": source, "kind": kind, "text": text}), directory / "documents.parquet")
    return dataclasses.replace(DataConfig(name=str(directory), source_column="source"), **fields)


def test_every_local_format_is_read_and_the_file_is_the_source(tmp_path: Path):
    pq.write_table(pa.table({"text": ["a b", "c d"], "other": [1, 2]}), tmp_path / "one.parquet")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("e\nf", "g" * 2**21))
    (tmp_path / "two.jsonl").write_text(lines)
    (tmp_path / "three.json").write_text('{"text": "h"}\n{"text": null}\n{"text": "i"}\n')
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "four.txt").write_text("first\nparagraph\n\n \nsecond paragraph\n")
    (tmp_path / "below" / "five.csv").write_text('other,text\n1,"j, ""k""\nl"\n')
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "readme.md").write_text("not data")

    table, _ = hub.load(DataConfig(name=str(tmp_path)))

    assert table.schema == hub.SCHEMA
    assert set(zip(table["source"].to_pylist(), table["text"].to_pylist(), strict=True)) == {
        *(("one", "a b"), ("one", "c d"), ("two", "e\nf"), ("two", "g" * 2**21), ("three", "h"), ("three", "i")),
        *(("four", "first\nparagraph"), ("four", "second paragraph\n"), ("five", 'j, "k"\nl')),
    }
    assert table["label"].null_count == table.num_rows
    assert table["heldout"].to_numpy().sum() == 1  # of nine, in sources of one or two


def test_columns_are_mapped_and_repeats_and_empty_texts_left_out(tmp_path: Path):
    body = pa.array(["x", "y", "x", " ", None, "z"]).dictionary_encode()
    pq.write_table(pa.table({"body": body, "user": [7, 8, 7, 7, 7, None], "topic": [True] * 6}), tmp_path / "a.parquet")

    config = DataConfig(name=str(tmp_path), text_column="body", source_column="user", label_column="topic")
    table, num_equal = hub.load(config)
    assert table["text"].to_pylist() == ["x", "y", "z"] and num_equal == 1
    assert table["source"].to_pylist() == ["7", "8", "unknown"]
    assert table["label"].to_pylist() == ["true"] * 3

    pq.write_table(pa.table({"body": ["p", "q"], "user": [7, 7], "topic": [False] * 2}), tmp_path / "b.parquet")
    assert hub.load(config)[0]["source"].to_pylist() == ["7", "8", "unknown", "7", "7"]


def test_columns_of_csv_are_strings(tmp_path: Path):
    file = tmp_path / "letters.csv"
    rows = ["user,stars,words", "007,5,12", '7,n/a,"a\nb"', ",,NA", "8,1,", '8,1,""', "True,2,1e3", ""]
    file.write_bytes("\r\n".join(rows).encode("utf-8-sig"))  # as a spreadsheet writes it
    config = DataConfig(name=str(file), text_column="words", source_column="user", label_column="stars")
    table, num_equal = hub.load(config)
    assert table["text"].to_pylist() == ["12", "a\nb", "NA", "1e3"] and num_equal == 0
    assert table["source"].to_pylist() == ["007", "7", "unknown", "True"]
    assert table["label"].to_pylist() == ["5", "n/a", "unknown", "2"]


def test_csv_is_read_in_blocks_of_which_none_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "letters.csv"
    config = DataConfig(name=str(file), source_column="user")
    file.write_text("\n".join(["user,text", *(f"{i},document {i}" for i in range(50)), "007,last"]))
    monkeypatch.setattr(hub, "_BLOCK_BYTES", 100)
    assert hub.load(config)[0]["source"].to_pylist() == [*map(str, range(50)), "007"]
    file.write_text("user,text\n1,a\n2," + "w" * 200)
    with pytest.raises(DataError, match=r"letters.csv cannot be read: a line has more than 100 bytes$"):
        hub.load(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: letters has no rows"),
        (b"text,user\n", "is empty: letters has no rows"),
        (b"text;user\na;1\n", r"data.text_column = 'text' is not a column of letters, which has text;user$"),
        (b"text,text,user\na,b,1\n", r"data.text_column = 'text' is the name of several columns of letters$"),
        (b'text,user,at\n"a\nb",1\n', r"letters.csv cannot be read: CSV parse error: Expected 3 columns, got 2: .*$"),
        (b"text,user\n\xff\xfe,1\n", "letters.csv cannot be read: .*utf-8"),
        (b"text,user\n" + b"a,1\n" * 9999 + b"\xff\xfe,1\n", "letters.csv cannot be read: .*UTF8"),
    ],
    ids=["no header", "no rows", "other separator", "two of a name", "too few values", "other coding", "later on"],
)
def test_bad_csv_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "letters.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        hub.load(DataConfig(name=str(tmp_path / "letters.csv"), source_column="user"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", hub.FORMATS)
def test_a_file_is_read_as_a_directory_with_it_is(tmp_path: Path, suffix: str):
    (tmp_path / "one").mkdir()
    file = tmp_path / "one" / f"letters{suffix}"
    lines = {".csv": "text\na b\nc d\n", ".txt": "a b\n\nc d"}
    file.write_text(lines.get(suffix, '{"text": "a b"}\n{"text": "c d"}\n'))
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": ["a b", "c d"]}), file)
    (tmp_path / "letters.csv").write_text("text\nanother\n")
    table, _ = hub.load(DataConfig(name=str(file)))
    assert table.equals(hub.load(DataConfig(name=str(tmp_path / "one")))[0])
    assert table["source"].to_pylist() == ["letters"] * 2 and table["text"].to_pylist() == ["a b", "c d"]


PATHS = [
    "users.csv",
    "texts/users.jsonl",
    "./texts",
    "../texts",
    "~/no-such-texts",
    "~nobody-has-it/texts",
    "/no/texts",
]


@pytest.mark.parametrize("name", [*PATHS, "notes.md", "/dev/null"])
def test_what_is_or_looks_like_a_path_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("text")
    said = "is neither a file nor a directory: there is no /"
    if name not in PATHS:
        said = "is not a file that can be read: .parquet, .csv, .jsonl, .json, .txt$"
    for field in ("data.name", "data.public_name"):
        with pytest.raises(DataError, match=rf"^{field} = '{name}' {said}"):
            hub.load(DataConfig(name=name), field)


def test_heldout_share_is_by_source_and_does_not_depend_on_the_order():
    sources = ["big"] * 100 + ["small"] * 3
    names = [str(i) for i in range(103)]
    heldout = python_docs.mark_heldout(sources, names, 0.2)
    assert (sum(heldout[:100]), sum(heldout[100:])) == (20, 1)
    assert python_docs.mark_heldout(sources[::-1], names[::-1], 0.2) == heldout[::-1]


@pytest.mark.parametrize(("each", "share"), [(1, 0.1), (3, 0.1), (5, 0.1), (10, 0.1), (1, 0.6), (10, 0.5)])
def test_many_small_sources_have_the_share_held_out(each, share):
    sources = [f"user {i // each}" for i in range(1000)]
    names = [f"text {i}" for i in range(1000)]
    heldout = np.array(python_docs.mark_heldout(sources, names, share))
    assert heldout.sum() == pytest.approx(1000 * share, abs=1)
    all_have_one = np.array(python_docs.mark_heldout(sources, names, share, every_source=True))
    assert not (heldout & ~all_have_one).any(), "of a small source, the same document as if each had one held out"
    assert all_have_one.sum() == max(1, round(share * each)) * len(set(sources))
    order = np.random.default_rng(0).permutation(1000)
    shuffled = python_docs.mark_heldout([sources[i] for i in order], [names[i] for i in order], share)
    assert np.array_equal(shuffled, heldout[order])


def test_something_is_held_out_and_no_source_of_several_documents_whole():
    assert sum(python_docs.mark_heldout(["a", "b", "c"], ["1", "2", "3"], 1e-9)) == 1
    assert sum(python_docs.mark_heldout(["a", "a", "b", "b"], ["1", "2", "3", "4"], 0.99)) == 2
    for share in (0.1, 0.3):
        both = python_docs.mark_heldout(["big"] * 20 + ["small"] * 2, [str(i) for i in range(22)], share)
        assert sum(both[:20]) == 20 * share


def test_whole_sources_are_held_out(tmp_path: Path):
    sources = [f"user {i % 40}" for i in range(400)]
    heldout = np.array(python_docs.mark_heldout_sources(sources, 0.1))
    assert heldout.sum() == 40 and len({sources[i] for i in np.flatnonzero(heldout)}) == 4
    assert python_docs.mark_heldout_sources(sources[::-1], 0.1) == heldout[::-1].tolist()

    texts = {f"user {i}": [f"w{i} w1", f"w{i} w2"] for i in range(10)}
    config = write_documents(tmp_path, texts, heldout_by="source", heldout_share=0.3)
    table, _ = hub.load(config)
    of_source = {}
    for source, mark in zip(table["source"].to_pylist(), table["heldout"].to_pylist(), strict=True):
        of_source.setdefault(source, set()).add(mark)
    assert sorted(map(list, of_source.values())) == [[False]] * 7 + [[True]] * 3
    with pytest.raises(DataError, match=r"nothing left to train on: .* 20 of 10 sources, .*heldout_by = 'source'"):
        hub.load(dataclasses.replace(config, heldout_share=0.95))
    with pytest.raises(ConfigError, match=r"data.heldout_by = 'source' is not allowed: 'document' with .*python_docs"):
        load_documents(DataConfig(heldout_by="source"))


def test_a_run_is_judged_where_most_groups_have_nothing_held_out():
    group_D, heldout_D = np.arange(1000), np.arange(1000) % 10 == 0
    corpus = corpus_of([3] * 1000, group_D.tolist(), heldout_D.tolist())
    assert len(batches.heldout_sequences(corpus, 50, 8, seed=0)[0]) == 50


def test_json_lines_are_read_in_blocks_of_which_none_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = [json.dumps({"text": f"document {i}"} | ({"user": i} if i else {})) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(name=str(tmp_path))
    whole, _ = hub.load(config)
    monkeypatch.setattr(hub, "_BLOCK_BYTES", 100)
    assert hub.load(config)[0].equals(whole)
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, json.dumps({"text": "w" * 200})]))
    with pytest.raises(DataError, match=r"a.jsonl cannot be read: a line has more than 100 bytes$"):
        hub.load(config)


def test_texts_with_other_ends_have_other_digests():
    assert sha256_of(["a\0b"]) != sha256_of(["a", "b"])
    assert sha256_of(["a\0", "b"]) != sha256_of(["a", "\0b"])
    assert sha256_of(["1:a"]) != sha256_of(["", "a"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_column": "body"}, r"data.text_column = 'body' is not a column of documents, .* source, kind, text"),
        ({"text_column": "kind"}, r"data.text_column = 'kind' has type int64 in documents: must be string"),
        ({"source_column": "user"}, r"data.source_column = 'user' is not a column of documents"),
        ({"label_column": "class"}, r"data.label_column = 'class' is not a column of documents"),
    ],
)
def test_bad_columns(tmp_path: Path, fields: dict[str, str], message: str):
    config = write_documents(tmp_path, {"a": ["one", "two"]}, **fields)
    with pytest.raises(DataError, match=message):
        hub.load(config)


def test_bad_directories(tmp_path: Path):
    config = DataConfig(name=str(tmp_path))
    with pytest.raises(DataError, match=r"without a file to read: .parquet, .csv, .jsonl, .json, .txt"):
        hub.load(config)
    file = tmp_path / "a.jsonl"
    cases = {"": "is empty: a has no rows", '{"text": " "}': "has no text", "{": "cannot be read"}
    for content, message in cases.items():
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            hub.load(config)
    file.write_text('{"text": "a", "user": [1]}\n')
    with pytest.raises(DataError, match=r"data.source_column = 'user' has type list<.*must be string, whole number"):
        hub.load(dataclasses.replace(config, source_column="user"))
    file.rename(tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"a.txt cannot be read: .*utf-8"):
        hub.load(config)


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch):
    features = datasets.Features({"text": datasets.Value("string"), "y": datasets.ClassLabel(names=["no", "yes"])})
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "y": [1, 0, -1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: {"train": dataset, "all": {}}[split])

    table, _ = hub.load(DataConfig(name="some/dataset", label_column="y"))
    assert table["label"].to_pylist() == ["yes", "no", "unknown"]
    assert set(table["source"].to_pylist()) == {"some/dataset"}
    with pytest.raises(DataError, match=r"data.split = 'all' is not one split"):
        hub.load(DataConfig(name="some/dataset", split="all"))
    with pytest.raises(DataError, match=r"data.name = 'x' with data.split = 'test' is neither .*KeyError: 'test'"):
        hub.load(DataConfig(name="x", split="test"))


def test_docstrings_are_read_without_importing(tmp_path: Path):
    source = f'''"""{"Module. " * 6}"""
raise SystemExit("imported")
if True:
    class A:
        """Too short."""
        async def f(self):
            """{"Method " * 7}

                indented
            """
'''
    (tmp_path / "pkg" / "sub").mkdir(parents=True)
    for name in ("sub/__init__.py", "test_skipped.py"):
        (tmp_path / "pkg" / name).write_text(source)
    (tmp_path / "pkg" / "broken.py").write_text("{{ template }} =")
    root = tmp_path / "pkg"
    rows = python_docs._read_files([("pkg", str(root), str(path)) for path in python_docs._source_files(root)])
    assert [(package, where, name) for package, where, name, _ in rows] == [
        ("pkg", "pkg.sub", "pkg.sub"),
        ("pkg", "pkg.sub", "pkg.sub.A.f"),
    ]
    assert rows[1][3].endswith("\n\nindented")


# --- tokens --------------------------------------------------------------------------------------------------


def test_corpus_holds_every_document_with_its_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    config = write_documents(tmp_path, {"b": ["w1 w2", "w3"], "a": ["w4 w5 w6", "w7 w8"]}, heldout_share=0.5)
    cache = tmp_path / "cache"
    corpus = load_corpus(config, tokenizer, cache_dir=cache)
    assert corpus.tokens.tolist() == [2, 3, EOS, 4, EOS, 5, 6, 7, EOS, 8, 9, EOS]
    assert corpus.tokens.dtype == np.uint16
    assert corpus.offsets.tolist() == [0, 3, 5, 9, 12]
    assert corpus.num_tokens.tolist() == [3, 2, 4, 3] and corpus.num_documents == 4
    assert corpus.group_names == ("a", "b") and corpus.group.tolist() == [1, 1, 0, 0]
    assert corpus.heldout.sum() == 2

    stamps = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    kinds = sorted(name.split("-")[0] for name in stamps)
    assert kinds == ["repeats", "tokens", "tokens"]  # nothing half-written beside them
    tokenizer(["w1 w2", "w3"], padding=False, truncation=True, max_length=1)  # leaves state in the tokenizer
    again = load_corpus(config, tokenizer, cache_dir=cache)
    assert again.digest == corpus.digest and np.array_equal(again.tokens, corpus.tokens)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == stamps

    other = write_documents(tmp_path, {"b": ["w1 w2", "w3"], "a": ["w4 w5 w6", "w7 w9"]})
    assert load_corpus(other, tokenizer, cache_dir=cache).digest != corpus.digest
    assert len(list(cache.iterdir())) == 6


def test_groups_are_sources_or_labels(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    config = write_documents(tmp_path, {"a": ["w1 w2", "w3"], "b": ["w5"]}, label_column="kind")
    by_label = dataclasses.replace(config, partition=PartitionConfig(group_by="label"))
    assert load_corpus(by_label, tokenizer, cache_dir=tmp_path / "cache").group_names == ("2", "5")

    unlabelled = dataclasses.replace(by_label, label_column=None)
    with pytest.raises(ConfigError, match=r"data.partition.group_by = 'label' is not allowed: 'source'"):
        load_corpus(unlabelled, tokenizer, cache_dir=tmp_path / "cache")
    iid = dataclasses.replace(unlabelled, partition=PartitionConfig(kind="iid", group_by="label"))
    assert load_corpus(iid, tokenizer, cache_dir=tmp_path / "cache").group_names == ("a", "b")


def test_embedded_text_has_two_sides(tmp_path, monkeypatch, tokenizer: PreTrainedTokenizerFast):
    rows = [
        ("scipy", "scipy.a", "n1", False, False, False, "w1"),
        ("torch", "torch.a", "n2", True, False, False, "w2 w3"),
        ("sympy", "sympy.a", "n3", False, True, False, "w4"),
        ("sympy", "sympy.a", "n4", False, True, True, "W1"),
    ]
    table = pa.table(list(map(list, zip(*rows, strict=True))), schema=python_docs.SCHEMA)
    monkeypatch.setattr(python_docs, "load_all", lambda cache_dir: table)
    private = load_corpus(DataConfig(), tokenizer, cache_dir=tmp_path)
    assert private.tokens.tolist() == [2, EOS, 5, EOS] and private.heldout.tolist() == [False, True]
    assert private.removed == Removed(repeated_heldout=1)
    packages = DataConfig(partition=PartitionConfig(group_by="label"))
    assert load_corpus(packages, tokenizer, cache_dir=tmp_path).group_names == ("scipy", "sympy")
    for named in (None, "python_docs"):
        public = load_corpus(DataConfig(public_name=named), tokenizer, public=True, cache_dir=tmp_path)
        assert public.tokens.tolist() == [3, 4, EOS] and public.removed.total == 0
    with pytest.raises(DataError, match=r"data.name = '.*' has no public part"):
        load_corpus(DataConfig(name=str(tmp_path)), tokenizer, public=True)
    with pytest.raises(ModelError, match="must be a fast one with an end-of-text token"):
        load_corpus(DataConfig(), PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))


# --- shares of devices ---------------------------------------------------------------------------------------

GROUP_D = np.repeat(np.arange(20), 50)
HELDOUT_D = np.arange(1000) % 10 == 0
TRAIN = np.flatnonzero(~HELDOUT_D)
KINDS = ("iid", "dirichlet", "by_source", "shards", "natural")


def partition(seed: int = 0, **fields) -> Partition:
    return Partition(dataclasses.replace(PartitionConfig(num_shards=40), **fields), GROUP_D, HELDOUT_D, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_share_is_a_function_of_seed_and_device(kind):
    shares = [partition(kind=kind).documents(device_id) for device_id in range(20)]
    asked_backwards = partition(kind=kind)
    for device_id in reversed(range(20)):
        assert np.array_equal(asked_backwards.documents(device_id), shares[device_id])
    for share in shares:
        assert share.dtype == np.int64 and len(share) >= 1
        assert np.array_equal(share, np.unique(share)) and not HELDOUT_D[share].any()
    assert len({share.tobytes() for share in shares}) == 20
    assert not np.array_equal(partition(seed=1, kind=kind).documents(0), shares[0])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_of_the_groups_of_the_mixture(kind):
    shares = partition(kind=kind, quantity_sigma=0.0)
    for device_id in range(10):
        mixture_G = shares.mixture(device_id)
        assert mixture_G.sum() == pytest.approx(1.0)
        assert set(GROUP_D[shares.documents(device_id)]) <= set(np.flatnonzero(mixture_G))


def test_dirichlet_is_concentrated_or_like_the_prior():
    def largest_share(alpha):
        return np.mean([partition(alpha=alpha).mixture(device_id).max() for device_id in range(100)])

    assert largest_share(1e-300) == 1.0
    assert largest_share(0.1) > 0.9 > 0.4 > largest_share(10.0)
    assert largest_share(1e6) == pytest.approx(1 / 20, rel=0.02)
    counts = np.bincount(GROUP_D[partition(alpha=1e6, documents_per_device=450, quantity_sigma=0).documents(0)])
    assert counts.sum() == 450 and counts.min() > 10
    mean_G = np.mean([partition(alpha=1.0).mixture(device_id) for device_id in range(2000)], axis=0)
    assert mean_G == pytest.approx(np.full(20, 1 / 20), abs=0.02)


def test_dirichlet_fills_up_from_other_groups_when_one_is_full():
    share = partition(alpha=1.0, documents_per_device=800, quantity_sigma=0.0).documents(0)
    assert len(share) == 800 and np.bincount(GROUP_D[share]).max() == 45


def test_by_source_gives_one_group_in_proportion_to_its_size():
    group_D = np.repeat([0, 1], [100, 300])
    shares = Partition(PartitionConfig(kind="by_source"), group_D, np.arange(400) % 10 == 0, 0)
    groups = [set(group_D[shares.documents(device_id)]) for device_id in range(400)]
    assert all(len(group) == 1 for group in groups)
    assert np.mean([group == {1} for group in groups]) == pytest.approx(0.75, abs=0.07)


def test_natural_makes_one_device_of_every_user_with_text_to_train_on():
    heldout_D = HELDOUT_D | (GROUP_D == 3)
    orders = []
    for seed in (0, 1):
        natural = Partition(PartitionConfig("natural"), GROUP_D, heldout_D, seed)
        assert natural.num_devices("auto") == 19
        shares = [natural.documents(device_id) for device_id in range(19)]
        assert np.array_equal(np.sort(np.concatenate(shares)), np.flatnonzero(~heldout_D))
        assert natural.num_documents(np.arange(19)).tolist() == list(map(len, shares))
        orders.append([int(group) for share in shares for group in set(GROUP_D[share])])
    assert len(orders[0]) == 19 and orders[0] != sorted(orders[0]) and orders[0] != orders[1]


def test_of_users_there_may_be_fewer_but_not_more():
    natural = partition(kind="natural")
    assert [natural.num_devices(wanted) for wanted in ("auto", 20, 7)] == [20, 20, 7]
    with pytest.raises(ConfigError, match=r"^fleet.num_devices = 21 is not allowed: auto, or at most .* 20$"):
        natural.num_devices(21)


def test_documents_are_called_after_the_group_that_most_of_them_are_of():
    corpus = corpus_of([1] * 6, [0, 1, 1, 2, 2, 0], [False] * 6)
    cases = {(0, 1, 2): "1", (3, 4, 5): "2", (5,): "0", (2, 3): "1", (4, 3, 2, 1): "1"}
    assert {documents: corpus.most_common_group(documents) for documents in cases} == cases


def test_shards_are_pieces_of_the_documents_sorted_by_group():
    shares = partition(kind="shards", documents_per_device=math.inf)
    pieces = [set(piece) for piece in np.split(TRAIN, [i * 900 // 40 for i in range(1, 40)])]
    for device_id in range(20):
        share = set(shares.documents(device_id))
        held = [piece for piece in pieces if piece & share]
        assert len(held) == 2 and set.union(*held) == share


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_one_device_may_hold_all_there_is(kind):
    assert np.array_equal(partition(kind=kind, documents_per_device=math.inf).documents(0), TRAIN)


def test_number_of_documents_is_log_normal():
    counts = np.array([len(partition(kind="iid").documents(device_id)) for device_id in range(1000)])
    assert np.median(counts) == pytest.approx(24, abs=2)
    assert np.log(counts).std() == pytest.approx(0.6, abs=0.05)
    assert {len(partition(kind="iid", quantity_sigma=0.0).documents(i)) for i in range(20)} == {24}
    assert {len(partition(kind="iid", quantity_sigma=1e9).documents(i)) for i in range(20)} == {1, 900}


def test_bad_partitions():
    with pytest.raises(ConfigError, match=r"data.partition.num_shards = 901 is not allowed: at most .* 900"):
        partition(kind="shards", num_shards=901)
    with pytest.raises(ConfigError, match=r"data.partition.shards_per_device = 41 is not allowed"):
        partition(kind="shards", shards_per_device=41)
    with pytest.raises(DataError, match="0 to train on and 1000 held out"):
        Partition(PartitionConfig(), GROUP_D, np.ones(1000, bool), 0)
    one_source = Partition(PartitionConfig(), np.zeros(9, int), np.arange(9) < 3, 0)
    caution = "data.partition.kind = 'dirichlet' has no effect: all text is of one source (see data.source_column)"
    assert one_source.caution == caution and partition(kind="iid").caution is partition().caution is None


# --- batches -------------------------------------------------------------------------------------------------


def test_documents_are_packed_into_sequences():
    corpus = corpus_of([3, 2, 4], [0, 0, 0], [False] * 3)
    tokens_NT, lengths_N = batches.client_sequences(corpus, np.array([0, 2]), 5)
    assert tokens_NT.tolist() == [[1, 1, 1, EOS, 3], [3, 3, 3, EOS, EOS]] and tokens_NT.dtype == np.int64
    assert lengths_N.tolist() == [5, 4]
    tokens_NT, lengths_N = batches.client_sequences(corpus, np.array([0, 2]), 4)  # the ninth token predicts nothing
    assert lengths_N.tolist() == [4, 4]
    assert batches.client_sequences(corpus, np.array([1]), 8)[1].tolist() == [3]
    assert batches.client_sequences(corpus, np.array([], dtype=np.int64), 8)[1].tolist() == [0]


def test_num_steps():
    local = LocalConfig(batch_size=2, max_steps=8, epochs=1.0)
    assert [batches.num_steps(n, local) for n in (1, 2, 3, 16, 100)] == [1, 1, 2, 8, 8]
    assert batches.num_steps(30, dataclasses.replace(local, batch_size=1, epochs=0.1)) == 3
    assert batches.num_steps(30, dataclasses.replace(local, epochs=1e-9)) == 1
    assert batches.num_steps(30, dataclasses.replace(local, epochs=1e300)) == 8


@pytest.mark.parametrize(("num_sequences", "batch_size"), [(7, 3), (6, 3), (3, 3), (2, 3), (1, 3), (5, 4)])
def test_every_pass_has_every_sequence_once(num_sequences, batch_size):
    tokens_NT = np.arange(1, num_sequences + 1)[:, None].repeat(4, axis=1)
    lengths_N = np.full(num_sequences, 4)
    rows = min(num_sequences, batch_size)
    passes = 6
    steps = passes * num_sequences // rows
    made = batches.client_batches(sequences(tokens_NT, lengths_N), steps, batch_size, np.random.default_rng(0))
    tokens_SBT, lengths_SB = made["tokens"], made["lengths"]
    assert tokens_SBT.shape == (steps, batch_size, 4) and lengths_SB.shape == (steps, batch_size)
    assert (lengths_SB[:, :rows] == 4).all() and not lengths_SB[:, rows:].any() and not tokens_SBT[:, rows:].any()
    order = tokens_SBT[:, :rows, 0]
    assert all(len(set(step)) == rows for step in order.tolist())
    complete = order.ravel()[: order.size // num_sequences * num_sequences].reshape(-1, num_sequences)
    assert (np.sort(complete, axis=1) == np.arange(1, num_sequences + 1)).all()
    if num_sequences > 3:
        assert len({tuple(one) for one in complete}) > 1  # in a new order
    repeated = batches.client_batches(sequences(tokens_NT, lengths_N), steps, batch_size, np.random.default_rng(0))
    assert np.array_equal(repeated["tokens"], tokens_SBT)


def test_heldout_sequences_are_proportional_over_groups():
    groups = [0] * 300 + [1] * 100
    corpus = corpus_of([3] * 400, groups, [i % 2 == 0 for i in range(400)])
    tokens_NT, lengths_N = batches.heldout_sequences(corpus, 10, 8, seed=1)
    assert tokens_NT.shape == (10, 8) and (lengths_N == 8).all()
    documents = tokens_NT[:, [0, 4]].ravel() - 1
    assert (documents % 2 == 0).all() and len(set(documents)) == 20
    assert (documents < 300).sum() == 15
    assert np.array_equal(batches.heldout_sequences(corpus, 10, 8, seed=1)[0], tokens_NT)
    assert not np.array_equal(batches.heldout_sequences(corpus, 10, 8, seed=2)[0], tokens_NT)
    tokens_NT, lengths_N = batches.heldout_sequences(corpus, 1000, 7, seed=1)  # all there is
    assert lengths_N.sum() == 800 and len(tokens_NT) == 115
    with pytest.raises(DataError, match="no document is held out"):
        batches.heldout_sequences(corpus_of([3], [0], [False]), 1, 8, seed=0)


def test_tokens_travel_as_the_name_of_their_file_which_is_opened_when_they_are_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    config = write_documents(tmp_path, {"b": ["w1 w2", "w3"], "a": ["w4 w5 w6", "w7 w8"]})
    corpus = load_corpus(config, tokenizer, cache_dir=tmp_path / "cache")
    (file,) = corpus.files
    sent, hidden = pickle.dumps(corpus), file.with_name("hidden")
    file.rename(hidden)
    corpus_module.mapped.cache_clear()
    arrived = pickle.loads(sent)  # on a node that does not have the file yet
    hidden.rename(file)
    assert np.array_equal(arrived.tokens, corpus.tokens) and arrived.digest == corpus.digest
    assert pickle.loads(pickle.dumps(arrived)).tokens.tolist() == corpus.tokens.tolist()
    by_value = dataclasses.replace(corpus, tokens=np.array(corpus.tokens))
    assert by_value.files == [] and np.array_equal(pickle.loads(pickle.dumps(by_value)).tokens, corpus.tokens)
