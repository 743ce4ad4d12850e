"""Charts: Vega-Lite specifications as dicts, drawn as SVG with the colours of the page's style sheet.

Rows are dicts. In all charts ``name`` is the method, ``value`` what is drawn, ``error`` half the error bar, ``look`` the colour
and marker, and ``title`` what the pointer shows.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

#: Colours of the style sheet, and markers: a method has one of each, and after all colours comes the next marker.
COLOURS = 8
SHAPES = ("circle", "diamond", "square", "triangle-up")

Dict = dict[str, Any]
#: Pixels: width of a chart, heights of a row and of a plot of scores, width of a letter and of the longest name shown.
_WIDTH, _ROW, _HEIGHT, _LETTER, _NAME = 360, 19, 250, 7.0, 130
_CONFIG: Dict = {
    "view": {"stroke": None},
    "axis": {
        "titleColor": "var(--muted)", "titleFontWeight": "normal", "domain": False, "ticks": False,
        "labelColor": "var(--muted)", "labelFontSize": 11, "labelPadding": 5, "gridColor": "var(--grid)",
    },
    "text": {"align": "left", "baseline": "middle", "fontSize": 11},
    "point": {"opacity": 1, "filled": True, "size": 50, "stroke": "var(--card)", "strokeWidth": 0.8},
    "line": {"strokeWidth": 1.6},
}  # fmt: skip
#: Encodings of all marks of a method, from what :func:`_clean` adds to rows. With a shape, lines have points.
_SERIES: Dict = {
    "description": {"field": "description"},
    "color": {"field": "colour", "scale": None},
    "shape": {"field": "shape", "scale": None},
    "detail": {"field": "name"},
}
_LEVEL = {"type": "rule", "color": "var(--muted)", "strokeDash": [5, 4]}
_ERROR = {"type": "errorbar", "ticks": {"size": 6, "aria": True}}
_BOLD = {"expr": "datum.best ? 'bold' : 'normal'"}
#: Names are cut in the middle: their ends differ.
_CUT = "length(datum.label) > 19 ? slice(datum.label, 0, 4) + '…' + slice(datum.label, -14) : datum.label"
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def looks(methods: Sequence[str]) -> dict[str, str]:
    """Return the colour and marker of each method by its place, so that they are the same in all charts."""
    return {name: f"c{i % COLOURS} {SHAPES[i // COLOURS % len(SHAPES)]}" for i, name in enumerate(methods)}


def px(value: float) -> str:
    """Return a coordinate: a tenth of a pixel is enough."""
    return f"{round(value, 1):g}"


def bar_chart(rows: Sequence[Dict], text: Callable[[float], str], alt: str) -> Markup:
    """Draw one stacked bar per name, of values that are not negative, with their sum as ``text`` has it."""
    totals: dict[str, float] = {}
    for row in rows:
        totals[row["name"]] = totals.get(row["name"], 0.0) + row["value"]
    sums = [{"name": name, "value": value, "title": text(value)} for name, value in totals.items()]
    x, y = _axis("value", {"nice": False}, tickCount=4), _names("name")
    bars = _layer({"type": "bar", "size": 13}, **_SERIES, x=x | {"stack": "zero"}, y=y, order={"field": "index"})
    words = _layer({"type": "text", "dx": 5}, sums, **_SERIES, x=x, y=y, text={"field": "title"})
    return _row_chart("name", rows, [bars, words], _widest(row["title"] for row in sums) + 8, alt)


def dot_chart(rows: Sequence[Dict], level: float | None, alt: str) -> Markup:
    """Draw one dot per row with its error bar and ``text``.

    Args:
        rows: ``seeds`` says whether the error is the spread over seeds (else its bar is dotted), ``best`` makes its text bold.
        level: score of full precision, a dashed line; None for none.
        alt: the chart in words.
    """
    right = _widest(row["text"] for row in rows) + 12
    x, y = _axis("value", {"domain": _domain(_ends(rows, level), 0.04)}, tickCount=4), _names("name")
    dash = {"condition": {"test": "datum.seeds", "value": [1, 0]}, "value": [2, 1.5]}
    edge = {"type": "text", "align": "right", "x": {"expr": f"width + {right - 2}"}, "fontWeight": _BOLD}
    layers = [
        *([] if level is None else [_layer(_LEVEL, [{"value": level}], x=x)]),
        _layer(_ERROR, **_SERIES, x=x, y=y, xError={"field": "error"}, strokeDash=dash),
        _layer("point", **_SERIES, x=x, y=y),
        _layer(edge, **_SERIES, y=y, text={"field": "text"}),
    ]
    return _row_chart("name", rows, layers, right, alt)


def block_chart(rows: Sequence[Dict], alt: str) -> Markup:
    """Draw one line per method down the rows' ``block``, on a logarithmic scale without values that are not positive."""
    shown = [row for row in rows if row["value"] > 0]
    x, y = _log_axis("value", [row["value"] for row in shown], 0.04, tickCount=3), _names("block")
    return _row_chart("block", shown, [_layer("line", **_SERIES, x=x, y=y, order={"field": "index"})], 14, alt)


def line_chart(places: Sequence[str], rows: Sequence[Dict], level: float | None, alt: str) -> Markup:
    """Draw one line per method over places (``place`` of a row), with its name at its end; ``level`` as in :func:`dot_chart`."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    # Methods at nearly the same place would hide each other: each stands a little beside the next.
    aside = {name: (i - (len(names) - 1) / 2) * min(0.02, 0.5 / len(names)) for i, name in enumerate(names)}
    y, rows = _bent(rows, level)
    rows = [row | {"x": places.index(row["place"]) + aside[row["name"]] * len(places)} for row in rows]
    last = list({row["name"]: row for row in sorted(rows, key=lambda row: row["x"])}.values())
    labels = [{"name": f"fp {level:.2f}", "y": _bend(level, y)}, *last] if level is not None else last
    low, high = y["scale"]["domain"]
    spots = spread([row["y"] for row in labels], 12.5 / _HEIGHT * (high - low), low, high)
    labels = [row | {"spot": spot} for row, spot in zip(labels, spots, strict=True)]
    right = min(_widest(row["name"] for row in labels), _NAME) + 14
    x = _axis("x", {"domain": [-0.3, len(places) - 0.7]}, grid=False, values=list(range(len(places))))
    x["axis"]["labelExpr"] = f"{list(places)}[datum.value]"
    spot = y | {"field": "spot"}
    name = {"type": "text", "x": {"expr": "width + 11"}, "limit": _NAME - 15}
    leader = {"type": "rule", "strokeWidth": 0.6, "opacity": 0.5}
    layers = [
        _layer("line", **_SERIES, x=x, y=y),
        _layer(leader, labels[-len(last) :], **_SERIES, x=x, x2={"value": _WIDTH - 34 - right + 8}, y=y, y2={"field": "spot"}),
        _layer(name, labels, **_SERIES, y=spot, text={"field": "name"}),
    ]
    return _score_chart(rows, level, x, y, layers, (34, 10, right, 24), alt)


def scatter_chart(rows: Sequence[Dict], front: Sequence[str], level: float | None, axis: str, alt: str) -> Markup:
    """Draw scores against ``cost`` (positive), the Pareto front as a stair, and names where there is room.

    Args:
        rows: in order of cost.
        front: names of those on the front. They are bold, and have room first.
        level: as in :func:`dot_chart`.
        axis: what the cost is.
        alt: the chart in words.
    """
    y, rows = _bent([row | {"best": row["name"] in front, "word": ""} for row in rows], level)
    x = _log_axis("cost", [row["cost"] for row in rows], 0.12, tickCount=4, title=axis)
    (low, high), (near, far) = y["scale"]["domain"], x["scale"]["domain"]
    width = _WIDTH - 46
    for row in rows:
        row["left"] = width * math.log(row["cost"] / near) / math.log(far / near)
        row["top"] = _HEIGHT * (high - row["y"]) / (high - low)
    taken = [(row["left"] - 5, row["top"] - 5, row["left"] + 5, row["top"] + 5) for row in rows]
    for row in sorted(rows, key=lambda row: not row["best"]):
        wide = 1.1 * _widest([row["name"]])  # it may be bold
        for dx, dy in ((8, 0), (-8 - wide, 0), (4, -11), (4, 11)):
            left, top = row["left"] + dx, row["top"] + dy
            box = (left, top - 6, left + wide, top + 6)
            free = not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            if free and 4 < left < width + 8 - wide and 0 < top < _HEIGHT:
                taken.append(box)
                row |= {"word": row["name"], "dx": dx, "dy": dy}
                break
    stair = [row for row in rows if row["best"]]
    stair.append(stair[-1] | {"cost": far})
    step = {"type": "line", "interpolate": "step-after", "strokeWidth": 1.2, "strokeDash": [2, 2], "color": "var(--muted)"}
    beside = {"type": "text", "dx": {"expr": "datum.dx"}, "dy": {"expr": "datum.dy"}, "fontWeight": _BOLD}
    layers = [
        _layer(step, stair, x=x, y=y),
        _layer("point", **_SERIES, x=x, y=y),
        _layer(beside, **_SERIES, x=x, y=y, text={"field": "word"}),
    ]
    return _score_chart(rows, level, x, y, layers, (34, 10, 12, 38), alt)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart: neighbours at least ``gap`` from each other, in the same order, within [low, high].

    Where there is no room for all, they stand as far apart as there is.
    """
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=lambda index: places[index])
    found = list(places)
    for index, before in zip(order, [None, *order], strict=False):
        found[index] = max(found[index], low if before is None else found[before] + gap)
    for index, after in zip(reversed(order), [None, *reversed(order)], strict=False):
        found[index] = min(found[index], high if after is None else found[after] - gap)
    return found


def stretched_ticks(low: float, high: float, bend: Callable[[float], float]) -> list[float]:
    """Return round values in [low, high] on a bent scale: in each place multiples of the finest step that can be read there."""
    gap = (bend(high) - bend(low)) / 12
    found: list[float] = []
    for step in (50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1):
        for value in (index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)):
            if all(abs(bend(value) - bend(other)) >= gap for other in [value - step, *found]):
                found.append(value)
    return sorted(found)


def _bend(value: float, y: Dict) -> float:
    """Return where a score lies on ``y``: by the square root of what is missing to the ``top``, if that has one."""
    return value if y["top"] is None else -math.sqrt(max(0.0, y["top"] - value))


def _bent(rows: Sequence[Dict], level: float | None) -> tuple[Dict, list[Dict]]:
    """Return the encoding of scores along y, and rows with their places ``y``, ``low`` and ``high`` on it.

    With a ``level`` the scale is stretched: most room is just below full precision, where methods differ least.
    """
    low, high = _domain(_ends(rows, level), 0.04 if level is None else 0.01)
    y = _axis("y", {"domain": [low, high]}) | {"top": None if level is None else high}
    if level is None:
        y["axis"]["tickCount"] = 5
    else:
        y["scale"]["domain"] = [_bend(low, y), 0.0]
        y["axis"]["values"] = [_bend(tick, y) for tick in stretched_ticks(low, high, lambda value: _bend(value, y))]
        y["axis"]["labelExpr"] = f"format({high!r} - datum.value * datum.value, '.5~g')"
    ends = (("y", 0), ("low", -1), ("high", 1))
    return y, [row | {end: _bend(row["value"] + sign * row["error"], y) for end, sign in ends} for row in rows]


def _ends(rows: Sequence[Dict], level: float | None) -> list[float]:
    """Return the ends of all error bars, and the level."""
    ends = [row["value"] + sign * row["error"] for row in rows for sign in (-1, 1)]
    return ends if level is None else [*ends, level]


def _domain(ends: Sequence[float], margin: float) -> list[float]:
    low, high = min(ends), max(ends)
    air = (high - low) * margin or max(abs(low) * 0.05, 0.5)
    return [low - air, high + air]


def _widest(texts: Iterable[str]) -> float:
    """Return about how many pixels the widest text takes."""
    return _LETTER * max(map(len, texts), default=0)


def _layer(mark: str | Dict, rows: Sequence[Dict] | None = None, **encoding: Any) -> Dict:
    """Return a layer, with data of its own where it has ``rows``."""
    data = {} if rows is None else {"data": {"values": _clean(rows)}}
    return data | {"mark": mark, "encoding": encoding}


def _axis(field: str, scale: Dict, **axis: Any) -> Dict:
    scale = {"nice": False} | ({"zero": False} if "domain" in scale else {}) | scale
    return {"field": field, "type": "quantitative", "scale": scale, "axis": {"title": None, "format": ".6~g"} | axis}


def _log_axis(field: str, values: Sequence[float], margin: float, **axis: Any) -> Dict:
    low, high = min(values, default=1.0), max(values, default=1.0)
    air = (high / low) ** margin if high > low else 1.5
    return _axis(field, {"domain": [low / air, high * air]}, **axis) | {
        "scale": {"type": "log", "domain": [low / air, high * air]}
    }


def _names(field: str) -> Dict:
    """Return the encoding of names along y, in the order of the data."""
    axis = {"title": None, "grid": True, "gridDash": [1, 3], "labelColor": "var(--text)", "labelExpr": _CUT, "labelLimit": 200}
    return {"field": field, "type": "ordinal", "sort": None, "axis": axis}


def _row_chart(field: str, rows: Sequence[Dict], layers: list[Dict], right: float, alt: str) -> Markup:
    names = {row[field] for row in rows}
    return _draw(rows, layers, (12 + min(_widest(names), _NAME), 8, right, 24), _ROW * len(names), alt)


def _score_chart(
    rows: Sequence[Dict], level: float | None, x: Dict, y: Dict, layers: list[Dict], padding: tuple[float, ...], alt: str
) -> Markup:
    """Draw ``layers`` over the level and error bars."""
    level_line = [] if level is None else [_layer(_LEVEL, [{"y": _bend(level, y)}], y=y)]
    errors = _layer(_ERROR, **_SERIES, x=x, y=y | {"field": "low"}, y2={"field": "high"})
    return _draw(rows, [*level_line, errors, *layers], padding, _HEIGHT, alt)


def _clean(rows: Iterable[Dict]) -> list[Dict]:
    """Return rows whose texts can stand in XML, with their place, colour, shape and description."""
    cleaned = []
    for index, row in enumerate(rows):
        found = {key: _UNPRINTABLE.sub("�", item) if isinstance(item, str) else item for key, item in row.items()}
        colour, _, shape = found.pop("look", "muted").partition(" ")
        found |= {"index": index, "colour": f"var(--{colour})", "shape": shape}
        cleaned.append(found | ({"description": f"{found['name']}\t{found['title']}"} if "title" in found else {}))
    return cleaned


def _draw(rows: Sequence[Dict], layers: list[Dict], padding: tuple[float, ...], height: float, alt: str) -> Markup:
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
    root.attrib = {"class": "chart", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    # All texts pass through the writer of XML, which escapes them.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _group(root: ElementTree.Element) -> None:
    """Put all marks of a method into one group, for filters and the pointer, and drop what the page does not need."""
    parents = {child: parent for parent in root.iter() for child in parent}
    plot = root.find(".//g[@class='mark-group role-frame root']/g/g")
    assert plot is not None
    series: dict[str, ElementTree.Element] = {}
    for element in list(root.iter()):
        name, tab, title = element.get("aria-label", "").partition("\t")
        if tab:
            group = series.setdefault(name, ElementTree.Element("g", {"class": "series", "data-method": name}))
            group.append(element)
            if element.get("aria-roledescription") in ("point", "bar"):
                ElementTree.SubElement(element, "title").text = title
        if tab or element.get("class") in ("background", "foreground"):
            parents[element].remove(element)
        for name, value in list(element.attrib.items()):
            if name in ("class", "role", "pointer-events") or name.startswith("aria-"):
                del element.attrib[name]
            elif name in ("transform", "d", "x2", "y2"):
                element.attrib[name] = re.sub(r"\d+\.\d\d+", lambda found: px(float(found[0])), value)
    plot.extend(series.values())
