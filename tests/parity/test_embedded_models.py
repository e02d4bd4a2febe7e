"""The embedded pair is what the documentation says: small enough, a pair, and every block matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeat_ray.models import foundation as foundations
from workloads.check_foundation import half_middle, heldout_text, perplexity

NUM_SEQUENCES = 128


@pytest.fixture(scope="module")
def private() -> dict[str, float]:
    """Perplexities on private text: of the two, and of the base without every second block of its middle."""
    prepared = {name: foundations.prepare(name, "float32") for name in foundations.EMBEDDED}
    text = heldout_text(prepared["pydoc-base"], NUM_SEQUENCES, public=False)  # for both: they share a tokenizer
    models = {name: foundations.load(foundation) for name, foundation in prepared.items()}
    models["half"] = half_middle(models["pydoc-base"])
    return {name: perplexity(model, *text) for name, model in models.items()}


@pytest.mark.sweep  # reads all the documentation there is
def test_leaving_out_every_second_middle_block_doubles_the_perplexity(private):
    assert private["half"] >= 2 * private["pydoc-base"]


@pytest.mark.sweep
def test_the_base_is_clearly_better_than_its_small_sibling(private):
    assert private["pydoc-base"] <= 0.75 * private["pydoc-small"]


def test_the_pair_shares_a_tokenizer_and_takes_less_than_40_megabytes():
    base, small = (foundations.model_dir(name) for name in foundations.EMBEDDED)
    assert (base / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    assert sum(path.stat().st_size for folder in (base, small) for path in Path(folder).iterdir()) < 40e6
