"""Charts: Vega-Lite specifications as dicts, drawn as SVG with the style sheet's colours.

Rows are dicts. In all charts ``name`` is the method, ``value`` what is drawn, ``error`` half the
error bar, ``look`` colour and marker, ``title`` what the pointer shows. ``level`` is the score of
full precision, a dashed line; None for none. ``alt`` is the chart in words.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

#: Colours of the style sheet, and markers. After all colours comes the next marker.
COLOURS = 8
SHAPES = ("circle", "diamond", "square", "triangle-up")

Dict = dict[str, Any]
#: Pixels: a chart's width, a row's height, the height of scores, a letter, the longest name.
_WIDTH, _ROW, _HEIGHT, _LETTER, _NAME = 360, 19, 250, 7.0, 130
_CONFIG: Dict = {
    "view": {"stroke": None},
    "axis": {
        "titleColor": "var(--muted)", "titleFontWeight": "normal",
        "labelColor": "var(--muted)", "labelFontSize": 11, "labelPadding": 5,
        "gridColor": "var(--grid)", "domain": False, "ticks": False,
    },
    "text": {"align": "left", "baseline": "middle", "fontSize": 11},
    "point": {
        "opacity": 1, "filled": True, "size": 50, "stroke": "var(--card)", "strokeWidth": 0.8,
    },
    "line": {"strokeWidth": 1.6},
}  # fmt: skip
#: Encodings of a method's marks, of fields that :func:`_clean` adds. Lines get points by a shape.
_SERIES: Dict = {
    "description": {"field": "description"},
    "color": {"field": "colour", "scale": None},
    "shape": {"field": "shape", "scale": None},
    "detail": {"field": "name"},
}
_LEVEL = {"type": "rule", "color": "var(--muted)", "strokeDash": [5, 4]}
_STAIR = _LEVEL | {"type": "line", "interpolate": "step-after", "strokeDash": [2, 2]}
_ERROR = {"type": "errorbar", "ticks": {"size": 6, "aria": True}}
_BOLD = {"expr": "datum.best ? 'bold' : 'normal'"}
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def looks(methods: Sequence[str]) -> dict[str, str]:
    """Return colour and marker of each method by its place, the same in all charts."""
    shapes = [f"c{colour} {shape}" for shape in SHAPES for colour in range(COLOURS)]
    return {name: shapes[index % len(shapes)] for index, name in enumerate(methods)}


def px(value: float) -> str:
    """Return a coordinate: a tenth of a pixel is enough."""
    return f"{round(value, 1):g}"


def bar_chart(rows: Sequence[Dict], sums: Sequence[Dict], alt: str) -> Markup:
    """Draw one stacked bar per name, with the title of its sum beside it."""
    x, y = _axis("value", tickCount=4), _names("name")
    x["scale"] |= {"zero": True, "padding": 0}
    order, stacked = {"field": "index"}, x | {"stack": "zero"}
    layers = [
        _layer({"type": "bar", "size": 13}, **_SERIES, x=stacked, y=y, order=order),
        _layer({"type": "text", "dx": 5}, sums, **_SERIES, x=x, y=y, text={"field": "title"}),
    ]
    return _row_chart("name", rows, layers, _widest(row["title"] for row in sums) + 8, alt)


def dot_chart(rows: Sequence[Dict], level: float | None, alt: str) -> Markup:
    """Draw one dot per row with its error bar and ``text``.

    The text is bold if the row is the ``best``, and the error bar dotted for one of ``seeds``.
    """
    right = _widest(row["text"] for row in rows) + 12
    x = _axis("value", tickCount=4)
    y = _names("name")
    dash = {"condition": {"test": "datum.seeds > 1", "value": [1, 0]}, "value": [2, 1.5]}
    at_edge = {"type": "text", "align": "right", "x": {"expr": f"width + {right - 2}"}}
    layers = [
        _layer(_LEVEL, [] if level is None else [{"value": level}], x=x),
        _layer(_ERROR, **_SERIES, x=x, y=y, xError={"field": "error"}, strokeDash=dash),
        _layer("point", **_SERIES, x=x, y=y),
        _layer(at_edge | {"fontWeight": _BOLD}, **_SERIES, y=y, text={"field": "text"}),
    ]
    return _row_chart("name", rows, layers, right, alt)


def block_chart(rows: Sequence[Dict], alt: str) -> Markup:
    """Draw one line per method down the rows' ``block``, on a logarithmic scale."""
    shown = [row for row in rows if row["value"] > 0]
    x = _axis("value", {"type": "log"}, tickCount=3)
    line = _layer("line", **_SERIES, x=x, y=_names("block"), order={"field": "index"})
    return _row_chart("block", shown, [line], 14, alt)


def line_chart(
    places: Sequence[str], rows: Sequence[Dict], level: float | None, alt: str
) -> Markup:
    """Draw one line per method over places (``bits`` of a row)."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    # Methods at nearly the same place would hide each other: each stands a little beside the next.
    step = min(0.02, 0.5 / len(names)) * len(places)
    aside = {name: (i - (len(names) - 1) / 2) * step for i, name in enumerate(names)}
    rows = [row | {"x": places.index(row["bits"]) + aside[row["name"]]} for row in rows]
    x = _axis("x", {"domain": [-0.3, len(places) - 0.7], "padding": 0}, grid=False)
    x["axis"] |= {"values": [*range(len(places))], "labelExpr": f"{[*places]}[datum.value]"}
    return _score_chart(rows, level, x, "line", alt)


def scatter_chart(rows: Sequence[Dict], level: float | None, axis: str, alt: str) -> Markup:
    """Draw scores against ``cost``, what ``axis`` says, and the ``best`` rows as a stair."""
    x = _axis("x", {"type": "log"}, tickCount=4, title=axis)
    rows = [row | {"x": row["cost"]} for row in rows]
    return _score_chart(rows, level, x, "point", alt)


def _score_chart(rows: Sequence[Dict], level: float | None, x: Dict, mark: str, alt: str) -> Markup:
    """Draw scores over ``x`` with error bars, and each method's name beside its last one.

    With a level the scale is stretched by the square root of what is missing to the top: most room
    is just below full precision, where methods differ least.
    """
    ends = [row["value"] + sign * row["error"] for row in rows for sign in (-1, 1)]
    ends += [] if level is None else [level]
    low, high = min(ends), max(ends)
    air = (high - low) * (0.04 if level is None else 0.01) or max(abs(low) * 0.05, 0.5)
    low, high = low - air, high + air

    def bend(value: float) -> float:
        return value if level is None else -math.sqrt(max(0.0, high - value))

    y = _axis("y", {"domain": [bend(low), bend(high)], "padding": 0}, tickCount=5)
    if level is not None:
        y["axis"] = {
            "title": None,
            "values": [bend(tick) for tick in stretched_ticks(low, high, bend)],
            "labelExpr": f"format({high!r} - datum.value * datum.value, '.5~g')",
        }
    spans = (("y", 0), ("low", -1), ("high", 1))
    rows = [
        row | {k: bend(row["value"] + sign * row["error"]) for k, sign in spans} for row in rows
    ]
    last = list({row["name"]: row for row in sorted(rows, key=lambda row: row["x"])}.values())
    full = [] if level is None else [{"name": f"fp {level:.2f}", "y": bend(level)}]
    gap = 12.5 / _HEIGHT * (bend(high) - bend(low))
    spots = spread([row["y"] for row in [*last, *full]], gap, bend(low), bend(high))
    labels = [row | {"spot": spot} for row, spot in zip([*last, *full], spots, strict=True)]
    right = min(_widest(row["name"] for row in labels), _NAME) + 14
    name = {"type": "text", "x": {"expr": "width + 11"}, "limit": _NAME - 15, "fontWeight": _BOLD}
    leader = {"x2": {"value": _WIDTH - 34 - right + 8}, "y2": {"field": "spot"}}
    thin = {"type": "rule", "strokeWidth": 0.6, "opacity": 0.5}
    layers = [
        _layer(_LEVEL, full, y=y),
        _layer(_STAIR, [row for row in rows if row.get("best")], x=x, y=y),
        _layer(thin, labels[: len(last)], **_SERIES, **leader, x=x, y=y),
        _layer(_ERROR, **_SERIES, x=x, y=y | {"field": "low"}, y2={"field": "high"}),
        _layer(mark, **_SERIES, x=x, y=y),
        _layer(name, labels, **_SERIES, y=y | {"field": "spot"}, text={"field": "name"}),
    ]
    return _draw(rows, layers, (34, 10, right, 38 if x["axis"]["title"] else 24), _HEIGHT, alt)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart: neighbours at least ``gap`` from each other, in order, within [low, high].

    Where there is no room for all, they stand as far apart as there is.
    """
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=lambda index: places[index])
    found, edge = list(places), low
    for index in order:
        found[index] = max(found[index], edge)
        edge = found[index] + gap
    edge = high
    for index in reversed(order):
        found[index] = min(found[index], edge)
        edge = found[index] - gap
    return found


def stretched_ticks(low: float, high: float, bend: Callable[[float], float]) -> list[float]:
    """Return round values: in each place of a bent scale multiples of the finest readable step."""
    gap = (bend(high) - bend(low)) / 12
    found: list[float] = []
    for step in (50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1):
        for index in range(math.ceil(low / step), math.floor(high / step) + 1):
            value = index * step
            if all(abs(bend(value) - bend(other)) >= gap for other in [value - step, *found]):
                found.append(value)
    return sorted(found)


def _axis(field: str, scale: Dict | None = None, **axis: Any) -> Dict:
    """Return the encoding of numbers along an axis."""
    scale = {"nice": False, "zero": False, "padding": 8} | (scale or {})
    axis = {"title": None, "format": ".6~g", **axis}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": axis}


def _names(field: str) -> Dict:
    """Return the encoding of names along y, in the order of the data."""
    axis = {"title": None, "labels": False, "grid": True, "gridDash": [1, 3]}
    return {"field": field, "type": "ordinal", "sort": None, "axis": axis}


def _layer(mark: str | Dict, rows: Sequence[Dict] | None = None, **encoding: Any) -> Dict:
    """Return a layer, with data of its own where it has ``rows``."""
    data = {} if rows is None else {"data": {"values": _clean(rows)}}
    return data | {"mark": mark, "encoding": encoding}


def _widest(texts: Iterable[str]) -> float:
    """Return about how many pixels the widest text takes."""
    return _LETTER * max(map(len, texts), default=0)


def _row_chart(
    field: str, rows: Sequence[Dict], layers: list[Dict], right: float, alt: str
) -> Markup:
    """Draw ``layers`` beside the names of rows; names of methods belong to their marks."""
    names = list(dict.fromkeys(row[field] for row in rows))
    # Long ones are cut in the middle, as their ends differ.
    short = [name if len(name) < 20 else f"{name[:4]}…{name[-14:]}" for name in names]
    more = {"title": ""} if field == "name" else {}
    labels = [{field: name, "short": word} | more for name, word in zip(names, short, strict=True)]
    text = {"type": "text", "align": "right", "x": -5}
    words = _layer(text, labels, **_SERIES, y=_names(field), text={"field": "short"})
    padding = (12 + _widest(short), 8, right, 24)
    return _draw(rows, [*layers, words], padding, _ROW * len(names), alt)


def _clean(rows: Iterable[Dict]) -> list[Dict]:
    """Return rows whose texts can stand in XML, with place, colour, shape and description."""
    cleaned = []
    for index, row in enumerate(rows):
        words = {k: _UNPRINTABLE.sub("�", v) for k, v in row.items() if isinstance(v, str)}
        colour, _, shape = words.get("look", "muted").partition(" ")
        if "title" in words:
            words["description"] = f"{words['name']}\t{words['title']}"
        marks = {"index": index, "colour": f"var(--{colour})", "shape": shape}
        cleaned.append(row | words | marks)
    return cleaned


def _draw(
    rows: Sequence[Dict], layers: list[Dict], padding: Sequence[float], height: float, alt: str
) -> Markup:
    """Return a chart with ``padding`` (left, top, right, bottom) around its plot as SVG."""
    import vl_convert

    spec = {
        "background": None,
        "data": {"values": _clean(rows)},
        "width": _WIDTH - padding[0] - padding[2],
        "height": height,
        "padding": dict(zip(("left", "top", "right", "bottom"), padding, strict=True)),
        "autosize": "none",
        "layer": layers,
        "config": _CONFIG,
    }
    svg = vl_convert.vegalite_to_svg(spec)
    root = ElementTree.fromstring(re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2))
    _group(root)
    root.attrib = {"class": "chart", "viewBox": root.get("viewBox", ""), "role": "img"}
    root.set("aria-label", alt)
    # All texts pass through the writer of XML, which escapes them.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _group(root: ElementTree.Element) -> None:
    """Put a method's marks into one group, for filters and the pointer; drop needless parts."""
    parents = {child: parent for parent in root.iter() for child in parent}
    plot = root.find(".//g[@class='mark-group role-frame root']/g/g")
    assert plot is not None
    series: dict[str, ElementTree.Element] = {}
    for element in list(root.iter()):
        method, mark, title = element.get("aria-label", "").partition("\t")
        if mark:
            new = ElementTree.Element("g", {"class": "series", "data-method": method})
            series.setdefault(method, new).append(element)
            if element.get("aria-roledescription") in ("point", "bar"):
                ElementTree.SubElement(element, "title").text = title
        if mark or element.get("class") in ("background", "foreground"):
            parents[element].remove(element)
        for name, value in list(element.attrib.items()):
            if name in ("class", "role", "pointer-events") or name.startswith("aria-"):
                del element.attrib[name]
            elif name in ("transform", "d", "x2", "y2"):
                rounded = re.sub(r"\d+\.\d\d+", lambda found: px(float(found[0])), value)
                element.set(name, rounded)
    plot.extend(series.values())
