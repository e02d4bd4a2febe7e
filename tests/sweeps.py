"""Cases of one kind, of which `make quick` takes some and `make test` most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def sweep(cases: Sequence[Any], quick: Sequence[Any], full: Sequence[Any] = ()) -> list[Any]:
    """All of the cases for a parametrisation; those that are not quick ones are marked, and those for `make full`."""
    return [
        case if case in quick else _marked(case, pytest.mark.full if case in full else pytest.mark.sweep)
        for case in cases
    ]


def _marked(case: Any, mark: pytest.MarkDecorator) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=mark)
