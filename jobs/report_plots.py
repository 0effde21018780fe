"""Line charts as inline SVG whose colours come from the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 40
MOST_POINTS = 600


@dataclass(frozen=True)
class Series:
    """One line: points of equal length, a legend entry and a style class (`raw`, `main`, `second`)."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "main"
    stepped: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at x with a tooltip."""

    x: float
    label: str


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
    whole: bool = False,
) -> str:
    """A figure with title, legend, axes and lines; values that are not finite are left out.

    `from_zero` starts the y axis at 0, `whole` puts its ticks on whole numbers.
    """
    points = [(x, y) for line in series for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    if not points:
        return ""
    x_low, x_high = _padded(min(x for x, _ in points), max(x for x, _ in points), 0.0)
    y_low, y_high = _padded(min(y for _, y in points), max(y for _, y in points), 0.06)
    if from_zero:
        y_low = min(0.0, min(y for _, y in points))

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks(y_low, y_high, 5, whole):
        y = down(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(x_low, x_high, 6):
        x = across(tick)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{short(tick)}</text>'
        )
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for mark in marks:
        if x_low <= mark.x <= x_high:
            x = across(mark.x)
            parts.append(
                f'<g class="mark"><title>{escape(mark.label)}</title>'
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base}"/>'
                f'<path d="M{x - 4:.1f} {TOP - 6}h8l-4 7z"/></g>'
            )
    for line in series:
        xs, ys = thinned(line.xs, line.ys)
        path = _path([across(x) for x in xs], [down(y) for y in ys], line.stepped)
        if len(xs) == 1:
            parts.append(f'<circle class="dot {line.style}" cx="{across(xs[0]):.1f}" cy="{down(ys[0]):.1f}" r="3"/>')
        elif path:
            parts.append(f'<path class="line {line.style}" d="{path}"/>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    legend = "".join(f'<span class="key {line.style}">{escape(line.name)}</span>' for line in series if line.name)
    if marks:
        legend += '<span class="key mark">restart</span>'
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <span class="unit">{escape(y_label)}</span>'
        f'<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def interval_strip(value: float, low: float, high: float, left: float, right: float, style: str) -> str:
    """A dot with its interval as whisker on a scale from `left` to `right`, 120 units wide."""
    span = (right - left) or 1.0

    def across(x: float) -> float:
        return 6 + (x - left) / span * 108

    return (
        f'<svg class="strip {style}" viewBox="0 0 120 14" aria-hidden="true">'
        f'<line class="rail" x1="6" x2="114" y1="7" y2="7"/>'
        f'<line class="whisker" x1="{across(low):.1f}" x2="{across(high):.1f}" y1="7" y2="7"/>'
        f'<circle cx="{across(value):.1f}" cy="7" r="3.4"/></svg>'
    )


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most 600 points: means of equal runs of finite points."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    size = max(1, math.ceil(len(pairs) / MOST_POINTS))
    runs = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return [sum(x for x, _ in run) / len(run) for run in runs], [sum(y for _, y in run) / len(run) for run in runs]


def ticks(low: float, high: float, wanted: int, whole: bool = False) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) from low to high, about `wanted` of them."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: 0, 0.002, 4.5, 120, 4.1k, 1.2M."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{suffix}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.2g}"


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    margin = (high - low) * share
    return low - margin, high + margin


def _path(xs: Sequence[float], ys: Sequence[float], stepped: bool) -> str:
    if not xs:
        return ""
    parts = [f"M{xs[0]:.1f} {ys[0]:.1f}"]
    for x, y in zip(xs[1:], ys[1:], strict=True):
        parts.append(f"H{x:.1f}V{y:.1f}" if stepped else f"L{x:.1f} {y:.1f}")
    return "".join(parts)
