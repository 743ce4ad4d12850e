"""Dot plots: rows with a value each, its error bar and the value in figures; and several series over the same rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report.charts.scales import linear, logarithmic, tick_text
from benchmarks.report.charts.shapes import (
    Chart,
    Line,
    Series,
    Shape,
    Style,
    Text,
    marker,
    polyline,
    shorten,
    text_width,
    whisker,
)

WIDTH, ROW = 360.0, 19.0
_TOP, _BOTTOM = 8.0, 24.0


@dataclass(frozen=True)
class Dot:
    """A row: its value, half its error bar, the value in figures, and all of it in words.

    Attributes:
        seeds: whether the error bar is the spread over seeds; else it is the error over samples, and drawn dashed.
        best: whether its figures stand out.
    """

    name: str
    value: float
    error: float
    text: str
    title: str
    seeds: bool
    best: bool = False


def dot_chart(dots: Sequence[Dot], level: float | None, looks: Mapping[str, Style], alt: str) -> Chart:
    """Draw rows from top to bottom, with a dashed line at ``level`` (full precision)."""
    height = _TOP + ROW * len(dots) + _BOTTOM
    left = 13 + min(118.0, max((text_width(dot.name) for dot in dots), default=0.0))
    right = WIDTH - 10 - max((text_width(dot.text) for dot in dots), default=0.0)
    ends = [dot.value + sign * dot.error for dot in dots for sign in (-1, 1)]
    x = linear([*ends, *([] if level is None else [level])], left, right)
    bottom = height - _BOTTOM
    chart = Chart(WIDTH, height, alt)
    for value in x.ticks(4):
        chart.shapes += [
            Line(x(value), _TOP, x(value), bottom, "grid"),
            Text(x(value), bottom + 15, tick_text(value), "tick", "middle"),
        ]
    if level is not None:
        chart.shapes.append(Line(x(level), _TOP, x(level), bottom, "level"))
    for index, dot in enumerate(dots):
        y, look = _TOP + ROW * (index + 0.5), looks[dot.name]
        bar = "whisker" if dot.seeds else "whisker sampling"
        shapes: list[Shape] = [
            Line(left, y, right, y, "row"),
            Text(left - 8, y + 4, shorten(dot.name, 118.0), "name", "end"),
            *whisker(x(dot.value - dot.error), x(dot.value + dot.error), y, f"{bar} {look.css}"),
            marker(x(dot.value), y, look.shape, look.css, dot.title),
            Text(WIDTH - 2, y + 4, dot.text, "figure best" if dot.best else "figure", "end"),
        ]
        chart.shapes.append(Series(shapes, dot.name))
    return chart


def row_chart(
    rows: Sequence[str],
    series: Mapping[str, Mapping[str, float]],
    looks: Mapping[str, Style],
    titles: Mapping[str, str],
    alt: str,
) -> Chart:
    """Draw a line a method down the rows, on a logarithmic scale; values that are not positive are left out.

    Args:
        rows: names, from top to bottom.
        series: the methods, each with its values by row.
        looks: of the methods.
        titles: the rows' full names, for the pointer.
        alt: the chart in words.
    """
    height = _TOP + ROW * len(rows) + _BOTTOM
    left = 13 + min(150.0, max(text_width(name) for name in rows))
    right, bottom = WIDTH - 12, height - _BOTTOM
    shown = {name: {row: v for row, v in values.items() if v > 0} for name, values in series.items()}
    everything = [value for values in shown.values() for value in values.values()]
    chart = Chart(WIDTH, height, alt)
    if not everything:
        return chart
    x = logarithmic(everything, left, right)
    for value in x.ticks():
        chart.shapes += [
            Line(x(value), _TOP, x(value), bottom, "grid"),
            Text(x(value), bottom + 15, tick_text(value), "tick", "middle"),
        ]
    y = {row: _TOP + ROW * (index + 0.5) for index, row in enumerate(rows)}
    for row, at in y.items():
        chart.shapes += [Line(left, at, right, at, "row"), Text(left - 8, at + 4, shorten(row, 150.0), "name", "end")]
    for name, values in shown.items():
        look, here = looks[name], [row for row in rows if row in values]
        shapes: list[Shape] = [polyline([(x(values[row]), y[row]) for row in here], look.css)] if len(here) > 1 else []
        for row in here:
            title = f"{name}, {titles.get(row, row)}: {values[row]:.4g}"
            shapes.append(marker(x(values[row]), y[row], look.shape, look.css, title, 3.6))
        chart.shapes.append(Series(shapes, name))
    return chart
