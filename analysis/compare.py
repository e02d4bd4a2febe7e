"""Several runs beside one another: which of them are one setting under several seeds, and a short label for each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.load import Frame, NotARunError, Run, load_run

SEED = "seed"
NOT_OF_THE_EXPERIMENT = (
    SEED,
    "out",
    "resume",
    "accept_changes",
    "trace",
    "checkpoint_every",
    "client_batch_size",  # `auto` measures it; the last digits depend on it
    "foundation.num_shards",
    "foundation.num_gpus",
    "hosts.backend",
    "hosts.address",
    "hosts.num_hosts",
    "hosts.num_gpus",
    "hosts.memory_gib",
    "watch.tensorboard",
    "watch.wandb",
)
"""Settings in which runs of one group may differ: they say where and how something is computed, not what."""
UNITS = {"s": "s", "m": "m", "w": "W", "hz": "Hz"}
MAX_LABEL = 48  # characters


class ComparisonError(ValueError):
    """Runs cannot be compared in the way that was asked for."""


@dataclass(frozen=True)
class Group:
    """Runs of one setting, each under a seed of its own; a single run is a group, too."""

    runs: tuple[Run, ...]

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def clients(self) -> Frame:
        """Of all its runs."""
        if len(self) == 1:
            return self.first.clients
        return pd.concat([run.clients for run in self.runs], ignore_index=True)

    @property
    def seeds(self) -> str:
        return ", ".join(text(run.settings.get(SEED)) for run in self.runs)


Groups = Mapping[str, Group]  # by label


def load_runs(directories: Iterable[str | Path]) -> Frame:
    """The rounds of several runs as one table, with a row a (run, round): the columns of `rounds`, and in front of them
    `run`, `algorithm`, `seed` and each setting in which the runs differ, by the end of its name that tells it apart:
    `rank`, or `lora.alpha` where `proxy.alpha` differs as well.

    Raises NotARunError if a directory holds no run, or no finished round.
    """
    runs = read_runs(directories)
    names = short_names([str(run.directory) for run in runs], "/")
    differing = [path for path in differing_settings(runs) if path not in (*NOT_OF_THE_EXPERIMENT, "algorithm")]
    taken = {"run", "algorithm", SEED}.union(*(run.rounds for run in runs))
    columns = dict(zip(differing, _setting_names(differing, taken), strict=True))
    tables = []
    for run, name in zip(runs, names, strict=True):
        of_run = {"run": name, "algorithm": run.settings.get("algorithm"), SEED: run.settings.get(SEED)}
        of_run |= {column: _plain(run.settings.get(path)) for path, column in columns.items()}
        table = pd.DataFrame({column: [value] * len(run.rounds) for column, value in of_run.items()})
        tables.append(table.join(run.rounds))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def read_runs(directories: Iterable[str | Path]) -> list[Run]:
    """Runs that have something to show; raises NotARunError for the first directory that has not."""
    runs = []
    for directory in directories:
        run = load_run(directory)
        if run.rounds.empty:
            raise NotARunError(f"{run.directory} has no finished round yet")
        runs.append(run)
    return runs


def group_runs(runs: Sequence[Run], each: bool = False, labels: Sequence[str] = ()) -> dict[str, Group]:
    """Runs by label, those of one setting under several seeds together; with `each`, every run by itself.

    A run that is unfinished or failed stands by itself and is marked, and so do runs of one setting of which two have
    the same seed. `labels` replace those that are found, one a group, in order; raises ComparisonError if there are
    not as many, or if two are the same.
    """
    places = [run.directory.resolve() for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise ComparisonError(f"{run.directory} is given twice")
    groups = [Group((run,)) for run in runs] if each else _over_seeds(runs)
    names = list(labels) or _names(groups)
    marked = [name + _mark(group, name) for name, group in zip(names, groups, strict=False)]
    if labels and (len(labels) != len(groups) or len(set(marked)) < len(marked)):
        asked = ", ".join(name + _mark(group, name) for name, group in zip(_names(groups), groups, strict=True))
        wrong = f"{len(labels)} given" if len(labels) != len(groups) else "two are the same"
        raise ComparisonError(f"labels: {wrong}, {len(groups)} needed, in this order for: {asked}")
    return dict(zip(marked, groups, strict=True))


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Paths of the settings that are not the same in all runs, in the order of config.json."""
    settings = [texts(run.settings) for run in runs]
    paths = dict.fromkeys(path for values in settings for path in values)
    return [path for path in paths if len({values.get(path) for values in settings}) > 1]


def short_names(names: Sequence[str], separators: str, taken: Iterable[str] = ()) -> list[str]:
    """Of each name the shortest end, cut at a separator, that no other one and nothing `taken` has."""
    pieces = {name: [piece for piece in re.split(f"(?<=[{separators}])", name) if piece] for name in names}
    found, taken = {}, set(taken)
    for name, own in pieces.items():
        for length in range(1, len(own) + 1):
            found[name] = "".join(own[-length:])
            others = {"".join(other[-length:]) for key, other in pieces.items() if key != name}
            if found[name] not in others | taken:
                break
    return [found.get(name, name) for name in names]


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: text(value) for name, value in values.items()}


def text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def _setting(run: Run) -> dict[str, str]:
    """What a run was an experiment with."""
    return {path: value for path, value in texts(run.settings).items() if path not in NOT_OF_THE_EXPERIMENT}


def _over_seeds(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs; the runs of a group in the order of their seeds."""
    together: dict[Any, list[int]] = {}
    for place, run in enumerate(runs):
        alone = place if _state(run) else None
        together.setdefault((frozenset(_setting(run).items()), alone), []).append(place)
    groups = {}
    for places in together.values():
        seeds = {place: text(runs[place].settings.get(SEED)) for place in places}
        if len(set(seeds.values())) < len(places):  # to run a seed again says nothing about other seeds
            groups |= {place: Group((runs[place],)) for place in places}
        else:
            in_order = sorted(places, key=lambda place: (len(seeds[place]), seeds[place]))
            groups[places[0]] = Group(tuple(runs[place] for place in in_order))
    return [groups[place] for place in sorted(groups)]


def _state(run: Run) -> str | None:
    """What keeps a run from standing for its setting."""
    if run.summary is None:
        return "unfinished"
    return "failed" if run.summary.get("failure") else None


def _mark(group: Group, name: str) -> str:
    """What a label says of a group beside its name."""
    seeds = f"{len(group)} seeds"
    marks = [seeds] if len(group) > 1 and name != seeds else []
    marks += [state for state in map(_state, group.runs[:1]) if state]
    return f" ({', '.join(marks)})" if marks else ""


def _names(groups: Sequence[Group]) -> list[str]:
    """In few words what tells each group from the others, or else the name of its directory."""
    if len(groups) == 1 and len(groups[0]) == 1:
        return ["this run"]
    settings = [_setting(group.first) for group in groups]
    in_words = _in_words(settings, differing_settings([group.first for group in groups]))
    names = [", ".join(words) for words in in_words]
    for index, group in enumerate(groups):
        if settings.count(settings[index]) > 1 or not names[index]:
            own = f"seed {group.seeds}" if len(group) == 1 else "" if names[index] else f"{len(group)} seeds"
            names[index] = ", ".join(filter(None, (names[index], own)))
    directories = short_names([str(run.directory) for group in groups for run in group.runs], "/")
    firsts = [sum(map(len, groups[:index])) for index in range(len(groups))]
    directories = [directories[first] for first in firsts]
    chosen = [
        directory if names.count(name) > 1 or len(name) > MAX_LABEL else name
        for name, directory in zip(names, directories, strict=True)
    ]
    return chosen if len(set(chosen)) == len(chosen) else directories


def _in_words(settings: Sequence[Mapping[str, str]], differing: Sequence[str]) -> list[list[str]]:
    """For each the settings that tell it from all others, as few as are needed; the algorithm first."""
    paths = [path for path in differing if path not in NOT_OF_THE_EXPERIMENT]
    chosen: list[str] = []

    def told_apart(by: Sequence[str]) -> int:
        return len({tuple(values.get(path) for path in by) for values in settings})

    while paths and told_apart(chosen) < told_apart(paths):
        best = "algorithm" if "algorithm" in paths and not chosen else None
        chosen.append(best or max(paths, key=lambda path: told_apart([*chosen, path])))
    names = dict(zip(paths, _setting_names(paths, (SEED,)), strict=True))
    shown = {path: _short_values([values.get(path) for values in settings]) for path in chosen}
    in_words = []
    for index, values in enumerate(settings):
        like, words = [other for other in settings if other != values], []
        for path in chosen:
            if not like:
                break
            if any(other.get(path) != values.get(path) for other in like):
                words.append(_words(path, names[path], shown[path][index]))
            like = [other for other in like if other.get(path) == values.get(path)]
        in_words.append(words)
    return in_words


def _setting_names(paths: Sequence[str], taken: Iterable[str]) -> list[str]:
    """Short names of settings; that of a part of the settings where what is set is its `name` or `kind`."""
    return short_names([path.removesuffix(".name").removesuffix(".kind") for path in paths], ".", taken)


def _short_values(values: Sequence[str | None]) -> list[str | None]:
    """Values without the folders or modules in front of them, if that leaves them apart."""
    names = [value for value in dict.fromkeys(values) if value and not value.startswith("[")]
    short: dict[str | None, str] = dict(zip(names, short_names(names, "/:"), strict=True))
    return [short.get(value, value) for value in values]


def _words(path: str, name: str, value: str | None) -> str:
    """A setting in words: rank 4, deadline 9 s, no eight bit."""
    name = re.sub("[._]", " ", name)
    if path == "algorithm" and value:
        return value
    if value in (None, "null", "[]"):
        return f"{name} unset"
    if value in ("true", "false"):
        return name if value == "true" else f"no {name}"
    words, _, unit = name.rpartition(" ")
    if unit in UNITS and not words.endswith(" per"):
        return f"{words} {value} {UNITS[unit]}"
    items = re.sub('[][,"]', "", value) if value.startswith("[") else value
    return f"{name} {items}"


def _plain(value: Any) -> Any:
    """What pandas can group by."""
    return tuple(value) if isinstance(value, list) else value
