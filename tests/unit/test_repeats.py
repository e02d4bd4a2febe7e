"""Nothing that is held out is trained on, in other words neither: which documents are left out, and what is trained."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from whole_runs import events, tiny

from fedpeat_ray import Simulation
from fedpeat_ray.config import DataConfig, DistilConfig, EmulatorConfig, LocalConfig, PartitionConfig
from fedpeat_ray.data import python_docs
from fedpeat_ray.data.client_data import ClientData, ServerData
from fedpeat_ray.data.corpus import load_corpus
from fedpeat_ray.data.documents import Removed, load_documents
from fedpeat_ray.data.partition import Partition
from fedpeat_ray.data.repeats import MOST_REPEATED, NUM_WORDS, grams_of, private_text, repeats
from fedpeat_ray.errors import DataError
from fedpeat_ray.models.foundation import load_tokenizer
from fedpeat_ray.runtime.run_log import read_config
from fedpeat_ray.tasks.language_modelling import LANGUAGE_MODELLING


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(10**6)}" for _ in range(count))


def write(directory: Path, texts: list[str]) -> str:
    directory.mkdir()
    (directory / "text.txt").write_text("\n\n".join(texts))
    return str(directory)


def gram_tuples(text: str) -> list[tuple[str, ...]]:
    """The definition, one by one, of a text of lower-case words."""
    found = text.split()
    return [tuple(found[i : i + NUM_WORDS]) for i in range(max(1, len(found) - NUM_WORDS + 1))]


def test_grams_are_runs_of_words_within_a_document():
    texts = [words(0, 30), "one two", words(1, 13), words(2, 14), words(3, 12), "", "...", "One, TWO!", words(0, 30)]
    grams = grams_of(texts)
    assert grams.hashes.dtype == np.uint64 and np.diff(grams.offsets).tolist() == [18, 1, 1, 2, 1, 1, 1, 1, 18]
    pieces = np.split(grams.hashes, grams.offsets[1:-1])
    assert pieces[1] == pieces[7] and np.array_equal(pieces[0], pieces[8]), (
        "case and what is between words do not count"
    )
    assert len(np.unique(grams.hashes)) == 18 + 1 + 1 + 2 + 1 + 1 + 1
    kept = np.array([True, False, False, True] + [False] * 5)
    assert np.array_equal(grams.of(kept).hashes, np.concatenate([pieces[0], pieces[3]]))
    assert grams.of(kept).offsets.tolist() == [0, 18, 20]
    assert len(grams_of([]).hashes) == 0


def test_shares_of_grams_agree_with_their_definition():
    rng = random.Random(0)
    text = [words(i, 60).split() for i in range(6)]
    documents = [
        " ".join(word for start in (0, 20, 40) for word in rng.choice(text)[start : start + 20]) for _ in range(40)
    ]
    grams = grams_of(documents)
    known = {gram for document in documents[:10] for gram in gram_tuples(document)}
    expected = [np.mean([gram in known for gram in gram_tuples(document)]) for document in documents]
    assert grams.share_in(grams.hashes[: grams.offsets[10]]) == pytest.approx(expected)
    assert 0 < np.mean(expected) < 1


def test_what_is_pieced_together_from_several_is_a_repeat_and_training_documents_come_first():
    parts = [words(i, 40) for i in range(3)]
    pieced = " ".join(parts)
    texts = [pieced.upper(), *parts, words(9, 40)]
    grams, everything = grams_of(texts), np.ones(5, dtype=bool)
    heldout = np.array([True, False, False, False, False])
    assert repeats(grams, heldout, everything).tolist() == [True, False, False, False, False]
    assert repeats(grams, ~heldout, everything).tolist() == [False, True, True, True, False]
    assert repeats(grams, heldout & False, everything).tolist() == [False, True, True, True, False]
    assert not repeats(grams, ~heldout, heldout).any(), "what may not go stays"


def test_no_heldout_document_that_is_kept_has_more_than_a_share_in_what_is_trained_on():
    rng = np.random.default_rng(0)
    pool = [words(i, 25) for i in range(60)]
    texts = [" ".join([*(pool[j] for j in rng.integers(60, size=2)), words(100 + i, i)]) for i in range(200)]
    heldout = rng.random(200) < 0.3
    grams = grams_of(texts)
    for may_go in (np.ones(200, dtype=bool), heldout):
        gone = repeats(grams, heldout, may_go)
        assert gone.any() and not (gone & ~may_go).any() and (~gone & heldout).any()
        training = grams.of(~gone & ~heldout)
        assert grams.of(~gone & heldout).share_in(training.hashes).max() <= MOST_REPEATED
        assert grams.of(heldout).share_in(training.hashes).max() > MOST_REPEATED


def test_public_documents_that_are_private_text_are_found():
    secret, shared = words(0, 60), words(1, 60)
    private = grams_of([secret, shared, words(2, 60)])
    long = " ".join([words(3, 400), secret, words(4, 400)])  # a small part of it, and all of the secret
    also_long = " ".join([words(5, 400), shared, words(6, 400)])
    halves = [" ".join([words(7, 200), *secret.split()[:30]]), " ".join([words(8, 200), *secret.split()[30:]])]
    public = grams_of([secret.title(), long, also_long, *halves, words(10, 60)])
    heldout = np.array([True, False, False])
    assert private_text(public, private, heldout).tolist() == [True, True, False, True, True, False]
    assert private_text(public, private, ~heldout).tolist() == [True, False, True, False, False, False]


def test_embedded_text_is_on_one_side_and_what_the_foundations_were_trained_on_stays(tmp_path, monkeypatch):
    texts = {
        "scipy": [*(words(i, 30) for i in range(12)), f"{words(3, 30)} of scipy", words(200, 30)],
        "torch": [*(words(i, 30) for i in range(100, 112)), f"{words(103, 30)} of torch", words(200, 30)],
    }
    for package, documents in texts.items():
        (tmp_path / package).mkdir()
        functions = (f'def f{i:02}():\n    """{text}"""\n' for i, text in enumerate(documents))
        (tmp_path / package / "all.py").write_text("".join(functions))
    monkeypatch.setattr(python_docs, "_roots", lambda: {package: tmp_path / package for package in texts})

    table = python_docs.extract()

    found = table["text"].to_pylist()
    assert len(found) == len(set(found)) == 27 and found.count(words(200, 30)) == 1
    public, heldout, repeat = (table[name].to_numpy() for name in ("public", "heldout", "repeat"))
    assert heldout.sum() == 2 and (heldout & public).sum() == 1
    assert (repeat & ~public).sum() == 1, "one of the two"
    assert not (repeat & public & ~heldout).any() and "of torch" in found[np.flatnonzero(public)[12]]


# --- the sides of a run --------------------------------------------------------------------------------------


def test_text_for_the_server_is_without_private_text(tmp_path: Path):
    private = [words(i, 50) for i in range(30)]
    own = [words(100 + i, 50) for i in range(10)]
    public = [*own, private[3], private[4].upper() + " and more", own[0] + " again", own[1]]
    config = DataConfig(write(tmp_path / "private", private), write(tmp_path / "public", public))
    table, removed = load_documents(config, public=True, cache_dir=tmp_path)
    assert sorted(table["text"].to_pylist()) == sorted(own)
    assert removed == Removed(equal=1, repeated_training=1, private=2)
    assert str(removed) == "1 equal to others, 1 repeats to train on, 2 private text"
    again = load_documents(config, public=True, cache_dir=tmp_path)
    assert again[0].equals(table) and again[1] == removed, "from the cache"
    assert load_documents(config, cache_dir=tmp_path)[1].total == 0

    same = dataclasses.replace(config, public_name=config.name)
    message = r"^data.public_name = '.*' has nothing left to train on: 30 of its 30 documents are text of data.name = "
    with pytest.raises(DataError, match=message):
        load_documents(same, public=True, cache_dir=tmp_path)


def test_errors_of_text_for_the_server_name_its_setting(tmp_path: Path):
    name = write(tmp_path / "private", [words(i, 20) for i in range(5)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns").mkdir()
    (tmp_path / "columns" / "a.jsonl").write_text('{"body": "w"}\n')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jsonl").write_text("{")
    write(tmp_path / "one", ["w"])
    messages = {
        "empty": r"^data.public_name = '.*' is a directory without a file",
        "columns": r"^data.text_column = 'text' is not a column of a of data.public_name, which has body",
        "broken": r"^data.public_name: .*a.jsonl cannot be read",
        "one": r"^data.public_name = '.*' has nothing left to train on: .* 1 of 1 sources",
        "no-such-dataset/at all": r"^data.public_name = '.*' with data.split = 'train' is neither",
    }
    for public, message in messages.items():
        path = tmp_path / public
        config = DataConfig(name, str(path) if path.exists() else public)
        with pytest.raises(DataError, match=message):
            load_documents(config, public=True, cache_dir=tmp_path)


def test_private_text_of_which_all_that_is_held_out_is_trained_on_is_refused(tmp_path: Path):
    text = words(0, 50)
    name = write(tmp_path / "text", [text, text.upper(), text.title()])
    with pytest.raises(DataError, match=r"^data.name = '.*' has nothing left to hold out: .* 1 in all, more than 20%"):
        load_documents(DataConfig(name), cache_dir=tmp_path)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    """A small python_docs in place of the real one."""
    rows = [
        ("torch" if i % 2 else "scipy", f"{'torch' if i % 2 else 'scipy'}.a", f"n{i}", i % 2 == 1, i % 10 < 2, i > 37)
        for i in range(40)
    ]
    texts = [words(i, 40) for i in range(40)]
    texts[9] = f"{texts[7]} again"  # public, to train on: stays
    columns = [*zip(*rows, strict=True), texts]
    table = pa.table(list(map(list, columns)), schema=python_docs.SCHEMA)
    monkeypatch.setattr(python_docs, "load_all", lambda cache_dir: table)
    return table


@pytest.mark.parametrize("public_name", [None, "python_docs"])
def test_the_server_has_the_public_half_of_the_embedded_text(embedded, public_name, tmp_path):
    table, removed = load_documents(DataConfig(public_name=public_name), public=True, cache_dir=tmp_path)
    of_half = embedded["public"].to_numpy() & ~embedded["repeat"].to_numpy()
    assert table["text"].to_pylist() == embedded.filter(of_half)["text"].to_pylist()
    assert set(table["label"].to_pylist()) == {"torch"} and removed == Removed(repeated_training=1)


def test_embedded_text_on_one_side_and_other_text_on_the_other(embedded, tmp_path):
    texts = embedded["text"].to_pylist()
    name = write(tmp_path / "text", [*texts[:6], *(words(i, 40) for i in range(100, 120))])
    table, removed = load_documents(DataConfig(name, "python_docs"), public=True, cache_dir=tmp_path)
    assert sorted(table["text"].to_pylist()) == sorted(texts[7:38:2]) and removed == Removed(0, 1, 0, private=3)
    table, removed = load_documents(DataConfig(public_name=name), public=True, cache_dir=tmp_path)
    assert not set(table["text"].to_pylist()) & set(texts[:6:2]) and removed == Removed(private=3)


# --- what is trained on --------------------------------------------------------------------------------------


def runs(tokens: np.ndarray) -> set[bytes]:
    """Runs of 32 tokens, here some four words."""
    tokens = tokens.astype(np.int64)
    return {tokens[i : i + 32].tobytes() for i in range(len(tokens) - 31)}


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Private text of six sources with repeats in it, and a server's text that has half of it, held out or not."""
    folder = tmp_path_factory.mktemp("overlapping")
    (folder / "private").mkdir()
    texts = {source: [words(100 * source + i, 20) for i in range(20)] for source in range(6)}
    for source, own in texts.items():
        other = texts[(source + 1) % 6]
        (folder / "private" / f"{source}.txt").write_text("\n\n".join([*own, *(f"{text} end" for text in other[:4])]))
    public = [words(1000 + i, 20) for i in range(20)] + [f"{text} too" for own in texts.values() for text in own[::2]]
    return DataConfig(str(folder / "private"), write(folder / "public", public))


@pytest.mark.parametrize("heldout_by", ["document", "source"])
@pytest.mark.parametrize("kind", ["iid", "dirichlet", "by_source", "shards"])
def test_no_heldout_text_is_in_anything_that_is_trained_on(gpt2_dir, overlapping, tmp_path, kind, heldout_by):
    partition = PartitionConfig(kind=kind, documents_per_device=1e9, num_shards=10)
    config = dataclasses.replace(overlapping, partition=partition, heldout_by=heldout_by)
    tokenizer = load_tokenizer(gpt2_dir)
    private = load_corpus(config, tokenizer, cache_dir=tmp_path)
    public = load_corpus(config, tokenizer, public=True, cache_dir=tmp_path)
    secret: set[bytes] = set()
    for corpus in (private, public):
        for d in np.flatnonzero(corpus.heldout):
            secret |= runs(corpus.tokens[corpus.offsets[d] : corpus.offsets[d + 1]])
    assert private.removed.repeated_training and public.removed.private and len(secret) > 500

    shares = Partition(partition, private.group, private.heldout, 0)
    local = LocalConfig(batch_size=4, sequence_length=48, max_steps=10**6)
    devices = ClientData(private, shares, local, 0, LANGUAGE_MODELLING)
    server, rng = ServerData(public, LANGUAGE_MODELLING), np.random.default_rng(0)
    tasks = [*devices.tasks(range(12), 1), devices.pooled_task(200, 4), server.task(100, local, rng)]
    rows = [
        (tokens, length) for task in tasks for tokens, length in by_row(task.arrays["tokens"], task.arrays["lengths"])
    ]
    for batch in server.batches(100, 4, 48, rng):
        rows += by_row(batch["tokens"], batch["lengths"])
    trained: set[bytes] = set()
    for tokens, length in rows:
        trained |= runs(tokens[:length])
    assert len(trained) > 3000 and not secret & trained


def test_a_run_says_what_was_left_out(deep_gpt2_dir, overlapping, tmp_path, capsys):
    data = dataclasses.replace(overlapping, partition=PartitionConfig(documents_per_device=4))
    distil = DistilConfig(steps=2, batch_size=2, sequence_length=16)
    emulator = EmulatorConfig(first=1, last=1, shares=(0.2, 0.6), server_steps=1, distil=distil)
    config = tiny(deep_gpt2_dir, Path("unused"), data=data, emulator=emulator, rounds=1, out=tmp_path / "run")
    Simulation(config).run()
    documents = read_config(tmp_path / "run")["resolved"]["documents"]
    removed = {side: facts["removed"] for side, facts in documents.items()}
    assert removed["private"]["repeated_training"] > 10 and removed["public"]["private"] == 60
    assert documents["public"]["training"] + documents["public"]["heldout"] == 20
    logged = events(tmp_path / "run", "documents_removed")
    assert [(event["side"], event["private"]) for event in logged] == [("private", 0), ("public", 60)]
    assert "public text: 20 documents; left out: 60 private text\n" in capsys.readouterr().out


def by_row(tokens: np.ndarray, lengths: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Every sequence with its length."""
    return list(zip(tokens.reshape(-1, tokens.shape[-1]), lengths.ravel().tolist(), strict=True))
