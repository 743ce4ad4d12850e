"""Figures: charts with their data in words and numbers, one per subject and bits."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from markupsafe import Markup

from benchmarks.console import duration, size_text
from benchmarks.grid.cell import Cell
from benchmarks.report import charts
from benchmarks.report.groups import Group, find
from benchmarks.report.tables import best_of
from benchmarks.results.scores import FULL, Column, columns_of, is_percent, unique
from fimaq_core.recipe import OFF

#: Stage of records that have no memory by stage: the peak of all of it.
_WHOLE = "whole cell (memory)"
#: Known stages in the order in which they run; each keeps its colour in all charts.
_STAGES = ("load", "reconstruct MLPs", "calibrate", "reconstruct", "evaluate", _WHOLE)
Looks = Mapping[str, str]
Row = dict[str, Any]


class Figure(NamedTuple):
    """A chart and its data; the first cell of a row is its name."""

    column: Column
    chart: Markup
    head: list[str]
    rows: list[list[str]]


def bits_figures(groups: Sequence[Group], metric: str, looks: Looks) -> Iterator[Figure]:
    """Yield scores from many bits to few, one figure per subject."""
    quantized = {group.cell.subject: group.cell for group in groups if group.cell.method != "fp"}
    for subject, cell in quantized.items():
        column = Column(subject, cell.model, FULL)
        mine = [group for group in groups if group.cell.subject == subject]
        cells = sorted((group.cell for group in mine if group.cell.bits != FULL), key=_narrow)
        places, rows = unique(cell.bits for cell in cells), _rows(mine, metric, looks)
        if not rows:
            continue
        names = unique(row["name"] for row in rows)
        texts = {(r["name"], r["bits"]): f"{r['value']:.2f} ± {r['error']:.2f}" for r in rows}
        alt = f"{metric} of {subject} at {', '.join(places)}, a line each for {', '.join(names)}"
        chart = charts.line_chart(places, rows, _level(find(groups, column), metric), alt)
        yield Figure(column, chart, ["method", *places], _table(names, places, texts))


def dot_figures(groups: Sequence[Group], metric: str, looks: Looks) -> Iterator[Figure]:
    """Yield methods from the best to the worst, with error bars."""
    for column, found, where in _columns(groups):
        rows = _rows(found.values(), metric, looks)
        if not rows:
            continue
        rows.sort(key=lambda row: row["value"], reverse=is_percent(metric))
        best = best_of({row["name"]: row["value"] for row in rows}, metric)
        rows = [row | {"best": row["name"] in best} for row in rows]
        first, last = (f"{row['name']} with {row['text']}" for row in (rows[0], rows[-1]))
        alt = f"{metric} of {where}, from {first} to {last}"
        table = [
            [row["name"], f"{row['value']:.2f}", row["error_text"], str(row["seeds"])]
            for row in rows
        ]
        chart = charts.dot_chart(rows, _level(found, metric), alt)
        yield Figure(column, chart, ["method", metric, "error bar", "seeds"], table)


def cost_figures(groups: Sequence[Group], metric: str, looks: Looks) -> Iterator[Figure]:
    """Yield scores against seconds, with the Pareto front."""
    for column, found, where in _columns(groups):
        rows = [row for row in _rows(found.values(), metric, looks) if row["cost"] > 0]
        if not rows:
            continue
        rows.sort(key=lambda row: row["cost"])
        front = pareto(rows, is_percent(metric))
        times = [duration(row["cost"]) for row in rows]
        rows = [
            row | {"best": row["name"] in front, "title": f"{row['title']}, {time}"}
            for row, time in zip(rows, times, strict=True)
        ]
        table = [
            [row["name"], f"{row['value']:.2f}", time, "yes" if row["best"] else "no"]
            for row, time in zip(rows, times, strict=True)
        ]
        alt = f"{metric} of {where} against seconds; on the Pareto front: {', '.join(front)}"
        axis = "seconds per cell (logarithmic)"
        chart = charts.scatter_chart(rows, _level(found, metric), axis, alt)
        yield Figure(column, chart, ["method", metric, "time", "on the front"], table)


def pareto(rows: Sequence[Mapping[str, Any]], higher: bool = True) -> list[str]:
    """Return the names of the rows that no other beats, dearest last.

    A row is beaten by one with no more ``cost`` and a better ``value`` (``higher``, or lower), or
    with less cost and no worse value.
    """
    sign = -1 if higher else 1
    ranked = sorted((row["cost"], sign * row["value"], row["name"]) for row in rows)
    front: list[tuple[float, float, str]] = []
    for row in ranked:
        if not front or row[1] < front[-1][1] or row[:2] == front[-1][:2]:
            front.append(row)
    return [name for _, _, name in front]


def block_figures(groups: Sequence[Group], looks: Looks, what: str) -> Iterator[Figure]:
    """Yield ``error`` of the blocks' outputs, or their ``fisher`` weight, one line per method."""
    words = {
        "error": "Relative squared error of blocks",
        "fisher": "Mean diagonal Fisher weight of blocks",
    }[what]
    for column, found, where in _columns(groups):
        every = {name: _block_means(group, what) for name, group in found.items()}
        series = {name: means for name, means in every.items() if means}
        if not series:
            continue
        labels = unique(label for means in series.values() for label in means)
        texts = {(label, name): f"{v:.4g}" for name in series for label, v in series[name].items()}
        rows = [
            {"name": name, "block": label, "value": series[name][label], "look": looks[name]}
            | {"title": f"{name}, {label}: {texts[label, name]}"}
            for name in series
            for label in labels
            if label in series[name]
        ]
        alt = f"{words} of {where}, {len(labels)} from input to output, for {', '.join(series)}"
        table = _table(labels, list(series), texts)
        yield Figure(column, charts.block_chart(rows, alt), ["block", *series], table)


def _block_means(group: Group, what: str) -> dict[str, float]:
    """Return means by block, of the blocks that have ``what`` in every seed."""
    blocks = (pair for item in group.items for pair in item.record.blocks.items())
    found = ((label, getattr(block, what)) for label, block in blocks)
    return _means(((label, value) for label, value in found if value is not None), len(group.items))


def kind_of(stage: str) -> str:
    """Return the kind of a stage: ``reconstruct`` of ``reconstruct text (reused)``."""
    plain = stage.removesuffix(" (reused)")
    found = re.match(r"reconstruct MLPs|(load|calibrate|reconstruct|evaluate)\b", plain)
    return found[0] if found else plain


def stage_colours(groups: Sequence[Group]) -> dict[str, str]:
    """Return a colour for each kind of stage that some record has."""
    stages = [_stages(group, memory) for group in groups for memory in (False, True)]
    kinds = {kind_of(stage): None for found in stages for stage in found}
    order = enumerate(unique([*_STAGES, *kinds]))
    return {kind: f"c{index % charts.COLOURS}" for index, kind in order if kind in kinds}


def stage_figures(
    groups: Sequence[Group], colours: Looks, memory: bool = False
) -> Iterator[Figure]:
    """Yield seconds of each method's stages and their sum, or ``memory``: peaks and the largest."""
    what, total = ("Peak memory", max) if memory else ("Seconds", sum)
    text: Callable[[float], str] = size_text if memory else duration
    unit = 1e-9 if memory else 1.0  # GB, so that the axis has round numbers
    end = "most" if memory else "all"
    for column, found, where in _columns(groups):
        every = {name: _stages(group, memory) for name, group in found.items()}
        stages = {name: means for name, means in every.items() if means}
        if not stages:
            continue
        rows: list[Row] = []
        sums: list[Row] = []
        texts: dict[tuple[str, str], str] = {}
        for name, means in stages.items():
            kinds: dict[str, float] = {}
            for stage, mean in means.items():
                kinds[kind_of(stage)] = total([kinds.get(kind_of(stage), 0.0), mean])
            if memory:  # the longest alone, as peaks do not add up
                kinds = dict(sorted(kinds.items(), key=lambda pair: -pair[1])[:1])
            rows += [
                {"name": name, "value": unit * value, "look": colours[kind]}
                | {"title": f"{name}, {kind}: {text(value)}"}
                for kind, value in kinds.items()
            ]
            whole = total(means.values())
            sums.append({"name": name, "value": unit * whole, "title": text(whole)})
            texts |= {(name, stage): text(mean) for stage, mean in (means | {end: whole}).items()}
        most = max(sums, key=lambda row: row["value"])
        alt = f"{what} by stage of {where}; most has {most['name']} with {most['title']}"
        heads = [*unique(stage for means in stages.values() for stage in means), end]
        table = _table(list(stages), heads, texts)
        yield Figure(column, charts.bar_chart(rows, sums, alt), ["method", *heads], table)


def _stages(group: Group, memory: bool) -> dict[str, float]:
    """Return seconds or bytes by stage, mean over the seeds that have it."""
    pairs: list[tuple[str, float]] = []
    for record in (item.record for item in group.items):
        peaks = record.stage_memory_bytes or {_WHOLE: record.peak_memory_bytes}
        pairs += (peaks if memory else record.seconds).items()
    return _means(pairs)


def _means(pairs: Iterable[tuple[str, float]], least: int = 1) -> dict[str, float]:
    """Return the mean of each name's values, of the names that have at least ``least``."""
    found: dict[str, list[float]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in found.items() if len(values) >= least}


def _columns(groups: Sequence[Group]) -> Iterator[tuple[Column, dict[str, Group], str]]:
    """Yield the columns of tables with their groups, and their names for texts."""
    for column in columns_of([group.cell for group in groups]):
        yield column, find(groups, column), f"{column.subject} at {column.bits}"


def _rows(groups: Iterable[Group], metric: str, looks: Looks) -> list[Row]:
    """Return what charts need of quantized groups that have ``metric``."""
    return [
        score._asdict()
        | {"name": g.method, "bits": g.cell.bits, "look": looks[g.method]}
        | {
            "cost": g.seconds,
            "title": f"{g.method}, {g.cell.bits}: {score.value:.2f} {score.error_text}",
        }
        for g in groups
        if g.cell.bits != FULL and (score := g.scores.get(metric)) is not None
    ]


def _table(
    names: Sequence[str], heads: Sequence[str], texts: Mapping[tuple[str, str], str]
) -> list[list[str]]:
    """Return rows of ``texts`` by name and head."""
    return [[name, *(texts.get((name, head), "–") for head in heads)] for name in names]


def _narrow(cell: Cell) -> tuple[int, int]:
    """Return what sorts from many bits to few."""
    return -cell.w_bit - cell.a_bit, -(cell.w_bit % OFF)


def _level(found: Mapping[str, Group], metric: str) -> float | None:
    """Return full precision's score; None if there is none, or if it is no ceiling (ranks)."""
    score = found["fp"].scores.get(metric) if "fp" in found and is_percent(metric) else None
    return None if score is None else score.value
