"""Scores as tables and charts: the overview, other metrics, recovery, scores against bits, methods side by side."""

import math
from collections.abc import Mapping, Sequence

from benchmarks.cells import Cell
from benchmarks.report.charts.dots import Dot, dot_chart
from benchmarks.report.charts.lines import Point, line_chart
from benchmarks.report.charts.shapes import Style
from benchmarks.report.groups import Column, Group, Score, columns_of, find, row_name, rows_of
from benchmarks.report.model import DataTable, Figure, Row, Value, Wide
from benchmarks.results.outcomes import compare
from benchmarks.results.scores import FULL, is_percent, unique
from benchmarks.tables.settings import optimised, special_quantizers
from fimaq_core.recipe import OFF

#: Standard errors of a paired difference within which a method cannot be told from the best.
_ERRORS = 2.0
_NOTHING = Value("–")


def wide_table(id: str, caption: str, groups: Sequence[Group], cells: Sequence[Cell], metric: str, main: bool) -> Wide:
    """Methods × (subject, bits): mean ± sd of ``metric`` over seeds.

    Args:
        id: of the table on the page.
        caption: its caption.
        groups: of a section.
        cells: of the section, measured or not.
        metric: to show.
        main: whether numbers lead to their provenance, and those that cannot be told from the best are marked.
    """
    columns = columns_of(cells)
    filled = [_column(find(groups, column), metric, main) for column in columns]
    about = {row_name(cell): _about(cell) for cell in cells}
    rows = [Row(name, [values.get(name, _NOTHING) for values in filled], about[name]) for name in rows_of(cells)]
    return Wide(id, caption, columns, rows)


def _about(cell: Cell) -> tuple[str, str]:
    return special_quantizers(cell.request.recipe), optimised(cell.request.recipe)


def _column(found: Mapping[str, Group], metric: str, main: bool) -> dict[str, Value]:
    scores = {name: score for name, group in found.items() if (score := group.score(metric)) is not None}
    judged = {name: score for name, score in scores.items() if found[name].cell.bits != FULL}
    best = best_of(judged, metric)
    values = {}
    for name, score in scores.items():
        near = main and best is not None and name in judged and name not in best and _near(found[name], found[next(iter(best))])
        values[name] = Value(
            text=score.text,
            number=score.mean,
            link=found[name].id if main else "",
            best=best is not None and name in best,
            near=near,
            title=score.error_text,
        )
    return values


def best_of(scores: Mapping[str, Score], metric: str) -> list[str] | None:
    """Names of the best, several where two decimals do not tell them apart; None of fewer than two."""
    if len(scores) < 2:
        return None
    pick = max if is_percent(metric) else min
    best = pick(scores, key=lambda name: scores[name].mean)
    text = f"{scores[best].mean:.2f}"
    return [best, *(name for name, score in scores.items() if name != best and f"{score.mean:.2f}" == text)]


def _near(group: Group, best: Group) -> bool:
    """Whether a difference is within two paired standard errors over the same samples; no where that is not known."""
    difference = compare(best.items, group.items)
    return difference is not None and abs(difference.difference) <= _ERRORS * difference.se


def recovery_table(id: str, caption: str, groups: Sequence[Group], cells: Sequence[Cell], metric: str) -> Wide | None:
    """What share of full precision's score is left, from unrounded scores; None for metrics that are no percentages."""
    if not is_percent(metric):
        return None
    columns = columns_of(cells)
    rows: dict[str, list[Value]] = {name: [] for name in rows_of(cells) if name != "fp"}
    for column in columns:
        found = find(groups, column)
        shares = {name: share for name, group in found.items() if (share := recovery(group, found.get("fp"), metric)) is not None}
        judged = {name: share for name, share in shares.items() if found[name].cell.bits != FULL}
        best = max(judged.values()) if len(judged) > 1 else math.nan
        for name, values in rows.items():
            share = shares.get(name)
            bold = name in judged and f"{share:.2f}" == f"{best:.2f}"
            values.append(
                _NOTHING if share is None else Value(f"{share:.2f}", share, best=bold, share=min(1.0, max(0.0, share / 100)))
            )
    about = {row_name(cell): _about(cell) for cell in cells}
    return Wide(id, caption, columns, [Row(name, values, about[name]) for name, values in rows.items()])


def recovery(group: Group, full: Group | None, metric: str) -> float | None:
    """Percent of full precision's score, mean over seeds; None for full precision itself, or without its score."""
    if group.cell.method == "fp":
        return None
    shares = []
    for item in group.items:
        base = item.record.fp_metrics.get(metric) or (full.items[0].record.metrics.get(metric) if full is not None else None)
        if metric in item.record.metrics and base is not None and base.value > 0:
            shares.append(100 * item.record.metrics[metric].value / base.value)
    return sum(shares) / len(shares) if shares else None


def bits_figures(prefix: str, groups: Sequence[Group], metric: str, looks: Mapping[str, Style]) -> list[Figure]:
    """A chart a subject: scores from many bits to few."""
    figures: list[Figure] = []
    for column in _subjects(groups):
        mine = [group for group in groups if group.cell.subject == column.subject and group.cell.bits != FULL]
        places = sorted(unique(group.cell.bits for group in mine), key=lambda name: _width(mine, name), reverse=True)
        series: dict[str, dict[str, Point]] = {}
        for group in mine:
            score = group.score(metric)
            if score is not None:
                title = f"{group.method}, {group.cell.bits}: {score.mean:.2f} {score.error_text}"
                series.setdefault(group.method, {})[group.cell.bits] = Point(score.mean, score.error, title)
        if not series:
            continue
        level = _level(groups, column, metric)
        alt = f"{metric} of {column.subject} at {', '.join(places)}, a line each for {', '.join(series)}; numbers under Data."
        rows = [
            [name, *(f"{points[p].value:.2f} ± {points[p].error:.2f}" if p in points else "–" for p in places)]
            for name, points in series.items()
        ]
        data = DataTable(["method", *places], rows, list(series))
        chart = line_chart(places, series, level, looks, alt)
        figures.append(Figure(f"{prefix}{len(figures)}", column.subject, chart, data, column.subject, column.model))
    return figures


def dot_figures(
    prefix: str, groups: Sequence[Group], cells: Sequence[Cell], metric: str, looks: Mapping[str, Style]
) -> list[Figure]:
    """A chart a subject and bits: methods from the best to the worst, with error bars."""
    figures: list[Figure] = []
    for column in columns_of(cells):
        found = {name: group for name, group in find(groups, column).items() if group.cell.bits != FULL}
        scores = {name: score for name, group in found.items() if (score := group.score(metric)) is not None}
        if not scores:
            continue
        best = best_of(scores, metric) or []
        dots = [
            Dot(
                name, score.mean, score.error, score.text if score.sd is not None else f"{score.mean:.2f}",
                f"{name}: {score.mean:.2f} {score.error_text}", score.sd is not None, name in best,
            )
            for name, score in sorted(scores.items(), key=lambda item: -item[1].mean if is_percent(metric) else item[1].mean)
        ]  # fmt: skip
        ends = f"{dots[0].name} first with {dots[0].text}, {dots[-1].name} last with {dots[-1].text}"
        alt = f"{metric} of {column.subject} at {column.bits}: {ends}; all numbers under Data."
        rows = [[dot.name, f"{dot.value:.2f}", scores[dot.name].error_text, str(scores[dot.name].seeds)] for dot in dots]
        data = DataTable(["method", metric, "error bar", "seeds"], rows, [dot.name for dot in dots])
        chart = dot_chart(dots, _level(groups, column, metric), looks, alt)
        title = f"{column.subject} {column.bits}"
        figures.append(Figure(f"{prefix}{len(figures)}", title, chart, data, column.subject, column.model, column.bits))
    return figures


def _subjects(groups: Sequence[Group]) -> list[Column]:
    quantized = [group.cell for group in groups if group.cell.method != "fp"]
    return [Column(cell.subject, cell.model, "") for cell in {cell.subject: cell for cell in quantized}.values()]


def _level(groups: Sequence[Group], column: Column, metric: str) -> float | None:
    """Full precision's score; None where it is not measured, or where less is better and it is no ceiling."""
    if not is_percent(metric):
        return None
    for group in groups:
        if group.cell.method == "fp" and group.cell.model == column.model:
            score = group.score(metric)
            return None if score is None else score.mean
    return None


def _width(groups: Sequence[Group], bits: str) -> tuple[int, int]:
    cell = next(group.cell for group in groups if group.cell.bits == bits)
    return cell.w_bit + cell.a_bit, cell.w_bit if cell.w_bit != OFF else 0
