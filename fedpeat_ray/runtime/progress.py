"""What a run tells the person who started it: a line a round, and a table at the end.

On a terminal a live bar stands below the lines; in a job's log there are only the lines, without
control codes, flushed one by one.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as LiveProgress
from rich.table import Table
from rich.text import Text

from fedpeat_ray.fleet.fits import Fits
from fedpeat_ray.runtime.metric import (
    NO_VALUE,
    Metric,
    metric_of,
    metric_words,
    score_of_round,
    scores_of,
    written_metric,
)
from fedpeat_ray.runtime.trace import Trace

if TYPE_CHECKING:
    from fedpeat_ray.runtime.run_state import RunState

IN_WORDS = {"plug_in": "plug-in", "proxy_tuned": "steered"}  # names of scores that say how `tuned` came about


_WIDTHS = {"round": 8, "": 12, "updates": 9, "clock": 12, "down": 8, "up": 8, "took": 11, "left": 11}
"""Of the columns of the table of rounds; the second has the name of the metric."""


class Progress:
    """A context manager around the stages and rounds of a run.

        with Progress(config.rounds) as progress:
            progress.stage("loading pydoc-base")
            ...
            progress.round(round_row)

    Args:
        num_rounds: rounds of the whole run.
        first_round: the round it starts with; above 1 in a resumed run.
        console: where to write; by default standard output.
        trace: is told what is done when.
        metric: what rounds are judged by.
    """

    def __init__(
        self,
        num_rounds: int,
        first_round: int = 1,
        console: Console | None = None,
        trace: Trace | None = None,
        metric: Metric | None = None,
    ) -> None:
        self.num_rounds = num_rounds
        self._metric = metric or Metric()
        self._trace = trace or Trace()
        self._console = console or _standard_output()
        self._walls_s: list[float] = []
        self._live: LiveProgress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:  # there only lines can be shown
            stage = TextColumn("{task.description}", markup=False)
            bar = (SpinnerColumn(), stage, BarColumn(), MofNCompleteColumn())
            self._live = LiveProgress(*bar, TextColumn("{task.fields[eta]}"), console=self._console, transient=True)
            self._task = self._live.add_task("starting", total=num_rounds, completed=first_round - 1, eta="")

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def stage(self, text: str) -> None:
        """Say what is done now, e.g. "starting hosts"."""
        self._trace.begin(text)
        if self._live:
            self._live.update(self._task, description=text)
        else:
            self._print(text)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._print(line)

    def warn(self, line: str) -> None:
        """Say what may not be as it was meant, above the rounds."""
        self._print(f"warning: {line}")

    def round(self, row: Mapping[str, Any]) -> None:
        """Say how a round went; `row` is its row of the rounds table."""
        self._walls_s.append(row["wall_s"])
        left = self.num_rounds - row["round"]
        eta = human_seconds(left * sum(self._walls_s) / len(self._walls_s)) if left else ""
        num_asked = row["num_completed"] + row["num_dropped"]
        figures = (
            f"{row['round']}/{self.num_rounds}",
            self._metric.written(score_of_round(row, self._metric)),
            f"{row['num_completed']}/{num_asked}",
            human_seconds(row["virtual_s"]),
            human_bytes(row["download_bytes"]),
            human_bytes(row["upload_bytes"]),
            human_seconds(row["wall_s"]),
            eta,
        )
        if len(self._walls_s) == 1:
            self._print(self._in_columns(name or self._metric.words for name in _WIDTHS))
        self._print(self._in_columns(figures))
        if self._live:
            total, eta = self.num_rounds, eta and f"{eta} left"
            self._live.update(self._task, description="training", completed=row["round"], total=total, eta=eta)

    def show(self, table: Table) -> None:
        """Something to be read above the rounds."""
        self._console.print(table)
        self._console.file.flush()

    def _in_columns(self, words: Iterable[str]) -> str:
        """A line of the table of rounds: of fewer than 80 characters, if numbers and the metric's name are short."""
        widths = (width if name else max(width, len(self._metric.words) + 2) for name, width in _WIDTHS.items())
        return "".join(f"{word:>{width}}" for word, width in zip(words, widths, strict=True)).rstrip()

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)  # as it is: brackets are no markup, a log has no width
        self._console.file.flush()


def fits_table(found: Fits, title: str = "devices that have the memory to train") -> Table:
    """The share of devices that have the memory to take part, a row a tier."""
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    table.add_column("tier")
    table.add_column("devices", justify="right")
    for task, need in found.memory_bytes.items():
        table.add_column(f"{task}, {human_bytes(need)}", justify="right")
    for tier, shares in found.shares.items():
        table.add_row(Text(tier), f"{found.num_devices[tier]:,}", *(f"{share:.1%}" for share in shares.values()))
    return table


def plan_tables(plan: Mapping[str, Any]) -> Iterator[Table]:
    """What a run would ask for (`fedpeat_ray.planning.plan`): of memory, of devices by tier, in sum, and here."""
    yield fits_table(Fits(**plan["fits"]))
    if plan["ranks"]:
        yield fits_table(Fits(**plan["ranks"]), "the same by LoRA rank, on the smallest model that devices get")
    yield _tiers_table(plan["tiers"])
    model, run, hosts = plan["model"], plan["run"], plan["hosts"]
    title = f"{plan['algorithm']} on {model['name']}, {run['num_rounds']} rounds"
    table = Table(box=box.SIMPLE, show_header=False, title=title, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    num_rounds, rounds = run["num_rounds"], len(plan["rounds"])
    table.add_row("parameters", f"{model['num_parameters']:,}")
    table.add_row("  trained and sent", f"{model['num_trained']:,}")
    table.add_row("blocks", str(model["num_blocks"]))
    table.add_section()
    if rounds < num_rounds:
        table.add_row("rounds that stand for all", str(rounds))
    table.add_row("virtual time", human_seconds(run["virtual_s"]))
    table.add_row("sent to devices", human_bytes(run["download_bytes"]))
    if run["emulator_bytes"]:
        table.add_row("  of these emulators", human_bytes(run["emulator_bytes"]))
    table.add_row("sent by devices", human_bytes(run["upload_bytes"]))
    table.add_row("energy of devices", human_joules(run["energy_j"]))
    table.add_section()
    table.add_row("memory of this machine", human_bytes(hosts["machine_bytes"]))
    table.add_row("  weights, which hosts share", human_bytes(hosts["shared_bytes"]))
    table.add_row(f"  a host's own, of {hosts['num_hosts']}", human_bytes(hosts["own_bytes"] + hosts["batch_bytes"]))
    if hosts["driver_bytes"] > hosts["shared_bytes"]:
        table.add_row("  weights on the driver's side", human_bytes(hosts["driver_bytes"]))
    if plan["wall"]:
        table.add_section()
        table.add_row("wall time here, about", human_seconds(plan["wall"]["total"]))
        for name, seconds in plan["wall"].items():
            if name != "total" and seconds:
                table.add_row(f"  {name}", human_seconds(seconds))
    yield table


def _tiers_table(tiers: Mapping[str, Mapping[str, Any]]) -> Table:
    title = "a device in a round, by tier: means, seconds of those that complete"
    table = Table(box=box.SIMPLE, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for name in ("tier", "asked", "done", "download", "compute", "upload", "down", "up", "energy"):
        table.add_column(name, justify="left" if name == "tier" else "right")
    for tier, of in tiers.items():
        seconds = [human_seconds(of[name]) for name in ("download_s", "compute_s", "upload_s")]
        sent = [human_bytes(of[name]) for name in ("download_bytes", "upload_bytes")]
        row = (f"{of['num_asked']:,}", f"{of['num_completed']:,}", *seconds, *sent, human_joules(of["energy_j"]))
        table.add_row(tier, *row)
    return table


def summary_table(summary: Mapping[str, Any]) -> Table:
    """What came out of a run, from its summary.json."""
    metric, scores, perplexity = metric_of(summary), scores_of(summary), summary["perplexity"]
    title = Text(f"{summary['algorithm']}, {summary['rounds']} rounds")
    table = Table(box=box.SIMPLE, show_header=False, title=title)
    table.add_column()
    table.add_column(justify="right")

    def add(name: str, value: str) -> None:
        table.add_row(Text(name), Text(value))  # as they are: brackets are no markup

    add(f"{metric.words}, zero-shot", metric.written(scores["zero_shot"]))
    on_devices, others = _sorted_out(scores)
    for name, change in on_devices.items():
        add(f"{metric.words}, {name}", _change(change, metric.written))
    # Equal perplexities, not scores: two accuracies may well be equal by chance. As text, for nan is nan.
    how = [name for name in others if str(perplexity.get(name)) == str(perplexity["tuned"])]
    add(f"{metric.words}, {', '.join(map(_words, how)) or 'tuned'}", metric.written(scores["tuned"]))
    for name, value in others.items():
        if name not in how:
            add(f"{metric.words}, {_words(name)}", metric.written(value))
    if scores.get("centralised") is not None:
        add(f"{metric.words}, tuned centrally", metric.written(scores["centralised"]))
        gap = summary.get("gap_closed")
        add("share of the gap closed", _percent(gap) if gap is not None else "tuned centrally is no bound here")
    if "privacy_gap" in summary:
        unit = "" if metric.name == "perplexity" else ", in perplexity"
        add(f"privacy gap{unit}", _number(summary["privacy_gap"]))
    for name, value in (summary.get("figures") or {}).items():
        add(_words(name), _figure(value))
    for name, change in _other_metrics(summary, metric).items():
        add(metric_words(name), _change(change, functools.partial(written_metric, name)))
    table.add_section()
    add("updates used", f"{summary['num_completed']:,}")
    add("devices dropped", f"{summary['num_dropped']:,}")
    for reason, count in (summary.get("drop_reasons") or {}).items():
        if count:
            add(f"  {reason}", f"{count:,}")
    if summary.get("num_skipped"):
        add("devices skipped", f"{summary['num_skipped']:,}")
    table.add_section()
    add("virtual time", human_seconds(summary["virtual_s"]))
    add("sent to devices", human_bytes(summary["download_bytes"]))
    if summary.get("emulator_bytes"):
        add("  of these emulators", human_bytes(summary["emulator_bytes"]))
    add("sent by devices", human_bytes(summary["upload_bytes"]))
    add("energy of devices", human_joules(summary["energy_j"]))
    add("wall time", human_seconds(summary["wall_s"]))
    return table


def runs_table(runs: Iterable[RunState], folder: Path, now: float) -> Table:
    """How far runs are, a row a run; `now` is in seconds since the epoch."""
    runs = list(runs)
    metrics = {run.metric for run in runs if run.score is not None} or {Metric()}
    one = metrics.pop() if len(metrics) == 1 else None  # for which a heading is enough
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("run")
    table.add_column("algorithm")
    table.add_column("state")
    for name in ("rounds", one.words if one else "score", "clock", "wall time", "last round"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(
            Text(str(run.directory.relative_to(folder))),
            Text(run.algorithm or NO_VALUE),
            run.state,
            f"{run.last_round}/{run.num_rounds or NO_VALUE}",
            Text(f"{'' if one or run.score is None else run.metric.words} {run.metric.written(run.score)}".strip()),
            human_seconds(run.virtual_s),
            human_seconds(run.wall_s),
            NO_VALUE if run.last_round_at is None else f"{human_seconds(max(now - run.last_round_at, 0.0))} ago",
        )
    return table


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the run's warnings, then `summary_table`; plain text where the output is no terminal."""
    console = console or _standard_output()
    for line in summary.get("warnings") or ():
        console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(summary_table(summary))


def human_bytes(num_bytes: float | None) -> str:
    """Decimal units: 950 B, 1.2 kB, 34.5 MB, 120 MB."""
    return _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_joules(joules: float | None) -> str:
    """950 J, 1.2 kJ."""
    return _scaled(joules, ("J", "kJ", "MJ", "GJ"))


def human_seconds(seconds: float | None) -> str:
    """0.25 s, 12.3 s, 4 min 05 s, 3 h 12 min, 2 d 05 h."""
    if seconds is None or not math.isfinite(seconds):
        return NO_VALUE
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    hours, rest_min = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {rest_min:02d} min"
    days, rest_h = divmod(round(seconds / 3600), 24)
    return f"{days} d {rest_h:02d} h"


def _standard_output() -> Console:
    return Console(force_terminal=sys.stdout.isatty())  # whatever $FORCE_COLOR says


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None or not math.isfinite(value):
        return NO_VALUE
    if value < 999.5:
        return f"{value:.0f} {units[0]}"
    for unit in units[1:-1]:
        value /= 1000
        if value < 999.5:
            return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} {units[-1]}"


def _number(value: float | None) -> str:
    return NO_VALUE if value is None or math.isnan(value) else f"{value:.2f}"


def _figure(value: float | None) -> str:
    """A number of any size: 3, 0.00025, 12,345.68."""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    return f"{value:,.2f}".removesuffix(".00") if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return NO_VALUE if value is None or math.isnan(value) else f"{value:.1%}"


def _change(values: Mapping[str, float | None], write: Callable[[float | None], str]) -> str:
    return f"{write(values.get('zero_shot'))} -> {write(values.get('tuned'))}"


def _other_metrics(summary: Mapping[str, Any], metric: Metric) -> dict[str, Mapping[str, float | None]]:
    """What else the task measures, before and after, by name; older runs have the share of tokens guessed."""
    metrics = summary.get("metrics")
    if metrics is None:
        return {"token_accuracy": summary["token_accuracy"]}
    names = dict.fromkeys(name for of in metrics.values() for name in of if name != metric.name)
    return {name: {when: of.get(name) for when, of in metrics.items()} for name in names}


def _sorted_out(scores: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Scores of what devices train where that is not the model itself, in words: every pair `X_zero_shot`,
    `X_tuned`, by level or not. And the numbers under any other name."""
    others = {name: value for name, value in scores.items() if name not in ("zero_shot", "tuned", "centralised")}
    on_devices = {}
    for name in [name.removesuffix("_zero_shot") for name in others if name.endswith("_zero_shot")]:
        if f"{name}_tuned" not in others:
            continue
        before, after = others.pop(f"{name}_zero_shot"), others.pop(f"{name}_tuned")
        if isinstance(before, Mapping):
            for level in dict.fromkeys((*before, *after)):
                change = {"zero_shot": before.get(level), "tuned": after.get(level)}
                on_devices[f"{_words(name)} of level {level}"] = change
        else:
            on_devices[f"{_words(name)} model alone"] = {"zero_shot": before, "tuned": after}
    return on_devices, {name: value for name, value in others.items() if isinstance(value, Real | None)}


def _words(name: str) -> str:
    return IN_WORDS.get(name) or name.replace("_", " ")
