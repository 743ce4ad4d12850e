"""Tables of methods × (subject, bits): scores, and what share of full precision's is left."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from benchmarks.cells import Cell
from benchmarks.marks import optimised, special_quantizers
from benchmarks.paired import compare
from benchmarks.report.groups import Group, Score, columns_of, find, row_name, rows_of
from benchmarks.results.scores import FULL, is_percent

#: Standard errors of a paired difference within which a method cannot be told from the best.
_ERRORS = 2.0


class Value(NamedTuple):
    """A number in a table.

    Attributes:
        text: as it is shown.
        number: what it sorts by.
        best: whether it is the best of its column.
        near: whether it cannot be told from the best.
        link: id of its provenance; empty for none.
        title: more of it in words.
        share: length of the bar beneath it, up to 100; None for no bar.
    """

    text: str
    number: float
    best: bool
    near: bool = False
    link: str = ""
    title: str = ""
    share: float | None = None


def wide_table(
    id: str, caption: str, groups: Sequence[Group], cells: Sequence[Cell], metric: str, main: bool = False
) -> dict[str, Any]:
    """Return mean ± sd of ``metric`` over seeds for all cells, measured or not.

    In the ``main`` table numbers lead to their provenance, and those that cannot be told from the best are marked.
    """
    columns = []
    for found in (find(groups, column) for column in columns_of(cells)):
        scores = {name: group.scores[metric] for name, group in found.items() if metric in group.scores}
        best = best_of({name: score for name, score in scores.items() if found[name].cell.bits != FULL}, metric)
        columns.append({
            name: Value(
                score.text, score.mean, name in best, main and _near(name, best, found),
                found[name].id if main else "", score.error_text,
            )
            for name, score in scores.items()
        })  # fmt: skip
    return _table(id, caption, cells, columns)


def recovery_table(id: str, groups: Sequence[Group], cells: Sequence[Cell], metric: str) -> dict[str, Any] | None:
    """Return the share of full precision's score, from unrounded scores; None for metrics that are no percentages."""
    if not is_percent(metric):
        return None
    columns = []
    for found in (find(groups, column) for column in columns_of(cells)):
        shares = {name: share for name, group in found.items() if (share := recovery(group, found.get("fp"), metric)) is not None}
        judged = [share for name, share in shares.items() if found[name].cell.bits != FULL]
        best = f"{max(judged):.2f}" if len(judged) > 1 else ""
        columns.append({
            name: Value(text, share, text == best and found[name].cell.bits != FULL, share=min(100.0, max(0.0, share)))
            for name, share in shares.items()
            for text in (f"{share:.2f}",)
        })  # fmt: skip
    table = _table(id, f"Percent of full precision's {metric}", cells, columns)
    return table | {"rows": [row for row in table["rows"] if row["method"] != "fp"]}


def _table(id: str, caption: str, cells: Sequence[Cell], filled: Sequence[Mapping[str, Value]]) -> dict[str, Any]:
    """Return what the template shows; ``filled`` has each column's values by row."""
    recipes = {row_name(cell): cell.request.recipe for cell in cells}
    columns = columns_of(cells)
    return {
        "id": id,
        "caption": caption,
        "columns": columns,
        "heads": [(subject, len(list(same))) for subject, same in groupby(column.subject for column in columns)],
        "rows": [
            {
                "method": name,
                "cells": [values.get(name) for values in filled],
                "marks": (special_quantizers(recipes[name]), optimised(recipes[name])),
            }
            for name in rows_of(cells)
        ],
    }


def best_of(scores: Mapping[str, Score], metric: str) -> list[str]:
    """Return the names of the best, the first and all that two decimals do not tell from it; none of fewer than two."""
    if len(scores) < 2:
        return []
    best = (max if is_percent(metric) else min)(scores, key=lambda name: scores[name].mean)
    same = [name for name, score in scores.items() if f"{score.mean:.2f}" == f"{scores[best].mean:.2f}"]
    return [best, *(name for name in same if name != best)]


def _near(name: str, best: Sequence[str], found: Mapping[str, Group]) -> bool:
    """Return whether a difference is within two paired standard errors over the same samples; no where that is not known."""
    if not best or name in best or found[name].cell.bits == FULL:
        return False
    difference = compare(found[best[0]].items, found[name].items)
    return difference is not None and abs(difference.difference) <= _ERRORS * difference.se


def recovery(group: Group, full: Group | None, metric: str) -> float | None:
    """Return percent of full precision's score, mean over seeds; None for full precision itself, or without its score."""
    if group.cell.method == "fp":
        return None
    shares = []
    for record in (item.record for item in group.items):
        base = record.fp_metrics.get(metric) or (full.items[0].record.metrics.get(metric) if full is not None else None)
        if metric in record.metrics and base is not None and base.value > 0:
            shares.append(100 * record.metrics[metric].value / base.value)
    return sum(shares) / len(shares) if shares else None
