"""Charts: Vega-Lite specifications as dicts, drawn as SVG in the colours of the style sheet.

Arguments of the chart functions:
    rows: columns ``name`` (of the method), ``value``, ``error`` (half the error bar), ``look``
        (colour and marker), ``title`` (shown under the pointer).
    level: score of full precision, drawn as a dashed line.
    alt: description of the chart in words.
"""

import re
import resource
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import pandas as pd
from markupsafe import Markup

from benchmarks.console import size_text
from fimaq_core.errors import FimaqError

#: Bytes of address space that the library for charts reserves.
_SPACE = 2**38
#: Number of colours in the style sheet, and markers. All colours come with one marker, then with
#: the next marker.
COLOURS = 8
SHAPES = ("circle", "diamond", "square", "triangle-up")

Dict = dict[str, Any]
#: In pixels: width of all charts, height of charts of scores, height of one row in other charts.
_WIDTH, _HEIGHT, _ROWS = 360, 250, {"step": 19}
_CONFIG: Dict = {
    "view": {"stroke": None},
    "axis": {
        "titleColor": "var(--muted)", "titleFontWeight": "normal", "gridColor": "var(--grid)",
        "labelColor": "var(--muted)", "labelFontSize": 11, "labelPadding": 5,
        "domain": False, "ticks": False, "labelOverlap": "greedy",
    },
    "text": {"align": "left", "baseline": "middle", "fontSize": 11},
    "point": {
        "opacity": 1, "filled": True, "size": 50, "stroke": "var(--card)", "strokeWidth": 0.8,
    },
    "line": {"strokeWidth": 1.6},
}  # fmt: skip
#: Encodings of a method's marks; :func:`_records` adds their fields. Because of the shape, lines
#: get points.
_SERIES: Dict = {
    "description": {"field": "description"},
    "color": {"field": "colour", "scale": None},
    "shape": {"field": "shape", "scale": None},
    "detail": {"field": "name"},
}
_LEVEL = {"type": "rule", "color": "var(--muted)", "strokeDash": [5, 4]}
_STAIR = _LEVEL | {"type": "line", "interpolate": "step-after", "strokeDash": [2, 2]}
_ERROR = {"type": "errorbar", "ticks": {"size": 6, "aria": True}}
_STRETCHED = {"type": "pow", "exponent": 2, "padding": 0}
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def looks(methods: Sequence[str]) -> dict[str, str]:
    """Return the colour and marker of each method, by its position; for all charts.

    The colours are ``--c0`` to ``--c7`` in `templates/page.css`.
    """
    shapes = [f"c{colour} {shape}" for shape in SHAPES for colour in range(COLOURS)]
    return {name: shapes[index % len(shapes)] for index, name in enumerate(methods)}


def px(value: float) -> str:
    """Return a coordinate in pixels, with at most one decimal."""
    return f"{round(value, 1):g}"


def bar_chart(rows: pd.DataFrame, sums: pd.DataFrame, alt: str) -> Markup:
    """Draw one stacked bar per name, with the title of the name's row in ``sums`` beside it."""
    x, y = _axis("value", {"zero": True, "padding": 0}, tickCount=4), _names("name")
    order, stacked = {"field": "index"}, x | {"stack": "zero"}
    layers = [
        _layer({"type": "bar", "size": 13}, x=stacked, y=y, order=order),
        _layer({"type": "text", "dx": 5}, sums, x=x, y=y, text={"field": "title"}),
    ]
    return _draw(rows, layers, alt)


def block_chart(rows: pd.DataFrame, alt: str) -> Markup:
    """Draw one line per method over the column ``block``, downwards, on a logarithmic scale."""
    x = _axis("value", {"type": "log"}, tickCount=3)
    line = _layer("line", x=x, y=_names("block"), order={"field": "index"})
    return _draw(rows[rows["value"] > 0], [line], alt)


def line_chart(rows: pd.DataFrame, level: float | None, alt: str) -> Markup:
    """Draw one line per method over the column ``bits``, in the order of the rows."""
    axis, scale = {"title": None, "labelAngle": 0, "grid": False}, {"type": "band", "padding": 0.8}
    x = {"field": "bits", "type": "ordinal", "sort": None, "axis": axis, "scale": scale}
    # The methods are drawn side by side, since equal scores would hide each other.
    return _score_chart("line", rows, level, alt, x=x, xOffset={"field": "name", "sort": None})


def scatter_chart(rows: pd.DataFrame, level: float | None, alt: str) -> Markup:
    """Draw scores against ``cost`` in seconds, with a stair through the rows that are ``best``."""
    x = _axis("cost", {"type": "log"}, tickCount=4, title="seconds per cell (logarithmic)")
    return _score_chart("point", rows, level, alt, x=x)


def _score_chart(mark: str, rows: pd.DataFrame, level: float | None, alt: str, **x: Dict) -> Markup:
    """Draw scores with error bars.

    With a level, the scale gives more room to values near full precision, where methods differ
    least.
    """
    y = _axis("value", {} if level is None else _STRETCHED, tickCount=10)
    front = rows[rows["best"]].to_dict("records") if "best" in rows else []
    full = [] if level is None else [{"value": level}]
    layers = [
        {"mark": _LEVEL, "data": {"values": full}, "encoding": {"y": y}},
        {"mark": _STAIR, "data": {"values": front}, "encoding": {**x, "y": y}},
        _layer(_ERROR, **x, y=y, yError={"field": "error"}),
        _layer(mark, **x, y=y),
    ]
    return _draw(rows, layers, alt, _HEIGHT)


def _axis(field: str, scale: Dict | None = None, **axis: Any) -> Dict:
    """Return the encoding of a column of numbers along an axis."""
    scale = {"nice": False, "zero": False, "padding": 8} | (scale or {})
    axis = {"title": None, "format": ".6~g", **axis}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": axis}


def _names(field: str) -> Dict:
    """Return the encoding of a column of names along y, in the order of the rows."""
    # Long names lose their middle, since names differ at their ends.
    cut = "length(datum.label) < 20 ? datum.label : "
    cut += "slice(datum.label, 0, 4) + '…' + slice(datum.label, -14)"
    axis = {"title": None, "labelExpr": cut, "gridDash": [1, 3], "grid": True}
    return {"field": field, "type": "ordinal", "sort": None, "axis": axis}


def _layer(mark: str | Dict, rows: pd.DataFrame | None = None, **encoding: Any) -> Dict:
    """Return a layer of methods' marks; ``rows`` replace the data of the chart."""
    data = {} if rows is None else {"data": {"values": _records(rows)}}
    return data | {"mark": mark, "encoding": _SERIES | encoding}


def _records(rows: pd.DataFrame) -> list[Dict]:
    """Return the rows with texts valid in XML; add index, colour, shape and description."""
    records = []
    for index, row in enumerate(rows.to_dict("records")):
        words = {k: _UNPRINTABLE.sub("�", v) for k, v in row.items() if isinstance(v, str)}
        colour, _, shape = words.get("look", "muted").partition(" ")
        if "title" in words:
            words["description"] = f"{words['name']}\t{words['title']}"
        marks = {"index": index, "colour": f"var(--{colour})", "shape": shape}
        records.append(row | words | marks)
    return records


def _draw(rows: pd.DataFrame, layers: list[Dict], alt: str, height: int | Dict = _ROWS) -> Markup:
    """Return a chart as SVG; the default height depends on the number of names.

    Raises FimaqError if the address space is too small, since the library would end the process.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < _SPACE:
        raise FimaqError(
            f"The charts of a report need {size_text(_SPACE)} of address space (not of memory), "
            f"and this process is limited to {size_text(limit)}: run `ulimit -v unlimited` first, "
            "or leave the report out. Tables are complete without it."
        )
    import vl_convert

    svg = vl_convert.vegalite_to_svg({
        "background": None,
        "data": {"values": _records(rows)},
        "width": _WIDTH,
        "height": height,
        "padding": {"left": 18, "top": 8, "right": 20, "bottom": 8},
        "autosize": {"type": "fit-x", "contains": "padding"},
        "layer": layers,
        "config": _CONFIG,
    })  # fmt: skip
    root = ElementTree.fromstring(re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2))
    _group(root)
    view = root.get("viewBox", "")
    root.attrib = {"class": "chart", "viewBox": view, "role": "img", "aria-label": alt}
    # The XML writer escapes all texts.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _group(root: ElementTree.Element) -> None:
    """Put the marks of each method into one group, for filters and hover; drop unused parts."""
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
