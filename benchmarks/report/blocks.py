"""Figures of blocks: how far a reconstructed block's output is from full precision, and how its loss weighed it."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from benchmarks.report.charts.dots import row_chart
from benchmarks.report.charts.shapes import Style
from benchmarks.report.groups import Group, columns_of, find
from benchmarks.report.model import DataTable, Figure
from benchmarks.tables import unique


def error_figures(prefix: str, groups: Sequence[Group], looks: Mapping[str, Style]) -> list[Figure]:
    """A chart a subject and bits: relative squared error of each block's output, a line a method."""
    words = "Relative squared error of block outputs"
    return _figures(prefix, groups, looks, words, lambda group: _means(group, "error"))


def fisher_figures(prefix: str, groups: Sequence[Group], looks: Mapping[str, Style]) -> list[Figure]:
    """The same of the mean diagonal Fisher weight, for methods whose loss has one."""
    return _figures(prefix, groups, looks, "Mean diagonal Fisher weight of blocks", lambda group: _means(group, "fisher"))


def without_blocks(groups: Sequence[Group]) -> int:
    """How many cells reconstructed blocks but have no figures of them: records from before these were kept."""
    records = [item for group in groups for item in group.items]
    return sum(
        1
        for item in records
        if item.record.recipe is not None and item.record.recipe.get("reconstruct") and not item.record.blocks
    )


def _means(group: Group, what: str) -> dict[str, float]:
    """Mean over seeds of a figure by block, of the blocks that have it in every seed."""
    found: dict[str, list[float]] = {}
    for item in group.items:
        for label, figures in item.record.blocks.items():
            value = getattr(figures, what)
            if value is not None:
                found.setdefault(label, []).append(value)
    return {label: fmean(values) for label, values in found.items() if len(values) == len(group.items)}


def _figures(
    prefix: str, groups: Sequence[Group], looks: Mapping[str, Style], words: str, of: Callable[[Group], dict[str, float]]
) -> list[Figure]:
    figures: list[Figure] = []
    for column in columns_of([group.cell for group in groups]):
        series = {name: values for name, group in find(groups, column).items() if (values := of(group))}
        if not series:
            continue
        subject, bits = column.subject, column.bits
        labels = unique(label for values in series.values() for label in values)
        short = short_names(labels)
        shown = {name: {short[label]: value for label, value in values.items()} for name, values in series.items()}
        titles = {short[label]: label for label in labels}
        alt = f"{words} of {subject} at {bits}, {len(labels)} blocks from input to output, for {', '.join(series)}."
        rows = [[label, *(f"{values[label]:.4g}" if label in values else "–" for values in series.values())] for label in labels]
        figures.append(Figure(
            f"{prefix}{len(figures)}", f"{subject} {bits}", row_chart(list(titles), shown, looks, titles, alt),
            DataTable(["block", *series], rows), subject, column.model, bits,
        ))  # fmt: skip
    return figures


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """Block labels without the words that all begin with: ``blocks.0`` stays, ``detector.backbone.x`` of two such is ``x``."""
    parts = [label.split(".") for label in labels]
    common = 0
    while all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    if len(labels) < 2:
        common = 0
    return {label: ".".join(part[common:]) for label, part in zip(labels, parts, strict=True)}
