"""Measured against published numbers, as ``python -m benchmarks diff`` has them."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pandas as pd

from benchmarks.compare import diff
from benchmarks.published.table import head_pair
from benchmarks.results.scores import Measured
from benchmarks.tables.reproduction import Reproduction, bits_text

#: Style of a verdict; others have ``none``.
KINDS = {
    diff.REPRODUCED: "good",
    diff.ABOVE: "above",
    diff.BELOW: "below",
    diff.UNCERTAIN: "unsure",
}
HEAD = (
    "model", "method", "bits", "metric", "measured", "published", "difference", "verdict",
    "source", "reason",
)  # fmt: skip


def published(measured: Sequence[Measured]) -> dict[str, Any]:
    """Compare records; ``hidden`` says why values have no published number, and of how many."""
    found = diff.diff([item.record for item in measured])
    known = found["published"].notna()
    counts = Counter(found["verdict"][known])
    judged = counts.total() - counts[diff.NOT_COMPARABLE]
    parts = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    summary = f"{judged} comparisons: {parts}."
    if not judged:
        summary = "Nothing here is on the same data, weights, settings and bits as a published number, so there is no verdict."
    return {
        "summary": summary,
        "head": HEAD,
        "rows": [(_cells(row), _kind(row["verdict"])) for row in found[known].to_dict("records")],
        "hidden": Counter(found["reason"][~known]).most_common(),
    }


def _kind(verdict: str) -> str:
    return KINDS.get(verdict, "none") if verdict else ""


def _cells(row: dict[Any, Any]) -> list[str]:
    evidence = f"{row['variant']}, {row['evidence']}" if row["variant"] else row["evidence"]
    texts = {
        "measured": "–" if pd.isna(row["measured"]) else f"{row['measured']:.2f} ± {row['se']:.2f}",
        "published": f"{row['published']:.2f}",
        "difference": "–" if pd.isna(row["difference"]) else f"{row['difference']:+.2f}",
        "source": f"{row['source']} ({evidence})",
    }
    return [str(texts.get(name, row[name])) for name in HEAD]


def published_table(layout: Reproduction) -> dict[str, Any]:
    """Return a published table in its own layout, with measured numbers and verdicts.

    A row is ``measured``, for ``context``, or ``beside`` (below) a measured row.
    """
    heads = [head_pair(layout.table.columns[column].head) for column in layout.columns]
    groups = [(name, len(list(members))) for name, members in groupby(above for above, _ in heads)]
    rows = []
    for row in layout.shown:
        kind = "beside" if not row.own else "measured" if row.line.measured else "context"
        cells = zip(row.texts, map(_kind, row.verdicts), strict=True)
        bits = bits_text(row.line.bits) if row.own else ""
        rows.append((kind, bits, row.label, list(cells)))
    return {
        "about": layout.table,
        "groups": groups if any(name for name, _ in groups) else [],
        "columns": [below for _, below in heads],
        "rows": rows,
        "lines": [layout.conclusion()[0], layout.legend, *layout.notes],
    }
