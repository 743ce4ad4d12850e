"""Tables of methods × (subject, bits): scores, and what share of full precision's is left."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from benchmarks.grid.cell import Cell
from benchmarks.report.groups import Group, find, row_name, rows_of
from benchmarks.results.outcomes import compare
from benchmarks.results.scores import FULL, columns_of, is_percent, metric_title
from benchmarks.tables.settings import optimised, special_quantizers

#: Standard errors of a paired difference within which a method cannot be told from the best.
_ERRORS = 2.0


class Value(NamedTuple):
    """A number in a table."""

    text: str
    number: float  # what it sorts by
    best: bool
    near: bool = False  # cannot be told from the best
    link: str = ""  # id of its provenance
    title: str = ""  # more of it in words
    share: float | None = None  # length of the bar beneath it, up to 100


def wide_table(
    groups: Sequence[Group], cells: Sequence[Cell], metric: str, main: bool = False
) -> dict[str, Any]:
    """Return mean ± sd of ``metric`` over seeds for all cells, measured or not.

    In the ``main`` table numbers lead to their provenance, and those that cannot be told from the
    best are marked.
    """

    def column(found: Mapping[str, Group]) -> dict[str, Value]:
        scores = {name: g.scores[metric] for name, g in found.items() if metric in g.scores}
        judged = {name: s.value for name, s in scores.items() if found[name].cell.bits != FULL}
        best = best_of(judged, metric)
        values = {}
        for name, score in scores.items():
            near = main and _near(name, best, found)
            link = found[name].id if main else ""
            values[name] = Value(
                score.text, score.value, name in best, near, link, score.error_text
            )
        return values

    columns = [column(find(groups, place)) for place in columns_of(cells)]
    return _table(metric_title(metric), cells, columns, rows_of(cells))


def recovery_table(
    groups: Sequence[Group], cells: Sequence[Cell], metric: str
) -> dict[str, Any] | None:
    """Return the percentage of full precision's score that is left; None for ranks."""

    def column(found: Mapping[str, Group]) -> dict[str, Value]:
        every = {name: recovery(group, found.get("fp"), metric) for name, group in found.items()}
        shares = {name: share for name, share in every.items() if share is not None}
        judged = {name: shares[name] for name in shares if found[name].cell.bits != FULL}
        best = best_of(judged, metric)
        return {
            name: Value(f"{share:.2f}", share, name in best, share=min(100.0, max(0.0, share)))
            for name, share in shares.items()
        }

    columns = [column(find(groups, place)) for place in columns_of(cells)]
    rows = [name for name in rows_of(cells) if name != "fp"] if is_percent(metric) else []
    caption = f"Percent of full precision's {metric}"
    return _table(caption, cells, columns, rows) if rows else None


def _table(
    caption: str, cells: Sequence[Cell], filled: Sequence[Mapping[str, Value]], rows: Sequence[str]
) -> dict[str, Any]:
    """Return what the template shows; ``filled`` has the values of each column by row."""
    recipes = {row_name(cell): cell.request.recipe for cell in cells}
    columns = columns_of(cells)
    return {
        "caption": caption,
        "columns": columns,
        "heads": [(name, len(list(same))) for name, same in groupby(c.subject for c in columns)],
        "rows": [(name, [values.get(name) for values in filled]) for name in rows],
        "marks": {name: (special_quantizers(r), optimised(r)) for name, r in recipes.items()},
    }


def best_of(values: Mapping[str, float], metric: str) -> list[str]:
    """Return the best and all that two decimals do not tell from it; none of fewer than two."""
    if len(values) < 2:
        return []
    best = (max if is_percent(metric) else min)(values, key=lambda name: values[name])
    same = [name for name, value in values.items() if f"{value:.2f}" == f"{values[best]:.2f}"]
    return [best, *(name for name in same if name != best)]


def _near(name: str, best: Sequence[str], found: Mapping[str, Group]) -> bool:
    """Return whether a difference to the best is within two standard errors over the samples.

    No where it is not known.
    """
    if not best or name in best or found[name].cell.bits == FULL:
        return False
    difference = compare(found[best[0]].items, found[name].items)
    return difference is not None and abs(difference.difference) <= _ERRORS * difference.se


def recovery(group: Group, full: Group | None, metric: str) -> float | None:
    """Return percent of full precision's score, from unrounded scores, mean over seeds.

    None for full precision itself, or without its score.
    """
    if group.cell.method == "fp":
        return None
    shares = []
    beside = None if full is None else full.items[0].record.metrics.get(metric)
    for record in (item.record for item in group.items):
        base = record.fp_metrics.get(metric, beside)
        if metric in record.metrics and base is not None and base.value > 0:
            shares.append(100 * record.metrics[metric].value / base.value)
    return sum(shares) / len(shares) if shares else None
