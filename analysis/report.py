"""One self-contained HTML page about one run, or several side by side."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from matplotlib.figure import Figure

from analysis import figures, tables
from analysis.compare import ComparisonError, Groups, group_runs, read_runs
from analysis.load import Run

TEMPLATES = Path(__file__).parent / "templates"


class Section(NamedTuple):
    """A part of the page: a heading, a sentence on how to read the figure, and what draws it."""

    title: str
    text: str
    """`{measured}` stands for the metrics."""
    plot: Callable[[Groups], Figure | None]
    nothing: str
    only_if: Callable[[Run], bool] | None = None
    """Left out if it holds for none of the runs."""


SECTIONS = (
    Section(
        "Quality over rounds",
        "On held-out private data after each round: {measured}; from the foundation as it came (zero-shot) towards "
        "what tuning centrally on the pooled data reaches with as many tokens.",
        figures.quality_over_rounds,
        "Quality was not measured.",
    ),
    Section(
        "Quality for its price",
        "The same over the simulated time it took, and over all bytes devices received and sent.",
        figures.quality_over_costs,
        "Quality was not measured.",
    ),
    Section(
        "Quality by emulator level",
        "Emulators that devices get, before and after, by the blocks of the foundation they keep, on the same data; "
        "the lines are the foundation without and with the tuned adapter. What lies between an emulator and the "
        "plug-in is the privacy gap: what only the owner of the foundation has.",
        figures.quality_by_level,
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


def write_report(
    directories: Sequence[str | Path], out: Path | None = None, each: bool = False, labels: Sequence[str] = ()
) -> Path:
    """Write the report of some run directories; by default `report.html` in that of a single run, and of several
    `comparison.html` in the deepest folder that holds them all.

    Raises NotARunError if a directory holds no run, or no finished round, and ComparisonError where `group_runs` does
    or where the runs have no folder in common.
    """
    runs = read_runs(directories)
    page = render(group_runs(runs, each, labels))
    out = out or _default_place(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _default_place(runs: Sequence[Run]) -> Path:
    if len(runs) == 1:
        return runs[0].directory / "report.html"
    common = Path(os.path.commonpath([os.path.abspath(run.directory.parent) for run in runs]))  # noqa: PTH100
    if common == Path(common.anchor):
        raise ComparisonError("the runs have no folder in common: --out says where the report is to lie")
    return common / "comparison.html"


def render(groups: Groups) -> str:
    """The page as a string."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = [run for group in groups.values() for run in group.runs]
    measured = " and ".join(
        f"{metric.words} ({'higher' if metric.higher_is_better else 'lower'} is better)"
        for metric in dict.fromkeys(run.metric for run in runs)
    )
    sections = [
        section._replace(text=section.text.format(measured=measured))
        for section in SECTIONS
        if section.only_if is None or any(map(section.only_if, runs))
    ]
    return environment.get_template("report.html").render(
        labels=list(groups),
        runs=runs,
        descriptions={label: tables.describe(group) for label, group in groups.items()},
        outcomes={label: tables.outcome(group) for label, group in groups.items()},
        warnings={label: tables.warnings(group) for label, group in groups.items()},
        key_figures=tables.key_figures(groups),
        metrics=tables.metrics(groups),
        sections=[(section, _image(section, groups)) for section in sections],
        events=tables.events(groups),
        differences=tables.differences(groups),
        settings=tables.settings(groups),
        origins=tables.origins(groups),
    )


def _image(section: Section, groups: Groups) -> str | None:
    file = io.BytesIO()
    if not figures.draw(section.plot, groups, file):
        return None
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
