"""A published table with measured numbers beside: verdicts, legend, notes; Markdown, CSV, LaTeX."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from benchmarks.compare import diff
from benchmarks.compare.diff import NOT_COMPARABLE, Judgement, Measurement
from benchmarks.grid.cell import CellName
from benchmarks.grid.names import UNSTATED, load_names
from benchmarks.published.table import FULL, Line, PublishedTable, TableCell, head_pair, head_text
from benchmarks.results.scores import Measured, count, csv_text, seeds_of, unique
from benchmarks.tables.layout import latex
from benchmarks.tables.layout import markdown as markdown_parts
from benchmarks.tables.summary import data_lines

NOT_MEASURED = "not measured"
#: Text where there is no number.
NOTHING = "–"
#: Mark behind a measured number, or behind a published one in its place, and its meaning.
_LEGEND = {
    diff.REPRODUCED: ("=", "reproduced, within 0.3 points or two standard errors"),
    diff.ABOVE: ("↑", "above the published number"),
    diff.BELOW: ("↓", "below the published number"),
    diff.UNCERTAIN: ("?", "too uncertain, since two standard errors are more than one point"),
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
    """A cell of a published table with its measurement.

    ``judgement`` is None where nothing is measured or nothing is published.
    """

    cell: TableCell
    item: Measurement | None
    judgement: Judgement | None

    @property
    def number(self) -> float | None:
        """The published number."""
        return float(self.cell.published["value"]) if self.cell.published else None

    @property
    def verdict(self) -> str:
        """The judgement's verdict, or the state of a cell without one."""
        if self.judgement is not None:
            return self.judgement.verdict
        if self.cell.name is None:
            return "context"
        return NOT_MEASURED if self.item is None else NOT_COMPARABLE

    @property
    def mark(self) -> str:
        """Sign of the verdict; empty where nothing is published, and for context."""
        return _LEGEND.get(self.verdict, ("",))[0] if self.cell.published else ""

    @property
    def text(self) -> str:
        """The measured number with its mark, or else the published one."""
        value = self.number if self.item is None else self.item.mean
        return NOTHING if value is None else f"{value:.2f} {self.mark}".strip()

    @property
    def difference(self) -> str:
        """Measured minus published with its error; empty where there is none."""
        if self.item is None or self.judgement is None or math.isnan(self.judgement.difference):
            return ""
        return f"{self.judgement.difference:+.2f} ± {self.item.se:.2f}"


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


class Reproduction:
    """A published table with the measurements of its cells.

    Attributes:
        table: the published table.
        measured: the finished cells behind the measurements.
        columns, lines: indices of the columns and lines that are shown.
        entries: entries by (line, column).
    """

    def __init__(
        self,
        table: PublishedTable,
        measured: Iterable[Measured],
        names: Collection[CellName] | None = None,
    ) -> None:
        """Combine a table with finished cells of its grid.

        Only lines and columns with grid cells of ``names`` are shown (None: all), and context of
        the same bits.
        """
        wanted = set(table.measured if names is None else names)
        self.table, self.measured = table, [item for item in measured if item.cell.name in wanted]
        places = [cell for cell in table.cells if names is None or cell.name in wanted]
        rows = {cell.row for cell in places}
        bits = {table.lines[row].bits for row in rows}
        rows |= {i for i, line in enumerate(table.lines) if not line.measured and line.bits in bits}
        self.columns, self.lines = sorted({cell.column for cell in places}), sorted(rows)
        every = diff.measurements(item.record for item in self.measured)
        keys = {(item.cell.name, diff.settings_key(item.record)) for item in self.measured}
        self.entries: dict[tuple[int, int], Entry] = {}
        for cell in table.cells:
            if cell.row in rows and cell.column in self.columns:
                own = [it for it in every if it.metric == cell.metric]
                own = [it for it in own if (cell.name, it.settings) in keys]
                # Several where data, weights or settings have changed between the seeds.
                item = max(own, key=lambda one: one.record.finished, default=None)
                row = cell.published
                judged = diff.judge(item, row, load_names()) if item and row else None
                self.entries[cell.row, cell.column] = Entry(cell, item, judged)

    @cached_property
    def judged(self) -> list[Entry]:
        """Measured entries with a published number beside them."""
        return [entry for entry in self.entries.values() if entry.judgement is not None]

    @cached_property
    def shown(self) -> list[Shown]:
        """The printed rows: up to three for a line with a measured number, else one."""
        found = []
        for index in self.lines:
            line = self.table.lines[index]
            own = [self.entries[index, column] for column in self.columns]
            if not line.measured and all(entry.text == NOTHING for entry in own):
                continue
            verdicts = ["" if e.judgement is None else e.judgement.verdict for e in own]
            found.append(Shown(line, head_text(line.row.head), [e.text for e in own], verdicts))
            numbers = [NOTHING if e.number is None else f"{e.number:.2f}" for e in own]
            beside = {"published": numbers, "difference ± error": [e.difference for e in own]}
            for label, texts in beside.items():
                if set(texts) - {NOTHING, ""} and any(e.item is not None for e in own):
                    found.append(Shown(line, label, texts, [""] * len(own)))
        return found

    @property
    def legend(self) -> str:
        """Meaning of the marks that occur, in one line."""
        texts = " ".join(text for row in self.shown for text in row.texts)
        parts = [f"{mark} {words}" for mark, words in _LEGEND.values() if mark in texts]
        if any(e.item is not None and e.judgement is None for e in self.entries.values()):
            parts.append("a measured number without a mark: nothing is published beside it")
        if any(not row.line.measured for row in self.shown):
            parts.append("rows without marks: published numbers, for context")
        return "; ".join(parts) + "."

    @property
    def notes(self) -> list[str]:
        """Reasons for missing verdicts, remarks and the table's footnotes, one line each."""
        return [
            *self._grouped(lambda j: [f"× {j.rule}"] if j.verdict == NOT_COMPARABLE else []),
            *self._grouped(lambda j: [f"? {j.rule}"] if j.verdict == diff.UNCERTAIN else []),
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

        0: all comparable numbers are reproduced; 1: some are not; 2: no number is comparable.
        """
        own = [entry for entry in self.entries.values() if entry.cell.name is not None]
        # A number that stands in several places of the table is one number.
        numbers = {(entry.cell.name, entry.cell.metric): entry for entry in own}.values()
        verdicts = Counter(e.judgement.verdict for e in numbers if e.judgement is not None)
        unlike = verdicts.pop(NOT_COMPARABLE, 0)
        if not verdicts:
            done = [entry for entry in numbers if entry.item is not None]
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
        return sentence, 0 if set(verdicts) == {diff.REPRODUCED} else 1


def bits_text(bits: str) -> str:
    """Return bits as papers print them: ``W4/A4``; ``FP`` for full precision."""
    return {FULL: "FP", UNSTATED: "bits unstated"}.get(bits, bits.upper().replace("A", "/A"))


def line_text(line: Line) -> str:
    """Return a line's name with its bits."""
    return head_text(line.row.head) + ("" if line.bits == FULL else f" {bits_text(line.bits)}")


def markdown(found: Reproduction, width: int | None = None) -> str:
    """Return the table with legend and notes; wider than a terminal's ``width`` in parts."""
    table = found.table
    heads = [head_text(table.columns[column].head) for column in found.columns]
    labels = [line_text(row.line) if row.label == row.head else row.label for row in found.shown]
    index = pd.Index(labels, name="method")
    body = pd.DataFrame([row.texts for row in found.shown], columns=heads, index=index)
    seeds = seeds_of(found.measured)
    lines = [found.legend, *data_lines(found.measured)]
    lines += [f"Seeds: {', '.join(map(str, seeds))}."] if seeds else []
    parts = [
        f"# {table.title}",
        f"{table.caption} Source: {table.paper}.",
        *markdown_parts(body, width),
        "\n".join(f"- {line}" for line in [*lines, *found.notes]),
    ]
    return "\n\n".join(parts) + "\n"


def csv(found: Reproduction) -> str:
    """Return one CSV line per number of the table, measured or published."""
    entries = [e for e in found.entries.values() if e.item is not None or e.number is not None]
    rows = [_csv_row(found.table, entry) for entry in entries]
    return csv_text(pd.DataFrame(rows, columns=COLUMNS).astype({"seeds": "Int64", "n": "Int64"}))


def _csv_row(table: PublishedTable, entry: Entry) -> dict[str, Any]:
    cell, item, judged = entry.cell, entry.item, entry.judgement
    source, line = cell.published or {}, table.lines[cell.row]
    return {
        "row": head_text(line.row.head),
        "column": head_text(table.columns[cell.column].head),
        "model": cell.name.model if cell.name else source.get("model", ""),
        "weights": cell.weights,
        "method": cell.name.method if cell.name else source.get("method", ""),
        "bits": line.bits,
        "metric": cell.metric or source.get("metric", ""),
        "measured": item and item.mean,
        "se": item and item.se,
        "seeds": item and item.seeds,
        "n": item and item.record.n,
        "published": entry.number,
        **{field: source.get(field, "") for field in ("source", "variant", "evidence")},
        "difference": judged.difference if judged else math.nan,
        "verdict": entry.verdict,
        "reason": judged.reason if judged else cell.unpublished,
    }


def tex(found: Reproduction) -> str:
    """Return the table as LaTeX that needs the package booktabs only."""
    table, rows, last = found.table, [], ""
    for row in found.shown:
        own, bits = row.label == row.head, bits_text(row.line.bits)
        name = row.label if own else f"  {row.label}"
        rows.append([bits if own and bits != last else "", name, *row.texts])
        last = bits
    heads = [head_pair(table.columns[column].head) for column in found.columns]
    columns = pd.MultiIndex.from_tuples([("", "Bits"), ("", "Method"), *heads])
    caption = f"{table.title}. {table.caption} Source: {table.paper}."
    notes = " ".join([found.legend, *found.notes])
    text = latex(pd.DataFrame(rows, columns=columns), caption, table.name, notes)
    return f"% Made from records. In the preamble: \\usepackage{{booktabs}}\n\n{text}\n"
