"""The examples of docs/own.md, as the files that a user would write."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "own.md"
NAMES = {
    "algorithm": "my_algorithm.py:Cooling",
    "controller": "my_controller.py:Bandit",
    "aggregator": "my_aggregator.py:median",
    "dataset": "my_dataset.py:letters",
}


def write(directory: Path) -> dict[str, str]:
    """Write the files; returns the import path of each kind of thing."""
    for name, code in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        (directory / name).write_text(code)
    return {kind: str(directory / name) for kind, name in NAMES.items()}
