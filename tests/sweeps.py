"""Cases of one kind, of which `make quick` takes some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def sweep(cases: Sequence[Any], quick: Sequence[Any]) -> list[Any]:
    """All of the cases for a parametrisation; those that are not quick ones are marked."""
    return [case if case in quick else _marked(case) for case in cases]


def _marked(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.sweep)
