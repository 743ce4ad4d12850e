"""Figures: charts with their data in words and numbers, one per subject and bits."""

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.report import charts
from benchmarks.report.groups import Column, Group, columns_of, find
from benchmarks.report.tables import best_of
from benchmarks.results.scores import FULL, is_percent, unique
from benchmarks.units import duration, size_text
from fimaq_core.recipe import OFF

#: What the template shows of a chart, and what makes it of the groups of a column.
Figure = dict[str, Any]
Make = Callable[[Column, dict[str, Group]], Figure | None]

#: Stage of records that have no memory by stage: the peak of all of it.
_WHOLE = "whole cell (memory)"
#: Stages in the order in which they run, as far as they are known; each keeps its colour in all charts.
_STAGES = ("load", "reconstruct MLPs", "calibrate", "reconstruct", "evaluate", _WHOLE)


def figures(prefix: str, groups: Sequence[Group], make: Make, columns: Sequence[Column] | None = None) -> list[Figure]:
    """Return the figures of all columns for which ``make`` finds something to show; ids begin with ``prefix``."""
    found: list[Figure] = []
    for column in columns_of([group.cell for group in groups]) if columns is None else columns:
        figure = make(column, find(groups, column))
        if figure is not None:
            found.append({"id": f"{prefix}{len(found)}", "column": column, "methods": [], **figure})
    return found


def bits_figures(prefix: str, groups: Sequence[Group], metric: str, looks: Mapping[str, str]) -> list[Figure]:
    """Return scores from many bits to few, one figure per subject."""

    def make(column: Column, found: dict[str, Group]) -> Figure | None:
        mine = [group for group in groups if group.cell.subject == column.subject and group.cell.bits != FULL]
        places = unique(group.cell.bits for group in sorted(mine, key=_width, reverse=True))
        rows = [_score_row(group, metric, looks, group.cell.bits) for group in mine if metric in group.scores]
        if not rows:
            return None
        texts = {(row["name"], row["place"]): f"{row['value']:.2f} ± {row['error']:.2f}" for row in rows}
        names = unique(row["name"] for row in rows)
        alt = f"{metric} of {column.subject} at {', '.join(places)}, a line each for {', '.join(names)}; numbers under Data."
        return {
            "chart": charts.line_chart(places, rows, _level(found, metric), alt),
            "head": ["method", *places],
            "rows": [[name, *(texts.get((name, place), "–") for place in places)] for name in names],
            "methods": names,
        }

    quantized = {group.cell.subject: group.cell for group in groups if group.cell.method != "fp"}
    return figures(prefix, groups, make, [Column(cell.subject, cell.model, FULL) for cell in quantized.values()])


def dot_figures(prefix: str, groups: Sequence[Group], metric: str, looks: Mapping[str, str]) -> list[Figure]:
    """Return methods from the best to the worst, with error bars."""

    def make(column: Column, found: dict[str, Group]) -> Figure | None:
        scores = {name: group.scores[metric] for name, group in _quantized(found).items() if metric in group.scores}
        if not scores:
            return None
        best = best_of(scores, metric)
        order = sorted(scores, key=lambda name: scores[name].mean, reverse=is_percent(metric))
        rows = [
            _score_row(found[name], metric, looks)
            | {"text": scores[name].text, "seeds": scores[name].seeds > 1, "best": name in best}
            for name in order
        ]
        ends = f"{order[0]} first with {rows[0]['text']}, {order[-1]} last with {rows[-1]['text']}"
        alt = f"{metric} of {column.subject} at {column.bits}: {ends}; all numbers under Data."
        return {
            "chart": charts.dot_chart(rows, _level(found, metric), alt),
            "head": ["method", metric, "error bar", "seeds"],
            "rows": [[name, f"{s.mean:.2f}", s.error_text, str(s.seeds)] for name in order for s in (scores[name],)],
            "methods": order,
        }

    return figures(prefix, groups, make)


def cost_figures(prefix: str, groups: Sequence[Group], metric: str, looks: Mapping[str, str]) -> list[Figure]:
    """Return scores against seconds, with the Pareto front."""

    def make(column: Column, found: dict[str, Group]) -> Figure | None:
        rows = [
            _score_row(group, metric, looks) | {"cost": group.seconds}
            for group in _quantized(found).values()
            if metric in group.scores and group.seconds > 0
        ]
        if not rows:
            return None
        for row in rows:
            row["title"] += f", {duration(row['cost'])}"
        rows.sort(key=lambda row: row["cost"])
        front = pareto(rows, is_percent(metric))
        alt = f"{metric} of {column.subject} at {column.bits} against seconds; on the Pareto front: {', '.join(front)}."
        level = _level(found, metric)
        return {
            "chart": charts.scatter_chart(rows, front, level, "seconds per cell (logarithmic)", alt),
            "head": ["method", metric, "time", "on the front"],
            "rows": [
                [row["name"], f"{row['value']:.2f}", duration(row["cost"]), "yes" if row["name"] in front else "no"]
                for row in rows
            ],
            "methods": [row["name"] for row in rows],
        }

    return figures(prefix, groups, make)


def pareto(rows: Sequence[Mapping[str, Any]], higher: bool = True) -> list[str]:
    """Return the names of the rows that no other beats, dearest last.

    A row is beaten by one with no more ``cost`` and a better ``value``, or with less cost and no worse value.
    """
    sign = 1.0 if higher else -1.0
    front: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["cost"], -sign * row["value"])):
        better = not front or sign * row["value"] > sign * front[-1]["value"]
        if better or (row["cost"], row["value"]) == (front[-1]["cost"], front[-1]["value"]):
            front.append(row)
    return [row["name"] for row in front]


def block_figures(prefix: str, groups: Sequence[Group], looks: Mapping[str, str], what: str) -> list[Figure]:
    """Return ``what`` of each block, mean over seeds, one line per method: ``error`` of its output, or ``fisher`` weight."""
    words = {"error": "Relative squared error of block outputs", "fisher": "Mean diagonal Fisher weight of blocks"}[what]

    def make(column: Column, found: dict[str, Group]) -> Figure | None:
        series = {name: values for name, group in found.items() if (values := _block_means(group, what))}
        if not series:
            return None
        labels = unique(label for values in series.values() for label in values)
        short = short_names(labels)
        rows = [
            {"name": name, "block": short[label], "value": values[label], "look": looks[name]}
            | {"title": f"{name}, {label}: {values[label]:.4g}"}
            for name, values in series.items()
            for label in labels
            if label in values
        ]
        alt = f"{words} of {column.subject} at {column.bits}, {len(labels)} blocks from input to output, for {', '.join(series)}."
        return {
            "chart": charts.block_chart(rows, alt),
            "head": ["block", *series],
            "rows": [
                [label, *(f"{values[label]:.4g}" if label in values else "–" for values in series.values())] for label in labels
            ],
        }

    return figures(prefix, groups, make)


def _block_means(group: Group, what: str) -> dict[str, float]:
    """Return means over seeds by block, of the blocks that have ``what`` in every seed."""
    found: dict[str, list[float]] = {}
    for item in group.items:
        for label, block in item.record.blocks.items():
            if getattr(block, what) is not None:
                found.setdefault(label, []).append(getattr(block, what))
    return {label: fmean(values) for label, values in found.items() if len(values) == len(group.items)}


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """Return block labels without the words that all begin with, of several labels; each keeps its last word."""
    parts = [label.split(".") for label in labels]
    common = 0
    while len(labels) > 1 and all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    return {label: ".".join(part[common:]) for label, part in zip(labels, parts, strict=True)}


def kind_of(stage: str) -> str:
    """Return the kind of a stage: ``reconstruct vision`` and ``reconstruct text (reused)`` are both ``reconstruct``."""
    plain = stage.removesuffix(" (reused)")
    found = re.match(r"reconstruct MLPs|(load|calibrate|reconstruct|evaluate)\b", plain)
    return found[0] if found else plain


def stage_colours(groups: Sequence[Group]) -> dict[str, str]:
    """Return a colour for each kind of stage that some record has, the known ones always the same."""
    stages = [_stages(group, memory) for group in groups for memory in (False, True)]
    kinds = unique(kind_of(stage) for found in stages for stage in found)
    order = unique([*_STAGES, *kinds])
    return {kind: f"c{index % charts.COLOURS}" for index, kind in enumerate(order) if kind in kinds}


def stage_figures(prefix: str, groups: Sequence[Group], colours: Mapping[str, str], memory: bool = False) -> list[Figure]:
    """Return seconds of each method's stages, mean over seeds, with their sum; or peak memory of the largest stage."""
    what, text, total = ("Peak memory", size_text, max) if memory else ("Seconds", duration, sum)

    def make(column: Column, found: dict[str, Group]) -> Figure | None:
        stages = {name: values for name, group in found.items() if (values := _stages(group, memory))}
        if not stages:
            return None
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for name, values in stages.items():
            for stage, value in values.items():
                kind = kind_of(stage)
                row = rows.setdefault((name, kind), {"name": name, "kind": kind, "value": 0.0, "look": colours[kind]})
                row["value"] = total([row["value"], value])
        if memory:  # the longest alone, as peaks do not add up
            longest = {row["name"]: row for row in sorted(rows.values(), key=lambda row: row["value"])}
            rows = {(name, ""): longest[name] for name in stages}
        for row in rows.values():
            row["title"] = f"{row['name']}, {row['kind']}: {text(row['value'])}"
            row["value"] *= 1e-9 if memory else 1.0  # in GB, so that the axis has round numbers
        totals = {name: total(values.values()) for name, values in stages.items()}
        top = max(totals, key=lambda name: totals[name])
        alt = f"{what} by stage of {column.subject} at {column.bits}; most has {top} with {text(totals[top])}."
        heads = unique(stage for values in stages.values() for stage in values)
        return {
            "chart": charts.bar_chart(list(rows.values()), lambda value: text(1e9 * value if memory else value), alt),
            "head": ["method", *heads, "most" if memory else "all"],
            "rows": [
                [name, *(text(values[head]) if head in values else "–" for head in heads), text(totals[name])]
                for name, values in stages.items()
            ],
            "methods": list(stages),
        }

    return figures(prefix, groups, make)


def _stages(group: Group, memory: bool) -> dict[str, float]:
    """Return seconds or bytes by stage, mean over the seeds that have it."""
    found: dict[str, list[float]] = {}
    for record in (item.record for item in group.items):
        peaks: Mapping[str, float] = record.stage_memory_bytes or {_WHOLE: record.peak_memory_bytes}
        for stage, value in (peaks if memory else record.seconds).items():
            found.setdefault(stage, []).append(value)
    return {stage: fmean(values) for stage, values in found.items()}


def _score_row(group: Group, metric: str, looks: Mapping[str, str], place: str = "") -> dict[str, Any]:
    score, name = group.scores[metric], group.method
    title = f"{name}{place and f', {place}'}: {score.mean:.2f} {score.error_text}"
    row = {"name": name, "place": place, "value": score.mean, "error": score.error, "look": looks[name], "title": title}
    return row


def _quantized(found: Mapping[str, Group]) -> dict[str, Group]:
    return {name: group for name, group in found.items() if group.cell.bits != FULL}


def _level(found: Mapping[str, Group], metric: str) -> float | None:
    """Return full precision's score; None where it is not measured, or where less is better and it is no ceiling."""
    score = found["fp"].scores.get(metric) if "fp" in found and is_percent(metric) else None
    return None if score is None else score.mean


def _width(group: Group) -> tuple[int, int]:
    cell = group.cell
    return cell.w_bit + cell.a_bit, cell.w_bit if cell.w_bit != OFF else 0
