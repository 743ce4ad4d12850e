"""What cells cost: seconds and memory by stage, and scores against seconds."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean

from benchmarks.cells import Cell
from benchmarks.report.charts.bars import bar_chart, legend
from benchmarks.report.charts.scatter import Spot, pareto, scatter_chart
from benchmarks.report.charts.shapes import COLOURS, Style
from benchmarks.report.groups import Group, columns_of, find
from benchmarks.report.model import DataTable, Figure
from benchmarks.results.scores import FULL, is_percent, unique
from benchmarks.units import duration, size_text

#: Of records that have no memory by stage: the peak of all of it.
_WHOLE = "whole cell (memory)"

#: Stages in the order in which they run, as far as they are known; each keeps its colour in all charts.
_STAGES = ("load", "reconstruct MLPs", "calibrate", "reconstruct", "evaluate", _WHOLE)


def kind_of(stage: str) -> str:
    """The kind of a stage: ``reconstruct vision`` and ``reconstruct text (reused)`` are both ``reconstruct``."""
    plain = stage.removesuffix(" (reused)")
    if plain.startswith("reconstruct MLPs"):
        return "reconstruct MLPs"
    found = re.match(r"(load|calibrate|reconstruct|evaluate)\b", plain)
    return found[1] if found else plain


def stage_colours(groups: Sequence[Group]) -> dict[str, int]:
    """A colour for each kind of stage that some record has, the known ones always the same."""
    records = [item.record for group in groups for item in group.items]
    kinds = unique(kind_of(stage) for record in records for stage in (*record.seconds, *record.stage_memory_bytes))
    if not all(record.stage_memory_bytes for record in records):
        kinds.append(_WHOLE)
    colours = legend([*_STAGES, *(kind for kind in kinds if kind not in _STAGES)])
    return {kind: colour % COLOURS for kind, colour in colours.items() if kind in kinds}


def time_figures(prefix: str, groups: Sequence[Group], colours: Mapping[str, int]) -> list[Figure]:
    """A chart a subject and bits: seconds of each method's stages, mean over seeds."""
    return _stage_figures(prefix, groups, colours, memory=False)


def memory_figures(prefix: str, groups: Sequence[Group], colours: Mapping[str, int]) -> list[Figure]:
    """The same of peak memory; the bar is the largest stage's, or the whole cell's where its record has no stages."""
    return _stage_figures(prefix, groups, colours, memory=True)


def _stage_figures(prefix: str, groups: Sequence[Group], colours: Mapping[str, int], memory: bool) -> list[Figure]:
    cells = [group.cell for group in groups]
    figures: list[Figure] = []
    for column in columns_of(cells):
        found = find(groups, column)
        stages = {name: _stages(group, memory) for name, group in found.items()}
        stages = {name: values for name, values in stages.items() if values}
        if not stages:
            continue
        bars: dict[str, dict[str, float]] = {}
        for name, values in stages.items():
            bar = bars.setdefault(name, {})
            for stage, value in values.items():
                kind = kind_of(stage)
                bar[kind] = max(bar.get(kind, 0.0), value) if memory else bar.get(kind, 0.0) + value
        text = size_text if memory else duration
        totals = {name: (max if memory else sum)(bar.values()) for name, bar in bars.items()}
        top = max(totals, key=lambda name: totals[name])
        what = "Peak memory" if memory else "Seconds"
        alt = f"{what} by stage of {column.subject} at {column.bits}; most has {top} with {text(totals[top])}."
        heads = unique(stage for values in stages.values() for stage in values)
        rows = [
            [name, *(text(values[head]) if head in values else "–" for head in heads), text(totals[name])]
            for name, values in stages.items()
        ]
        data = DataTable(["method", *heads, "most" if memory else "all"], rows, list(stages))
        if memory:  # in GB, so that the axis has round numbers
            chart = bar_chart(_scaled(bars, 1e-9), colours, lambda value: size_text(1e9 * value), alt, stacked=False)
        else:
            chart = bar_chart(bars, colours, duration, alt)
        title = column.subject if column.bits == FULL else f"{column.subject} {column.bits}"
        figures.append(Figure(f"{prefix}{len(figures)}", title, chart, data, column.subject, column.model, column.bits))
    return figures


def _scaled(bars: Mapping[str, Mapping[str, float]], factor: float) -> dict[str, dict[str, float]]:
    return {name: {stage: value * factor for stage, value in bar.items()} for name, bar in bars.items()}


def _stages(group: Group, memory: bool) -> dict[str, float]:
    """Mean over the seeds that have a stage, by stage."""
    found: dict[str, list[float]] = {}
    for item in group.items:
        record = item.record
        values: Mapping[str, float] = record.seconds
        if memory:
            values = record.stage_memory_bytes or {_WHOLE: record.peak_memory_bytes}
        for stage, value in values.items():
            found.setdefault(stage, []).append(value)
    return {stage: fmean(values) for stage, values in found.items()}


def cost_figures(
    prefix: str, groups: Sequence[Group], cells: Sequence[Cell], metric: str, looks: Mapping[str, Style]
) -> list[Figure]:
    """A chart a subject and bits: scores against seconds, with the Pareto front."""
    figures: list[Figure] = []
    for column in columns_of(cells):
        spots = []
        found = find(groups, column)
        for name, group in found.items():
            score = group.score(metric)
            if group.cell.bits == FULL or score is None or group.seconds <= 0:
                continue
            title = f"{name}: {score.mean:.2f} {score.error_text}, {duration(group.seconds)}"
            spots.append(Spot(name, group.seconds, score.mean, score.error, title))
        if not spots:
            continue
        front = pareto(spots, higher=is_percent(metric))
        names = [spot.name for spot in front]
        full = found["fp"].score(metric) if "fp" in found and is_percent(metric) else None
        alt = f"{metric} of {column.subject} at {column.bits} against seconds; on the Pareto front: {', '.join(names)}."
        chart = scatter_chart(spots, front, None if full is None else full.mean, looks, "seconds a cell (logarithmic)", alt)
        rows = [
            [spot.name, f"{spot.value:.2f}", duration(spot.cost), "yes" if spot.name in names else "no"]
            for spot in sorted(spots, key=lambda spot: spot.cost)
        ]
        data = DataTable(["method", metric, "time", "on the front"], rows, [row[0] for row in rows])
        title = f"{column.subject} {column.bits}"
        figures.append(Figure(f"{prefix}{len(figures)}", title, chart, data, column.subject, column.model, column.bits))
    return figures
