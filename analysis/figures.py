"""The figures of a report: each takes runs by label and gives a figure, or None with nothing to show.

All in one style: Okabe and Ito's colours, which colour-blind readers tell apart; no pyplot, so
nothing global is touched.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter, StrMethodFormatter

from analysis.load import Frame, Run

Runs = Mapping[str, Run]
Cost = Callable[[Frame], Any]  # cumulative, a value a round

INK, GREY, PALE = "#222222", "#8a8a8a", "#e6e6e6"
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


def perplexity_over_rounds(runs: Runs) -> Figure | None:
    return _perplexity(runs, {"round": lambda rounds: rounds["round"]}, 3.2, on_devices=True)


def perplexity_over_costs(runs: Runs) -> Figure | None:
    unit_s, time_name = time_unit(max(run.rounds["virtual_s"].max() for run in runs.values()))
    unit_bytes, bytes_name = byte_unit(max(_traffic(run.rounds).max() for run in runs.values()))
    costs: dict[str, Cost] = {
        f"virtual time ({time_name})": lambda rounds: rounds["virtual_s"] / unit_s,
        f"down and up, all devices ({bytes_name})": lambda rounds: _traffic(rounds) / unit_bytes,
    }
    return _perplexity(runs, costs, 2.9)


def perplexity_by_level(runs: Runs) -> Figure | None:
    """Emulators before and after tuning, by the blocks they keep, between what the foundation does."""
    names = {"emulator_zero_shot", "emulator_tuned"}
    runs = {label: run for label, run in runs.items() if run.levels and names <= run.perplexity.keys()}
    if not runs:
        return None
    figure, panels = _grid(len(runs), min(2, len(runs)), 3.1)
    emulators = (("emulator_zero_shot", GREY, "white"), ("emulator_tuned", RUN_COLOURS[0], RUN_COLOURS[0]))
    for axes, (label, run) in zip(panels, runs.items(), strict=True):
        for name, colour, face in emulators:
            by_level = {level: run.perplexity[name].get(str(level)) for level in run.levels}
            points = pd.Series(by_level, dtype=float).dropna()
            blocks = [run.levels[level] for level in points.index]
            axes.plot(blocks, points, color=colour, marker="o", markersize=5, markerfacecolor=face, zorder=3)
        for name, (_, style) in FOUNDATION_LINES.items():
            if (value := run.perplexity.get(name)) is not None:
                axes.axhline(value, **style)
        given = {
            level: blocks for level, blocks in run.levels.items() if str(level) in run.perplexity["emulator_tuned"]
        }
        axes.set_xticks(list(given.values()), [f"{blocks}\nlevel {level}" for level, blocks in given.items()])
        axes.margins(x=0.12)
        axes.grid(axis="y")
        axes.set_xlabel(f"blocks of the foundation's {max(run.levels.values())} that an emulator keeps")
        _log_if_wide(axes, 4, (1, 2, 5))
        if len(runs) > 1:
            axes.set_title(label)
    panels[0].set_ylabel("perplexity")
    marks = (("emulator, zero-shot", GREY, "white"), ("emulator, tuned", RUN_COLOURS[0], RUN_COLOURS[0]))
    key = [Line2D([], [], color=c, marker="o", markersize=5, markerfacecolor=f, label=label) for label, c, f in marks]
    key += [
        Line2D([], [], label=label, **style)
        for name, (label, style) in FOUNDATION_LINES.items()
        if any(run.perplexity.get(name) is not None for run in runs.values())
    ]
    figure.legend(handles=key, loc="outside upper left", ncols=3)
    return figure


def levels_in_use(runs: Runs) -> Figure | None:
    """A row a run: who completed on which emulator, and what was sent for it, round by round."""
    runs = {label: run for label, run in runs.items() if _completed(run)["level"].notna().any()}
    if not runs:
        return None
    figure = Figure((WIDTH, 2.3 * len(runs) + 0.6), layout="constrained")
    rows = figure.subplots(len(runs), 2, squeeze=False)
    unit, unit_name = byte_unit(
        max((run.rounds["download_bytes"] + run.rounds["upload_bytes"]).max() for run in runs.values())
    )
    used = sorted({int(level) for run in runs.values() for level in _completed(run)["level"].dropna()})
    top = max(1, *used, *(level for run in runs.values() for level in run.levels))
    level_colours = {f"level {level}": _shade(level / top) for level in used}
    for (left, right), (label, run) in zip(rows, runs.items(), strict=True):
        completed, rounds = _completed(run), run.rounds.set_index("round")
        shares = pd.crosstab(completed["round"], completed["level"], normalize="index") * 100
        shares = shares.rename(columns=lambda level: f"level {level:.0f}").reindex(index=rounds.index)
        _stacked_over_rounds(left, shares, level_colours)
        left.set_ylim(0, 100)
        left.set_ylabel("completed devices (%)")
        adapters = rounds["download_bytes"] - rounds["emulator_bytes"] + rounds["upload_bytes"]
        columns = zip(BYTES_COLOURS, (rounds["emulator_bytes"], adapters), strict=True)
        _stacked_over_rounds(right, pd.DataFrame(dict(columns)) / unit, BYTES_COLOURS)
        right.set_ylabel(f"sent, all devices ({unit_name})")
        if len(runs) > 1:
            left.set_title(label)
    for axes in rows[-1]:
        axes.set_xlabel("round")
    _legend_above(figure, level_colours | BYTES_COLOURS)
    return figure


def logged_over_rounds(runs: Runs) -> Figure | None:
    """A panel a name that the algorithm or its controller logged, with a line a run."""
    tables = [_logged(run) for run in runs.values()]
    names = list(dict.fromkeys(name for table in tables for name in table))
    if not names:
        return None
    num_columns = {1: 1, 2: 2, 4: 2}.get(len(names), 3)
    figure, panels = _grid(len(names), num_columns, 2.6 - 0.3 * num_columns, share_x=True, share_y=False)
    last = max(table.index.max() for table in tables)
    for index, (axes, name) in enumerate(zip(panels, names, strict=True)):
        found = [(table[name], c) for table, c in zip(tables, _colours(runs), strict=True) if name in table]
        scale, unit = _power_of_ten(max(values.abs().max() for values, _ in found))
        for values, colour in found:
            points, marker = values.dropna() / scale, "o" if values.count() <= 40 else None
            axes.plot(values.index, values / scale, color=colour, marker=marker, markersize=3)
            if len(points) < len(values):  # thin over rounds that have none
                axes.plot(points.index, points, color=colour, linewidth=0.8)
        _few_ticks(axes)
        axes.set_title(textwrap.fill(name.replace("_", " ") + unit, 110 // num_columns))
        axes.set_xlim(0.5, last + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        if index + num_columns >= len(names):  # nothing below it
            axes.tick_params(axis="x", labelbottom=True)
            axes.set_xlabel("round")
    if len(runs) > 1:
        colours = zip(runs, _colours(runs), strict=True)
        key = [Line2D([], [], color=colour, label=label) for label, colour in colours]
        figure.legend(handles=key, loc="outside upper left", ncols=3)
    return figure


def time_by_tier(runs: Runs) -> Figure | None:
    """Mean seconds of a completed device, by tier and phase."""
    if all(_completed(run).empty for run in runs.values()):
        return None
    figure, panels = _panels_by_tier(runs)
    for axes, run in zip(panels, runs.values(), strict=True):
        means = _completed(run).groupby("tier")[[f"{phase}_s" for phase in PHASE_COLOURS]].mean()
        means = means.rename(columns=lambda name: name.removesuffix("_s")).reindex(tier_order(runs)).fillna(0)
        _stacked(axes, means, PHASE_COLOURS)
        for row, seconds in enumerate(means.sum(axis=1)):
            _note(axes, seconds, row, f"{seconds:.3g} s" if seconds else "none completed")
        axes.margins(x=0.14)
        axes.set_xlabel("mean of the completed devices (virtual s)")
    _legend_above(figure, PHASE_COLOURS)
    return figure


def slowest_device(runs: Runs) -> Figure | None:
    """The completed device that each round waited for."""
    if all(_completed(run).empty for run in runs.values()):
        return None
    figure, panels = _grid(len(runs), 1, 1.9)
    for axes, (label, run) in zip(panels, runs.items(), strict=True):
        slowest = _slowest(_completed(run))
        bottom = np.zeros(len(slowest))
        for phase, colour in PHASE_COLOURS.items():
            seconds = slowest[f"{phase}_s"].fillna(0).to_numpy(float)
            axes.bar(slowest["round"], seconds, 0.8, bottom=bottom, color=colour)
            bottom += seconds
        axes.set_xlim(0.4, run.rounds["round"].max() + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        axes.set_ylabel("virtual s")
        if len(runs) > 1:
            axes.set_title(label)
    panels[-1].set_xlabel("round")
    _legend_above(figure, PHASE_COLOURS)
    return figure


def dropouts_by_tier(runs: Runs) -> Figure | None:
    """What became of the sampled devices, in shares of each tier."""
    fates = {label: run.clients["drop_reason"].fillna(run.clients["outcome"]) for label, run in runs.items()}
    reasons = set().union(*fates.values()) - {"completed"}
    if not reasons:
        return None
    colours = {reason: REASON_COLOURS.get(reason, GREY) for reason in [*REASON_COLOURS, *sorted(reasons)]}
    colours = {reason: colour for reason, colour in colours.items() if reason in reasons} | {"completed": PALE}
    figure, panels = _panels_by_tier(runs)
    for axes, (label, run) in zip(panels, runs.items(), strict=True):
        counts = pd.crosstab(run.clients["tier"], fates[label])
        counts = counts.reindex(index=tier_order(runs), columns=list(colours)).fillna(0)
        sampled = counts.sum(axis=1)
        _stacked(axes, counts.div(sampled.clip(lower=1), axis=0) * 100, colours)
        for row, count in enumerate(sampled):
            _note(axes, 100, row, f"of {count:,.0f}", annotation_clip=False)
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the tier's sampled devices (%)")
    _legend_above(figure, colours)
    return figure


def memory_by_tier(runs: Runs) -> Figure | None:
    """What a device's task needs, against what the devices of its tier have."""
    if all(_memory(run).empty for run in runs.values()):
        return None
    figure, panels = _panels_by_tier(runs)
    need_colour, cap_colour = RUN_COLOURS[0], "#d0d0d0"
    for axes, run in zip(panels, runs.values(), strict=True):
        axes.set_xscale("log")
        for row, tier in enumerate(tier_order(runs)):
            table = _memory(run).loc[lambda table, tier=tier: table["tier"] == tier]
            if table.empty:
                continue
            for column, colour, width in (("memory_cap_bytes", cap_colour, 12), ("memory_bytes", need_colour, 4)):
                low, middle, high = table[column].quantile([0, 0.5, 1]) / 1e6
                axes.plot([low, high], [row, row], color=colour, linewidth=width, solid_capstyle="butt", zorder=2)
                axes.plot(middle, row, "|", color=INK, markersize=width, zorder=3)
            too_large = (table["memory_bytes"] > table["memory_cap_bytes"]).mean()
            note = f"{max(too_large, 0.01):.0%} do not fit" if too_large else "all fit"
            _note(axes, 1, row, note, xycoords=axes.get_yaxis_transform(), annotation_clip=False)
        _plain_numbers(axes.xaxis)
        axes.set_xlabel("memory of a device (MB, log scale)")
    _legend_above(figure, {"what the task needs": need_colour, "what the devices have": cap_colour})
    return figure


def energy_by_tier(runs: Runs) -> Figure | None:
    """Energy of the whole run, split by whether the update was used."""
    if not sum(run.clients["energy_j"].sum() for run in runs.values()):
        return None
    colours = {"completed": "#009E73", "dropped": "#D55E00"}
    figure, panels = _panels_by_tier(runs)
    for axes, run in zip(panels, runs.values(), strict=True):
        spent = run.clients.pivot_table("energy_j", "tier", "outcome", "sum")
        spent = spent.reindex(index=tier_order(runs), columns=list(colours)).fillna(0) / 1e3
        _stacked(axes, spent, colours)
        mean = _completed(run).groupby("tier")["energy_j"].mean()
        for row, (tier, total) in enumerate(spent.sum(axis=1).items()):
            _note(axes, total, row, f"{mean[tier]:.3g} J each" if tier in mean else "none completed")
        axes.margins(x=0.2)
        axes.set_xlabel("energy of the whole run (kJ)")
    _legend_above(
        figure, {"devices that completed": colours["completed"], "devices that dropped out": colours["dropped"]}
    )
    return figure


def tier_order(runs: Runs) -> list[str]:
    """Tiers of all runs, from little memory to much."""
    clients: Frame = pd.concat([run.clients for run in runs.values()])
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


def draw(plot: Callable[[Runs], Figure | None], runs: Runs, file: IO[bytes]) -> bool:
    """Draw a figure into a PNG file in the style of the report; False if there is nothing to show."""
    with rc_context(STYLE):
        figure = plot(runs)
        if figure is None:
            return False
        figure.savefig(file, format="png")
    return True


def _perplexity(runs: Runs, costs: Mapping[str, Cost], panel_height: float, on_devices: bool = False) -> Figure | None:
    """Perplexity against each cost, from zero-shot at no cost on; reference points as lines.

    With `on_devices` also of the largest model that devices get, where that is not the foundation.
    """
    if all(run.rounds["perplexity"].dropna().empty for run in runs.values()):
        return None
    figure, panels = _grid(len(costs), len(costs), panel_height)
    for axes, (name, cost) in zip(panels, costs.items(), strict=True):
        for run, colour in zip(runs.values(), _colours(runs), strict=True):
            points = pd.DataFrame({"cost": cost(run.rounds), "perplexity": run.rounds["perplexity"]}).dropna()
            zero_shot, centralised = (_reference(run, key) for key in ("zero_shot", "centralised"))
            if zero_shot is not None:
                points = pd.concat([pd.DataFrame({"cost": [0.0], "perplexity": [zero_shot]}), points])
                axes.axhline(zero_shot, color=GREY, **ZERO_SHOT)
            if centralised is not None:
                axes.axhline(centralised, color=colour, **CENTRALISED)
            marker = "o" if len(points) <= 40 else None
            if on_devices and not (path := _path_on_devices(run, cost)).empty:
                how = ON_DEVICES | {"marker": marker, "markerfacecolor": "white"}
                axes.plot(path["cost"], path["perplexity"], color=colour, **how)
            axes.plot(points["cost"], points["perplexity"], color=colour, marker=marker, markersize=4)
        axes.grid(axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel(name)
        _log_if_wide(axes)
    panels[0].set_ylabel("perplexity")
    if len(costs) == 1:
        panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    lines = [Line2D([], [], color=colour, label=label) for label, colour in zip(runs, _colours(runs), strict=True)]
    if on_devices and any(not _path_on_devices(run, costs["round"]).empty for run in runs.values()):
        lines.append(
            Line2D([], [], color=GREY, label="largest model on devices", markerfacecolor="white", **ON_DEVICES)
        )
    if any(_reference(run, "zero_shot") is not None for run in runs.values()):
        lines.append(Line2D([], [], color=GREY, label="zero-shot", **ZERO_SHOT))
    if any(_reference(run, "centralised") is not None for run in runs.values()):
        lines.append(Line2D([], [], color=GREY, label="tuned centrally", **CENTRALISED))
    figure.legend(handles=lines, loc="outside upper left", ncols=3)
    return figure


def _grid(
    num_panels: int, num_columns: int, panel_height: float, share_x: bool = False, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    num_rows = math.ceil(num_panels / num_columns)
    figure = Figure((WIDTH, panel_height * num_rows + 0.35), layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, sharex=share_x, sharey=share_y, squeeze=False).flat)
    for unused in panels[num_panels:]:
        unused.set_visible(False)
    return figure, panels[:num_panels]


def _panels_by_tier(runs: Runs) -> tuple[Figure, list[Axes]]:
    """A panel a run, side by side, with a row a tier."""
    tiers = tier_order(runs)
    figure, panels = _grid(len(runs), min(2, len(runs)), 0.65 + 0.36 * len(tiers), share_x=True)
    for axes, label in zip(panels, runs, strict=True):
        axes.set_yticks(range(len(tiers)), tiers)
        axes.set_ylim(len(tiers) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelbottom=True)
        axes.grid(axis="x")
        if len(runs) > 1:
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


def _log_if_wide(axes: Axes, wide: float = 8, subs: tuple[int, ...] = (1, 3)) -> None:
    low, high = axes.dataLim.intervaly
    if low > 0 and high / low > wide:
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


def _memory(run: Run) -> Frame:
    tasks = run.clients[run.clients["outcome"] != "skipped"]
    return tasks[["tier", "memory_bytes", "memory_cap_bytes"]].dropna()


def _logged(run: Run) -> Frame:
    """Finite numbers that were logged, by round, a column a name."""
    table = run.rounds.set_index("round").filter(regex=r"^figures\.").replace([np.inf, -np.inf], np.nan)
    return table.rename(columns=lambda name: name.removeprefix("figures.")).dropna(axis="columns", how="all")


def _completed(run: Run) -> Frame:
    return run.clients[run.clients["outcome"] == "completed"]


def _slowest(completed: Frame) -> Frame:
    seconds = completed[["download_s", "compute_s", "upload_s"]].sum(axis=1)
    return completed.loc[seconds.groupby(completed["round"]).idxmax()]


def _colours(runs: Runs) -> list[str]:
    return [RUN_COLOURS[index % len(RUN_COLOURS)] for index in range(len(runs))]


def _reference(run: Run, name: str) -> float | None:
    return run.perplexity.get(name)


def _path_on_devices(run: Run, cost: Cost) -> Frame:
    """Perplexity of the largest model on devices against a cost, from zero-shot on; empty where there is none."""
    if "device_perplexity" not in run.rounds:
        return pd.DataFrame()
    points = pd.DataFrame({"cost": cost(run.rounds), "perplexity": run.rounds["device_perplexity"]}).dropna()
    zero_shot, _ = ((None, None), *run.on_devices.values())[-1]
    if points.empty or zero_shot is None:
        return points
    return pd.concat([pd.DataFrame({"cost": [0.0], "perplexity": [zero_shot]}), points])
