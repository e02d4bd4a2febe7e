"""One self-contained HTML page about one run, or several side by side."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from analysis import figures
from analysis.figures import Runs
from analysis.load import Frame, NotARunError, Run, load_run

TEMPLATES = Path(__file__).parent / "templates"
NO_VALUE = "–"
HOW = {  # in a word, and in a sentence: names of perplexities that say how the tuned model came about
    "plug_in": ("plug-in", "with the adapter plugged into the foundation"),
    "proxy_tuned": ("steered", "with the foundation steered by the small model"),
}
MEMORY_MODELS = {
    "tested family": "within 10 % of what PyTorch allocates",
    "estimate": "an estimate: this family of models is not among those held to PyTorch",
}
NOT_A_DIFFERENCE = ("out", "resume")
MAX_LABEL_SETTINGS = 3


class Section(NamedTuple):
    """A part of the page: a heading, a sentence on how to read the figure, and what draws it."""

    title: str
    text: str
    plot: Callable[[Runs], Figure | None]
    nothing: str
    only_if: Callable[[Run], bool] | None = None
    """Left out if it holds for none of the runs."""


SECTIONS = (
    Section(
        "Quality over rounds",
        "Perplexity on held-out private text after each round (lower is better), from the foundation as it came "
        "(zero-shot) towards what tuning centrally on the pooled data reaches with as many tokens.",
        figures.perplexity_over_rounds,
        "Perplexity was not measured.",
    ),
    Section(
        "Quality for its price",
        "The same perplexity over the simulated time it took, and over all bytes devices received and sent.",
        figures.perplexity_over_costs,
        "Perplexity was not measured.",
    ),
    Section(
        "Perplexity by emulator level",
        "Emulators that devices get, before and after, by the blocks of the foundation they keep, on the same text; "
        "the lines are the foundation without and with the tuned adapter. What lies between an emulator and the "
        "plug-in is the privacy gap: what only the owner of the foundation has.",
        figures.perplexity_by_level,
        "Emulators are measured at the end of a run, and these runs are unfinished.",
        only_if=lambda run: bool(run.levels),
    ),
    Section(
        "Levels in use",
        "The emulators that the completed devices of each round trained on, a higher level is a larger emulator; and "
        "what was sent. A device that has the emulator of its level already receives the adapter only.",
        figures.levels_in_use,
        "No device completed a round.",
        only_if=lambda run: bool(run.levels) or run.clients["level"].notna().any(),
    ),
    Section(
        "Logged by the algorithm",
        "Numbers that the algorithm or its controller wrote down along the way, under the names it gave them.",
        figures.logged_over_rounds,
        "Nothing that was logged is a finite number.",
        only_if=lambda run: any(name.startswith("figures.") for name in run.rounds),
    ),
    Section(
        "Where the seconds go",
        "Simulated time of a completed device, by tier: receiving the model, training, sending the update.",
        figures.time_by_tier,
        "No device completed a round.",
    ),
    Section(
        "What a round waits for",
        "The slowest completed device of each round, and what it spent its time on.",
        figures.slowest_device,
        "No device completed a round.",
    ),
    Section(
        "Who drops out, and why",
        "What became of the devices sampled from each tier, whose number stands at the right; “not needed” are "
        "those sampled to spare that were ready after the round was full, “skipped” those the controller left out.",
        figures.dropouts_by_tier,
        "No device dropped out.",
    ),
    Section(
        "Memory",
        "Peak training memory by the memory model against what devices have for it: range and median of each tier, "
        "and the share of sampled devices whose task does not fit. How far the model is known for this family of "
        "models stands among the key figures.",
        figures.memory_by_tier,
        "No memory figures were logged.",
    ),
    Section(
        "Energy",
        "Energy for computing and radio over the whole run, also of devices whose update was lost; at the right is "
        "the mean of a completed device in a round.",
        figures.energy_by_tier,
        "No energy was spent.",
    ),
)


def write_report(directories: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of some run directories; by default `report.html` in the first one.

    Raises NotARunError if a directory holds no run, or no finished round.
    """
    runs = label_runs([load_run(directory) for directory in directories])
    for run in runs.values():
        if run.rounds.empty:
            raise NotARunError(f"{run.directory} has no finished round yet")
    out = out or Path(directories[0]) / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(runs), encoding="utf-8")
    return out


def render(runs: Runs) -> str:
    """The page as a string."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [s for s in SECTIONS if s.only_if is None or any(s.only_if(run) for run in runs.values())]
    return environment.get_template("report.html").render(
        runs=runs,
        descriptions={label: describe(run) for label, run in runs.items()},
        outcomes={label: _outcome(run) for label, run in runs.items()},
        warnings={label: _warnings(run) for label, run in runs.items()},
        key_figures=_key_figures(runs),
        sections=[(section, _image(section, runs)) for section in sections],
        events={label: _events(run.events) for label, run in runs.items() if len(run.events)},
        differences=_side_by_side(_differing(runs)),
        settings=_side_by_side({label: _texts(run.settings) for label, run in runs.items()}),
        origins=_side_by_side({label: _origin(run) for label, run in runs.items()}),
    )


def label_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by a label that says how their settings differ, or else by directory name."""
    if len(runs) == 1:
        return {"this run": runs[0]}
    names = {str(index): run for index, run in enumerate(runs)}
    differing = _differing(names)
    labels = []
    for index, run in names.items():
        settings = [f"{path.rpartition('.')[2]} {value}" for path, value in differing[index].items()]
        labels.append(", ".join(settings) if 0 < len(settings) <= MAX_LABEL_SETTINGS else run.name)
    if len(set(labels)) < len(labels):
        labels = [run.name for run in runs]
    if len(set(labels)) < len(labels):
        labels = [str(run.directory) for run in runs]
    return dict(zip(labels, runs, strict=True))


def describe(run: Run) -> str:
    """What was run, in words."""
    get = run.settings.get
    algorithm = (run.config.get("resolved") or {}).get("algorithm") or {}  # older runs do not say
    text = str(algorithm.get("name") or get("algorithm", "an unnamed algorithm"))
    if algorithm.get("about"):
        text += f" ({algorithm['about']})"
    if get("foundation.name"):
        text += f", tuning {get('foundation.name')}"
    if get("data.name"):
        text += f" on {get('data.name')}"
    if get("fleet.num_devices"):
        text += f", on a simulated fleet of {get('fleet.num_devices'):,} devices"
    if get("cohort_size"):
        text += f" of which a round waits for {get('cohort_size'):,}"
    finished = int(run.rounds["round"].max())
    planned = get("rounds", finished)
    state = (
        f"{finished} round{'s' * (finished > 1)}"
        if run.summary
        else f"unfinished: {finished} of {planned} rounds so far"
    )
    return f"{text}; {state}, seed {get('seed', NO_VALUE)}."


def _outcome(run: Run) -> str:
    """What came out, in a sentence or two."""
    perplexity = run.perplexity
    zero_shot, tuned = perplexity.get("zero_shot"), perplexity.get("tuned")
    if zero_shot is None or tuned is None:
        measured = run.rounds["perplexity"].dropna()
        when = "after the last round is" if run.summary else "so far is"
        return f"Perplexity {when} {measured.iloc[-1]:.2f}." if len(measured) else "Perplexity was not measured."
    how = "".join(f" {HOW[name][1]}" if name in HOW else f" ({_words(name)})" for name in run.tuned_by)
    text = f"Perplexity went from {zero_shot:.2f} to {tuned:.2f}{how}"
    gap = (run.summary or {}).get("gap_closed")
    centralised = perplexity.get("centralised")
    if gap is not None and centralised is not None:
        text += f", which is {gap:.0%} of the way to tuning centrally ({centralised:.2f})"
    elif centralised is not None:
        text += f"; tuning centrally with as many tokens came to {centralised:.2f}, so it is no bound here"
    if run.on_devices:
        name, (before, after) = list(run.on_devices.items())[-1]
        if (gap := (run.summary or {}).get("privacy_gap")) is not None:
            text += f". With the same adapter the largest emulator on devices has {_number(after)}, "
            text += f"a privacy gap of {gap:.2f}"
        elif before is not None and after is not None:
            text += f". The {name} alone went from {before:.2f} to {after:.2f}"
    return text + "."


def _warnings(run: Run) -> list[str]:
    """What to know before reading the results: that there are none, that they are worse, what was ignored."""
    summary = run.summary or {}
    lines = [f"This run has no result: {summary['failure']}."] if summary.get("failure") else []
    lines += [f"{line[0].upper()}{line[1:]}." for line in summary.get("warnings") or ()]
    if "setting" in run.events and "counts_if" in run.events:
        ignored = run.events[run.events["kind"] == "ignored_setting"].drop_duplicates("setting")
        for event in ignored.to_dict("records"):
            lines.append(f"{event['setting']} had no effect: it counts if {event['counts_if']}.")
    return lines


def _key_figures(runs: Runs) -> list[tuple[str, list[str]]]:
    """What came out, what the algorithm sums up under names of its own, and what it cost."""
    on_devices = list(dict.fromkeys(name for run in runs.values() for name in run.on_devices))
    others = [name for run in runs.values() for name in run.other_perplexities if name not in run.tuned_by]
    others = list(dict.fromkeys(others))
    results = {label: _results(run, on_devices, others) for label, run in runs.items()}
    summed_up = {label: _summed_up(run) for label, run in runs.items()}
    costs = {label: _costs(run) for label, run in runs.items()}
    return [row for facts in (results, summed_up, costs) for row in _side_by_side(facts)]


def _results(run: Run, on_devices: Sequence[str], others: Sequence[str]) -> dict[str, str | None]:
    """How good the model became; from the tables, so that an unfinished run has it too.

    With a row for each of these models on devices, and for these other perplexities.
    """
    summary, rounds = run.summary or {}, run.rounds
    perplexity, accuracy = run.perplexity, summary.get("token_accuracy") or {}
    how = f" ({', '.join(map(_words, run.tuned_by))})" if run.tuned_by else ""
    return {
        "Perplexity, zero-shot": _number(perplexity.get("zero_shot")),
        **{f"Perplexity, {name}": _change(*run.on_devices.get(name, (None, None))) for name in on_devices},
        "Perplexity, tuned": _number(perplexity.get("tuned", _last(rounds["perplexity"]))) + how,
        **{f"Perplexity, {_words(name)}": _number(perplexity.get(name)) for name in others},
        "Perplexity, tuned centrally": _number(perplexity.get("centralised")),
        "Share of the gap closed": _percent(summary.get("gap_closed")),
        "Privacy gap": _number(summary["privacy_gap"]) if "privacy_gap" in summary else None,
        "Token accuracy, zero-shot": _percent(accuracy.get("zero_shot")),
        "Token accuracy, tuned": _percent(accuracy.get("tuned", _last(rounds["token_accuracy"]))),
    }


def _summed_up(run: Run) -> dict[str, str | None]:
    numbers = (run.summary or {}).get("figures") or {}
    return {_words(name)[:1].upper() + _words(name)[1:]: _figure(value) for name, value in numbers.items()}


def _costs(run: Run) -> dict[str, str | None]:
    """What it took; from the tables, too."""
    summary, rounds = run.summary or {}, run.rounds
    emulator_bytes = rounds["emulator_bytes"].sum() if "emulator_bytes" in rounds else 0  # older runs do not say
    num_skipped = rounds["num_skipped"].sum()
    emulators = f" ({_scaled(emulator_bytes, 'B')} emulators)" if emulator_bytes else ""
    known = str((run.config.get("resolved") or {}).get("memory_model") or "")
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in run.clients["drop_reason"].value_counts().items())
    return {
        "Rounds": f"{len(rounds):,}",
        "Updates used": f"{rounds['num_completed'].sum():,}",
        "Memory model": MEMORY_MODELS.get(known, known) or None,
        "Devices dropped": f"{rounds['num_dropped'].sum():,}" + (f" ({reasons})" if reasons else ""),
        "Devices skipped": f"{num_skipped:,}" if num_skipped else None,
        "Tokens trained on": f"{rounds['num_tokens'].sum():,}",
        "Virtual time": _time(rounds["virtual_s"].max()),
        "Sent to devices": _scaled(rounds["download_bytes"].sum(), "B") + emulators,
        "Sent by devices": _scaled(rounds["upload_bytes"].sum(), "B"),
        "Energy of devices": _scaled(rounds["energy_j"].sum(), "J"),
        "Wall time (measured)": _time(summary.get("wall_s", rounds["wall_s"].sum())),
    }


def _origin(run: Run) -> dict[str, str]:
    """Where a run comes from: what is needed to trust it and to repeat it."""
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


def _differing(runs: Runs) -> dict[str, dict[str, str]]:
    """The settings in which runs differ, as text, by label."""
    settings = {label: _texts(run.settings) for label, run in runs.items()}
    paths = dict.fromkeys(path for values in settings.values() for path in values if path not in NOT_A_DIFFERENCE)
    paths = [path for path in paths if len({values.get(path) for values in settings.values()}) > 1]
    return {label: {path: values.get(path, NO_VALUE) for path in paths} for label, values in settings.items()}


def _side_by_side(columns: Mapping[str, Mapping[str, str | None]]) -> list[tuple[str, list[str]]]:
    """Facts by label as table rows: the name of a fact, and its value in each run; none where no run has one."""
    names = dict.fromkeys(name for values in columns.values() for name in values)
    rows = {name: [values.get(name) for values in columns.values()] for name in names}
    rows = {name: values for name, values in rows.items() if values != [None] * len(values)}
    return [(name, [NO_VALUE if value is None else value for value in values]) for name, values in rows.items()]


def _events(events: Frame) -> list[tuple[str, str, str]]:
    """Time, kind and facts of each event."""
    rows = []
    for event in events.to_dict("records"):
        facts = {key: value for key, value in event.items() if key not in ("time", "kind") and _is_fact(value)}
        rows.append(
            (str(event["time"])[:19], str(event["kind"]), ", ".join(f"{k}: {_text(v)}" for k, v in facts.items()))
        )
    return rows


def _is_fact(value: Any) -> bool:
    return isinstance(value, list | dict) or bool(pd.notna(value))


def _image(section: Section, runs: Runs) -> str | None:
    file = io.BytesIO()
    if not figures.draw(section.plot, runs, file):
        return None
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def _last(series: Any) -> float | None:
    values = series.dropna()
    return float(values.iloc[-1]) if len(values) else None


def _number(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.2f}"


def _figure(value: float | None) -> str:
    """A number of any size: 3, 0.00025, 12,345.68."""
    if value is None:
        return NO_VALUE
    return f"{value:,.2f}".removesuffix(".00") if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def _words(name: str) -> str:
    return HOW[name][0] if name in HOW else name.replace("_", " ")


def _change(before: float | None, after: float | None) -> str:
    return NO_VALUE if before is after is None else f"{_number(before)} → {_number(after)}"


def _percent(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.1%}"


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
