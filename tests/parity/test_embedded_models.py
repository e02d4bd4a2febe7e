"""The embedded pair is what the documentation says: small enough, a pair, and every block matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeat_ray.models import foundation as foundations
from workloads.check_foundation import Quality, quality


@pytest.fixture(scope="module")
def measured() -> dict[str, Quality]:
    return {name: quality(name, num_sequences=128) for name in foundations.EMBEDDED}


def test_leaving_out_every_second_middle_block_doubles_the_perplexity(measured):
    assert measured["pydoc-base"].private_half_middle >= 2 * measured["pydoc-base"].private


def test_the_base_is_clearly_better_than_its_small_sibling(measured):
    assert measured["pydoc-base"].private <= 0.75 * measured["pydoc-small"].private


def test_the_pair_shares_a_tokenizer_and_takes_less_than_40_megabytes():
    base, small = (foundations.model_dir(name) for name in foundations.EMBEDDED)
    assert (base / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    assert sum(path.stat().st_size for folder in (base, small) for path in Path(folder).iterdir()) < 40e6
