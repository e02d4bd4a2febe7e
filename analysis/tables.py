"""What a report says in words and numbers; of several seeds the mean, with the lowest and the highest in brackets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import pandas as pd

from analysis import figures
from analysis.compare import Group, Groups, differing_settings, text, texts
from analysis.load import Frame, Metric, Run, last_of

NO_VALUE = "–"
HOW = {  # in a word, and in a sentence: names of scores that say how the tuned model came about
    "plug_in": ("plug-in", "with the adapter plugged into the foundation"),
    "proxy_tuned": ("steered", "with the foundation steered by the small model"),
}
MEMORY_MODELS = {
    "tested family": "within 10 % of what PyTorch allocates",
    "estimate": "an estimate: this family of models is not among those held to PyTorch",
}
NOT_A_DIFFERENCE = ("out", "resume")
SEPARATOR = "; "  # of what differs between the runs of a group

Rows = list[tuple[str, list[str]]]  # the name of a fact, and its value in each group


def describe(group: Group) -> str:
    """What was run, in words."""
    run = group.first
    get = run.settings.get
    algorithm = (run.config.get("resolved") or {}).get("algorithm") or {}  # older runs do not say
    words = str(algorithm.get("name") or get("algorithm", "an unnamed algorithm"))
    if algorithm.get("about"):
        words += f" ({algorithm['about']})"
    if get("foundation.name"):
        words += f", tuning {get('foundation.name')}"
    if get("data.name"):
        words += f" on {get('data.name')}"
    if get("fleet.num_devices"):
        words += f", on a simulated fleet of {get('fleet.num_devices'):,} devices"
    if get("cohort_size"):
        words += f" of which a round waits for {get('cohort_size'):,}"
    finished = int(run.rounds["round"].max())
    planned = get("rounds", finished)
    state = (
        f"{finished} round{'s' * (finished > 1)}"
        if run.summary
        else f"unfinished: {finished} of {planned} rounds so far"
    )
    seeds = f"seed {get('seed', NO_VALUE)}" if len(group) == 1 else f"{len(group)} runs with seeds {group.seeds}"
    return f"{words}; {state}, {seeds}."


def outcome(group: Group) -> str:
    """What came out, in a sentence or two."""
    finished, metric = all(run.summary for run in group.runs), group.first.metric
    zero_shot, tuned, centralised = (
        _known(run.scores.get(name) for run in group.runs) for name in ("zero_shot", "tuned", "centralised")
    )
    if not zero_shot or not tuned:
        measured = _known(last_of(run.rounds["score"]) for run in group.runs)
        when = "after the last round is" if finished else "so far is"
        words = f"{when} {_spread(measured, metric.written)}" if measured else "was not measured"
        return f"{metric.title} {words}."
    how = "".join(f" {HOW[name][1]}" if name in HOW else f" ({_words(name)})" for name in _tuned_by(group))
    words = f"{metric.title} went from {_spread(zero_shot, metric.written)} to {_spread(tuned, metric.written)}{how}"
    gaps = _of_summaries(group, "gap_closed")
    if len(gaps) == len(group) and centralised:
        words += f", which is {_mean(gaps):.0%} of the way to tuning centrally ({metric.written(_mean(centralised))})"
    elif centralised:
        words += f"; tuning centrally with as many tokens came to {metric.written(_mean(centralised))}, "
        words += f"a bound for {len(gaps)} of {len(group)} seeds only" if gaps else "so it is no bound here"
    if group.first.on_devices:
        name = list(group.first.on_devices)[-1]
        before, after = _on_devices(group, name)
        if gaps := _of_summaries(group, "privacy_gap"):
            words += f". With the same adapter the largest emulator on devices has {_spread(after, metric.written)}, "
            words += f"a privacy gap of {_spread(gaps, _number)}{'' if metric.is_perplexity else ' in perplexity'}"
        elif before and after:
            change = f"from {_spread(before, metric.written)} to {_spread(after, metric.written)}"
            words += f". The {name} alone went {change}"
    return words + "."


def warnings(group: Group) -> list[str]:
    """What to know before reading the results: that there are none, that they are worse, what was ignored; and that
    runs of a group differ in more than their seed."""
    seeds: dict[str, list[str]] = {}
    for run in group.runs:
        for line in _warnings(run):
            seeds.setdefault(line, []).append(text(run.settings.get("seed")))
    lines = [f"Seed {', '.join(of)}: {line}" if len(of) < len(group) else line for line, of in seeds.items()]
    inputs = ("data_digest", "versions", "git")
    unlike = [name for name in inputs if len({text(run.config.get(name)) for run in group.runs}) > 1]
    if unlike:
        names = {"data_digest": "the text they read", "versions": "versions of packages", "git": "the code's commit"}
        lines.append(f"Not only the seed differs between these runs: {', '.join(names[name] for name in unlike)}.")
    return lines


def _warnings(run: Run) -> list[str]:
    summary = run.summary or {}
    lines = [f"This run has no result: {summary['failure']}."] if summary.get("failure") else []
    lines += [f"{line[0].upper()}{line[1:]}." for line in summary.get("warnings") or ()]
    if "setting" in run.events and "counts_if" in run.events:
        ignored = run.events[run.events["kind"] == "ignored_setting"].drop_duplicates("setting")
        for event in ignored.to_dict("records"):
            lines.append(f"{event['setting']} had no effect: it counts if {event['counts_if']}.")
    return lines


def key_figures(groups: Groups) -> Rows:
    """What came out, what the algorithm sums up under names of its own, and what it cost."""
    results = {label: _results(group, _with_metric(groups, group.first.metric)) for label, group in groups.items()}
    summed_up = {label: _summed_up(group) for label, group in groups.items()}
    costs = {label: _costs(group) for label, group in groups.items()}
    return [row for facts in (results, summed_up, costs) for row in _side_by_side(facts)]


def metrics(groups: Groups) -> Rows:
    """All that the tasks measure, before and after; none where that is no more than what they are judged by."""
    rows = {label: _measured(group) for label, group in groups.items()}
    return _side_by_side(rows) if any(len(of_group) > 1 for of_group in rows.values()) else []


def _measured(group: Group) -> dict[str, str]:
    found = {}
    for name in dict.fromkeys(name for run in group.runs for name in run.metrics):
        pairs, metric = [run.metrics.get(name, (None, None)) for run in group.runs], Metric(name)
        before, after = [before for before, _ in pairs], [after for _, after in pairs]
        found[metric.title] = _change(before, after, metric.written)
    return found


def differences(groups: Groups) -> Rows:
    """The settings in which runs differ."""
    differing = differing_settings([run for group in groups.values() for run in group.runs])
    return [(path, values) for path, values in settings(groups) if path in differing and path not in NOT_A_DIFFERENCE]


def settings(groups: Groups) -> Rows:
    """All of them."""
    return _of_runs(groups, lambda run: texts(run.settings))


def origins(groups: Groups) -> Rows:
    """Where runs come from: what is needed to trust them and to repeat them."""
    return _of_runs(groups, _origin)


def events(groups: Groups) -> dict[str, list[tuple[str, str, str]]]:
    """Time, kind and facts of each event, by run."""
    found = {}
    for label, group in groups.items():
        for run in group.runs:
            if len(run.events):
                seed = f", seed {text(run.settings.get('seed'))}" if len(group) > 1 else ""
                found[label + seed] = _events(run.events)
    return found


def _with_metric(groups: Groups, metric: Metric) -> list[Run]:
    """The runs that are judged by it."""
    return [run for group in groups.values() for run in group.runs if run.metric == metric]


def _results(group: Group, alike: Sequence[Run]) -> dict[str, str | None]:
    """How good the model became; from the tables, so that an unfinished run has it too.

    With a row for each model on devices and for each other score that any of the runs `alike` has.
    """
    runs, metric = group.runs, group.first.metric
    summaries = [run.summary or {} for run in runs]
    on_devices = dict.fromkeys(name for run in alike for name in run.on_devices)
    others = dict.fromkeys(name for run in alike for name in run.other_scores if name not in run.tuned_by)
    tuned = [run.scores.get("tuned", last_of(run.rounds["score"])) for run in runs]

    def scores(name: str) -> str:
        return _spread([run.scores.get(name) for run in runs], metric.written)

    return {
        f"{metric.title}, zero-shot": scores("zero_shot"),
        **{f"{metric.title}, {name}": _change(*_on_devices(group, name), metric.written) for name in on_devices},
        f"{metric.title}, tuned": _spread(tuned, metric.written, ", ".join(map(_words, _tuned_by(group)))),
        **{f"{metric.title}, {_words(name)}": scores(name) for name in others},
        f"{metric.title}, tuned centrally": scores("centralised"),
        "Share of the gap closed": _spread([summary.get("gap_closed") for summary in summaries], _percent),
        "Privacy gap" if metric.is_perplexity else "Privacy gap, in perplexity": (
            _spread([summary.get("privacy_gap") for summary in summaries], _number)
            if any("privacy_gap" in summary for summary in summaries)
            else None
        ),
    }


def _summed_up(group: Group) -> dict[str, str | None]:
    numbers = [(run.summary or {}).get("figures") or {} for run in group.runs]
    names = dict.fromkeys(name for of_run in numbers for name in of_run)
    return {
        _words(name)[:1].upper() + _words(name)[1:]: _spread([of_run.get(name) for of_run in numbers], _figure)
        for name in names
    }


def _costs(group: Group) -> dict[str, str | None]:
    """What it took; from the tables, too."""
    runs = group.runs

    def total(column: str, how: Callable[[float], str], *notes: str) -> str:
        return _spread([run.rounds[column].sum() for run in runs], how, *notes)

    emulators = [run.rounds["emulator_bytes"].sum() for run in runs if "emulator_bytes" in run.rounds]  # or older
    known = str((group.first.config.get("resolved") or {}).get("memory_model") or "")
    reasons = group.clients["drop_reason"].value_counts() / len(group)
    return {
        "Rounds": _spread([len(run.rounds) for run in runs], _count),
        "Updates used": total("num_completed", _count),
        "Memory model": MEMORY_MODELS.get(known, known) or None,
        "Devices dropped": total(
            "num_dropped", _count, ", ".join(f"{reason} {_count(count)}" for reason, count in reasons.items())
        ),
        "Devices skipped": total("num_skipped", _count)
        if any(run.rounds["num_skipped"].sum() for run in runs)
        else None,
        "Tokens trained on": total("num_tokens", _count),
        "Virtual time": _spread([run.rounds["virtual_s"].max() for run in runs], _time),
        "Sent to devices": total(
            "download_bytes", _bytes, f"{_bytes(_mean(emulators))} emulators" if any(emulators) else ""
        ),
        "Sent by devices": total("upload_bytes", _bytes),
        "Energy of devices": total("energy_j", lambda value: _scaled(value, "J")),
        "Wall time (measured)": _spread(
            [(run.summary or {}).get("wall_s", run.rounds["wall_s"].sum()) for run in runs], _time
        ),
    }


def _origin(run: Run) -> dict[str, str]:
    config, git = run.config, run.config.get("git")
    hardware = config.get("hardware") or {}
    created = config.get("created")
    versions = {name: version for name, version in (config.get("versions") or {}).items() if version}
    return {
        "Directory": run.name,
        "Started": f"{datetime.fromisoformat(created):%Y-%m-%d %H:%M} UTC" if created else NO_VALUE,
        "Commit": f"{git['commit'][:12]}{', with changes' if git['dirty'] else ''}" if git else NO_VALUE,
        "Data digest": str(config.get("data_digest") or NO_VALUE),
        "Adapter SHA-256": str((run.summary or {}).get("adapter_sha256") or NO_VALUE),
        "Machine": f"{hardware.get('machine', NO_VALUE)}, {hardware.get('num_cpus', NO_VALUE)} CPUs",
        "GPUs": ", ".join(hardware.get("gpus") or ()) or "none",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or NO_VALUE,
    }


def _of_runs(groups: Groups, facts: Callable[[Run], Mapping[str, str]]) -> Rows:
    """Facts of runs as table rows, with a column a group."""
    columns = {}
    for label, group in groups.items():
        of_runs = [facts(run) for run in group.runs]
        names = dict.fromkeys(name for of_run in of_runs for name in of_run)
        columns[label] = {
            name: SEPARATOR.join(dict.fromkeys(of_run.get(name, NO_VALUE) for of_run in of_runs)) for name in names
        }
    return _side_by_side(columns)


def _side_by_side(columns: Mapping[str, Mapping[str, str | None]]) -> Rows:
    """Facts by label as table rows: the name of a fact, and its value in each group; none where no group has one."""
    names = dict.fromkeys(name for values in columns.values() for name in values)
    rows = {name: [values.get(name) for values in columns.values()] for name in names}
    rows = {name: values for name, values in rows.items() if values != [None] * len(values)}
    return [(name, [NO_VALUE if value is None else value for value in values]) for name, values in rows.items()]


def _events(events: Frame) -> list[tuple[str, str, str]]:
    rows = []
    for event in events.to_dict("records"):
        facts = {key: value for key, value in event.items() if key not in ("time", "kind") and _is_fact(value)}
        rows.append(
            (str(event["time"])[:19], str(event["kind"]), ", ".join(f"{k}: {text(v)}" for k, v in facts.items()))
        )
    return rows


def _is_fact(value: Any) -> bool:
    return isinstance(value, list | dict) or bool(pd.notna(value))


def _tuned_by(group: Group) -> list[str]:
    return [name for name in group.first.tuned_by if all(name in run.tuned_by for run in group.runs)]


def _on_devices(group: Group, name: str) -> tuple[list[float], list[float]]:
    """Scores before and after of a model that devices train, over the runs that have them."""
    pairs = [run.on_devices.get(name, (None, None)) for run in group.runs]
    return _known(before for before, _ in pairs), _known(after for _, after in pairs)


def _of_summaries(group: Group, name: str) -> list[float]:
    return _known((run.summary or {}).get(name) for run in group.runs)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float | None], how: Callable[[float], str], *notes: str) -> str:
    """The mean of the values that there are; in brackets the lowest and the highest if they differ, of how many runs
    if some have none, and notes."""
    known = _known(values)
    if not known:
        return NO_VALUE
    lowest, highest = how(min(known)), how(max(known))
    inside = [f"{lowest} to {highest}"] if lowest != highest else []
    inside += [f"{len(known)} of {len(values)} seeds"] if len(known) < len(values) else []
    inside += [note for note in notes if note]
    return how(_mean(known)) + (f" ({'; '.join(inside)})" if inside else "")


def _change(before: Sequence[float | None], after: Sequence[float | None], how: Callable[[float], str]) -> str:
    return f"{_spread(before, how)} → {_spread(after, how)}" if _known([*before, *after]) else NO_VALUE


def _words(name: str) -> str:
    return HOW[name][0] if name in HOW else name.replace("_", " ")


def _number(value: float) -> str:
    return f"{value:.2f}"


def _count(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _figure(value: float) -> str:
    """A number of any size: 3, 0.00025, 12,345.68."""
    return f"{value:,.2f}".removesuffix(".00") if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def _bytes(value: float) -> str:
    return _scaled(value, "B")


def _scaled(value: float, unit: str) -> str:
    """1,234,000 bytes as 1.23 MB."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:,.3g} P{unit}"


def _time(seconds: float) -> str:
    length, unit = figures.time_unit(seconds)
    return f"{seconds / length:.3g} {unit}"
