"""The run directory: what a run writes down, a round at a time, readable whatever happens next.

Every file is written beside its place under a hidden name, flushed to disk and moved there, so a
crash leaves whole parts only. The clients of a round go first: a row in `rounds` says that the
round is complete. `docs/run_log.md` describes the files and their columns.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.errors import ConfigError, RunDirError
from fedpeat_ray.files import flush, remove_dir, remove_unfinished, written_whole
from fedpeat_ray.records import CLIENT_COLUMNS, DROP_REASONS, ROUND_COLUMNS, Column, arrow_schema

CONFIG, SUMMARY, EVENTS, ADAPTER = "config.json", "summary.json", "events.jsonl", "adapter"
PACKAGES = ("fedpeat_ray", "ray", "torch", "transformers", "peft", "deepspeed", "numpy", "pyarrow", "pandas")
COMPUTING = ("fedpeat_ray", "torch", "transformers", "peft", "numpy")  # the bits of a run depend on these

_CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class RunLog:
    """Writes one run directory. Make it with `create` (a new run) or `resume` (one that exists)."""

    directory: Path

    @classmethod
    def create(
        cls,
        directory: Path,
        config: Mapping[str, Any],
        resolved: Mapping[str, Any] | None = None,
        *,
        data_digest: str | None = None,
        gpus: Sequence[str] = (),
    ) -> RunLog:
        """Start a run directory and write config.json.

        Args:
            directory: made with its parents if it does not exist.
            config: `SimulationConfig.to_dict()`, with the numbers that were chosen for "auto".
            resolved: what was worked out and is no setting, e.g. the tiers or the number of hosts.
            data_digest: digest of the text the run reads.
            gpus: names of the cluster's GPUs.

        Raises:
            RunDirError: the directory holds another run, or cannot be written.
        """
        cls.check_free(directory)
        directory = directory.absolute()
        try:
            (directory / "rounds").mkdir(parents=True)  # claims the directory: of two runs, one gets it
            (directory / "clients").mkdir()
            flush(directory.parent)
        except FileExistsError as error:
            raise RunDirError(f"{error.filename} exists: the directory holds another run, or is no directory") from None
        except OSError as error:
            raise RunDirError(f"{directory} cannot be written: {error.strerror}") from error
        _write_json(
            directory / CONFIG,
            {
                "config": config,
                "resolved": resolved or {},
                "created": _now(),
                "command": sys.argv,
                "data_digest": data_digest,
                "versions": _versions(),
                "git": _git_state(),
                "hardware": {
                    "machine": platform.machine(),
                    "platform": platform.platform(),
                    "num_cpus": os.cpu_count(),
                    "gpus": list(gpus),
                },
            },
        )
        return cls(directory)

    @staticmethod
    def check_free(directory: Path) -> None:
        """Raise RunDirError if the directory holds a run: cheap, to be asked before anything is loaded."""
        if directory.exists() and not directory.is_dir():
            raise RunDirError(f"{directory.absolute()} is no directory")
        if (directory / CONFIG).exists() or (directory / "rounds").exists():
            raise RunDirError(f"{directory.absolute()} holds another run: choose another directory, or resume it")

    @classmethod
    def resume(cls, directory: Path, config: Mapping[str, Any]) -> RunLog:
        """Go on writing a run directory, with this configuration; raises RunDirError if it holds no run.

        What a killed process left half written goes. The event `changed` names what computes otherwise than when
        the run began.
        """
        log = cls(directory.absolute())
        before = read_config(directory)
        for folder in ("", "rounds", "clients", "checkpoints", "emulators"):
            remove_unfinished(log.directory / folder)
        _write_json(log.directory / CONFIG, {**before, "config": config})
        log.event("resumed", changed={k: v for k, v in config.items() if before["config"].get(k) != v})
        changed: dict[str, Any] = {"versions": versions} if (versions := changed_versions(before)) else {}
        commits = [(git or {}).get("commit") for git in (before.get("git"), _git_state())]
        if all(commits) and commits[0] != commits[1]:
            changed["commit"] = commits
        if changed:
            log.event("changed", **changed)
        return log

    def write_round(
        self,
        round: int,
        round_row: Mapping[str, Any],
        client_rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any] | np.ndarray],
    ) -> None:
        """Write both parts of one round: its row, and a row a client (as rows, or as columns).

        The columns are exactly those of `records`; those with a default may be missing. None and NaN become null.
        """
        if not isinstance(client_rows, Mapping):
            client_rows = _columns_of(client_rows)
        clients = _table(CLIENT_COLUMNS, client_rows)
        rounds = _table(ROUND_COLUMNS, {name: [value] for name, value in round_row.items()})
        assert rounds["round"].to_pylist() == [round], f"the row says round {round_row['round']}, not {round}"
        assert set(clients["round"].to_pylist()) <= {round}, f"clients of another round than {round}"
        for folder, table in (("clients", clients), ("rounds", rounds)):
            with written_whole(self.directory / folder / f"{round:05d}.parquet") as part:
                pq.write_table(table, part)

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line to events.jsonl: a crash, a retry, a warning, with its facts."""
        line = _json({"time": _now(), "kind": kind, **facts}) + "\n"
        with open(self.directory / EVENTS, "ab", buffering=0) as file:
            file.write(line.encode())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: the run is finished."""
        _write_json(self.directory / SUMMARY, summary)

    def totals(self) -> dict[str, Any]:
        """Sums over all rounds written so far, as summary.json has them."""
        rounds = pq.read_table(self.directory / "rounds", schema=arrow_schema(ROUND_COLUMNS))
        reasons = pq.read_table(self.directory / "clients", columns=["drop_reason"])["drop_reason"]
        counted = {item["values"]: item["counts"] for item in reasons.value_counts().to_pylist()}
        counts = ("num_completed", "num_dropped", "num_skipped")
        costs = ("download_bytes", "emulator_bytes", "upload_bytes", "energy_j")
        sums = {name: sum(value or 0 for value in rounds[name].to_pylist()) for name in counts + costs}
        sums["rounds_without_updates"] = rounds["num_completed"].to_pylist().count(0)
        return {**sums, "drop_reasons": {reason: counted.get(reason, 0) for reason in DROP_REASONS}}

    def truncate_after(self, round: int) -> None:
        """Remove the parts of rounds later than the checkpoint that is resumed, the summary and the adapter.

        Events stay: they tell what happened, also in the rounds that are run again.
        """
        (self.directory / SUMMARY).unlink(missing_ok=True)
        remove_dir(self.directory / ADAPTER)
        for folder in ("rounds", "clients"):  # the reverse of the order of writing
            for part in (self.directory / folder).glob("*.parquet"):
                if int(part.stem) > round:
                    part.unlink()


def read_config(directory: Path) -> dict[str, Any]:
    """config.json; `SimulationConfig.from_dict(read_config(directory)["config"])` repeats the run.

    Raises RunDirError if the directory holds no run.
    """
    try:
        values = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunDirError(f"{directory} holds no run: {CONFIG}: {error.strerror}") from None
    except ValueError as error:
        raise RunDirError(f"{directory / CONFIG} is no JSON: {error}") from None
    if not (isinstance(values, dict) and isinstance(values.get("config"), dict)):
        raise RunDirError(f"{directory} holds no run: {CONFIG} has no configuration")
    return values


def read_settings(directory: Path) -> SimulationConfig:
    """The settings of the run in a directory. Raises RunDirError if it holds none, or one of other settings."""
    try:
        return SimulationConfig.from_dict(read_config(directory)["config"])
    except (ConfigError, TypeError, AttributeError) as error:
        raise RunDirError(f"{directory / CONFIG} is of another version: {error}") from error


def last_round(directory: Path) -> int:
    """The last round that is complete; 0 if none is."""
    return max(round_files(directory), default=0)


def round_files(directory: Path) -> dict[int, Path]:
    """The files of complete rounds, by round."""
    parts = (directory / "rounds").glob("[0-9]*.parquet")
    return {int(part.stem): part for part in parts if part.stem.isdecimal()}


def changed_versions(before: Mapping[str, Any]) -> dict[str, list[str]]:
    """Packages the bits depend on, as a config.json has them and as they are, where the two differ."""
    was, now = before.get("versions") or {}, _versions()
    pairs = {package: [was.get(package), now[package]] for package in COMPUTING}
    return {package: [one, other] for package, (one, other) in pairs.items() if one and other and one != other}


def check_inputs(directory: Path, before: Mapping[str, Any], now: Mapping[str, str | None]) -> None:
    """Raise RunDirError if a run that began with `before`, a config.json, would go on with something else.

    What either side does not say is not compared: config.json has not always said everything.

    Args:
        directory: for the message.
        before: config.json.
        now: digests by name: data_digest, and those of `resolved`, of a level as e.g. "weights_sha256 of level 1".
    """
    resolved = before.get("resolved") or {}
    was = {"data_digest": before.get("data_digest"), **resolved} | {
        f"{name} of level {level['level']}": level.get(name)
        for level in resolved.get("levels") or ()
        for name in ("blocks", "weights_sha256")
    }
    for name, value in now.items():
        if (began := was.get(name)) is not None and value is not None and str(began) != str(value):
            one, other = (f"{text[:12]}…" if len(text) == 64 else text for text in (str(began), str(value)))
            raise RunDirError(f"{directory} cannot be resumed: {name} was {one} when the run began, now it is {other}")


def default_run_dir(algorithm: str, seed: int) -> Path:
    """An absolute path that is free, where runs go: `<algorithm>-<date>-<time>-seed<seed>`, in UTC."""
    runs = where_runs_go()
    name = f"{algorithm}-{datetime.now(UTC):%Y%m%d-%H%M%S}-seed{seed}"
    path, count = runs / name, 1
    while path.exists():
        count += 1
        path = runs / f"{name}-{count}"
    return path


def where_runs_go() -> Path:
    """$FEDPEAT_RUNS; unset, `runs/` of the checkout that is the working directory; elsewhere `~/fedpeat_runs`.

    The driver of `ray job submit` runs in a copy of the checkout that Ray deletes, so a submitted job never uses
    `runs/`.
    """
    here = Path.cwd()
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # set by Ray's job supervisor for the driver
    if os.environ.get("FEDPEAT_RUNS"):
        return Path(os.environ["FEDPEAT_RUNS"]).expanduser().absolute()
    if not submitted and (here / ".git").exists() and (here / "pyproject.toml").exists():
        return here / "runs"
    return Path.home() / "fedpeat_runs"


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = {column.name for column in CLIENT_COLUMNS}
    for row in rows:
        assert set(row) == names, f"columns unknown or missing in a row: {sorted(set(row) ^ names)}"
    return {name: [row[name] for row in rows] for name in names}


def _table(columns: tuple[Column, ...], values: Mapping[str, Sequence[Any] | np.ndarray]) -> pa.Table:
    schema = arrow_schema(columns)
    num_rows = max(map(len, values.values()), default=0)
    values = {c.name: [c.default] * num_rows for c in columns if c.default is not None} | dict(values)
    assert set(values) == set(schema.names), f"columns unknown or missing: {sorted(set(values) ^ set(schema.names))}"
    arrays = [pa.array(values[field.name], field.type, from_pandas=True) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with written_whole(path) as part:
        part.write_text(_json(value, indent=2) + "\n", encoding="utf-8")


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _plain(value: Any) -> Any:
    """Values strict JSON can hold: NaN and infinity become null, arrays lists, paths strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES}


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package lies in and whether it was changed; None if there is none."""
    if not (_CHECKOUT / ".git").exists():  # installed, perhaps inside somebody else's checkout
        return None
    try:
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ("git", "-C", str(_CHECKOUT), *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
