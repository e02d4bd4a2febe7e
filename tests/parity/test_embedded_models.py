"""The embedded pair is what the documentation says: small enough, a pair, and every block matters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeat_ray.config import DataConfig, LoraConfig
from fedpeat_ray.data import python_docs
from fedpeat_ray.data.batches import heldout_sequences
from fedpeat_ray.data.corpus import load_corpus
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.foundation import load, load_backbone, load_tokenizer, prepare
from fedpeat_ray.records import sequences
from fedpeat_ray.trainable.lora import find_lora
from fedpeat_ray.training.evaluation import Evaluate, ScoreSum, evaluation_tasks
from workloads.check_foundation import half_middle, heldout_text, perplexity

IN_PART = {
    "scipy": "optimize",
    "sympy": "polys",
    "pandas": "io",
    "networkx": "generators",
    "numpy": "lib",
    "matplotlib": "axes",
    "ray": "tune",
}
"""A folder of every private package: an eighth of all documents, text of every kind."""


@pytest.fixture(scope="module")
def in_part(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], AbstractContextManager]:
    """A part of the documentation: to read all there is takes a minute."""
    cache, source_files = tmp_path_factory.mktemp("cache in part"), python_docs._source_files

    def some_files(root: Path) -> Iterator[Path]:
        yield from source_files(root / IN_PART[root.name]) if root.name in IN_PART else ()

    @contextlib.contextmanager
    def in_part() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(cache))
            patch.setattr(python_docs, "_source_files", some_files)
            yield

    return in_part


@pytest.fixture(scope="module", params=["in part", pytest.param("all", marks=pytest.mark.full)])
def private(request: pytest.FixtureRequest, in_part) -> dict[str, float]:
    """Perplexities on private text: of the two, and of the base without every second block of its middle."""
    prepared = {name: foundations.prepare(name, "float32") for name in foundations.PAIR}
    with contextlib.nullcontext() if request.param == "all" else in_part():
        num_sequences = 128 if request.param == "all" else 32
        text = heldout_text(prepared["pydoc-base"], num_sequences, public=False)  # for both: they share a tokenizer
    models = {name: foundations.load(foundation) for name, foundation in prepared.items()}
    models["half"] = half_middle(models["pydoc-base"])
    return {name: perplexity(model, *text) for name, model in models.items()}


@pytest.mark.sweep  # reads documentation
def test_leaving_out_every_second_middle_block_doubles_the_perplexity(private):
    assert private["half"] >= 2 * private["pydoc-base"]


@pytest.mark.sweep
def test_the_base_is_clearly_better_than_its_small_sibling(private):
    assert private["pydoc-base"] <= 0.75 * private["pydoc-small"]


def test_the_pair_shares_a_tokenizer_and_takes_less_than_40_megabytes():
    base, small = (foundations.model_dir(name) for name in foundations.PAIR)
    assert (base / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    assert sum(path.stat().st_size for folder in (base, small) for path in Path(folder).iterdir()) < 40e6


def test_the_small_encoders_take_less_than_10_megabytes():
    folders = [foundations.model_dir(name) for name in foundations.EMBEDDED if name not in foundations.PAIR]
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 10e6


@pytest.mark.sweep
@pytest.mark.parametrize("text", ["in part", pytest.param("all", marks=pytest.mark.full)])
def test_perplexity_in_the_type_of_training_agrees_to_a_tenth_of_a_percent(text, in_part):
    """bfloat16 also where the processor has no instructions for it: only slower. Rounding averages out over tokens: a
    quarter of these sequences alone may differ by 0.11 %."""
    foundation = prepare("pydoc-small", "bfloat16")
    backbone, lora = load_backbone(foundation), find_lora(load(foundation), LoraConfig())
    adapter_P = lora.init(0)
    adapter_P += 0.01 * torch.from_numpy(np.random.default_rng(0).standard_normal(len(adapter_P))).float()
    with contextlib.nullcontext() if text == "all" else in_part():
        corpus = load_corpus(DataConfig(), load_tokenizer(foundation.config_dir))
    tasks = evaluation_tasks("all", sequences(*heldout_sequences(corpus, 256, 128, seed=0)))
    found = []
    for exact in (True, False):
        scores = ScoreSum().add(Evaluate(lora, exact)(backbone, adapter_P, tasks)).result()
        found.append(scores["all"].perplexity)
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[0] != found[1]
