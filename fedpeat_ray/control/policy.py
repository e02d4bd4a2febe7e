"""The policy of the learned controller: one small network for every device, in numpy.

    h_n = relu(W2 relu(W1 x_n))           each candidate by itself: device_1, device_2
    c   = relu(Wc [mean h, max h])        all of them together: context
    z_n = relu(Wz [h_n, c])               each in view of all: joint
    logits_n = Wo z_n                     skip, level 1 … L; renew, stay: choice

The same parameters serve 10 candidates and 10,000, and permuted candidates get permuted choices (deep sets, Zaheer et
al. 2017). To skip starts at the log-odds that as many take part as there are places. It is trained in branching_ppo.py
and stored as safetensors with a JSON beside it.

Legend: N candidates, L levels, D columns of observation.py, H width.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedpeat_ray.control.observation import Columns
from fedpeat_ray.control.plan import SKIP
from fedpeat_ray.errors import DataError

_WEIGHTS, _ABOUT, _FORMAT = "policy.safetensors", "policy.json", 1


@dataclass(frozen=True)
class About:
    """What a policy is for, and where it comes from."""

    shares: tuple[float, ...]
    """Of the blocks that level 1, 2, … keeps: the ladder."""
    give_foundation: bool
    """Whether the foundation is a level of its own above these."""
    trained: Mapping[str, Any]
    """How it was trained, for the reader."""

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.shares) + self.give_foundation


@dataclass(frozen=True)
class Policy:
    """Reads observations, answers with choices."""

    about: About
    weights: Mapping[str, np.ndarray]
    """float32: "<layer>.weight" (out, in) and "<layer>.bias" (out,) for each of the layers above."""

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, 1 + L + 2); what may not be chosen has -inf."""
        columns = Columns(self.about.num_levels)
        features, masks = rows[:, : columns.num_features], rows[:, columns.num_features :]
        h = _relu(self._layer("device_2", _relu(self._layer("device_1", features))))
        context = _relu(self._layer("context", np.concatenate([h.mean(axis=0), h.max(axis=0)])))
        weight, width = self.weights["joint.weight"], h.shape[1]
        z = _relu(h @ weight[:, :width].T + (weight[:, width:] @ context + self.weights["joint.bias"]))
        logits = self._layer("choice", z)
        logits[:, 0] += skip_log_odds(rows[0, columns.names.index("candidates_per_place")])
        return np.where(masks > 0, logits, -np.inf)

    def choose(self, rows: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, 2): as many candidates take part as are expected to, the likeliest of them, at least one; each
        with its likeliest level and exchange."""
        logits, num_levels = self.logits(rows), 1 + self.about.num_levels
        of_levels, of_exchange = logits[:, :num_levels], logits[:, num_levels:]
        odds = np.exp(of_levels - of_levels.max(axis=1, keepdims=True))
        takes_part = 1 - odds[:, 0] / odds.sum(axis=1)
        likeliest = np.argsort(-takes_part, kind="stable")[: max(1, round(float(takes_part.sum())))]
        levels = np.full(len(rows), SKIP)
        levels[likeliest] = 1 + of_levels[likeliest, 1:].argmax(axis=1)
        levels[takes_part == 0] = SKIP
        return np.stack([levels, of_exchange.argmax(axis=1)], axis=1)

    @property
    def sha256(self) -> str:
        """Of the weights."""
        return _digest(save(dict(self.weights)))

    def _layer(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def save(self, directory: Path) -> None:
        """Write both files."""
        directory.mkdir(parents=True, exist_ok=True)
        columns = Columns(self.about.num_levels).names
        about = {"format": _FORMAT, "columns": columns, "sha256": self.sha256, **asdict(self.about)}
        (directory / _WEIGHTS).write_bytes(save(dict(self.weights)))
        (directory / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Raises DataError, naming the file and what is wrong, for anything that `save` did not write."""
        try:
            about = json.loads((directory / _ABOUT).read_text(encoding="utf-8"))
            weights = (directory / _WEIGHTS).read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"{directory}: no policy can be read there ({error})") from error
        if not isinstance(about, dict) or about.get("format") != _FORMAT:
            raise DataError(f"{directory / _ABOUT}: not a policy of format {_FORMAT}")
        if _digest(weights) != about.get("sha256"):
            raise DataError(f"{directory / _WEIGHTS}: damaged, its SHA-256 is not the one in {_ABOUT}")
        try:
            policy = cls(About(tuple(about["shares"]), about["give_foundation"], about["trained"]), load(weights))
            columns = Columns(policy.about.num_levels)
            if tuple(about["columns"]) != columns.names:
                raise DataError(f"{directory / _ABOUT}: it reads other columns than are written today; train it anew")
            policy.choose(np.ones((1, len(columns.names)), np.float32))
        except (KeyError, TypeError, ValueError, IndexError, SafetensorError) as error:
            raise DataError(f"{directory}: damaged ({type(error).__name__}: {error})") from error
        return policy


def skip_log_odds(log_candidates_per_place: float) -> float:
    """At these odds, as many candidates take part as there are places."""
    return math.log(max(math.expm1(log_candidates_per_place), 0.05))


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
