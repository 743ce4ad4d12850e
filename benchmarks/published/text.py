"""A published table as text: for terminals and Markdown, as CSV and as LaTeX."""

from pathlib import Path

import pandas as pd

from benchmarks.compare.published import NOT_COMPARABLE
from benchmarks.published.layout import NOT_MEASURED, NOTHING, Entry, Layout, line_text
from benchmarks.published.table import head_pair, head_text
from benchmarks.results import scores
from benchmarks.tables import latex
from benchmarks.tables import markdown as md
from benchmarks.tables.summary import data_lines

COLUMNS = [
    "row",
    "column",
    "model",
    "weights",
    "method",
    "bits",
    "metric",
    "measured",
    "se",
    "seeds",
    "n",
    "published",
    "source",
    "variant",
    "evidence",
    "difference",
    "verdict",
    "reason",
]


def markdown(layout: Layout, width: int | None = None) -> str:
    """Return the table with its legend and notes as Markdown.

    Args:
        layout: the table.
        width: a terminal's width; a wider table is printed in several parts. None keeps it whole.
    """
    table = layout.table
    heads = [head_text(table.columns[column].head) for column in layout.columns]
    labels = [line_text(row.line) if row.label == row.head else row.label for row in layout.shown]
    index = pd.Index(labels, name="method")
    body = pd.DataFrame([row.texts for row in layout.shown], columns=heads, index=index)
    lines = [layout.legend, *data_lines(layout.measured), *_seeds(layout), *layout.notes]
    parts = [
        f"# {table.title}",
        f"{table.caption} Source: {table.paper}.",
        *(md.markdown(_without_empty(part)) for part in md.cut(body, width)),
        "\n".join(f"- {line}" for line in lines),
    ]
    return "\n\n".join(parts) + "\n"


def _without_empty(part: pd.DataFrame) -> pd.DataFrame:
    """Leave out rows without a number in this part of the table."""
    return part[~part.isin(["", NOTHING]).all(axis=1)]


def _seeds(layout: Layout) -> list[str]:
    seeds = sorted({item.cell.seed for item in layout.measured if item.cell.seed is not None})
    return [f"Seeds: {', '.join(map(str, seeds))}."] if seeds else []


def csv(layout: Layout) -> str:
    """Return one CSV line per number of the table, measured or published, with :data:`COLUMNS`."""
    entries = layout.entries.values()
    rows = [_row(layout, e) for e in entries if e.item is not None or e.published is not None]
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"seeds": "Int64", "n": "Int64"})
    return scores.csv_text(table)


def _row(layout: Layout, entry: Entry) -> dict[str, object]:
    cell, item, judgement = entry.cell, entry.item, entry.judgement
    line, published = layout.table.lines[cell.row], cell.published or {}
    verdict = "context" if cell.name is None else NOT_MEASURED if item is None else NOT_COMPARABLE
    return {
        "row": head_text(line.row.head),
        "column": head_text(layout.table.columns[cell.column].head),
        "model": published.get("model", "") if cell.name is None else cell.name.model,
        "weights": cell.weights,
        "method": published.get("method", "") if cell.name is None else cell.name.method,
        "bits": line.bits,
        "metric": cell.metric or published.get("metric", ""),
        "measured": item and item.value,
        "se": item and item.se,
        "seeds": item and item.seeds,
        "n": item and item.record.n,
        "published": entry.published,
        "source": published.get("source", ""),
        "variant": published.get("variant", ""),
        "evidence": published.get("evidence", ""),
        "difference": judgement and judgement.difference,
        "verdict": verdict if judgement is None else judgement.verdict,
        "reason": cell.unpublished if judgement is None else judgement.reason,
    }


def tex(layout: Layout) -> str:
    """Return the table as LaTeX that needs the package booktabs only."""
    table, rows, bits = layout.table, [], ""
    for row in layout.shown:
        first = row.label == row.head
        rows.append(
            [
                row.bits if first and row.bits != bits else "",
                row.label if first else rf"\quad {row.label}",
                *row.texts,
            ]
        )
        bits = row.bits
    pairs = [head_pair(table.columns[column].head) for column in layout.columns]
    heads = [("", "Bits"), ("", "Method"), *pairs]
    if not any(above for above, _ in pairs):
        columns = pd.Index([latex.escape(below) for _, below in heads])
    else:
        columns = pd.MultiIndex.from_tuples([tuple(map(latex.escape, head)) for head in heads])
    body = pd.DataFrame([[_cell(text) for text in row] for row in rows], columns=columns)
    text = body.style.hide(axis="index").to_latex(
        hrules=True,
        column_format="ll" + "r" * len(pairs),
        multicol_align="c",
        environment="table*",
        position="t",
        position_float="centering",
        caption=latex.escape(f"{table.title}. {table.caption} Source: {table.paper}."),
        label=f"tab:{table.name}",
    )
    notes = " ".join(latex.escape(line) for line in (layout.legend, *layout.notes))
    small = "\\centering\n\\scriptsize\n\\setlength{\\tabcolsep}{3pt}\n"
    text = text.replace("\\centering\n", small, 1)
    text = text.replace("\\end{table*}", f"\n\\smallskip\n{notes}\n\\end{{table*}}")
    return f"% Made from records. In the preamble: \\usepackage{{booktabs}}\n\n{text}"


def _cell(text: str) -> str:
    indent = r"\quad " if text.startswith(r"\quad ") else ""
    return indent + latex.escape(text.removeprefix(indent))


def write(layout: Layout, folder: Path) -> list[Path]:
    """Write the table as Markdown, CSV and LaTeX into a folder and return the files."""
    texts = {"md": markdown(layout), "csv": csv(layout), "tex": tex(layout)}
    paths = []
    for ending, text in texts.items():
        paths.append(folder / f"{layout.table.name}.{ending}")
        scores.write_text(paths[-1], text)
    return paths
