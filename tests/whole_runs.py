"""Whole runs small enough for a test, in this process: their configuration, what they leave, and when two are equal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Self

import pandas as pd

from fedpeat_ray import SimulationConfig
from fedpeat_ray.config import (
    AvailabilityConfig,
    ChannelConfig,
    ControlConfig,
    DataConfig,
    DistilConfig,
    EmulatorConfig,
    EvaluationConfig,
    FleetConfig,
    FoundationConfig,
    HostsConfig,
    LocalConfig,
    LoraConfig,
    PartitionConfig,
)
from fedpeat_ray.control.plan import Controller

SHARES = (0.2, 0.6)
"""Of five blocks: one, three."""
ENDS = EmulatorConfig(
    first=1,
    last=1,
    shares=SHARES,
    weights="foundation",
    realign_steps=3,
    distil=DistilConfig(steps=6, batch_size=2, sequence_length=16),
)
"""Two emulators of a model of seven blocks."""

SIX = FleetConfig(num_devices=6, availability=AvailabilityConfig(kind="always"), channel=ChannelConfig(kind="nominal"))
"""Devices that are always there."""

EVERYBODY: dict[str, Any] = {"cohort_size": 6, "over_sample": 1.0, "fleet": SIX}
"""Settings with which all of these train in every round."""


class Unsettled(Controller):
    """A controller without settings."""

    @classmethod
    def build(cls, config: ControlConfig, seed: int) -> Self:
        return cls()


def tiny(model: Path, text: Path, **changes: Any) -> SimulationConfig:
    """Three rounds of six of fourteen devices on a page of text, judged at the end: about a second.

    The server's text is the folder `public` beside `text`.
    """
    config = SimulationConfig(
        rounds=3,
        cohort_size=6,
        client_batch_size=4,
        seed=3,
        local=LocalConfig(sequence_length=32, max_steps=3, learning_rate=0.02),
        lora=LoraConfig(rank=2),
        foundation=FoundationConfig(str(model), dtype="float32"),
        data=DataConfig(
            str(text), public_name=str(text.with_name("public")), partition=PartitionConfig(documents_per_device=4)
        ),
        fleet=FleetConfig(num_devices=14),
        evaluation=EvaluationConfig(every=99, num_sequences=8, sequence_length=32, centralised=False),
        hosts=HostsConfig(backend="serial"),
    )
    return changed(config, **changes)


def changed(config: SimulationConfig, **changes: Any) -> SimulationConfig:
    """With other settings; those of a part as a dict."""
    parts = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **parts)


def summary(directory: Path) -> dict[str, Any]:
    """summary.json without what was measured."""
    values = json.loads((directory / "summary.json").read_text())
    return {name: value for name, value in values.items() if not name.startswith("wall_")}


def table(directory: Path, name: str) -> Any:
    """The columns of `rounds` or `clients` that the machine has no say in, as a data frame."""
    frame = pd.read_parquet(directory / name, dtype_backend="pyarrow")
    return frame[[column for column in frame.columns if not column.startswith("wall_")]]


def events(directory: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of events.jsonl; those of one kind, if one is named."""
    path = directory / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if kind in (None, event["kind"])]


def assert_same_bits(one: Path, other: Path) -> None:
    """Adapter, summary and every deterministic column agree exactly."""
    for name in ("rounds", "clients"):
        pd.testing.assert_frame_equal(table(one, name), table(other, name), check_exact=True)
    assert summary(one)["adapter_sha256"] == summary(other)["adapter_sha256"]
    assert summary(one) == summary(other)
