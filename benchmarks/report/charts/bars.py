"""Stacked bars: what each stage adds to the whole."""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.report.charts.scales import Scale, tick_text
from benchmarks.report.charts.shapes import Bar, Chart, Line, Series, Shape, Text, shorten, text_width

WIDTH, ROW = 360.0, 19.0
_TOP, _BOTTOM = 8.0, 24.0


def bar_chart(
    rows: Mapping[str, Mapping[str, float]],
    colours: Mapping[str, int],
    text: Callable[[float], str],
    alt: str,
    stacked: bool = True,
) -> Chart:
    """Draw a bar a row.

    Args:
        rows: name to stage to value, not negative.
        colours: number of each stage's colour in the style sheet.
        text: of a value, for people.
        alt: the chart in words.
        stacked: put the stages one after the other and show their sum; else the longest alone, as peaks do not add up.
    """
    totals = {name: (sum(parts.values()) if stacked else max(parts.values(), default=0.0)) for name, parts in rows.items()}
    height = _TOP + ROW * len(rows) + _BOTTOM
    left = 13 + min(118.0, max((text_width(name) for name in rows), default=0.0))
    right = WIDTH - 8 - max((text_width(text(total)) for total in totals.values()), default=0.0)
    x = Scale(0.0, max([*totals.values(), 1e-9]), left, right)
    bottom = height - _BOTTOM
    chart = Chart(WIDTH, height, alt)
    for value in x.ticks(4):
        chart.shapes += [
            Line(x(value), _TOP, x(value), bottom, "grid"),
            Text(x(value), bottom + 15, tick_text(value), "tick", "middle"),
        ]
    for index, (name, parts) in enumerate(rows.items()):
        top, at = _TOP + ROW * index + 3, left
        shapes: list[Shape] = [Text(left - 8, top + 11, shorten(name, 118.0), "name", "end")]
        shown = parts if stacked else {stage: value for stage, value in parts.items() if value == totals[name]}
        for stage, value in list(shown.items())[: None if stacked else 1]:
            width = x(value) - left
            shapes.append(Bar(at, top, max(width, 0.4), ROW - 6, f"fill c{colours[stage]}", f"{name}, {stage}: {text(value)}"))
            at += width
        shapes.append(Text(at + 5, top + 11, text(totals[name]), "figure"))
        chart.shapes.append(Series(shapes, name))
    return chart


def legend(stages: Sequence[str]) -> dict[str, int]:
    """A colour for each stage, by its place."""
    return {stage: index for index, stage in enumerate(dict.fromkeys(stages))}
