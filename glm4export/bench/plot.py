"""Plots of a benchmark: where it stands under the machine's roofline, and how speed changes with length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from glm4export.bench.limits import Limits
from glm4export.bench.report import Report, Spread
from glm4runtime.contract import UserError

SUFFIXES = (".png", ".svg")

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_PREFILL, _DECODE, _ROOF = "#0072B2", "#D55E00", "#555555"
_SMALL = 8.5  # points
_GIGA = 1e9
# White behind text, so that it can be read where a line passes.
_TEXT: dict[str, Any] = {
    "fontsize": _SMALL,
    "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
}

Point = tuple[float, float, str, str]  # x, y, name, colour


def check(path: Path) -> None:
    """Raises UserError where ``path`` can't become a plot, before minutes are spent on measuring."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot {path}: unknown kind {path.suffix!r}; end the name in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: no folder {path.parent}; make it first")


def write(report: Report, path: Path) -> None:
    """Draw a report into a .png or .svg file."""
    figure = Figure(figsize=(12, 6), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.3, 1))
    roofline = figure.add_subplot(grid[:, 0])
    points = _roofline(roofline, report)
    _prefill_by_length(figure.add_subplot(grid[0, 1]), report)
    _decode_by_context(figure.add_subplot(grid[1, 1]), report)
    where = f"{report.machine.cpu}, {report.machine.cores} cores" if report.provider == "cpu" else report.provider
    figure.suptitle(f"{Path(report.bundle).resolve().name}: {report.precision} on {where}")
    figure.draw_without_rendering()  # names are placed by pixels, which are known once all is laid out
    _name_points(roofline, points)
    if report.limits is not None:
        _name_slope(roofline, report.limits, points)
    figure.savefig(path, format=path.suffix.lower().removeprefix("."))


def _roofline(axes: Axes, report: Report) -> list[Point]:
    """Operations per second over operations per byte, by prompt length and batch; returns the points to be named."""
    first = report.plan.contexts[0]
    decode = [run for run in report.decode if run.context == first]
    series = (
        ("prefill, by prompt tokens", "o", _PREFILL, [(r.tokens, r.ops, r.bytes, r.seconds) for r in report.prefill]),
        (
            f"decode at {first} tokens, by batch",
            "s",
            _DECODE,
            [(run.batch, run.ops, run.bytes, run.seconds_per_step) for run in decode],
        ),
    )
    points: list[Point] = []
    for name, marker, colour, runs in series:
        across = [ops / size for _, ops, size, _ in runs]
        rates = [Spread.of(ops / second / _GIGA for second in seconds.runs) for _, ops, _, seconds in runs]
        _with_bars(axes, across, rates, marker, colour, name)
        labels = [str(count) for count, *_ in runs]
        points += [(x, rate.median, label, colour) for x, rate, label in zip(across, rates, labels, strict=True)]
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    left, right = min(xs) / 2, max(xs) * 4
    if report.limits is not None:
        ridge = report.limits.fp32_ops_per_second / report.limits.read_bytes_per_second
        left, right = min(left, ridge / 12), max(right, ridge * 40)
        ys.append(report.limits.int8_ops_per_second / _GIGA)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(ys) / 4, max(ys) * 2))
    if report.limits is not None:
        _roofs(axes, report.limits, left, right)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_plain))
        axis.set_minor_formatter(NullFormatter())
    axes.set_title("Roofline", loc="left")
    axes.set(xlabel="arithmetic intensity [operations per byte read]")
    axes.set_ylabel("speed of linears [10⁹ operations per second]")
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(loc="lower right", fontsize=_SMALL)
    return points


def _roofs(axes: Axes, limits: Limits, left: float, right: float) -> None:
    """The machine's read bandwidth as a slope, its matmul peaks as flats from where they meet the slope."""
    bandwidth = limits.read_bytes_per_second / _GIGA
    peaks = {"int8": limits.int8_ops_per_second / _GIGA, "fp32": limits.fp32_ops_per_second / _GIGA}
    top = max(peaks.values())
    axes.plot([left, top / bandwidth], [left * bandwidth, top], color=_ROOF, linewidth=1.2)
    for kind, peak in peaks.items():
        axes.plot([peak / bandwidth, right], [peak, peak], color=_ROOF, linewidth=1.2)
        axes.annotate(
            f"{kind} matmul, {_plain(peak)} GOP/s", (right, peak), (-5, 3), textcoords="offset points",
            ha="right", va="bottom", color=_ROOF, **_TEXT,
        )  # fmt: skip


def _name_slope(axes: Axes, limits: Limits, points: list[Point]) -> None:
    """Write the bandwidth along its slope, where it is farthest from every point."""
    bandwidth = limits.read_bytes_per_second / _GIGA
    end = max(limits.int8_ops_per_second, limits.fp32_ops_per_second) / _GIGA / bandwidth
    start = max(axes.get_xlim()[0], axes.get_ylim()[0] / bandwidth)
    places = np.geomspace(start, end, 11)[2:-2]
    pixels = axes.transData.transform(np.stack([places, places * bandwidth], axis=1))
    taken = axes.transData.transform([(x, y) for x, y, *_ in points])
    distances = np.linalg.norm(pixels[:, None] - taken[None], axis=2).min(axis=1)
    place = places[int(distances.argmax())]
    (x0, y0), (x1, y1) = pixels[0], pixels[-1]
    axes.annotate(
        f"memory, {_plain(bandwidth)} GB/s", (place, place * bandwidth), (-3, 3), textcoords="offset points",
        rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)), rotation_mode="anchor",
        ha="center", va="bottom", color=_ROOF, **_TEXT,
    )  # fmt: skip


def _prefill_by_length(axes: Axes, report: Report) -> None:
    lengths = [run.tokens for run in report.prefill]
    _with_bars(axes, lengths, [run.tokens_per_second for run in report.prefill], "o-", _PREFILL, "measured")
    _lengths(axes, lengths, "prompt [tokens]")
    axes.set_title("Prefill", loc="left")
    axes.set(ylabel="tokens per second", ylim=(0, None))


def _decode_by_context(axes: Axes, report: Report) -> None:
    """One sequence's speed, and what the bandwidth would allow unless that would dwarf it."""
    runs = [run for run in report.decode if run.batch == 1]
    contexts = [run.context for run in runs]
    _with_bars(axes, contexts, [run.tokens_per_second for run in runs], "s-", _DECODE, "measured")
    if report.limits is not None:
        allowed = [report.limits.read_bytes_per_second / run.bytes for run in runs]
        if max(allowed) < 3 * max(run.tokens_per_second.high for run in runs):
            axes.plot(contexts, allowed, "--", color=_ROOF, linewidth=1.2, label="read bandwidth allows")
            axes.legend(loc="lower left", fontsize=_SMALL)  # the axis begins at 0: room below the curves
    _lengths(axes, contexts, "context [tokens]")
    axes.set_title("Decode, one sequence", loc="left")
    axes.set(ylabel="tokens per second", ylim=(0, 1.05 * axes.get_ylim()[1]))


def _with_bars(axes: Axes, across: Sequence[float], rates: list[Spread], style: str, colour: str, name: str) -> None:
    """Medians with a bar from the lowest to the highest."""
    medians = [rate.median for rate in rates]
    bars = np.array([[rate.median - rate.low, rate.high - rate.median] for rate in rates]).T
    axes.errorbar(across, medians, bars, fmt=style, color=colour, capsize=3, markersize=5, label=name)


def _lengths(axes: Axes, lengths: Sequence[int], name: str) -> None:
    """A logarithmic axis with the measured lengths on it, those left out that would touch the one before."""
    ticks: list[int] = []
    for length in lengths:
        if not ticks or length >= ticks[-1] * max(1.25, (lengths[-1] / lengths[0]) ** 0.08):
            ticks.append(length)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.set_xlabel(name)
    axes.grid(True, alpha=0.25)


def _name_points(axes: Axes, points: list[Point]) -> None:
    """Write each point's name to its right, moved up where it would touch another's."""
    scale = 72 / axes.figure.dpi
    pixels = axes.transData.transform([(x, y) for x, y, *_ in points]) * scale
    taken: list[tuple[float, float, float]] = []  # left, right, height
    for index in np.argsort(pixels[:, 1]):
        across, up, name, colour = points[index]
        x, y = pixels[index]
        left, right, height = x - 4, x + 8 + 0.65 * _SMALL * len(name), y  # the marker and its name
        for other_left, other_right, other in sorted(taken, key=lambda place: place[2]):
            if left < other_right and other_left < right and abs(other - height) < 1.2 * _SMALL:
                height = other + 1.2 * _SMALL
        taken.append((left, right, height))
        axes.annotate(
            name, (across, up), (6, height - y), textcoords="offset points", va="center", color=colour, **_TEXT
        )


def _plain(value: float, _: object = None) -> str:
    """A number without an exponent: three digits of it, or all that stand before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
