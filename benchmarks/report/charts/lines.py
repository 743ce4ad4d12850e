"""Scores against bits: a line a method, from many bits to few, where methods part and their names stand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report.charts.scales import linear, spread, stretched, tick_text
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

WIDTH, HEIGHT = 360.0, 300.0
_LEFT, _TOP, _BOTTOM = 34.0, 10.0, 24.0


@dataclass(frozen=True)
class Point:
    """A value with half the length of its error bar, and what it is in words."""

    value: float
    error: float
    title: str


def line_chart(
    places: Sequence[str], series: Mapping[str, Mapping[str, Point]], level: float | None, looks: Mapping[str, Style], alt: str
) -> Chart:
    """Draw methods over places.

    Args:
        places: names along x, from left to right.
        series: the methods, each with its points by place.
        level: of the dashed line for full precision; None for none.
        looks: of the methods.
        alt: the chart in words.
    """
    names = max((text_width(name) for name in series), default=0.0)
    right = WIDTH - min(max(names, text_width("fp 00.00")), 118.0) - 26
    chart = Chart(WIDTH, HEIGHT, alt)
    ends = [p.value + sign * p.error for points in series.values() for p in points.values() for sign in (-1, 1)]
    bottom = HEIGHT - _BOTTOM
    y = linear(ends, bottom, _TOP) if level is None else stretched(ends, level, bottom, _TOP)
    # Lines reach nearly from side to side; a single place stands in the middle.
    step = (right - _LEFT) * (0.72 / (len(places) - 1) if len(places) > 1 else 1.0)
    first = _LEFT + (right - _LEFT) * (0.14 if len(places) > 1 else 0.5)
    x = {place: first + step * index for index, place in enumerate(places)}
    for value in y.ticks():
        chart.shapes += [
            Line(_LEFT, y(value), right, y(value), "grid"),
            Text(_LEFT - 5, y(value) + 4, tick_text(value), "tick", "end"),
        ]
    chart.shapes += [Text(at, bottom + 17, place, "tick", "middle") for place, at in x.items()]
    if level is not None:
        chart.shapes.append(Line(_LEFT, y(level), right + 8, y(level), "level"))
    last = {name: [place for place in places if place in points][-1] for name, points in series.items() if points}
    wanted = [y(series[name][place].value) for name, place in last.items()] + ([] if level is None else [y(level)])
    labels = spread(wanted, 12.5, _TOP, bottom)
    if level is not None:
        chart.shapes.append(Text(right + 11, labels.pop() + 4, f"fp {level:.2f}", "tick"))
    # Methods at nearly the same place would hide each other: each stands a little beside the next.
    shift = {
        name: (index - (len(last) - 1) / 2) * min(2.6, 0.26 * (right - _LEFT) / max(1, len(last)))
        for index, name in enumerate(last)
    }
    for (name, place), at in zip(last.items(), labels, strict=True):
        points, look, aside = series[name], looks[name], shift[name]
        here = [(x[found] + aside, y(points[found].value)) for found in places if found in points]
        shapes: list[Shape] = [polyline(here, look.css)] if len(here) > 1 else []
        for found in (found for found in places if found in points):
            point, left = points[found], x[found] + aside
            shapes += whisker(
                y(point.value - point.error), y(point.value + point.error), left, f"whisker {look.css}", vertical=True
            )
            shapes.append(marker(left, y(point.value), look.shape, look.css, point.title, 3.6))
        shapes += [
            Line(x[place] + aside + 5, y(points[place].value), right + 8, at, f"leader {look.css}"),
            Text(right + 11, at + 4, shorten(name, 118.0), f"name {look.css}"),
        ]
        chart.shapes.append(Series(shapes, name))
    return chart
