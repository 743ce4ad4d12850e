"""Tables: scores by method, subject and bits; measured beside published numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import pandas as pd

from benchmarks.compare import diff
from benchmarks.grid.cell import Cell
from benchmarks.published.schema import head_pair
from benchmarks.report.groups import Group, find
from benchmarks.results.outcomes import CompareError, compare
from benchmarks.results.scores import (
    FULL,
    Measured,
    columns_of,
    metric_title,
    over_seeds,
    rows_of,
    scores,
    unique,
)
from benchmarks.tables.reproduction import Reproduction, bits_text
from benchmarks.tables.settings import recipe_marks
from tasks.common.record import is_percent

#: A method counts as equal to the best within this number of standard errors of their difference.
_ERRORS = 2.0
_DIFF_HEAD = (
    "model", "method", "bits", "metric", "measured", "published", "difference", "verdict",
    "source", "reason",
)  # fmt: skip
Dict = dict[str, Any]


def score_table(
    groups: Sequence[Group], cells: Sequence[Cell], metric: str, *, main: bool = False
) -> Dict:
    """Return the table of ``metric``, mean ± sd over seeds, with gaps for unmeasured cells.

    In the ``main`` table each number links to its provenance, and numbers within two standard
    errors of the best are marked as ``near``.
    """
    columns, filled = columns_of(cells), []
    for column in columns:
        found = {name: g for name, g in find(groups, column).items() if metric in g.scores}
        scores = {name: group.scores[metric] for name, group in found.items()}
        # Full precision is not among the candidates for the best.
        judged = {name: s.value for name, s in scores.items() if found[name].cell.bits != FULL}
        best, values = best_of(judged, metric), {}
        for name, s in scores.items():
            values[name] = {"text": s.text, "number": s.value, "best": name in best}
            if main:
                values[name] |= {"link": found[name].id, "title": s.error_text, "near": False}
                if best and name in judged and name not in best:
                    try:
                        pair = compare(found[best[0]].items, found[name].items)
                        values[name]["near"] = abs(pair.difference) <= _ERRORS * pair.se
                    except CompareError as error:
                        values[name]["title"] += f"; not compared with the best: {error}"
        filled.append(values)
    recipes = {cell.row: cell.request.recipe for cell in cells}
    return {
        "caption": metric_title(metric),
        "columns": columns,
        "heads": [(name, len(list(same))) for name, same in groupby(c.subject for c in columns)],
        "rows": [(name, [values.get(name) for values in filled]) for name in rows_of(cells)],
        "marks": {name: recipe_marks(r) for name, r in recipes.items()},
    }


def fidelity_tables(groups: Sequence[Group]) -> dict[str, pd.DataFrame]:
    """Return one table per subject and bits: the fidelity of each method, means over seeds."""
    items = [item for group in groups for item in group.items]
    found = scores([item for item in items if item.record.fidelity], fidelity=True)
    names = unique(name for item in items for name in item.record.fidelity)
    rows, order = found[found["metric"].isin(names)], rows_of([item.cell for item in items])
    tables = {}
    for (subject, bits), own in rows.groupby(["subject", "bits"], sort=False):
        means = over_seeds(own, ["row", "metric"])
        means["text"] = [f"{row.mean:.3g} ± {row.se:.2g}" for row in means.itertuples()]
        wide = means.pivot(index="row", columns="metric", values="text").fillna("–")
        here = [name for name in order if name in wide.index]
        titles = {name: metric_title(name) for name in names if name in wide}
        wide = wide.loc[here, [*titles]].rename(columns=titles)
        tables[f"{subject} {bits}"] = wide.rename_axis(index="method", columns=None)
    return tables


def best_of(values: Mapping[str, float], metric: str) -> list[str]:
    """Return the name of the best value, then the names of values equal at two decimals.

    A single value is not the best of anything: the list is empty.
    """
    if len(values) < 2:
        return []
    best = (max if is_percent(metric) else min)(values, key=lambda name: values[name])
    same = [name for name, value in values.items() if f"{value:.2f}" == f"{values[best]:.2f}"]
    return [best, *(name for name in same if name != best)]


def diff_table(measured: Sequence[Measured]) -> Dict:
    """Return the comparison with published numbers that ``python -m benchmarks diff`` makes.

    ``hidden`` lists reasons for a missing published number, with the number of values.
    """
    found = diff.diff([item.record for item in measured])
    known = found["published"].notna()
    counts = Counter(found["verdict"][known])
    judged = counts.total() - counts[diff.NOT_COMPARABLE]
    parts = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    nothing = (
        "No measured number has the same data, weights, settings and bits as a published number, "
        "so there is no verdict."
    )
    rows = found[known].to_dict("records")
    return {
        "summary": f"{judged} comparisons: {parts}." if judged else nothing,
        "head": _DIFF_HEAD,
        "rows": [(_diff_texts(row), row["verdict"]) for row in rows],
        "hidden": Counter(found["reason"][~known]).most_common(),
        "interval": diff.INTERVAL,
        "margin": f"{diff.MARGIN:g}",
        "tolerance": f"{diff.TOLERANCE:g}",
    }


def _diff_texts(row: dict[Any, Any]) -> list[str]:
    """Return the texts of a row, in the order of its head."""
    evidence = f"{row['variant']}, {row['evidence']}" if row["variant"] else row["evidence"]
    texts = {
        "measured": "–" if pd.isna(row["measured"]) else f"{row['measured']:.2f} ± {row['se']:.2f}",
        "published": f"{row['published']:.2f}",
        "difference": "–" if pd.isna(row["difference"]) else f"{row['difference']:+.2f}",
        "source": f"{row['source']} ({evidence})",
    }
    return [str(texts.get(name, row[name])) for name in _DIFF_HEAD]


def paper_table(layout: Reproduction) -> Dict:
    """Return a published table in the paper's own layout, with measured numbers and verdicts.

    Kinds of rows: ``measured``; ``beside``, published numbers below a measured row; ``context``,
    other published rows.
    """
    heads = [head_pair(layout.table.columns[column].head) for column in layout.columns]
    groups = [(name, len(list(members))) for name, members in groupby(above for above, _ in heads)]
    rows = []
    for row in layout.shown:
        kind = "beside" if not row.own else "measured" if row.line.measured else "context"
        cells = zip(row.texts, row.verdicts, strict=True)
        bits = bits_text(row.line.bits) if row.own else ""
        rows.append((kind, bits, row.label, list(cells)))
    return {
        "about": layout.table,
        "groups": groups if any(name for name, _ in groups) else [],
        "columns": [below for _, below in heads],
        "rows": rows,
        "lines": [layout.conclusion()[0], layout.legend, *layout.notes],
    }
