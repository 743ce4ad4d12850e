"""Scores against cost, with the Pareto front: what nothing else is both cheaper and better than."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report.charts.scales import linear, logarithmic, stretched, tick_text
from benchmarks.report.charts.shapes import Chart, Line, Path, Series, Shape, Style, Text, marker, number, text_width, whisker

WIDTH, HEIGHT = 360.0, 270.0
_LEFT, _TOP, _BOTTOM, _RIGHT = 34.0, 10.0, 38.0, 12.0


@dataclass(frozen=True)
class Spot:
    """A method: what it costs (positive), what it scores with half the error bar, and both in words."""

    name: str
    cost: float
    value: float
    error: float
    title: str


def pareto(spots: Sequence[Spot], higher: bool = True) -> list[Spot]:
    """Return those that no other beats, dearest last.

    A spot is beaten by one that is no dearer and scores better, or is cheaper and no worse.

    Args:
        spots: any order.
        higher: whether a higher value is better.
    """
    sign = 1.0 if higher else -1.0
    front: list[Spot] = []
    for spot in sorted(spots, key=lambda spot: (spot.cost, -sign * spot.value)):
        beats = not front or sign * spot.value > sign * front[-1].value
        alike = bool(front) and (spot.cost, spot.value) == (front[-1].cost, front[-1].value)
        if beats or alike:
            front.append(spot)
    return front


def scatter_chart(
    spots: Sequence[Spot], front: Sequence[Spot], level: float | None, looks: Mapping[str, Style], axis: str, alt: str
) -> Chart:
    """Draw spots, the front as a stair, and as many names as there is room for, those of the front first."""
    chart = Chart(WIDTH, HEIGHT, alt)
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    x = logarithmic([spot.cost for spot in spots], _LEFT + 6, right - 30)
    ends = [spot.value + sign * spot.error for spot in spots for sign in (-1, 1)]
    y = linear(ends, bottom, _TOP) if level is None else stretched(ends, level, bottom, _TOP)
    for value in y.ticks():
        chart.shapes += [
            Line(_LEFT, y(value), right, y(value), "grid"),
            Text(_LEFT - 5, y(value) + 4, tick_text(value), "tick", "end"),
        ]
    for value in x.ticks():
        chart.shapes += [
            Line(x(value), _TOP, x(value), bottom, "grid"),
            Text(x(value), bottom + 15, tick_text(value), "tick", "middle"),
        ]
    chart.shapes.append(Text((_LEFT + right) / 2, HEIGHT - 4, axis, "tick", "middle"))
    if level is not None:
        chart.shapes.append(Line(_LEFT, y(level), right, y(level), "level"))
    if front:
        stair = f"M{number(x(front[0].cost))} {number(y(front[0].value))}"
        stair += "".join(f"H{number(x(spot.cost))}V{number(y(spot.value))}" for spot in front[1:])
        chart.shapes.append(Path(f"{stair}H{number(right)}", "front"))
    on_front = {spot.name for spot in front}
    placed = [(x(spot.cost) - 5, y(spot.value) - 5, x(spot.cost) + 5, y(spot.value) + 5) for spot in spots]
    for spot in [*front, *(spot for spot in spots if spot.name not in on_front)]:
        left, top, look = x(spot.cost), y(spot.value), looks[spot.name]
        shapes: list[Shape] = [
            *whisker(y(spot.value - spot.error), y(spot.value + spot.error), left, f"whisker {look.css}", vertical=True),
            marker(left, top, look.shape, look.css, spot.title, 4.6 if spot.name in on_front else 3.6),
        ]
        word = _name(spot.name, left, top, placed, bottom)
        if word is not None:
            shapes.append(Text(*word, spot.name, f"name {look.css}" + (" best" if spot.name in on_front else "")))
        chart.shapes.append(Series(shapes, spot.name))
    return chart


def _name(
    name: str, x: float, y: float, placed: list[tuple[float, float, float, float]], bottom: float
) -> tuple[float, float] | None:
    """Where a name fits beside its marker (start of its base line); None where it would cover something."""
    width = 1.1 * text_width(name)  # it may be bold
    for left, base in (
        (x + 8, y + 4),
        (x - 8 - width, y + 4),
        (x - width / 2, y - 8),
        (x - width / 2, y + 16),
        (x + 6, y - 6),
        (x + 6, y + 14),
    ):
        box = (left, base - 9, left + width, base + 2)
        inside = left >= _LEFT and box[2] <= WIDTH - 2 and box[1] >= _TOP - 8 and box[3] <= bottom
        if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in placed):
            placed.append(box)
            return left, base
    return None
