"""Line charts as SVG, drawn by hand: axes with labels and units, linear or logarithmic.

Colours, fonts and widths of lines are those of the page's style sheet, by the classes given here,
so that a chart is readable on a light and on a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from fastdiff.training.run_report.series import Series, thinned

WIDTH, HEIGHT = 520.0, 270.0  # of a chart, in units that the page scales
LEFT, RIGHT, TOP, BOTTOM = 66.0, 12.0, 12.0, 42.0  # margins
LOG_FROM = 10.0  # ratio of the largest to the least value from which an axis is logarithmic
DOTS = 60  # a curve of at most so many values has a dot at each
PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Line:
    """A curve of a chart.

    Attributes:
        label: for the legend; a curve without one is explained by another curve's.
        series: its values.
        colour: number of its colour in the style sheet, from 0.
        faint: whether it is drawn thin and pale, as the raw values behind a smoothed curve.
        dashed: whether it is dashed.
    """

    label: str
    series: Series
    colour: int
    faint: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """What a chart shows.

    Attributes:
        title: its heading.
        unit: the label of the vertical axis, with the unit.
        lines: its curves; those without values are left out.
        zero: whether the vertical axis begins at 0.
        log: whether the vertical axis may be logarithmic; it is if the values, all positive, span
            a factor of :data:`LOG_FROM`.
        percent: whether values are shares, shown in percent.
        note: a sentence below the chart.
        marks: steps at which a process continued the run, shown as vertical lines.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    zero: bool = False
    log: bool = False
    percent: bool = False
    note: str = ""
    marks: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """One axis: a range of values, its ticks, and whether it is logarithmic."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def share(self, value: np.ndarray) -> np.ndarray:
        """Where values lie between the ends of the axis, 0..1."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return (np.log10(value) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)


def svg(chart: Chart) -> str:
    """The chart as an SVG element; "" if no curve has a value."""
    lines = [line for line in chart.lines if len(line.series)]
    if not lines:
        return ""
    steps = np.concatenate([line.series.steps[[0, -1]] for line in lines])
    values = np.concatenate([_ends(line.series) for line in lines])
    x = linear_axis(min(0.0, float(steps.min())), float(steps.max()), 6, padded=False)
    y = _vertical(float(values.min()), float(values.max()), chart)
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y.ticks:
        at = TOP + high * (1 - float(y.share(np.array(tick))))
        parts.append(_rule("grid", LEFT, at, right, at))
        parts.append(_text("tick", LEFT - 7, at + 4, number(tick, chart.percent), "end"))
    for tick in x.ticks:
        at = LEFT + wide * float(x.share(np.array(tick)))
        parts.append(_rule("axis", at, bottom, at, bottom + 4))
        parts.append(_text("tick", at, bottom + 18, number(tick), "middle"))
    for mark in chart.marks:
        if x.low < mark < x.high:
            at = LEFT + wide * float(x.share(np.array(mark)))
            parts.append(_rule("mark", at, TOP, at, bottom))
    parts.append(f'<path class="axis" d="M{LEFT:g} {TOP:g}V{bottom:g}H{right:g}"/>')
    parts += [_curve(line, x, y, wide, high) for line in lines]
    parts.append(_text("label", LEFT + wide / 2, HEIGHT - 6, "step", "middle"))
    unit = chart.unit + (" (log scale)" if y.log else "")
    turned = f'transform="translate(12 {TOP + high / 2:g}) rotate(-90)"'
    parts.append(f'<text class="label" {turned} text-anchor="middle">{escape(unit)}</text>')
    name = escape(f"{chart.title}: {chart.unit} against step", quote=True)
    axes = (
        f'data-x="{x.low!r} {x.high!r}" data-y="{y.low!r} {y.high!r}" '
        f'data-log="{int(y.log)}" data-percent="{int(chart.percent)}"'
    )
    box = f'viewBox="0 0 {WIDTH:g} {HEIGHT:g}"'
    return f'<svg {box} role="img" aria-label="{name}" {axes}>{"".join(parts)}</svg>'


def linear_axis(low: float, high: float, count: int, *, padded: bool = True) -> Axis:
    """An axis of about ``count`` round ticks.

    Args:
        low: the least value.
        high: the largest value.
        count: number of ticks wanted.
        padded: whether the axis goes on to the next ticks beyond the values.
    """
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        low, high = (low - room, high + room) if padded else (low, low + room)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [step * k for k in range(first, last + 1)]
    if padded:
        return Axis(ticks[0], ticks[-1], ticks)
    return Axis(low, high, [tick for tick in ticks if low <= tick <= high * (1 + 1e-9)])


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis of positive values, with ticks at 1, 2 and 5 times powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    every = 1 if len(factors) > 1 else max(1, (last - first) // 6)
    ticks = [f * 10.0**k for k in range(first, last + 1, every) for f in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    below = max((tick for tick in ticks if tick <= low), default=low)
    above = min((tick for tick in ticks if tick >= high), default=high)
    return Axis(below, above, sorted({below, *inside, above}), log=True)


def number(value: float, percent: bool = False) -> str:
    """A number as a short text: 1.5k, 3e-5; or a share in percent."""
    if percent:
        return f"{100 * value:.3g}%"
    size = abs(value)
    for scale, prefix in PREFIXES:
        if size >= scale:
            return f"{value / scale:.4g}{prefix}"
    if value and size < 1e-3:
        digits, _, exponent = f"{value:.3g}".partition("e")
        return f"{digits}e{int(exponent)}" if exponent else digits
    return f"{value:.4g}"


def _rule(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    """A text that begins, ends or has its middle at a point."""
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {where}>{escape(text)}</text>'


def _ends(series: Series) -> np.ndarray:
    return np.array([series.values.min(), series.values.max()])


def _vertical(low: float, high: float, chart: Chart) -> Axis:
    if chart.log and low > 0 and high / low >= LOG_FROM:
        return log_axis(low, high)
    return linear_axis(min(0.0, low) if chart.zero else low, high, 5)


def _curve(line: Line, x: Axis, y: Axis, wide: float, high: float) -> str:
    series = thinned(line.series)
    across = LEFT + wide * x.share(series.steps)
    down = TOP + high * (1 - y.share(series.values))
    points = " ".join(f"{a:.1f},{b:.2f}" for a, b in zip(across, down, strict=True))
    kinds = "curve" + " faint" * line.faint + " dashed" * line.dashed
    label = f' data-label="{escape(line.label, quote=True)}"' if line.label else ""
    drawn = f'<polyline class="{kinds} c{line.colour}" points="{points}"{label}/>'
    if len(series) <= DOTS and not line.faint:
        drawn += "".join(
            f'<circle class="c{line.colour}" cx="{a:.1f}" cy="{b:.2f}" r="2.2"/>'
            for a, b in zip(across, down, strict=True)
        )
    return drawn
