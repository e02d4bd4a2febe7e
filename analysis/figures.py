"""The figures of a report: each takes groups of runs by label and gives a figure, or None with nothing to show.

A line of several runs is their mean, with a band from the lowest to the highest; bars and shares are of all of them.

All in one style: Okabe and Ito's colours, which colour-blind readers tell apart; no pyplot, so
nothing global is touched.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Literal

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    ScalarFormatter,
    StrMethodFormatter,
)

from analysis.compare import Group, Groups
from analysis.load import Frame, Metric, Run

Cost = Callable[[Frame], Any]  # cumulative, a value a round

INK, GREY, PALE = "#222222", "#8a8a8a", "#e6e6e6"
MARKERS = ("o", "s", "^", "D")  # by turns, once all colours are in use
BAND = 0.2  # opacity
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PHASE_COLOURS = {"download": "#56B4E9", "compute": "#0072B2", "upload": "#E69F00"}
REASON_COLOURS = {
    "unavailable": "#56B4E9",
    "memory": "#D55E00",
    "link": "#E69F00",
    "deadline": "#CC79A7",
    "non_finite": "#000000",
    "not needed": "#b0b0b0",
    "skipped": "#7b8790",  # a decision, drawn beside the losses
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a $ in the name of a run or a model is a $
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "savefig.dpi": 160,
}
WIDTH = 8.4  # inches
ZERO_SHOT: dict[str, Any] = {"linewidth": 1.2, "linestyle": ":"}
CENTRALISED: dict[str, Any] = {"linewidth": 1.2, "linestyle": "--", "alpha": 0.8}
ON_DEVICES: dict[str, Any] = {"linewidth": 1.4, "linestyle": (0, (3, 1.5)), "marker": "o", "markersize": 3.5}
BYTES_COLOURS = {"emulators, down": "#CC79A7", "adapters, down and up": "#0072B2"}

FOUNDATION_LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero_shot": ("foundation, zero-shot", {"color": GREY, **ZERO_SHOT}),
    "plug_in": ("foundation with the adapter: plug-in", {"color": RUN_COLOURS[0], "linewidth": 1.2}),
    "centralised": ("tuned centrally", {"color": RUN_COLOURS[1], **CENTRALISED}),
}


def quality_over_rounds(groups: Groups) -> Figure | None:
    return _quality(groups, {"round": lambda rounds: rounds["round"]}, 3.2, on_devices=True)


def quality_over_costs(groups: Groups) -> Figure | None:
    unit_s, time_name = time_unit(max(run.rounds["virtual_s"].max() for run in _runs(groups)))
    unit_bytes, bytes_name = byte_unit(max(_traffic(run.rounds).max() for run in _runs(groups)))
    costs: dict[str, Cost] = {
        f"virtual time ({time_name})": lambda rounds: rounds["virtual_s"] / unit_s,
        f"down and up, all devices ({bytes_name})": lambda rounds: _traffic(rounds) / unit_bytes,
    }
    return _quality(groups, costs, 2.9)


def quality_by_level(groups: Groups) -> Figure | None:
    """Emulators before and after tuning, by the blocks they keep, between what the foundation does."""
    names, several = {"emulator_zero_shot", "emulator_tuned"}, len(groups) > 1
    groups = {
        label: group
        for label, group in groups.items()
        if all(run.levels and names <= run.scores.keys() for run in group.runs)
    }
    if not groups:
        return None
    metrics = dict.fromkeys(group.first.metric for group in groups.values())
    figure, panels = _grid(len(groups), min(2, len(groups)), 3.1, share_y=len(metrics) == 1)
    emulators = (("emulator_zero_shot", GREY, "white"), ("emulator_tuned", RUN_COLOURS[0], RUN_COLOURS[0]))
    for axes, (label, group) in zip(panels, groups.items(), strict=True):
        levels = group.first.levels
        for name, colour, face in emulators:
            of_runs = [
                pd.Series({level: run.scores[name].get(str(level)) for level in levels}, dtype=float).dropna()
                for run in group.runs
            ]
            points = _over_runs(of_runs)
            points.index = points.index.map(levels)
            axes.vlines(points.index, points["min"], points["max"], colors=colour, alpha=2 * BAND, linewidth=6)
            axes.plot(points["mean"], color=colour, marker="o", markersize=5, markerfacecolor=face, zorder=3)
        for name, (_, style) in FOUNDATION_LINES.items():
            if (value := _reference(group, name)) is not None:
                axes.axhline(value, **style)
        tuned = [run.scores["emulator_tuned"] for run in group.runs]
        given = {level: blocks for level, blocks in levels.items() if any(str(level) in of_run for of_run in tuned)}
        axes.set_xticks(list(given.values()), [f"{blocks}\nlevel {level}" for level, blocks in given.items()])
        axes.margins(x=0.12)
        axes.grid(axis="y")
        axes.set_xlabel(f"blocks of the foundation's {max(levels.values())} that an emulator keeps")
        _scale(axes, group.first.metric, 4, (1, 2, 5))
        if axes is panels[0] or len(metrics) > 1:
            axes.set_ylabel(group.first.metric.words)
        if several:
            axes.set_title(label)
    marks = (("emulator, zero-shot", GREY, "white"), ("emulator, tuned", RUN_COLOURS[0], RUN_COLOURS[0]))
    key = [Line2D([], [], color=c, marker="o", markersize=5, markerfacecolor=f, label=label) for label, c, f in marks]
    key += [
        Line2D([], [], label=label, **style)
        for name, (label, style) in FOUNDATION_LINES.items()
        if any(_reference(group, name) is not None for group in groups.values())
    ]
    figure.legend(handles=[*key, *_band_key(groups)], loc="outside upper left", ncols=3)
    return figure


def levels_in_use(groups: Groups) -> Figure | None:
    """A row a group: who completed on which emulator, and what was sent for it, round by round."""
    several = len(groups) > 1
    groups = {label: group for label, group in groups.items() if _completed(group)["level"].notna().any()}
    if not groups:
        return None
    figure = Figure((WIDTH, 2.3 * len(groups) + 0.6), layout="constrained")
    rows = figure.subplots(len(groups), 2, squeeze=False)
    unit, unit_name = byte_unit(
        max((run.rounds["download_bytes"] + run.rounds["upload_bytes"]).max() for run in _runs(groups))
    )
    used = sorted({int(level) for group in groups.values() for level in _completed(group)["level"].dropna()})
    top = max(1, *used, *(level for run in _runs(groups) for level in run.levels))
    level_colours = {f"level {level}": _shade(level / top) for level in used}
    for (left, right), (label, group) in zip(rows, groups.items(), strict=True):
        completed = _completed(group)
        sent = ["download_bytes", "emulator_bytes", "upload_bytes"]
        rounds = _mean_by_round([run.rounds[["round", *sent]] for run in group.runs])
        shares = pd.crosstab(completed["round"], completed["level"], normalize="index") * 100
        shares = shares.rename(columns=lambda level: f"level {level:.0f}").reindex(index=rounds.index)
        _stacked_over_rounds(left, shares, level_colours)
        left.set_ylim(0, 100)
        left.set_ylabel("completed devices (%)")
        adapters = rounds["download_bytes"] - rounds["emulator_bytes"] + rounds["upload_bytes"]
        columns = zip(BYTES_COLOURS, (rounds["emulator_bytes"], adapters), strict=True)
        _stacked_over_rounds(right, pd.DataFrame(dict(columns)) / unit, BYTES_COLOURS)
        right.set_ylabel(f"sent, all devices ({unit_name})")
        if several:
            left.set_title(label)
    for axes in rows[-1]:
        axes.set_xlabel("round")
    _legend_above(figure, level_colours | BYTES_COLOURS)
    return figure


def logged_over_rounds(groups: Groups) -> Figure | None:
    """A panel a name that the algorithm or its controller logged, with a line a group."""
    logged = {label: [_logged(run) for run in group.runs] for label, group in groups.items()}
    tables = [table for of_group in logged.values() for table in of_group]
    names = list(dict.fromkeys(name for table in tables for name in table))
    if not names:
        return None
    num_columns = {1: 1, 2: 2, 4: 2}.get(len(names), 3)
    figure, panels = _grid(len(names), num_columns, 2.6 - 0.3 * num_columns, share_x=True, share_y=False)
    last = max(table.index.max() for table in tables)
    for index, (axes, name) in enumerate(zip(panels, names, strict=True)):
        found = {label: [table[name] for table in of_group if name in table] for label, of_group in logged.items()}
        scale, unit = _power_of_ten(max(values.abs().max() for of_group in found.values() for values in of_group))
        for of_group, look in zip(found.values(), _looks(groups), strict=True):
            if not of_group:
                continue
            values = _over_runs(of_group) / scale
            points = values.dropna()
            _line(axes, values, **look | {"markersize": 3})
            if len(points) < len(values):  # thin over rounds that have none
                axes.plot(points.index, points["mean"], color=look["color"], linewidth=0.8)
        _few_ticks(axes)
        axes.set_title(textwrap.fill(name.replace("_", " ") + unit, 110 // num_columns))
        axes.set_xlim(0.5, last + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        if index + num_columns >= len(names):  # nothing below it
            axes.tick_params(axis="x", labelbottom=True)
            axes.set_xlabel("round")
    if len(groups) > 1 or _band_key(groups):
        figure.legend(handles=[*_group_key(groups), *_band_key(groups)], loc="outside upper left", ncols=3)
    return figure


def time_by_tier(groups: Groups) -> Figure | None:
    """Mean seconds of a completed device, by tier and phase."""
    if all(_completed(group).empty for group in groups.values()):
        return None
    figure, panels = _panels_by_tier(groups)
    for axes, group in zip(panels, groups.values(), strict=True):
        means = _completed(group).groupby("tier")[[f"{phase}_s" for phase in PHASE_COLOURS]].mean()
        means = means.rename(columns=lambda name: name.removesuffix("_s")).reindex(tier_order(groups)).fillna(0)
        _stacked(axes, means, PHASE_COLOURS)
        for row, seconds in enumerate(means.sum(axis=1)):
            _note(axes, seconds, row, f"{seconds:.3g} s" if seconds else "none completed")
        axes.margins(x=0.14)
        axes.set_xlabel("mean of the completed devices (virtual s)")
    _legend_above(figure, PHASE_COLOURS)
    return figure


def slowest_device(groups: Groups) -> Figure | None:
    """The completed device that each round waited for."""
    if all(_completed(group).empty for group in groups.values()):
        return None
    figure, panels = _grid(len(groups), 1, 1.9)
    for axes, (label, group) in zip(panels, groups.items(), strict=True):
        slowest = _mean_by_round([_slowest(_completed(run)) for run in group.runs])
        bottom = np.zeros(len(slowest))
        for phase, colour in PHASE_COLOURS.items():
            seconds = slowest[f"{phase}_s"].fillna(0).to_numpy(float)
            axes.bar(slowest.index, seconds, 0.8, bottom=bottom, color=colour)
            bottom += seconds
        axes.set_xlim(0.4, max(run.rounds["round"].max() for run in group.runs) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        axes.set_ylabel("virtual s")
        if len(groups) > 1:
            axes.set_title(label)
    panels[-1].set_xlabel("round")
    _legend_above(figure, PHASE_COLOURS)
    return figure


def dropouts_by_tier(groups: Groups) -> Figure | None:
    """What became of the sampled devices, in shares of each tier."""
    clients = {label: group.clients for label, group in groups.items()}
    fates = {label: table["drop_reason"].fillna(table["outcome"]) for label, table in clients.items()}
    reasons = set().union(*fates.values()) - {"completed"}
    if not reasons:
        return None
    colours = {reason: REASON_COLOURS.get(reason, GREY) for reason in [*REASON_COLOURS, *sorted(reasons)]}
    colours = {reason: colour for reason, colour in colours.items() if reason in reasons} | {"completed": PALE}
    figure, panels = _panels_by_tier(groups)
    for axes, (label, table) in zip(panels, clients.items(), strict=True):
        counts = pd.crosstab(table["tier"], fates[label])
        counts = counts.reindex(index=tier_order(groups), columns=list(colours)).fillna(0)
        sampled = counts.sum(axis=1)
        _stacked(axes, counts.div(sampled.clip(lower=1), axis=0) * 100, colours)
        for row, count in enumerate(sampled):
            _note(axes, 100, row, f"of {count:,.0f}", annotation_clip=False)
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the tier's sampled devices (%)")
    _legend_above(figure, colours)
    return figure


def memory_by_tier(groups: Groups) -> Figure | None:
    """What a device's task needs, against what the devices of its tier have."""
    if all(_memory(group).empty for group in groups.values()):
        return None
    figure, panels = _panels_by_tier(groups)
    need_colour, cap_colour = RUN_COLOURS[0], "#d0d0d0"
    for axes, group in zip(panels, groups.values(), strict=True):
        axes.set_xscale("log")
        for row, tier in enumerate(tier_order(groups)):
            table = _memory(group).loc[lambda table, tier=tier: table["tier"] == tier]
            if table.empty:
                continue
            for column, colour, width in (("memory_cap_bytes", cap_colour, 12), ("memory_bytes", need_colour, 4)):
                low, middle, high = table[column].quantile([0, 0.5, 1]) / 1e6
                axes.plot([low, high], [row, row], color=colour, linewidth=width, solid_capstyle="butt", zorder=2)
                axes.plot(middle, row, "|", color=INK, markersize=width, zorder=3)
            too_large = (table["memory_bytes"] > table["memory_cap_bytes"]).mean()
            note = f"{max(too_large, 0.01):.0%} do not fit" if too_large else "all fit"
            _note(axes, 1, row, note, xycoords=axes.get_yaxis_transform(), annotation_clip=False)
        low, high = axes.dataLim.intervalx
        wide = len(groups) > 1 and high / low > 1e3  # half a page has no room for so many
        _plain_numbers(axes.xaxis, (1,) if wide else (1, 3))
        axes.set_xlabel("memory of a device (MB, log scale)")
    _legend_above(figure, {"what the task needs": need_colour, "what the devices have": cap_colour})
    return figure


def energy_by_tier(groups: Groups) -> Figure | None:
    """Energy of the whole run, split by whether the update was used; of several runs the mean."""
    if not sum(run.clients["energy_j"].sum() for run in _runs(groups)):
        return None
    colours = {"completed": "#009E73", "dropped": "#D55E00"}
    figure, panels = _panels_by_tier(groups)
    most = max(group.clients.groupby("tier")["energy_j"].sum().max() / len(group) for group in groups.values())
    unit, unit_name = (1e3, "kJ") if most > 1e3 else (1, "J")
    for axes, group in zip(panels, groups.values(), strict=True):
        spent = group.clients.pivot_table("energy_j", "tier", "outcome", "sum")
        spent = spent.reindex(index=tier_order(groups), columns=list(colours)).fillna(0) / (unit * len(group))
        _stacked(axes, spent, colours)
        mean = _completed(group).groupby("tier")["energy_j"].mean()
        for row, (tier, total) in enumerate(spent.sum(axis=1).items()):
            _note(axes, total, row, f"{mean[tier]:.3g} J each" if tier in mean else "none completed")
        axes.margins(x=0.2)
        axes.set_xlabel(f"energy of the whole run ({unit_name})")
    _legend_above(
        figure, {"devices that completed": colours["completed"], "devices that dropped out": colours["dropped"]}
    )
    return figure


def tier_order(groups: Groups) -> list[str]:
    """Tiers of all runs, from little memory to much."""
    clients: Frame = pd.concat([run.clients for run in _runs(groups)])
    if clients.empty:
        return []
    caps = clients.groupby("tier")["memory_cap_bytes"].median()
    return [str(tier) for tier in caps.sort_values(kind="stable").index]


def time_unit(longest_s: float) -> tuple[float, str]:
    """The unit, as seconds and by name, in which times up to this one read well."""
    for unit_s, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if longest_s >= 3 * unit_s:
            return unit_s, name
    return 1, "s"


def byte_unit(largest: float) -> tuple[float, str]:
    """The same for bytes."""
    return (1e9, "GB") if largest > 3e9 else (1e6, "MB")


def draw(plot: Callable[[Groups], Figure | None], groups: Groups, file: IO[bytes]) -> bool:
    """Draw a figure into a PNG file in the style of the report; False if there is nothing to show."""
    with rc_context(STYLE):
        figure = plot(groups)
        if figure is None:
            return False
        figure.savefig(file, format="png")
    return True


def _quality(groups: Groups, costs: Mapping[str, Cost], panel_height: float, on_devices: bool = False) -> Figure | None:
    """The metric against each cost, from zero-shot at no cost on; reference points as lines. A row of panels a metric.

    With `on_devices` also of the largest model that devices get, where that is not the foundation.
    """
    metrics = list(dict.fromkeys(run.metric for run in _runs(groups) if run.rounds["score"].notna().any()))
    if not metrics:
        return None
    figure, panels = _grid(len(metrics) * len(costs), len(costs), panel_height, share_y="row")
    looks = dict(zip(groups, _looks(groups), strict=True))
    for axes, (metric, (name, cost)) in zip(panels, itertools.product(metrics, costs.items()), strict=True):
        for label, group in groups.items():
            if group.first.metric != metric:
                continue
            look, zero_shot, centralised = (
                looks[label],
                _reference(group, "zero_shot"),
                _reference(group, "centralised"),
            )
            if zero_shot is not None:
                axes.axhline(zero_shot, color=GREY, **ZERO_SHOT)
            if centralised is not None:
                axes.axhline(centralised, color=look["color"], **CENTRALISED)
            if on_devices and _has_path_on_devices(group):
                how = look | {"markersize": 3.5} | ON_DEVICES | {"markerfacecolor": "white"}
                _path(axes, [_path_on_devices(run, cost) for run in group.runs], **how | {"marker": look["marker"]})
            _path(axes, [_path_of_the_model(run, cost) for run in group.runs], **look | {"markersize": 4})
        axes.grid(axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel(name)
        _scale(axes, metric)
        if len(costs) == 1:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes, metric in zip(panels[:: len(costs)], metrics, strict=True):
        axes.set_ylabel(metric.words)
    lines: list[Artist] = [*_group_key(groups), *_band_key(groups)]
    if on_devices and any(_has_path_on_devices(group) for group in groups.values()):
        lines.append(
            Line2D([], [], color=GREY, label="largest model on devices", markerfacecolor="white", **ON_DEVICES)
        )
    if any(_reference(group, "zero_shot") is not None for group in groups.values()):
        lines.append(Line2D([], [], color=GREY, label="zero-shot", **ZERO_SHOT))
    if any(_reference(group, "centralised") is not None for group in groups.values()):
        lines.append(Line2D([], [], color=GREY, label="tuned centrally", **CENTRALISED))
    figure.legend(handles=lines, loc="outside upper left", ncols=3)
    return figure


def _path(axes: Axes, of_runs: Sequence[Frame], **look: Any) -> None:
    """The metric against a cost, of several runs the means of both, round by round."""
    of_runs = [points for points in of_runs if not points.empty]
    if of_runs:
        score = _over_runs([points["score"] for points in of_runs])
        cost = _over_runs([points["cost"] for points in of_runs])["mean"]
        _line(axes, score.set_axis(cost), **look)


def _over_runs(of_runs: Sequence[Any]) -> Frame:
    """Columns mean, min and max of series of several runs, over the runs that have a value there."""
    return pd.concat(of_runs).groupby(level=0).agg(["mean", "min", "max"])


def _mean_by_round(of_runs: Sequence[Frame]) -> Frame:
    table: Frame = pd.concat(of_runs)
    return table.groupby("round").mean()


def _line(axes: Axes, points: Frame, **look: Any) -> None:
    """The mean as a line, with marks where they have room, and a band from the lowest to the highest."""
    if (points["max"] > points["min"]).any():
        axes.fill_between(points.index, points["min"], points["max"], color=look["color"], alpha=BAND, linewidth=0)
    if len(points.dropna()) > 40:
        look["markevery"] = max(1, len(points) // 20)
        if look["marker"] == MARKERS[0]:
            look["marker"] = None
    axes.plot(points.index, points["mean"], **look)


def _grid(
    num_panels: int, num_columns: int, panel_height: float, share_x: bool = False, share_y: bool | Literal["row"] = True
) -> tuple[Figure, list[Axes]]:
    num_rows = math.ceil(num_panels / num_columns)
    figure = Figure((WIDTH, panel_height * num_rows + 0.35), layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, sharex=share_x, sharey=share_y, squeeze=False).flat)
    for unused in panels[num_panels:]:
        unused.set_visible(False)
    return figure, panels[:num_panels]


def _panels_by_tier(groups: Groups) -> tuple[Figure, list[Axes]]:
    """A panel a group, side by side, with a row a tier."""
    tiers = tier_order(groups)
    figure, panels = _grid(len(groups), min(2, len(groups)), 0.65 + 0.36 * len(tiers), share_x=True)
    for axes, label in zip(panels, groups, strict=True):
        axes.set_yticks(range(len(tiers)), tiers)
        axes.set_ylim(len(tiers) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelbottom=True)
        axes.grid(axis="x")
        if len(groups) > 1:
            axes.set_title(label)
    return figure, panels


def _stacked(axes: Axes, table: Frame, colours: Mapping[str, str]) -> None:
    """Horizontal bars, one a row of the table, stacked over its columns."""
    left = np.zeros(len(table))
    for name, colour in colours.items():
        width = table[name].fillna(0).to_numpy(float)
        axes.barh(range(len(table)), width, 0.62, left=left, color=colour)
        left += width


def _stacked_over_rounds(axes: Axes, table: Frame, colours: Mapping[str, str]) -> None:
    """Upright bars, one a round, stacked over the columns of the table that have a colour."""
    bottom = np.zeros(len(table))
    for name, colour in colours.items():
        if name in table:
            height = table[name].fillna(0).to_numpy(float)
            axes.bar(table.index, height, 0.8, bottom=bottom, color=colour)
            bottom += height
    axes.set_xlim(0.4, table.index.max() + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y")


def _shade(share: float) -> str:
    """Of one green, from pale to full."""
    red, green, blue = (1 - share) * np.array(to_rgb(PALE)) + share * np.array(to_rgb("#00593f"))
    return to_hex((red, green, blue))


def _note(axes: Axes, x: float, row: int, text: str, **how: Any) -> None:
    axes.annotate(text, (x, row), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK, **how)


def _legend_above(figure: Figure, colours: Mapping[str, str]) -> None:
    handles = [Patch(color=colour, label=label.replace("_", "-")) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1.2)


def _scale(axes: Axes, metric: Metric, wide: float = 8, subs: tuple[int, ...] = (1, 3)) -> None:
    """On the y axis: shares in percent, perplexities that are far apart logarithmic."""
    if metric.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    low, high = axes.dataLim.intervaly
    if metric.is_perplexity and low > 0 and high / low > wide:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis, subs)


def _plain_numbers(axis: Axis, subs: tuple[int, ...] = (1, 3)) -> None:
    """10, 30, 100, 300 on a log axis instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _power_of_ten(largest: float) -> tuple[float, str]:
    """The power of 1000 in which numbers up to this one read well, and how a title says so."""
    if largest == 0 or 1e-2 <= largest < 1e4:
        return 1, ""
    exponent = 3 * math.floor(math.log10(largest) / 3)
    return 10.0**exponent, " (10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")) + ")"


def _few_ticks(axes: Axes) -> None:
    """On the y axis, written out; a constant has the one of its value."""
    low, high = axes.dataLim.intervaly
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        axes.set_yticks([low], [f"{low:.4g}"])
        axes.set_ylim(low - 1, high + 1)
        return
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.ticklabel_format(axis="y", style="plain")


def _traffic(rounds: Frame) -> Any:
    return (rounds["download_bytes"] + rounds["upload_bytes"]).cumsum()


def _memory(group: Group) -> Frame:
    tasks = group.clients[group.clients["outcome"] != "skipped"]
    return tasks[["tier", "memory_bytes", "memory_cap_bytes"]].dropna()


def _logged(run: Run) -> Frame:
    """Finite numbers that were logged, by round, a column a name."""
    table = run.rounds.set_index("round").filter(regex=r"^figures\.").replace([np.inf, -np.inf], np.nan)
    return table.rename(columns=lambda name: name.removeprefix("figures.")).dropna(axis="columns", how="all")


def _completed(runs: Run | Group) -> Frame:
    return runs.clients[runs.clients["outcome"] == "completed"]


def _slowest(completed: Frame) -> Frame:
    """By round, the times of the device that took longest."""
    times = completed[["download_s", "compute_s", "upload_s"]]
    return completed.loc[times.sum(axis=1).groupby(completed["round"]).idxmax(), ["round", *times]]


def _runs(groups: Groups) -> list[Run]:
    return [run for group in groups.values() for run in group.runs]


def _looks(groups: Groups) -> list[dict[str, Any]]:
    """Colour and marker of each group's lines, the same in every figure."""
    turns = [divmod(index, len(RUN_COLOURS)) for index in range(len(groups))]
    return [{"color": RUN_COLOURS[colour], "marker": MARKERS[turn % len(MARKERS)]} for turn, colour in turns]


def _group_key(groups: Groups) -> list[Line2D]:
    """What a legend says of the groups; with marks only where they tell lines of one colour apart."""
    looks: list[dict[str, Any]] = [
        {**look, "markersize": 4 * (look["marker"] != MARKERS[0])} for look in _looks(groups)
    ]
    return [Line2D([], [], label=label, **look) for label, look in zip(groups, looks, strict=True)]


def _band_key(groups: Groups) -> list[Patch]:
    several = any(len(group) > 1 for group in groups.values())
    return [Patch(color=GREY, alpha=BAND, linewidth=0, label="range over seeds")] if several else []


def _reference(group: Group, name: str) -> float | None:
    """A score of the summary, of several runs the mean."""
    values = [value for run in group.runs if (value := run.scores.get(name)) is not None]
    return sum(values) / len(values) if values else None


def _path_of_the_model(run: Run, cost: Cost) -> Frame:
    """The metric against a cost by round, from zero-shot on."""
    return _from_zero_shot(run, cost, "score", run.scores.get("zero_shot"))


def _path_on_devices(run: Run, cost: Cost) -> Frame:
    """The same of the largest model on devices; empty where there is none."""
    zero_shot, _ = ((None, None), *run.on_devices.values())[-1]
    points = _from_zero_shot(run, cost, "device_score", zero_shot)
    return points if len(points.drop(0, errors="ignore")) else pd.DataFrame()


def _from_zero_shot(run: Run, cost: Cost, column: str, zero_shot: float | None) -> Frame:
    points = pd.DataFrame({"cost": cost(run.rounds), "score": run.rounds[column]})
    points = points.astype(float).set_axis(run.rounds["round"]).dropna()
    if zero_shot is None:
        return points
    return pd.concat([pd.DataFrame({"cost": [0.0], "score": [zero_shot]}, index=[0]), points])


def _has_path_on_devices(group: Group) -> bool:
    return any(not _path_on_devices(run, lambda rounds: rounds["round"]).empty for run in group.runs)
