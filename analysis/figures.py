"""The figures of a report: each takes runs by label and gives a figure, or None with nothing to show.

All in one style: Okabe and Ito's colours, which colour-blind readers tell apart; no pyplot, so
nothing global is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

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
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
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
UPPER_BOUND: dict[str, Any] = {"linewidth": 1.2, "linestyle": "--", "alpha": 0.8}


def perplexity_over_rounds(runs: Runs) -> Figure | None:
    return _perplexity(runs, {"round": lambda rounds: rounds["round"]}, 3.2)


def perplexity_over_costs(runs: Runs) -> Figure | None:
    unit_s, time_name = time_unit(max(run.rounds["virtual_s"].max() for run in runs.values()))
    unit_bytes, bytes_name = (
        (1e9, "GB") if max(_traffic(run.rounds).max() for run in runs.values()) > 3e9 else (1e6, "MB")
    )
    costs: dict[str, Cost] = {
        f"virtual time ({time_name})": lambda rounds: rounds["virtual_s"] / unit_s,
        f"down and up, all devices ({bytes_name})": lambda rounds: _traffic(rounds) / unit_bytes,
    }
    return _perplexity(runs, costs, 2.9)


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
    reasons = set().union(*(run.clients["drop_reason"].dropna() for run in runs.values()))
    if not reasons:
        return None
    colours = {reason: REASON_COLOURS.get(reason, GREY) for reason in [*REASON_COLOURS, *sorted(reasons)]}
    colours = {reason: colour for reason, colour in colours.items() if reason in reasons} | {"completed": PALE}
    figure, panels = _panels_by_tier(runs)
    for axes, run in zip(panels, runs.values(), strict=True):
        fate = run.clients["drop_reason"].fillna("completed")
        counts = pd.crosstab(run.clients["tier"], fate).reindex(index=tier_order(runs), columns=list(colours)).fillna(0)
        sampled = counts.sum(axis=1)
        _stacked(axes, counts.div(sampled.clip(lower=1), axis=0) * 100, colours)
        for row, count in enumerate(sampled):
            _note(axes, 100, row, f"of {count:,.0f}", annotation_clip=False)
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the tier's sampled devices (%)")
    _legend_above(figure, colours)
    return figure


def quality_by_tier(runs: Runs) -> Figure | None:
    """Perplexity on the text of each tier's devices, zero-shot and tuned."""
    by_tier = {label: (run.summary or {}).get("perplexity_by_tier") or {} for label, run in runs.items()}
    tiers = [tier for tier in tier_order(runs) if any(tier in values for values in by_tier.values())]
    if not tiers:
        return None
    figure, (axes,) = _grid(1, 1, 0.7 + len(tiers) * max(0.36, 0.24 * len(runs)))
    for index, (values, colour) in enumerate(zip(by_tier.values(), _colours(runs), strict=True)):
        offset = (index - (len(runs) - 1) / 2) * 0.7 / len(runs)
        for row, tier in enumerate(tiers):
            zero_shot, tuned = (values.get(tier, {}).get(key) for key in ("zero_shot", "tuned"))
            if zero_shot is None or tuned is None:
                continue
            axes.plot([zero_shot, tuned], [row + offset] * 2, color=colour, alpha=0.3, linewidth=3, zorder=2)
            axes.scatter(zero_shot, row + offset, 32, facecolor="white", edgecolor=colour, linewidth=1.5, zorder=3)
            axes.scatter(tuned, row + offset, 40, color=colour, zorder=3)
    axes.set_yticks(range(len(tiers)), tiers)
    axes.set_ylim(len(tiers) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel("perplexity")
    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 6, "markeredgecolor": GREY}
    key: list[Any] = [Line2D([], [], markerfacecolor="white", label="zero-shot", **dot)]
    key.append(Line2D([], [], markerfacecolor=GREY, label="tuned", **dot))
    if len(runs) > 1:
        key += [Patch(color=colour, label=label) for label, colour in zip(runs, _colours(runs), strict=True)]
    figure.legend(handles=key, loc="outside upper left", ncols=5)
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


def draw(plot: Callable[[Runs], Figure | None], runs: Runs, file: IO[bytes]) -> bool:
    """Draw a figure into a PNG file in the style of the report; False if there is nothing to show."""
    with rc_context(STYLE):
        figure = plot(runs)
        if figure is None:
            return False
        figure.savefig(file, format="png")
    return True


def _perplexity(runs: Runs, costs: Mapping[str, Cost], panel_height: float) -> Figure | None:
    """Perplexity against each cost, from zero-shot at no cost on; reference points as lines."""
    if all(run.rounds["perplexity"].dropna().empty for run in runs.values()):
        return None
    figure, panels = _grid(len(costs), len(costs), panel_height)
    for axes, (name, cost) in zip(panels, costs.items(), strict=True):
        for run, colour in zip(runs.values(), _colours(runs), strict=True):
            points = pd.DataFrame({"cost": cost(run.rounds), "perplexity": run.rounds["perplexity"]}).dropna()
            zero_shot, upper_bound = (_reference(run, key) for key in ("zero_shot", "upper_bound"))
            if zero_shot is not None:
                points = pd.concat([pd.DataFrame({"cost": [0.0], "perplexity": [zero_shot]}), points])
                axes.axhline(zero_shot, color=GREY, **ZERO_SHOT)
            if upper_bound is not None:
                axes.axhline(upper_bound, color=colour, **UPPER_BOUND)
            marker = "o" if len(points) <= 40 else None
            axes.plot(points["cost"], points["perplexity"], color=colour, marker=marker, markersize=4)
        axes.grid(axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel(name)
        _log_if_wide(axes)
    panels[0].set_ylabel("perplexity")
    if len(costs) == 1:
        panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    lines = [Line2D([], [], color=colour, label=label) for label, colour in zip(runs, _colours(runs), strict=True)]
    if any(_reference(run, "zero_shot") is not None for run in runs.values()):
        lines.append(Line2D([], [], color=GREY, label="zero-shot", **ZERO_SHOT))
    if any(_reference(run, "upper_bound") is not None for run in runs.values()):
        lines.append(Line2D([], [], color=GREY, label="upper bound: tuned centrally", **UPPER_BOUND))
    figure.legend(handles=lines, loc="outside upper left", ncols=3)
    return figure


def _grid(num_panels: int, num_columns: int, panel_height: float, share_x: bool = False) -> tuple[Figure, list[Axes]]:
    num_rows = math.ceil(num_panels / num_columns)
    figure = Figure((WIDTH, panel_height * num_rows + 0.35), layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, sharex=share_x, sharey=True, squeeze=False).flat)
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


def _note(axes: Axes, x: float, row: int, text: str, **how: Any) -> None:
    axes.annotate(text, (x, row), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK, **how)


def _legend_above(figure: Figure, colours: Mapping[str, str]) -> None:
    handles = [Patch(color=colour, label=label.replace("_", "-")) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1.2)


def _log_if_wide(axes: Axes) -> None:
    low, high = axes.dataLim.intervaly
    if low > 0 and high / low > 8:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)


def _plain_numbers(axis: Axis) -> None:
    """10, 30, 100, 300 on a log axis instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _traffic(rounds: Frame) -> Any:
    return (rounds["download_bytes"] + rounds["upload_bytes"]).cumsum()


def _memory(run: Run) -> Frame:
    return run.clients[["tier", "memory_bytes", "memory_cap_bytes"]].dropna()


def _completed(run: Run) -> Frame:
    return run.clients[run.clients["outcome"] == "completed"]


def _slowest(completed: Frame) -> Frame:
    seconds = completed[["download_s", "compute_s", "upload_s"]].sum(axis=1)
    return completed.loc[seconds.groupby(completed["round"]).idxmax()]


def _colours(runs: Runs) -> list[str]:
    return [RUN_COLOURS[index % len(RUN_COLOURS)] for index in range(len(runs))]


def _reference(run: Run, name: str) -> float | None:
    return ((run.summary or {}).get("perplexity") or {}).get(name)
