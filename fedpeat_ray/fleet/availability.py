"""When a device can be asked: charging, idle and online, in the usual reading.

Every kind is a pure function of (seed, device, time): nothing is remembered between calls, so rounds
may be replayed, resumed or asked for in any order.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fedpeat_ray.config import AvailabilityConfig
from fedpeat_ray.errors import ConfigError, DataError
from fedpeat_ray.seeding import derive_seed, uniforms

TRACE_COLUMNS = ["device_id", "start_s", "stop_s"]

PHASE_SPREAD = 1 / 6
"""Width of the band of phases of a diurnal fleet, as a share of the day: four hours, a continent."""


class Availability(Protocol):
    """Says which devices can be asked at a time."""

    def available(self, device_ids: np.ndarray, now_s: float) -> np.ndarray:
        """Shapes: device_ids (N,) integers -> (N,) bool. `now_s`: virtual seconds, at least 0."""
        ...


def build_availability(config: AvailabilityConfig, num_devices: int, seed: int) -> Availability:
    """The kind that is configured.

    Raises ConfigError if the trace file cannot be read, DataError if its content cannot be used.
    """
    if config.kind == "always":
        return AlwaysAvailable()
    if config.kind == "markov":
        return MarkovAvailability(config.slot_s, config.mean_on_s, config.mean_off_s, seed)
    if config.kind == "diurnal":
        return DiurnalAvailability(config.slot_s, config.day_s, config.min_share, config.max_share, seed)
    assert config.trace is not None, "SimulationConfig.validate asks for the file"
    return read_trace(config.trace, num_devices)


@dataclass(frozen=True)
class AlwaysAvailable:
    """Every device, at all times."""

    def available(self, device_ids: np.ndarray, now_s: float) -> np.ndarray:
        return np.full(device_ids.shape, True)


@dataclass(frozen=True)
class MarkovAvailability:
    """A two-state chain a device, in slots: the continuous-time on/off process seen at slot starts.

    With rates 1 / mean_on_s and 1 / mean_off_s, the process after slot_s is still where it was or has
    forgotten it: P = keep * I + (1 - keep) * stationary, keep = exp(-slot_s * (1/mean_on_s + 1/mean_off_s)).
    So the state is the one drawn at the last slot in which the device redrew it, which is found by looking
    back from now: 1 / (1 - keep) slots on average, with no chain to carry along. In slot 0 all devices draw,
    hence the chain is stationary from the start: the share on is mean_on_s / (mean_on_s + mean_off_s).
    (Coupling from the past, Propp and Wilson 1996, in its simplest case.)
    """

    slot_s: float
    mean_on_s: float
    mean_off_s: float
    seed: int

    def available(self, device_ids: np.ndarray, now_s: float) -> np.ndarray:
        keep = math.exp(-self.slot_s * (1 / self.mean_on_s + 1 / self.mean_off_s))
        share_on = self.mean_on_s / (self.mean_on_s + self.mean_off_s)
        on = np.empty(len(device_ids), bool)
        undecided = np.arange(len(device_ids))
        slot = int(now_s // self.slot_s)
        while undecided.size:
            if slot == 0:
                keep = 0.0
            # One draw decides both: below `keep` the state stays; the rest, stretched to (0, 1), draws it anew.
            draws = (uniforms(derive_seed(self.seed, "markov", slot), device_ids[undecided]) - keep) / (1 - keep)
            redrawn = draws >= 0
            on[undecided[redrawn]] = draws[redrawn] < share_on
            undecided = undecided[~redrawn]
            slot -= 1
        return on


@dataclass(frozen=True)
class DiurnalAvailability:
    """A sine over the day, after the daily swing of real fleets (Bonawitz et al. 2019).

    In each slot a device is available with probability min_share + (max_share - min_share) *
    (1 + sin(2 pi (t / day_s + phase))) / 2 at the start t of the slot, drawn by device and slot. Phases are
    uniform over PHASE_SPREAD of a day, as in a fleet that lives on one continent: the share of the whole
    fleet swings nearly (95 %) as far as that of one device. Phases over a whole day would cancel out.
    """

    slot_s: float
    day_s: float
    min_share: float
    max_share: float
    seed: int

    def available(self, device_ids: np.ndarray, now_s: float) -> np.ndarray:
        slot = int(now_s // self.slot_s)
        phase = PHASE_SPREAD * (uniforms(derive_seed(self.seed, "phase"), device_ids) - 0.5)
        height = (1 + np.sin(2 * np.pi * (slot * self.slot_s / self.day_s + phase))) / 2
        share = self.min_share + (self.max_share - self.min_share) * height
        return uniforms(derive_seed(self.seed, "diurnal", slot), device_ids) < share


@dataclass(frozen=True)
class TraceAvailability:
    """Intervals read from a file: available from start_s up to, not at, stop_s.

    A device without intervals is never available; intervals of a device may overlap. Shapes: (rows,) each.
    """

    device_id: np.ndarray
    start_s: np.ndarray
    stop_s: np.ndarray

    def available(self, device_ids: np.ndarray, now_s: float) -> np.ndarray:
        return np.isin(device_ids, self.device_id[(self.start_s <= now_s) & (now_s < self.stop_s)])


def read_trace(path: Path, num_devices: int) -> TraceAvailability:
    """Read a CSV file with the header device_id,start_s,stop_s, one interval a line.

    Raises ConfigError if the file cannot be read, DataError naming file, line and column if a value is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        allowed = f"a readable CSV file with columns {','.join(TRACE_COLUMNS)} ({error})"
        raise ConfigError.of("fleet.availability.trace", str(path), allowed) from error
    rows = csv.reader(text.splitlines())
    header = [name.strip() for name in next(rows, [])]
    if header != TRACE_COLUMNS:
        raise DataError(f"{path}, line 1: the header is {','.join(header)!r}, must be {','.join(TRACE_COLUMNS)}")
    intervals = [_interval(row, f"{path}, line {rows.line_num}", num_devices) for row in rows if row]
    if not intervals:
        raise DataError(f"{path}: no intervals; one line a time a device is available, {','.join(TRACE_COLUMNS)}")
    device_id, start_s, stop_s = zip(*intervals, strict=True)
    return TraceAvailability(np.array(device_id, np.int64), np.array(start_s), np.array(stop_s))


def _interval(row: list[str], place: str, num_devices: int) -> tuple[int, float, float]:
    if len(row) != len(TRACE_COLUMNS):
        raise DataError(f"{place}: {len(row)} values, must be {len(TRACE_COLUMNS)}: {','.join(TRACE_COLUMNS)}")
    id_text, start_text, stop_text = (value.strip() for value in row)
    if not id_text.isdecimal() or int(id_text) >= num_devices:
        raise DataError(f"{place}, device_id = {id_text!r}: must be an integer from 0 to {num_devices - 1}")
    start_s, stop_s = _number(start_text), _number(stop_text)
    if not 0 <= start_s < math.inf:
        raise DataError(f"{place}, start_s = {start_text!r}: must be a finite number of at least 0")
    if not stop_s > start_s:
        raise DataError(f"{place}, stop_s = {stop_text!r}: must be a number above start_s = {start_text}")
    return int(id_text), start_s, stop_s


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
