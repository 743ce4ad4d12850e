"""Objects drawn over pictures: boxes, outlines of masks, and labels where there is room for them."""

from collections.abc import Mapping, Sequence

from benchmarks.report.charts.shapes import number
from benchmarks.report.views import Drawing, Object
from tasks.common.examples import FoundObject, ObjectSample, TrueObject

#: Pixels of the page: longer side of a drawing, and size of its letters; the width of a letter as a share of its size.
SIDE, _LETTERS, _LETTER = 190, 10, 0.62

#: How far an outline may be off, as a share of a picture's longer side and in its pixels: more is not seen, and the stairs
#: along pixels are no part of an outline.
_OFF, _OFF_PIXELS = 1 / 500, 0.75

_Box = tuple[float, float, float, float]


def drawing(sample: ObjectSample, objects: Sequence[TrueObject], colours: Mapping[str, int], word: str) -> Drawing:
    """``objects`` over the picture of ``sample``; of found ones the surest stand on top and have their labels first.

    Args:
        sample: says how large the picture is.
        objects: true or found.
        colours: of classes.
        word: what they are, for the text alternative.
    """
    longest = max(sample.size)
    letters = longest * _LETTERS / SIDE
    taken: list[_Box] = []
    drawn = []
    for one in sorted(objects, key=_score, reverse=True):
        label = f"{one.name} {100 * one.score:.0f}%" if isinstance(one, FoundObject) else one.name
        x, y, width, height = one.box
        box = (x, y, max(width, 0.0), max(height, 0.0))
        outlines = [points for polygon in one.polygons if (points := outline(polygon, longest))]
        drawn.append(Object(label, colours[one.name], box, outlines, _place(label, box, letters, sample.size, taken)))
    named = ", ".join(one.label for one in drawn) or "nothing"
    return Drawing(drawn[::-1], f"{word}: {named}", letters)


def _score(one: TrueObject) -> float:
    return one.score if isinstance(one, FoundObject) else 0.0


def _place(label: str, box: _Box, letters: float, size: Sequence[int], taken: list[_Box]) -> tuple[float, float] | None:
    """Where a label fits within the picture: above its box, below it, or just inside; adds it to those that are ``taken``."""
    width = letters * _LETTER * len(label)
    left = min(max(box[0], 0.0), max(0.0, size[0] - width))
    for base in (box[1] - 0.2 * letters, box[1] + box[3] + 0.9 * letters, box[1] + letters):
        mine = (left, base - 0.85 * letters, left + width, base + 0.1 * letters)
        if mine[1] >= 0 and mine[3] <= size[1] and not any(_overlap(mine, other) for other in taken):
            taken.append(mine)
            return left, base
    return None


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def outline(polygon: Sequence[float], side: int) -> str:
    """An outline as SVG points, rounded and without points that do not show, for a picture whose longer side is ``side``."""
    import cv2
    import numpy as np

    points = np.array(polygon[: len(polygon) // 2 * 2], dtype=np.float32).reshape(-1, 1, 2)
    fewer = cv2.approxPolyDP(points, max(side * _OFF, _OFF_PIXELS), True).reshape(-1, 2)
    return " ".join(f"{number(float(x))},{number(float(y))}" for x, y in fewer) if len(fewer) >= 3 else ""
