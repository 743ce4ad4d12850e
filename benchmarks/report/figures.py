"""Figures: charts and the tables of their data, one figure per subject and bits."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

import pandas as pd
from markupsafe import Markup

from benchmarks.console import duration, size_text
from benchmarks.report import charts
from benchmarks.report.groups import Group, find
from benchmarks.results.scores import FULL, Column, columns_of, unique
from fimaq_core.recipe import OFF
from tasks.common.record import is_percent, own_seconds

#: Name of the only stage in memory figures of records that state no memory per stage.
_WHOLE = "whole cell (memory)"
#: Known stages in the order in which they run, for their colours.
_STAGES = ("load", "reconstruct MLPs", "calibrate", "reconstruct", "evaluate", _WHOLE)
_BLOCK_TITLES = {
    "error": "Relative squared error of blocks",
    "fisher": "Mean diagonal Fisher weight of blocks",
}
#: Style of each method (colour and marker) or of each kind of stage (colour).
Looks = Mapping[str, str]
#: Charts of one kind per section; each takes some 30 ms and 30 kB. The tables have all numbers.
MOST_CHARTS = 30
_NO_CHART = Markup(
    "<p>No chart: the page draws the first {} of a kind. The table has the numbers.</p>"
)
_SCORE_COLUMNS = [
    "subject", "name", "bits", "value", "error", "look", "title", "shown", "cost", "narrow",
]  # fmt: skip


class Figure(NamedTuple):
    """A chart, and the table of its data."""

    column: Column
    chart: Markup
    data: pd.DataFrame  #: texts, with the names of the rows as index

    @property
    def methods(self) -> list[str]:
        """Names of the drawn methods: the rows or the columns of ``data``."""
        return list(self.data.index if self.data.index.name == "method" else self.data.columns)


def bits_figures(groups: Sequence[Group], metric: str, looks: Looks) -> Iterator[Figure]:
    """Yield one figure per subject: the scores from many bits to few."""
    every = _score_rows(groups, metric, looks)
    columns = columns_of([group.cell for group in groups])
    for column in dict.fromkeys(column._replace(bits=FULL) for column in columns):
        rows = every[every["subject"] == column.subject].sort_values("narrow", kind="stable")
        if rows.empty:
            continue
        bits, names = unique(rows["bits"]), unique(rows["name"])
        places, methods = ", ".join(bits), ", ".join(names)
        alt = f"{metric} of {column.subject} at {places}, one line per method: {methods}"
        chart = charts.line_chart(rows, _level(groups, column, metric), alt)
        data = rows.pivot(index="name", columns="bits", values="shown").loc[names, bits]
        yield Figure(column, chart, _data(data, "method"))


def axis_figures(
    groups: Sequence[Group], axis: str, points: Iterable[str], metric: str, looks: Looks
) -> Iterator[Figure]:
    """Yield one figure per subject and bits: the scores at the points of an axis."""
    on = [
        (group, point, group.scores[metric])
        for group in groups
        for name, point in group.cell.axis_points
        if name == axis and metric in group.scores
    ]
    for place, column in enumerate(columns_of([group.cell for group, _, _ in on])):
        rows = pd.DataFrame(
            {"name": group.cell.method, "bits": point, "look": looks[group.cell.method]}
            | {"value": score.value, "error": score.error, "shown": score.text}
            | {"title": f"{group.cell.method}, {point}: {score.value:.2f} {score.error_text}"}
            for group, point, score in on
            if (group.cell.subject, group.cell.bits) == (column.subject, column.bits)
        )
        names, order = unique(rows["name"]), [p for p in points if p in set(rows["bits"])]
        rows = rows.sort_values("bits", key=lambda found: found.map(order.index), kind="stable")
        alt = f"{metric} of {column.subject} at {column.bits} by {axis} ({', '.join(order)}), one "
        alt += f"line per method: {', '.join(names)}"
        level = _level(groups, column, metric)
        chart = _limited(place, partial(charts.line_chart, rows, level, alt))
        data = rows.pivot(index="name", columns="bits", values="shown").loc[names, order]
        yield Figure(column, chart, _data(data, "method"))


def cost_figures(groups: Sequence[Group], metric: str, looks: Looks) -> Iterator[Figure]:
    """Yield one figure per subject and bits: scores against seconds per cell, Pareto front."""
    every = _score_rows(groups, metric, looks)
    for place, column in enumerate(columns_of([group.cell for group in groups])):
        here = every["subject"].eq(column.subject) & every["bits"].eq(column.bits)
        rows = every[here].sort_values("cost", kind="stable")
        if rows.empty:
            continue
        front = pareto(rows, higher=is_percent(metric))
        rows = rows.assign(best=rows["name"].isin(front), time=rows["cost"].map(duration))
        rows = rows.assign(title=rows["title"] + ", " + rows["time"])
        rows["on the front"] = rows["best"].map({True: "yes", False: "no"})
        where = f"{column.subject} at {column.bits}"
        alt = f"{metric} of {where} against seconds; on the Pareto front: {', '.join(front)}"
        level = _level(groups, column, metric)
        chart = _limited(place, partial(charts.scatter_chart, rows, level, alt))
        data = rows.set_index("name")[["shown", "time", "on the front"]]
        yield Figure(column, chart, _data(data.rename(columns={"shown": metric}), "method"))


def _score_rows(groups: Sequence[Group], metric: str, looks: Looks) -> pd.DataFrame:
    """Return one row per group of quantized cells that has ``metric``."""
    rows = []
    for group in groups:
        cell, score = group.cell, group.scores.get(metric)
        if score is not None and cell.bits != FULL:
            row = {"subject": cell.subject, "name": group.method, "bits": cell.bits}
            row |= {"value": score.value, "error": score.error, "look": looks[group.method]}
            row["title"] = f"{group.method}, {cell.bits}: {score.value:.2f} {score.error_text}"
            row["shown"] = f"{score.value:.2f} ± {score.error:.2f}"
            seconds = fmean(own_seconds(item.record) for item in group.items)
            row["cost"] = max(seconds, 0.001)  # positive, for the logarithmic axis
            row["narrow"] = (-cell.w_bit - cell.a_bit, -(cell.w_bit % OFF))
            rows.append(row)
    return pd.DataFrame(rows, columns=_SCORE_COLUMNS)


def _level(groups: Sequence[Group], column: Column, metric: str) -> float | None:
    """Return the score of full precision; None if it is unknown or the metric is a rank."""
    full = find(groups, column).get("fp")
    score = full.scores.get(metric) if full and is_percent(metric) else None
    return None if score is None else score.value


def pareto(rows: pd.DataFrame, *, higher: bool = True) -> list[str]:
    """Return the names of rows on the Pareto front, in the order of their ``cost``.

    A row is on the front unless another row is better in ``cost`` or ``value`` and not worse in
    the other. Lower costs are better; higher values are better if ``higher``, otherwise lower ones.
    """
    sign = -1 if higher else 1
    ranked = sorted(zip(rows["cost"], sign * rows["value"], rows["name"], strict=True))
    front: list[tuple[float, float, str]] = []
    for row in ranked:
        if not front or row[1] < front[-1][1] or row[:2] == front[-1][:2]:
            front.append(row)
    return [name for _, _, name in front]


def block_figures(groups: Sequence[Group], looks: Looks, what: str) -> Iterator[Figure]:
    """Yield figures of ``what`` by block: the outputs' ``error`` or the ``fisher`` weight."""
    for place, column in enumerate(columns_of([group.cell for group in groups])):
        found = find(groups, column)
        every = {name: _block_means(group, what) for name, group in found.items()}
        means = pd.DataFrame({name: mean for name, mean in every.items() if mean})
        if means.empty:
            continue
        texts = means.map("{:.4g}".format, na_action="ignore")
        rows = [
            {"name": name, "block": block, "value": value, "look": looks[name]}
            | {"title": f"{name}, {block}: {texts.at[block, name]}"}
            for name in means
            for block, value in means[name].dropna().items()
        ]
        alt = f"{_BLOCK_TITLES[what]} of {column.subject} at {column.bits}, for {len(means)} "
        alt += f"blocks from input to output; methods: {', '.join(means)}"
        chart = _limited(place, partial(charts.block_chart, pd.DataFrame(rows), alt))
        yield Figure(column, chart, _data(texts, "block"))


def _limited(place: int, draw: Callable[[], Markup]) -> Markup:
    """Return a chart, or a sentence behind the first :data:`MOST_CHARTS` of its kind."""
    return draw() if place < MOST_CHARTS else _NO_CHART.format(MOST_CHARTS)


def _block_means(group: Group, what: str) -> dict[str, float]:
    """Return the means over seeds by block, for blocks that have ``what`` in every seed."""
    first, *others = (
        {name: getattr(block, what) for name, block in item.record.blocks.items()}
        for item in group.items
    )
    rows = {name: [value, *(own.get(name) for own in others)] for name, value in first.items()}
    return {name: fmean(values) for name, values in rows.items() if None not in values}


def kind_of(stage: str) -> str:
    """Return the kind of a stage: ``reconstruct`` for ``reconstruct text (reused)``."""
    plain = stage.removesuffix(" (reused)")
    found = re.match(r"reconstruct MLPs|(load|calibrate|reconstruct|finish|evaluate)\b", plain)
    return found[0] if found else plain


def stage_colours(groups: Sequence[Group]) -> dict[str, str]:
    """Return the colour of each kind of stage in the records, for all charts."""
    found = [_stages(group, memory) for group in groups for memory in (False, True)]
    kinds = [kind_of(stage) for stages in found for stage in stages]
    order = enumerate(unique([*_STAGES, *kinds]))
    return {kind: f"c{index % charts.COLOURS}" for index, kind in order if kind in kinds}


def stage_figures(
    groups: Sequence[Group], colours: Looks, *, memory: bool = False
) -> Iterator[Figure]:
    """Yield figures of seconds per stage and their sum; if ``memory``, of peak memory per stage."""
    what, total, whole = ("Peak memory", "max", "largest") if memory else ("Seconds", "sum", "all")
    text: Callable[[float], str] = size_text if memory else duration
    unit = 1e-9 if memory else 1.0  # GB, so that the axis has round numbers
    for place, column in enumerate(columns_of([group.cell for group in groups])):
        found = find(groups, column)
        stages = pd.DataFrame({name: _stages(group, memory) for name, group in found.items()})
        stages = stages.dropna(axis="columns", how="all")
        if stages.empty:
            continue
        rows, sums = [], stages.agg(total)
        for name in stages:
            kinds: dict[str, list[float]] = {}
            for stage, value in stages[name].dropna().items():
                kinds.setdefault(kind_of(stage), []).append(value)
            shown = {kind: max(own) if memory else sum(own) for kind, own in kinds.items()}
            if memory:
                largest = max(shown, key=lambda kind: shown[kind])
                shown = {largest: shown[largest]}
            rows += [
                {"name": name, "value": unit * value, "look": colours[kind]}
                | {"title": f"{name}, {kind}: {text(value)}"}
                for kind, value in shown.items()
            ]
        ends = pd.DataFrame({"value": unit * sums, "title": sums.map(text)}).rename_axis("name")
        alt = f"{what} by stage of {column.subject} at {column.bits}. Largest: {sums.idxmax()} "
        alt += f"with {text(sums.max())}"
        draw = partial(charts.bar_chart, pd.DataFrame(rows), ends.reset_index(), alt)
        chart = _limited(place, draw)
        data = stages.T.assign(**{whole: sums}).map(text, na_action="ignore")
        yield Figure(column, chart, _data(data, "method"))


def _stages(group: Group, memory: bool) -> dict[str, float]:
    """Return seconds, or bytes of memory, by stage: the mean over seeds that have the stage."""
    records = [item.record for item in group.items]
    peaks = [r.stage_memory_bytes or {_WHOLE: r.peak_memory_bytes} for r in records]
    values: dict[str, list[float]] = {}
    for own in peaks if memory else [record.seconds for record in records]:
        for stage, value in own.items():
            values.setdefault(stage, []).append(value)
    return {stage: fmean(found) for stage, found in values.items()}


def _data(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return texts with ``–`` for missing values; ``name`` becomes the head of the row names."""
    return table.astype(object).fillna("–").rename_axis(name)
