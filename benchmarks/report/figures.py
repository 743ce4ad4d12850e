"""Figures: charts with their data in words and numbers, one per subject and bits."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from markupsafe import Markup

from benchmarks.report import charts
from benchmarks.report.groups import Group, find
from benchmarks.report.tables import best_of
from benchmarks.results.scores import FULL, Column, columns_of, is_percent, unique
from benchmarks.units import duration, size_text
from fimaq_core.recipe import OFF

#: Stage of records that have no memory by stage: the peak of all of it.
_WHOLE = "whole cell (memory)"
#: Known stages in the order in which they run; each keeps its colour in all charts.
_STAGES = ("load", "reconstruct MLPs", "calibrate", "reconstruct", "evaluate", _WHOLE)
_YES = {True: "yes", False: "no"}
Looks = Mapping[str, str]


class Figure(NamedTuple):
    """A chart and its data; the first cell of a row is its name."""

    column: Column
    chart: Markup
    head: list[str]
    rows: list[list[str]]


def bits_figures(groups: Sequence[Group], metric: str, looks: Looks) -> Iterator[Figure]:
    """Yield scores from many bits to few, one figure per subject."""
    quantized = {group.cell.subject: group.cell for group in groups if group.cell.method != "fp"}
    for column in (Column(cell.subject, cell.model, FULL) for cell in quantized.values()):
        mine = [g for g in groups if g.cell.subject == column.subject and g.cell.bits != FULL]
        places = unique(g.cell.bits for g in sorted(mine, key=_narrow))
        rows = [_row(g, metric, looks, f", {g.cell.bits}") for g in mine if metric in g.scores]
        names = unique(row["name"] for row in rows)
        if not rows:
            continue
        texts = {(r["name"], r["place"]): f"{r['value']:.2f} ± {r['error']:.2f}" for r in rows}
        alt = f"{metric} of {column.subject} at {', '.join(places)}, a line each for {', '.join(names)}; numbers under Data."
        table = [[name, *(texts.get((name, place), "–") for place in places)] for name in names]
        chart = charts.line_chart(places, rows, _level(find(groups, column), metric), alt)
        yield Figure(column, chart, ["method", *places], table)


def dot_figures(groups: Sequence[Group], metric: str, looks: Looks) -> Iterator[Figure]:
    """Yield methods from the best to the worst, with error bars."""
    for column, found in _columns(groups):
        scores = {name: group.scores[metric] for name, group in _scored(found, metric).items()}
        if not scores:
            continue
        best = best_of(scores, metric)
        order = sorted(scores, key=lambda name: scores[name].mean, reverse=is_percent(metric))
        texts = [scores[name].text for name in order]
        rows = [
            _row(found[name], metric, looks)
            | {"text": text, "seeds": scores[name].seeds > 1, "best": name in best}
            for name, text in zip(order, texts, strict=True)
        ]
        alt = (
            f"{metric} of {column.subject} at {column.bits}: {order[0]} first with {texts[0]}, "
            f"{order[-1]} last with {texts[-1]}; all numbers under Data."
        )
        table = [
            [name, f"{score.mean:.2f}", score.error_text, str(score.seeds)]
            for name, score in ((name, scores[name]) for name in order)
        ]
        chart = charts.dot_chart(rows, _level(found, metric), alt)
        yield Figure(column, chart, ["method", metric, "error bar", "seeds"], table)


def cost_figures(groups: Sequence[Group], metric: str, looks: Looks) -> Iterator[Figure]:
    """Yield scores against seconds, with the Pareto front."""
    for column, found in _columns(groups):
        rows = [
            _row(group, metric, looks, time=f", {duration(group.seconds)}")
            | {"cost": group.seconds}
            for group in _scored(found, metric).values()
            if group.seconds > 0
        ]
        if not rows:
            continue
        rows.sort(key=lambda row: row["cost"])
        front = pareto(rows, is_percent(metric))
        rows = [row | {"best": row["name"] in front} for row in rows]
        alt = f"{metric} of {column.subject} at {column.bits} against seconds; on the Pareto front: {', '.join(front)}."
        table = [
            [row["name"], f"{row['value']:.2f}", duration(row["cost"]), _YES[row["best"]]]
            for row in rows
        ]
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
        "error": "Relative squared error of block outputs",
        "fisher": "Mean diagonal Fisher weight of blocks",
    }[what]
    for column, found in _columns(groups):
        every = {name: _block_means(group, what) for name, group in found.items()}
        series = {name: means for name, means in every.items() if means}
        if not series:
            continue
        labels = unique(label for means in series.values() for label in means)
        rows = [
            {"name": name, "block": label, "value": means[label], "look": looks[name]}
            | {"title": f"{name}, {label}: {means[label]:.4g}"}
            for name, means in series.items()
            for label in labels
            if label in means
        ]
        alt = f"{words} of {column.subject} at {column.bits}, {len(labels)} blocks from input to output, for {', '.join(series)}."
        texts = {(row["name"], row["block"]): f"{row['value']:.4g}" for row in rows}
        table = [[label, *(texts.get((name, label), "–") for name in series)] for label in labels]
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
    for column, found in _columns(groups):
        every = {name: _stages(group, memory) for name, group in found.items()}
        stages = {name: means for name, means in every.items() if means}
        if not stages:
            continue
        rows = []
        for name, means in stages.items():
            kinds: dict[str, float] = {}
            for stage, mean in means.items():
                kinds[kind_of(stage)] = total([kinds.get(kind_of(stage), 0.0), mean])
            if memory:  # the longest alone, as peaks do not add up
                top = max(kinds, key=lambda kind: kinds[kind])
                kinds = {top: kinds[top]}
            rows += [
                {"name": name, "value": unit * mean, "look": colours[kind]}
                | {"title": f"{name}, {kind}: {text(mean)}"}
                for kind, mean in kinds.items()
            ]
        totals = {name: total(means.values()) for name, means in stages.items()}
        top = max(totals, key=lambda name: totals[name])
        alt = f"{what} by stage of {column.subject} at {column.bits}; most has {top} with {text(totals[top])}."
        heads = unique(stage for means in stages.values() for stage in means)
        texts = {
            (name, stage): text(mean) for name in stages for stage, mean in stages[name].items()
        }
        table = [
            [name, *(texts.get((name, head), "–") for head in heads), text(totals[name])]
            for name in stages
        ]
        chart = charts.bar_chart(rows, lambda value: text(value / unit), alt)
        yield Figure(column, chart, ["method", *heads, "most" if memory else "all"], table)


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


def _columns(groups: Sequence[Group]) -> Iterator[tuple[Column, dict[str, Group]]]:
    """Yield the columns of tables with their groups."""
    for column in columns_of([group.cell for group in groups]):
        yield column, find(groups, column)


def _scored(found: Mapping[str, Group], metric: str) -> dict[str, Group]:
    """Return the quantized groups that have ``metric``."""
    return {
        name: group
        for name, group in found.items()
        if group.cell.bits != FULL and metric in group.scores
    }


def _row(group: Group, metric: str, looks: Looks, bits: str = "", time: str = "") -> dict[str, Any]:
    """Return what charts need of a score; ``bits`` and ``time`` are more words of its title."""
    score, name = group.scores[metric], group.method
    title = f"{name}{bits}: {score.mean:.2f} {score.error_text}{time}"
    values = {"value": score.mean, "error": score.error, "place": group.cell.bits}
    return {"name": name, "look": looks[name], "title": title} | values


def _narrow(group: Group) -> tuple[int, int]:
    """Return what sorts from many bits to few."""
    return -group.cell.w_bit - group.cell.a_bit, -(group.cell.w_bit % OFF)


def _level(found: Mapping[str, Group], metric: str) -> float | None:
    """Return full precision's score; None if there is none, or if it is no ceiling (ranks)."""
    score = found["fp"].scores.get(metric) if "fp" in found and is_percent(metric) else None
    return None if score is None else score.mean
