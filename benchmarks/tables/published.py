"""A published table with measured numbers beside: verdicts, legend, notes; Markdown, CSV, LaTeX."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.compare.published import (
    ABOVE,
    BELOW,
    NOT_COMPARABLE,
    REPRODUCED,
    UNCERTAIN,
    Judgement,
    Measurement,
    judge,
    measurements,
    settings,
)  # fmt: skip
from benchmarks.grid.cell import CellName
from benchmarks.grid.names import UNSTATED, load_names
from benchmarks.published.schema import head_pair, head_text
from benchmarks.published.table import FULL, Line, PublishedTable, TableCell
from benchmarks.results.scores import Measured, count, csv_text, seeds_of, unique, write_text
from benchmarks.tables.latex import typeset
from benchmarks.tables.markdown import cut
from benchmarks.tables.markdown import markdown as table_text
from benchmarks.tables.summary import data_lines

NOT_MEASURED = "not measured"
#: Text where there is no number.
NOTHING = "–"
#: Mark behind a measured number, or behind a published one in its place, and its meaning.
_LEGEND = {
    REPRODUCED: ("=", "reproduced, within 0.3 points or two standard errors"),
    ABOVE: ("↑", "above the published number"),
    BELOW: ("↓", "below the published number"),
    UNCERTAIN: ("?", "too uncertain, since two standard errors are more than one point"),
    NOT_COMPARABLE: ("×", "not comparable, for the reason below"),
    NOT_MEASURED: ("°", "published number, not measured yet"),
    "": (NOTHING, "no number"),
}
COLUMNS = [
    "row", "column", "model", "weights", "method", "bits", "metric", "measured", "se", "seeds", "n",
    "published", "source", "variant", "evidence", "difference", "verdict", "reason",
]  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A cell of the table as it is shown.

    Attributes:
        judgement: None where nothing is measured or nothing is published.
        text: the measured number with its mark, or else the published one.
        published, difference: texts below it; the difference is empty where there is none.
        values: by the columns of the CSV file.
    """

    cell: TableCell
    judgement: Judgement | None
    mark: str
    text: str
    published: str
    difference: str
    values: dict[str, Any]

    @property
    def measured(self) -> bool:
        """True for cells with a measured number."""
        return self.values["measured"] is not None


def _entry(table: PublishedTable, cell: TableCell, measured: Sequence[Measurement]) -> Entry:
    found = [item for item in measured if item.metric == cell.metric]
    # All seeds of a cell share data, weights and settings, unless those have changed in between.
    item = max(found, key=lambda one: one.record.finished, default=None)
    source, name, line = cell.published or {}, cell.name, table.lines[cell.row]
    number = float(source["value"]) if source else None
    judged = judge(item, source, load_names()) if item and source else None
    gap = judged.difference if judged else math.nan
    verdict = "context" if name is None else NOT_MEASURED if item is None else NOT_COMPARABLE
    verdict = judged.verdict if judged else verdict
    mark = _LEGEND[verdict][0] if source and verdict in _LEGEND else ""
    value = item.mean if item else number
    values = {
        "row": head_text(line.row.head),
        "column": head_text(table.columns[cell.column].head),
        "model": name.model if name else source.get("model", ""),
        "weights": cell.weights,
        "method": name.method if name else source.get("method", ""),
        "bits": line.bits,
        "metric": cell.metric or source.get("metric", ""),
        "measured": item and item.mean,
        "se": item and item.se,
        "seeds": item and item.seeds,
        "n": item and item.record.n,
        "published": number,
        **{field: source.get(field, "") for field in ("source", "variant", "evidence")},
        "difference": gap,
        "verdict": verdict,
        "reason": judged.reason if judged else cell.unpublished,
    }
    return Entry(
        cell,
        judged,
        mark,
        text=NOTHING if value is None else f"{value:.2f} {mark}".strip(),
        published=NOTHING if number is None else f"{number:.2f}",
        difference="" if item is None or math.isnan(gap) else f"{gap:+.2f} ± {item.se:.2f}",
        values=values,
    )


@dataclass(frozen=True)
class Shown:
    """One printed row of a line: its name or ``published`` or ``difference``, texts by column.

    ``verdicts`` are empty where nothing is judged.
    """

    line: Line
    label: str
    texts: Sequence[str]
    verdicts: Sequence[str]

    @property
    def head(self) -> str:
        """Name of the line."""
        return head_text(self.line.row.head)


class Layout:
    """A published table with its measurements.

    ``columns`` and ``lines`` are the indices of what is shown, ``entries`` by these, ``measured``
    the cells behind it.
    """

    def __init__(
        self,
        table: PublishedTable,
        measured: Iterable[Measured],
        names: Collection[CellName] | None = None,
    ) -> None:
        """Lay out a table with finished cells of its grid.

        Only lines and columns with grid cells of ``names`` are shown (None: all).
        """
        wanted = set(table.measured if names is None else names)
        self.table, self.measured = table, [item for item in measured if item.cell.name in wanted]
        every = measurements(item.record for item in self.measured)
        keys: dict[CellName | None, set[str]] = {}
        for item in self.measured:
            keys.setdefault(item.cell.name, set()).add(settings(item.record))
        places = [cell for cell in table.cells if names is None or cell.name in wanted]
        rows = {cell.row for cell in places}
        bits = {table.lines[row].bits for row in rows}
        self.columns = sorted({cell.column for cell in places})
        context = {row for row, line in enumerate(table.lines) if not line.measured}
        self.lines = sorted(rows | {row for row in context if table.lines[row].bits in bits})
        self.entries = {
            (cell.row, cell.column): _entry(
                table, cell, [it for it in every if it.settings in keys.get(cell.name, ())]
            )
            for cell in table.cells
            if cell.row in self.lines and cell.column in self.columns
        }

    @cached_property
    def judged(self) -> list[Entry]:
        """Measured entries with a published number beside them."""
        return [entry for entry in self.entries.values() if entry.judgement is not None]

    @cached_property
    def shown(self) -> list[Shown]:
        """The printed rows: up to three for a line with anything measured, else one."""
        found = []
        for index in self.lines:
            line = self.table.lines[index]
            entries = [self.entries[index, column] for column in self.columns]
            if not line.measured and all(entry.text == NOTHING for entry in entries):
                continue
            verdicts = ["" if e.judgement is None else e.judgement.verdict for e in entries]
            found.append(Shown(line, head_text(line.row.head), [e.text for e in entries], verdicts))
            beside = {
                "published": [e.published for e in entries],
                "difference ± error": [e.difference for e in entries],
            }
            for label, texts in beside.items():
                if set(texts) - {NOTHING, ""} and any(e.measured for e in entries):
                    found.append(Shown(line, label, texts, [""] * len(entries)))
        return found

    @property
    def legend(self) -> str:
        """Meaning of the marks that occur, in one line."""
        texts = " ".join(text for row in self.shown for text in row.texts)
        parts = [f"{mark} {words}" for mark, words in _LEGEND.values() if mark in texts]
        if any(e.measured and e.judgement is None for e in self.entries.values()):
            parts.append("a measured number without a mark: nothing is published beside it")
        if any(not row.line.measured for row in self.shown):
            parts.append("rows without marks: published numbers, for context")
        return "; ".join(parts) + "."

    @property
    def notes(self) -> list[str]:
        """Reasons for missing verdicts, remarks and the table's footnotes, one line each."""
        return [
            *self._grouped(lambda j: [f"× {j.rule}"] if j.verdict == NOT_COMPARABLE else []),
            *self._grouped(lambda j: [f"? {j.rule}"] if j.verdict == UNCERTAIN else []),
            *self._grouped(lambda j: j.remarks),
            *self.table.footnotes,
        ]

    def _grouped(self, of: Callable[[Judgement], Iterable[str]]) -> list[str]:
        """Return texts of judged entries, each once with its entries."""
        found: dict[str, list[TableCell]] = {}
        for entry in self.judged:
            for text in of(entry.judgement) if entry.judgement else ():
                found.setdefault(text, []).append(entry.cell)
        return [f"{text}: {self._places(cells)}." for text, cells in found.items()]

    def _places(self, cells: Sequence[TableCell]) -> str:
        every = [entry.cell for entry in self.judged]
        quantized = [cell for cell in every if cell.name and cell.name.method != "fp"]
        if len(cells) > 1:
            for name, whole in (("compared", every), ("quantized", quantized)):
                if len(cells) == len(whole):
                    return f"all that is {name}"
        columns: dict[int, list[str]] = {}
        for cell in cells:
            columns.setdefault(cell.row, []).append(head_text(self.table.columns[cell.column].head))
        texts = []
        for row, heads in columns.items():
            complete = sum(cell.row == row for cell in every) == len(heads) > 1
            where = "all columns" if complete else ", ".join(heads)
            texts.append(f"{line_text(self.table.lines[row])} ({where})")
        return "; ".join(texts)

    def conclusion(self) -> tuple[str, int]:
        """Return the sentence that closes a run, and its exit code.

        0: all numbers that are comparable are reproduced; 1: some are not; 2: none is comparable.
        """
        own = [entry for entry in self.entries.values() if entry.cell.name is not None]
        # A number that stands in several places of the table is one number.
        numbers = {(entry.cell.name, entry.cell.metric): entry for entry in own}.values()
        verdicts = Counter(e.judgement.verdict for e in numbers if e.judgement is not None)
        unlike = verdicts.pop(NOT_COMPARABLE, 0)
        if not verdicts:
            done = [entry for entry in numbers if entry.measured]
            whys = unique(e.judgement.rule if e.judgement else e.cell.unpublished for e in done)
            why = f"{count(len(done), 'number')} measured, but {'; '.join(whys)}"
            why = why if done else "nothing is measured"
            return f"Nothing is comparable with the published table: {why}.", 2
        missing = sum(entry.mark == "°" for entry in numbers)
        counts = ", ".join(f"{verdicts[name]} {name}" for name in _LEGEND if verdicts[name])
        others = ((unlike, NOT_COMPARABLE), (missing, NOT_MEASURED))
        rest = ", ".join(f"{number} {words}" for number, words in others if number)
        compared = count(verdicts.total(), "number")
        sentence = f"Compared {compared}: {counts}{rest and f' ({rest})'}."
        return sentence, 0 if set(verdicts) == {REPRODUCED} else 1


def bits_text(bits: str) -> str:
    """Return bits as papers print them: ``W4/A4``; ``FP`` for full precision."""
    return {FULL: "FP", UNSTATED: "bits unstated"}.get(bits, bits.upper().replace("A", "/A"))


def line_text(line: Line) -> str:
    """Return a line's name with its bits."""
    return head_text(line.row.head) + ("" if line.bits == FULL else f" {bits_text(line.bits)}")


def markdown(layout: Layout, width: int | None = None) -> str:
    """Return the table with legend and notes; wider than a terminal's ``width`` in parts."""
    table = layout.table
    heads = [head_text(table.columns[column].head) for column in layout.columns]
    labels = [line_text(row.line) if row.label == row.head else row.label for row in layout.shown]
    index = pd.Index(labels, name="method")
    body = pd.DataFrame([row.texts for row in layout.shown], columns=heads, index=index)
    seeds = seeds_of(layout.measured)
    lines = [layout.legend, *data_lines(layout.measured)]
    lines += [f"Seeds: {', '.join(map(str, seeds))}."] if seeds else []
    parts = [
        f"# {table.title}",
        f"{table.caption} Source: {table.paper}.",
        # Rows without a number in a part are left out.
        *(table_text(p[~p.isin(["", NOTHING]).all(axis=1)]) for p in cut(body, width)),
        "\n".join(f"- {line}" for line in [*lines, *layout.notes]),
    ]
    return "\n\n".join(parts) + "\n"


def csv(layout: Layout) -> str:
    """Return one CSV line per number of the table, measured or published."""
    entries = layout.entries.values()
    rows = [e.values for e in entries if e.measured or e.values["published"] is not None]
    return csv_text(pd.DataFrame(rows, columns=COLUMNS).astype({"seeds": "Int64", "n": "Int64"}))


def tex(layout: Layout) -> str:
    """Return the table as LaTeX that needs the package booktabs only."""
    table, rows, last = layout.table, [], ""
    for row in layout.shown:
        own, bits = row.label == row.head, bits_text(row.line.bits)
        rows.append(
            [
                bits if own and bits != last else "",
                row.label if own else f"  {row.label}",
                *row.texts,
            ]
        )
        last = bits
    heads = [head_pair(table.columns[column].head) for column in layout.columns]
    caption = f"{table.title}. {table.caption} Source: {table.paper}."
    notes = " ".join([layout.legend, *layout.notes])
    text = typeset(
        [("", "Bits"), ("", "Method"), *heads], rows, caption, table.name,
        environment="table*", notes=notes,
    )  # fmt: skip
    return f"% Made from records. In the preamble: \\usepackage{{booktabs}}\n\n{text}\n"


def write(layout: Layout, folder: Path) -> list[Path]:
    """Write the table as Markdown, CSV and LaTeX into a folder and return the files."""
    texts = {"md": markdown(layout), "csv": csv(layout), "tex": tex(layout)}
    paths = [folder / f"{layout.table.name}.{ending}" for ending in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_text(path, text)
    return paths
