"""Tiers of one's own, from a TOML file with a table a tier or a CSV file with a row a tier; both have the fields of
`Tier`, and `like`, the tier of ours that all figures are taken from which are not given."""

from __future__ import annotations

import csv
import io
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedpeat_ray.errors import ConfigError, DataError, one_of
from fedpeat_ray.fleet.tiers import TIERS, WHOLE_FLEET, Tier

FIGURES = (
    "share",
    "float32_flops_per_s",
    "float16_flops_per_s",
    "memory_cap_bytes",
    "gpu_fraction",
    "downlink_bytes_per_s",
    "uplink_bytes_per_s",
    "compute_power_w",
    "radio_power_w",
)
FIELDS = ("description", "like", *FIGURES)
UNSAID = {"description": "", "gpu_fraction": 0.1}
"""What need not be given; nor need float16_flops_per_s, which is then as float32_flops_per_s."""
MOST = 127  # the index of a device's tier is an int8
_LEAST, _GREATEST = 1e-30, 1e30  # far beyond these, float32, in which fleets hold figures, is 0 or infinite


def read_tiers(path: Path) -> tuple[Tier, ...]:
    """The tiers in a file, in its order.

    Raises ConfigError if the file cannot be read, DataError naming file, tier and field if something in it is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        match path.suffix.lower():
            case ".toml":
                rows = list(tomllib.loads(text).items())
            case ".csv":
                rows = list(_rows(path, text))
            case suffix:
                raise ValueError(f"its name ends in {suffix!r}, not in .toml or .csv")
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError.of("fleet.tiers", str(path), f"a readable TOML or CSV file with tiers ({error})") from error
    tiers: dict[str, Tier] = {}
    for name, given in rows:
        if name in tiers:
            raise DataError(f"{path}, tier {name!r}: is there twice")
        tiers[name] = _tier(path, name, given)
    if not 1 <= len(tiers) <= MOST:
        raise DataError(f"{path}: {len(tiers)} tiers, must be 1 to {MOST}")
    return tuple(tiers.values())


def _rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and other cells of each row, less those that are empty."""
    reader = csv.reader(io.StringIO(text, newline=""))
    columns = [name.strip() for name in next(reader, [])]
    if "name" not in columns or len(set(columns)) < len(columns):
        allowed = f"must be different names of columns, name and some of {', '.join(FIELDS)}"
        raise DataError(f"{path}, line 1: the header is {','.join(columns)!r}, {allowed}")
    for row in filter(any, reader):
        if len(row) > len(columns):
            raise DataError(f"{path}, line {reader.line_num}: {len(row)} values, must be at most {len(columns)}")
        cells = {column: cell.strip() for column, cell in zip(columns, row, strict=False) if cell.strip()}
        yield cells.pop("name", ""), cells


def _tier(path: Path, name: str, given: object) -> Tier:
    place = f"{path}, tier {name!r}"
    if not name or not name.isprintable() or name == WHOLE_FLEET:
        raise DataError(f"{place}: must be a name that can be printed, and not {WHOLE_FLEET!r}")
    if not isinstance(given, Mapping):
        raise DataError(f"{place}: must be a table, [{name}], with some of {', '.join(FIELDS)}")
    for field in given:
        if field not in FIELDS:
            raise DataError(f"{place}, {field}: must be {one_of(field, FIELDS)}")
    values: dict[str, Any] = dict(UNSAID)
    if "like" in given:
        ours, like = {tier.name: tier for tier in TIERS}, str(given["like"])
        if like not in ours:
            raise DataError(f"{place}, like = {like!r}: must be {one_of(like, list(ours))}")
        values |= asdict(ours[like])
    figures: dict[str, Any] = {field: _number(place, field, given[field]) for field in FIGURES if field in given}
    if "float32_flops_per_s" in figures:
        values["float16_flops_per_s"] = figures["float32_flops_per_s"]
    values |= figures
    if missing := [field for field in FIGURES if field not in values]:
        raise DataError(f"{place}, {missing[0]}: is missing, and so is `like` with a tier to take it from")
    values |= {"name": name, "sources": str(path), "memory_cap_bytes": int(values["memory_cap_bytes"])}
    values["description"] = str(given.get("description", values["description"]))
    return Tier(**values)


def _number(place: str, field: str, value: Any) -> float:
    """Raises DataError for what is none, or none that a tier can have."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    most = 1.0 if field == "gpu_fraction" else _GREATEST
    if not _LEAST <= number <= most:
        raise DataError(f"{place}, {field} = {value!r}: must be a number above 0, from {_LEAST:g} to {most:g}")
    return number
