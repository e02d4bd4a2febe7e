"""What a run writes down: the columns of the two tables, with unit and meaning, in one place.

`docs/run_log.md` is held to this schema by a test. Columns marked measured (prefix `wall_`) depend
on the machine; all others are a function of the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

COMPLETED = "completed"
DROPPED = "dropped"
SKIPPED = "skipped"
"""The controller left the device out: decided, not lost. It costs nothing."""

UNAVAILABLE = "unavailable"
MEMORY = "memory"
LINK = "link"
DEADLINE = "deadline"
NOT_NEEDED = "not needed"
NON_FINITE = "non_finite"
DROP_REASONS = (UNAVAILABLE, MEMORY, LINK, DEADLINE, NOT_NEEDED, NON_FINITE)


NO_HOST = "no_host"
"""An event: nothing is done until the cluster has room for a host."""

SERVER = -1
"""Stands for the server where a device id is asked for."""


@dataclass(frozen=True)
class Column:
    """One column of a table of the run directory."""

    name: str
    type: pa.DataType
    unit: str
    meaning: str
    default: Any = None
    """Written where a row lacks the column; None: no row may."""

    @property
    def measured(self) -> bool:
        """True if the value depends on the machine the run ran on."""
        return self.name.startswith("wall_")


CLIENT_COLUMNS = (
    Column("round", pa.int32(), "", "round, from 1"),
    Column("device_id", pa.int64(), "", "the device, from 0"),
    Column("tier", pa.string(), "", "class of hardware"),
    Column("group", pa.string(), "", "source or label (`data.partition.group_by`) of most of its documents"),
    Column("outcome", pa.string(), "", " | ".join((COMPLETED, DROPPED, SKIPPED))),
    Column("drop_reason", pa.string(), "", " | ".join(DROP_REASONS) + "; null if not dropped"),
    Column("level", pa.int32(), "", "emulator level; null where the algorithm has none, and if skipped"),
    Column("emulator_age", pa.int32(), "", "re-alignments since that emulator was new; null as `level`"),
    Column("lora_rank", pa.int32(), "", "rank of the device's LoRA; null without LoRA"),
    Column("num_steps", pa.int32(), "steps", "local optimizer steps of the task"),
    Column("num_examples", pa.int64(), "sequences", "sequences in the device's share"),
    Column("num_tokens", pa.int64(), "tokens", "tokens the task trains on, padding not counted"),
    Column("download_bytes", pa.int64(), "bytes", "received by the device"),
    Column("emulator_bytes", pa.int64(), "bytes", "of these the emulator; 0 if the device kept the one it had"),
    Column("upload_bytes", pa.int64(), "bytes", "sent by the device; 0 if dropped"),
    Column("download_s", pa.float64(), "virtual s", "time on the downlink"),
    Column("compute_s", pa.float64(), "virtual s", "time to train"),
    Column("upload_s", pa.float64(), "virtual s", "time on the uplink"),
    Column("energy_j", pa.float64(), "J", "computing and radio; what was spent until it dropped"),
    Column("flops", pa.float64(), "", "floating point operations of training, as far as it got"),
    Column("memory_bytes", pa.int64(), "bytes", "peak training memory by the memory model"),
    Column("memory_cap_bytes", pa.int64(), "bytes", "what the device has for training"),
    Column("train_loss", pa.float64(), "nats/token", "mean loss over the local steps; null if not trained"),
    Column("wall_train_s", pa.float64(), "s", "measured: the client's share of its batch's training time"),
)

ROUND_COLUMNS = (
    Column("round", pa.int32(), "", "round, from 1"),
    Column("virtual_s", pa.float64(), "virtual s", "simulated clock at the end of the round"),
    Column("num_completed", pa.int32(), "devices", "devices whose update was used"),
    Column("num_dropped", pa.int32(), "devices", "devices sampled, not skipped and not used, whatever the reason"),
    Column("num_skipped", pa.int32(), "devices", "devices sampled and left out by the controller", default=0),
    Column("num_tokens", pa.int64(), "tokens", "tokens trained on by completed devices"),
    Column("download_bytes", pa.int64(), "bytes", "by all sampled devices"),
    Column("emulator_bytes", pa.int64(), "bytes", "of these emulators"),
    Column("upload_bytes", pa.int64(), "bytes", "by all sampled devices"),
    Column("energy_j", pa.float64(), "J", "by all sampled devices"),
    Column("flops", pa.float64(), "", "of training on all sampled devices"),
    Column(
        "server_flops",
        pa.float64(),
        "",
        "of the server: its tuning, re-aligning emulators, distilling a small model",
    ),
    Column("server_memory_bytes", pa.int64(), "bytes", "peak of the same by the memory model; 0 if there is none"),
    Column("train_loss", pa.float64(), "nats/token", "mean over completed devices, weighted by tokens"),
    Column(
        "perplexity",
        pa.float64(),
        "",
        "exp of the mean loss a label (next token, class), on held-out private data; null if not evaluated",
    ),
    Column("device_perplexity", pa.float64(), "", "same data, the largest emulator or small model on devices; or null"),
    Column("token_accuracy", pa.float64(), "", "share of labels guessed, same data; null if not evaluated"),
    Column(
        "metrics",
        pa.map_(pa.string(), pa.float64()),
        "",
        "what the task measures there, by name; empty if not evaluated",
        default=(),
    ),
    Column(
        "device_metrics",
        pa.map_(pa.string(), pa.float64()),
        "",
        "the same of the largest emulator or small model on devices",
        default=(),
    ),
    Column(
        "figures",
        pa.map_(pa.string(), pa.float64()),
        "",
        "numbers that the algorithm or its controller logged, by name",
        default=(),
    ),
    Column("wall_train_s", pa.float64(), "s", "measured: training on the hosts"),
    Column("wall_eval_s", pa.float64(), "s", "measured: evaluation"),
    Column("wall_s", pa.float64(), "s", "measured: the whole round"),
)


def arrow_schema(columns: tuple[Column, ...]) -> pa.Schema:
    """The Arrow schema of one table."""
    return pa.schema([(column.name, column.type) for column in columns])


@dataclass(frozen=True)
class Assignment:
    """What one device is asked to train in one round. Its text is read where it is trained."""

    device_id: int
    round: int
    num_examples: int
    """Sequences in the device's share: its weight in the mean."""
    num_steps: int
    num_tokens: int
    """Valid tokens of all steps."""
    documents: tuple[int, ...]
    """Of the device's share, by index."""
    level: int | None = None
    """The emulator to train on; None: the foundation."""
    age: int = 0
    """Of that emulator, in re-alignments since."""


Arrays = Mapping[str, np.ndarray]
"""A batch of examples by what of them it holds (tokens, pixels, labels), a row each. "lengths" is always there: how
many tokens the row has that are not padding; a row of length 0 fills up and counts for nothing."""


def sequences(tokens: np.ndarray, lengths: np.ndarray) -> Arrays:
    """Sequences: token ids (..., T) and how many of each are not padding (...)."""
    return {"tokens": tokens, "lengths": lengths}


@dataclass(frozen=True)
class ClientTask:
    """What one device trains in one round, with its examples.

    Legend: S steps, B rows a step.
    """

    device_id: int
    num_examples: int
    """Sequences in the device's share: its weight in the mean."""
    arrays: Arrays
    """Batches, arrays (S, B, ...)."""
    level: int | None = None
    """The emulator to train on; None: the foundation."""
    age: int = 0
    """Of that emulator, in re-alignments since."""

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.arrays["lengths"])

    @property
    def num_tokens(self) -> int:
        """Valid tokens of all steps."""
        return int(self.arrays["lengths"].sum())

    def step(self, number: int) -> Arrays:
        """The batch of a step, from 0."""
        return {name: array[number] for name, array in self.arrays.items()}


@dataclass(frozen=True)
class ClientReport:
    """What is known of a device's work once it is trained: the part of its row the plan could not tell."""

    device_id: int
    train_loss: float | None
    """Mean loss over the local steps, nats per token."""
    failure: str | None
    """NON_FINITE (the update is no number, or absurdly long) or MEMORY (a real cap was hit): it is not used."""
    wall_train_s: float
