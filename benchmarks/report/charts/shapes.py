"""What charts are made of. Coordinates are pixels of the chart's own box, y downwards."""

from collections.abc import Sequence
from dataclasses import dataclass, field

#: Colours of the style sheet, and marker shapes: a series has one of each, and after all colours the next shape.
COLOURS = 8
SHAPES = ("circle", "diamond", "square", "triangle")

#: Pixels that a letter takes on average in the charts' size of text.
LETTER = 6.7


@dataclass(frozen=True)
class Line:
    """A straight line; ``css`` says what it is."""

    x1: float
    y1: float
    x2: float
    y2: float
    css: str
    kind: str = "line"


@dataclass(frozen=True)
class Text:
    """A word. ``anchor`` is ``start``, ``middle`` or ``end``."""

    x: float
    y: float
    text: str
    css: str = ""
    anchor: str = "start"
    kind: str = "text"


@dataclass(frozen=True)
class Path:
    """A path or a marker; ``title`` shows where the pointer rests on it."""

    d: str
    css: str
    title: str = ""
    kind: str = "path"


@dataclass(frozen=True)
class Bar:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    css: str
    title: str = ""
    kind: str = "bar"


Shape = Line | Text | Path | Bar


@dataclass(frozen=True)
class Series:
    """Shapes that belong together: what a filter hides, and what stands out under the pointer."""

    shapes: Sequence[Shape]
    method: str = ""
    css: str = ""
    kind: str = "series"


@dataclass
class Chart:
    """A drawing of ``width`` × ``height``, and what it shows in words, for those who do not see it."""

    width: float
    height: float
    alt: str
    shapes: list[Shape | Series] = field(default_factory=list)


@dataclass(frozen=True)
class Style:
    """How a method looks in all charts: the number of its colour, and its marker."""

    colour: int
    shape: str

    @property
    def css(self) -> str:
        """Its class in the style sheet."""
        return f"c{self.colour}"


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """A look for each method: by its place, so that it is the same in every chart."""
    return {
        name: Style(index % COLOURS, SHAPES[index // COLOURS % len(SHAPES)]) for index, name in enumerate(dict.fromkeys(methods))
    }


def marker(x: float, y: float, shape: str, css: str, title: str, size: float = 4.2) -> Path:
    """A marker centred at (x, y); all shapes have about the same area."""
    if shape == "circle":
        d = f"M{number(x - size)} {number(y)}a{size} {size} 0 1 0 {2 * size} 0a{size} {size} 0 1 0 {-2 * size} 0z"
    elif shape == "square":
        side = size * 0.9
        d = f"M{number(x - side)} {number(y - side)}h{2 * side:.1f}v{2 * side:.1f}h{-2 * side:.1f}z"
    elif shape == "diamond":
        r = size * 1.3
        d = f"M{number(x)} {number(y - r)}l{r:.1f} {r:.1f}l{-r:.1f} {r:.1f}l{-r:.1f} {-r:.1f}z"
    else:
        r = size * 1.15
        d = f"M{number(x)} {number(y - r)}l{r:.1f} {2 * r:.1f}h{-2 * r:.1f}z"
    return Path(d, f"mark {css}", title)


def polyline(points: Sequence[tuple[float, float]], css: str) -> Path:
    """A line through points."""
    return Path("M" + "L".join(f"{number(x)} {number(y)}" for x, y in points), f"curve {css}")


def whisker(x1: float, x2: float, y: float, css: str, vertical: bool = False) -> list[Shape]:
    """An error bar with its caps, along x at ``y``; ``vertical``: along y from ``x1`` to ``x2`` at x = ``y``."""
    cap = 3.0
    ends = ((x1, y, x2, y), (x1, y - cap, x1, y + cap), (x2, y - cap, x2, y + cap))
    if vertical:
        return [Line(b, a, d, c, css) for a, b, c, d in ends]
    return [Line(a, b, c, d, css) for a, b, c, d in ends]


def text_width(text: str) -> float:
    """About how wide a text is drawn."""
    return LETTER * len(text)


def shorten(text: str, width: float) -> str:
    """``text``, cut where it is wider than ``width``; its end, in which names differ, stays."""
    room = max(4, int(width / LETTER))
    if len(text) <= room:
        return text
    head = room // 4
    return f"{text[:head]}…{text[len(text) - (room - 1 - head) :]}"


def number(value: float) -> str:
    """A coordinate: a tenth of a pixel is enough."""
    text = f"{value:.1f}"
    return text.removesuffix(".0") if text != "-0.0" else "0"
