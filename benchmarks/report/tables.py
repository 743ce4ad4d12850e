"""Tables: scores of methods × (subject, bits), and published beside measured numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import pandas as pd

from benchmarks.compare import diff
from benchmarks.grid.cell import Cell
from benchmarks.published.schema import head_pair
from benchmarks.report.groups import Group, find, row_name, rows_of
from benchmarks.results.outcomes import compare
from benchmarks.results.scores import FULL, Measured, columns_of, is_percent, metric_title
from benchmarks.tables.reproduction import Reproduction, bits_text
from benchmarks.tables.settings import recipe_marks

#: Standard errors of a paired difference below which a method counts as equal to the best.
_ERRORS = 2.0
#: Style of a verdict; other verdicts have the style ``none``.
_STYLES = {
    diff.REPRODUCED: "good",
    diff.ABOVE: "above",
    diff.BELOW: "below",
    diff.UNCERTAIN: "unsure",
}
_DIFF_HEAD = (
    "model", "method", "bits", "metric", "measured", "published", "difference", "verdict",
    "source", "reason",
)  # fmt: skip
Dict = dict[str, Any]


def score_table(
    groups: Sequence[Group], cells: Sequence[Cell], metric: str, *, main: bool = False
) -> Dict:
    """Return mean ± sd of ``metric`` over seeds for all cells, measured or not.

    In the ``main`` table numbers link to their provenance, and numbers that differ from the best by
    less than two standard errors are marked as ``near``.
    """
    columns, filled = columns_of(cells), []
    for column in columns:
        found = {name: g for name, g in find(groups, column).items() if metric in g.scores}
        scores = {name: group.scores[metric] for name, group in found.items()}
        # Full precision does not compete.
        judged = {name: s.value for name, s in scores.items() if found[name].cell.bits != FULL}
        best, values = best_of(judged, metric), {}
        for name, s in scores.items():
            values[name] = {"text": s.text, "number": s.value, "best": name in best}
            if main:
                rival = bool(best) and name in judged and name not in best
                values[name] |= {"link": found[name].id, "title": s.error_text}
                values[name]["near"] = rival and _near(found, name, best[0])
        filled.append(values)
    recipes = {row_name(cell): cell.request.recipe for cell in cells}
    return {
        "caption": metric_title(metric),
        "columns": columns,
        "heads": [(name, len(list(same))) for name, same in groupby(c.subject for c in columns)],
        "rows": [(name, [values.get(name) for values in filled]) for name in rows_of(cells)],
        "marks": {name: recipe_marks(r) for name, r in recipes.items()},
    }


def best_of(values: Mapping[str, float], metric: str) -> list[str]:
    """Return the best and all names that look the same at two decimals; none of fewer than two."""
    if len(values) < 2:
        return []
    best = (max if is_percent(metric) else min)(values, key=lambda name: values[name])
    same = [name for name, value in values.items() if f"{value:.2f}" == f"{values[best]:.2f}"]
    return [best, *(name for name in same if name != best)]


def _near(found: Mapping[str, Group], name: str, best: str) -> bool:
    """Return True if the paired difference to the best is within two standard errors."""
    pair = compare(found[best].items, found[name].items)
    return pair is not None and abs(pair.difference) <= _ERRORS * pair.se


def diff_table(measured: Sequence[Measured]) -> Dict:
    """Compare records with published numbers, as ``python -m benchmarks diff`` does.

    ``hidden`` counts the measured values without a published number by reason.
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
        "rows": [(_diff_texts(row), _style(row["verdict"])) for row in rows],
        "hidden": Counter(found["reason"][~known]).most_common(),
    }


def _style(verdict: str) -> str:
    return _STYLES.get(verdict, "none") if verdict else ""


def _diff_texts(row: dict[Any, Any]) -> list[str]:
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

    A row is ``measured``, or ``context``, or ``beside`` (below a measured row).
    """
    heads = [head_pair(layout.table.columns[column].head) for column in layout.columns]
    groups = [(name, len(list(members))) for name, members in groupby(above for above, _ in heads)]
    rows = []
    for row in layout.shown:
        kind = "beside" if not row.own else "measured" if row.line.measured else "context"
        cells = zip(row.texts, map(_style, row.verdicts), strict=True)
        bits = bits_text(row.line.bits) if row.own else ""
        rows.append((kind, bits, row.label, list(cells)))
    return {
        "about": layout.table,
        "groups": groups if any(name for name, _ in groups) else [],
        "columns": [below for _, below in heads],
        "rows": rows,
        "lines": [layout.conclusion()[0], layout.legend, *layout.notes],
    }
