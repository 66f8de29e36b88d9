"""Curves and bars as SVG, a string each, that stand in a page by themselves: no script, no font, no file beside them."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 28, 34, 46
COLOURS = ("#2f6fb5", "#d1672c", "#3d9455", "#8a56a8", "#b3973a", "#5f6b76")


@dataclass(frozen=True)
class Curve:
    """Lines over a common axis.     series : (name, points) each, a point (x, y); points that are not finite are left out.

    levels : (name, y) of horizontal lines, such as the best loss that is possible.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    levels: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Bar:
    """low and high : the ends of the whisker, None for none.     chance : where a guesser would stand.     All shares from 0 to 1."""

    value: float
    low: float | None
    high: float | None
    chance: float


def line_chart(curve: Curve) -> str:
    """An SVG of the curve, or "" where it has no point."""
    series = [(name, [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]) for name, points in curve.series]
    points = [point for _, line in series for point in line]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points] + [y for _, y in curve.levels]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), nice_ticks(min(ys), max(ys))
    place = _Axes((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), WIDTH, HEIGHT)
    parts = [place.grid(y_ticks), *(place.x_tick(x) for x in x_ticks), place.labels(curve.x_label, curve.y_label)]
    for name, y in curve.levels:
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place.y(y):.1f}" y2="{place.y(y):.1f}"/>')
        parts.append(f'<text class="note" x="{WIDTH - RIGHT}" y="{place.y(y) + 14:.1f}" text-anchor="end">{escape(name)}</text>')
    for (_, line), colour in zip(series, _colours(len(series)), strict=True):
        path = " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in line)
        dots = "".join(f'<circle cx="{place.x(x):.1f}" cy="{place.y(y):.1f}" r="2.5" fill="{colour}"/>' for x, y in line) if len(line) < 40 else ""
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>{dots}')
    return _svg(WIDTH, HEIGHT, curve.title, [name for name, _ in series], parts)


def bar_chart(title: str, groups: Sequence[str], names: Sequence[str], bars: Sequence[Sequence[Bar]]) -> str:
    """An SVG of lying bars: a group of them for each subject, in it one for each model.     bars : [group][name]"""
    thick, gap = 13, 10
    left = 24 + 7 * min(28, max(len(group) for group in groups))
    height = TOP + len(groups) * (len(names) * thick + gap) + BOTTOM
    place = _Axes((0, 1), (0, 1), WIDTH, height, left)
    parts = [f'<line class="grid" x1="{place.x(x):.1f}" x2="{place.x(x):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>' for x in (0, 0.25, 0.5, 0.75, 1)]
    parts += [place.x_tick(x, f"{100 * x:.0f} %") for x in (0, 0.25, 0.5, 0.75, 1)]
    for i, (group, row) in enumerate(zip(groups, bars, strict=True)):
        y = TOP + i * (len(names) * thick + gap) + gap / 2
        parts.append(f'<text x="{left - 8}" y="{y + len(names) * thick / 2 + 4:.1f}" text-anchor="end">{escape(_short(group))}</text>')
        for j, (bar, colour) in enumerate(zip(row, _colours(len(names)), strict=True)):
            top, middle = y + j * thick, y + j * thick + thick / 2 - 1
            parts.append(f'<rect x="{left}" y="{top:.1f}" width="{place.x(bar.value) - left:.1f}" height="{thick - 2}" fill="{colour}"/>')
            if bar.low is not None:
                parts.append(f'<line class="whisker" x1="{place.x(bar.low):.1f}" x2="{place.x(bar.high):.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>')
            x = place.x(bar.chance)
            parts.append(f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{top + thick - 2:.1f}"/>')
    parts.append(f'<text class="note" x="{WIDTH - RIGHT}" y="{height - 10}" text-anchor="end">whisker: 95 % interval; dashed: chance</text>')
    return _svg(WIDTH, height, title, names, parts)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, in steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / about
    unit = 10 ** math.floor(math.log10(rough))
    step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


class _Axes:
    """From figures to places in the picture."""

    def __init__(self, x_range, y_range, width, height, left=LEFT):
        self.x_range, self.y_range, self.width, self.height, self.left = x_range, y_range, width, height, left

    def x(self, value):
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - RIGHT)

    def y(self, value):
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def grid(self, ticks):
        return "".join(
            f'<line class="grid" x1="{self.left}" x2="{self.width - RIGHT}" y1="{self.y(t):.1f}" y2="{self.y(t):.1f}"/>'
            f'<text x="{self.left - 6}" y="{self.y(t) + 4:.1f}" text-anchor="end">{t:,.4g}</text>' for t in ticks)  # fmt: skip

    def x_tick(self, value, text=None):
        shown = text or (f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}")
        return f'<text x="{self.x(value):.1f}" y="{self.height - BOTTOM + 16}" text-anchor="middle">{shown}</text>'

    def labels(self, x_label, y_label):
        middle, height = (self.left + self.width - RIGHT) / 2, self.height
        return (f'<text class="note" x="{middle:.0f}" y="{height - 10}" text-anchor="middle">{escape(x_label)}</text>'
                f'<text class="note" x="14" y="{height / 2:.0f}" text-anchor="middle" transform="rotate(-90 14 {height / 2:.0f})">{escape(y_label)}</text>')  # fmt: skip


def _colours(n):
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _short(text, length=28):
    return text if len(text) <= length else text[: length - 1] + "…"


def _svg(width, height, title, names, parts):
    legend, x = [], width - RIGHT
    for name, colour in reversed(list(zip(names, _colours(len(names)), strict=True))):
        shown = _short(name, 24)
        legend.append(f'<text x="{x}" y="18" text-anchor="end" style="fill:{colour}" font-weight="600">{escape(shown)}</text>')
        x -= 7 * len(shown) + 18
    heading = f'<text x="{8}" y="18" font-weight="600">{escape(title)}</text>'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
            f'aria-label="{escape(title, quote=True)}" font-family="sans-serif" font-size="12">{heading}{"".join(legend)}{"".join(parts)}</svg>')  # fmt: skip
