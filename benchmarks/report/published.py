"""Measured against published numbers, as ``python -m benchmarks diff`` has them."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from benchmarks.compare import published as diff
from benchmarks.published.layout import Layout, bits_text
from benchmarks.published.table import head_pair
from benchmarks.report.model import PaperTable, Published, TableRow, Verdict
from benchmarks.tables import Measured
from tasks.common.record import ResultRecord

HEAD = ("model", "method", "bits", "metric", "measured", "published", "difference", "verdict", "source")

#: Style of a verdict.
KINDS = {
    diff.REPRODUCED: "good",
    diff.ABOVE: "above",
    diff.BELOW: "below",
    diff.UNCERTAIN: "unsure",
}


def published(measured: Sequence[Measured]) -> Published:
    """Compare the records of ``measured``."""
    records: list[ResultRecord] = [item.record for item in measured]
    rows: list[dict[Any, Any]] = diff.diff(records).to_dict("records") if records else []
    shown = [row for row in rows if not _nothing(row["published"])]
    hidden: dict[str, int] = {}
    for row in rows:
        if _nothing(row["published"]):
            hidden[row["reason"]] = hidden.get(row["reason"], 0) + 1
    counts: dict[str, int] = {}
    for row in shown:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    judged = sum(count for verdict, count in counts.items() if verdict != diff.NOT_COMPARABLE)
    summary = (
        f"{judged} comparisons: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}."
        if judged
        else "Nothing here is on the same data, weights, settings and bits as a published number, so there is no verdict."
    )
    return Published(HEAD, [_verdict(row) for row in shown], sorted(hidden.items(), key=lambda item: -item[1]), summary)


def published_table(layout: Layout) -> PaperTable:
    """Return a published table in its own layout, with measured numbers and verdicts."""
    table = layout.table
    heads = [head_pair(table.columns[column].head) for column in layout.columns]
    groups = [(name, len(list(members))) for name, members in groupby(above for above, _ in heads)]
    rows = []
    for row in layout.shown:
        own = row.label == row.head
        kind = "beside" if not own else "measured" if row.line.measured else "context"
        styles = [KINDS.get(verdict, "none") if verdict else "" for verdict in row.verdicts]
        bits = bits_text(row.line.bits) if own else ""
        rows.append(TableRow(bits, row.label, kind, list(zip(row.texts, styles, strict=True))))
    return PaperTable(
        table.title,
        table.caption,
        table.paper,
        groups if any(name for name, _ in groups) else [],
        [below for _, below in heads],
        rows,
        [layout.conclusion()[0], layout.legend, *layout.notes],
    )


def _verdict(row: dict[Any, Any]) -> Verdict:
    measured = "–" if _nothing(row["measured"]) else f"{row['measured']:.2f} ± {row['se']:.2f}"
    gap = "–" if _nothing(row["difference"]) else f"{row['difference']:+.2f}"
    kind = KINDS.get(row["verdict"], "none")
    source = (
        f"{row['source']} ({row['variant']}, {row['evidence']})" if row["variant"] else f"{row['source']} ({row['evidence']})"
    )
    cells = [
        row["model"],
        row["method"],
        row["bits"],
        row["metric"],
        measured,
        f"{row['published']:.2f}",
        gap,
        row["verdict"],
        source,
    ]
    return Verdict([str(cell) for cell in cells], kind, str(row["verdict"]), str(row["reason"]))


def _nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
