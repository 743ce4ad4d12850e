"""Layout of a published table: measured beside published numbers, verdicts, legend and notes."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmarks.cells import CellName
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
)
from benchmarks.names import UNSTATED, load_names
from benchmarks.published.table import FULL, Line, PublishedTable, TableCell, head_text
from benchmarks.results.scores import Measured, count, unique
from tasks.common.record import ResultRecord

NOT_MEASURED = "not measured"
#: Mark behind a measured number, or behind a published one that stands in its place.
MARKS = {
    REPRODUCED: "=",
    ABOVE: "↑",
    BELOW: "↓",
    UNCERTAIN: "?",
    NOT_COMPARABLE: "×",
    NOT_MEASURED: "°",
}
#: Text where there is no number.
NOTHING = "–"
_LEGEND = {
    "=": "reproduced, within 0.3 points or two standard errors",
    "↑": "above the published number",
    "↓": "below the published number",
    "?": "too uncertain, since two standard errors are more than one point",
    "×": "not comparable, for the reason below",
    "°": "published number, not measured yet",
    NOTHING: "no number",
}


@dataclass(frozen=True)
class Entry:
    """A cell of the table with what is measured of it.

    Attributes:
        cell: the table's.
        item: the measurement; None where there is none.
        judgement: the comparison; None where nothing is measured or nothing is published.
    """

    cell: TableCell
    item: Measurement | None = None
    judgement: Judgement | None = None

    @property
    def published(self) -> float | None:
        """The published number."""
        return None if self.cell.published is None else float(self.cell.published["value"])

    @property
    def mark(self) -> str:
        """The mark of the verdict; empty for context and for measured numbers without another."""
        if self.judgement is not None:
            return MARKS[self.judgement.verdict]
        waiting = self.item is None and self.cell.name is not None and self.published is not None
        return MARKS[NOT_MEASURED] if waiting else ""

    @property
    def text(self) -> str:
        """The measured number with its mark, or else the published one."""
        value = self.published if self.item is None else self.item.value
        return NOTHING if value is None else f"{_number(value)}{self.mark and f' {self.mark}'}"

    @property
    def difference(self) -> str:
        """The difference with its standard error; empty where there is none to quote."""
        if self.item is None or self.judgement is None or math.isnan(self.judgement.difference):
            return ""
        return f"{self.judgement.difference:+.2f} ± {self.item.se:.2f}"


@dataclass(frozen=True)
class Shown:
    """One printed row.

    Attributes:
        line: the table's line.
        label: its name, or what the row says of the line above: ``published``, ``difference``.
        texts: by column.
        verdicts: by column; empty but for measured numbers that are judged.
    """

    line: Line
    label: str
    texts: Sequence[str]
    verdicts: Sequence[str]

    @property
    def head(self) -> str:
        """Name of the line."""
        return head_text(self.line.row.head)

    @property
    def bits(self) -> str:
        """Bits of weights and activations, as papers print them."""
        return bits_text(self.line.bits)


class Layout:
    """A table with what is measured of it.

    Attributes:
        table: the published table.
        columns, lines: indices of the columns and lines that are shown.
        entries: by line and column.
        measured: the records behind it.
    """

    def __init__(
        self,
        table: PublishedTable,
        measured: Iterable[Measured],
        names: Collection[CellName] | None = None,
    ) -> None:
        """Lay out a table.

        Args:
            table: the published table.
            measured: finished cells of its grid.
            names: the grid cells to show. Lines and columns without any of them are left out, and
                other measured cells are not looked at. None: the whole table.
        """
        wanted = set(table.measured if names is None else names)
        records: dict[CellName, list[ResultRecord]] = {}
        self.table, self.measured = table, [item for item in measured if item.cell.name in wanted]
        for found in self.measured:
            records.setdefault(found.cell.name, []).append(found.record)
        places = [cell for cell in table.cells if names is None or cell.name in wanted]
        rows = {cell.row for cell in places}
        bits = {table.lines[row].bits for row in rows}
        self.columns = sorted({cell.column for cell in places})
        context = {row for row, line in enumerate(table.lines) if not line.measured}
        self.lines = sorted(rows | {row for row in context if table.lines[row].bits in bits})
        self.entries = {
            (cell.row, cell.column): _entry(cell, records.get(cell.name, []) if cell.name else [])
            for cell in table.cells
            if cell.row in self.lines and cell.column in self.columns
        }

    @cached_property
    def judged(self) -> list[Entry]:
        """Entries that are measured and have a published number beside them."""
        return [entry for entry in self.entries.values() if entry.judgement is not None]

    @cached_property
    def shown(self) -> list[Shown]:
        """The printed rows: up to three for a line with anything measured, else one."""
        found = []
        for index in self.lines:
            line = self.table.lines[index]
            entries = [self.entries[index, column] for column in self.columns]
            verdicts = [e.judgement.verdict if e.judgement is not None else "" for e in entries]
            if all(entry.text == NOTHING for entry in entries) and not line.measured:
                continue
            found.append(Shown(line, head_text(line.row.head), [e.text for e in entries], verdicts))
            if any(entry.item is not None for entry in entries):
                none = [""] * len(entries)
                published = [NOTHING if (v := e.published) is None else _number(v) for e in entries]
                if set(published) != {NOTHING}:
                    found.append(Shown(line, "published", published, none))
                if any(entry.difference for entry in entries):
                    gaps = [entry.difference for entry in entries]
                    found.append(Shown(line, "difference ± error", gaps, none))
        return found

    @property
    def legend(self) -> str:
        """Meaning of the marks that occur, in one line."""
        texts = " ".join(text for row in self.shown for text in row.texts)
        parts = [f"{mark} {words}" for mark, words in _LEGEND.items() if mark in texts]
        if any(e.item is not None and e.judgement is None for e in self.entries.values()):
            parts.append("a measured number without a mark: nothing is published beside it")
        if any(not row.line.measured for row in self.shown):
            parts.append("rows without marks: published numbers, for context")
        return "; ".join(parts) + "."

    @property
    def notes(self) -> list[str]:
        """Reasons for missing verdicts, remarks and the table's footnotes, one line each."""
        return [
            *self._grouped(lambda e, j: [f"× {j.rule}"] if j.verdict == NOT_COMPARABLE else []),
            *self._grouped(lambda e, j: [f"? {j.rule}"] if j.verdict == UNCERTAIN else []),
            *self._grouped(lambda e, j: j.remarks),
            *self.table.footnotes,
        ]

    def _grouped(self, of: Callable[[Entry, Judgement], Iterable[str]]) -> list[str]:
        """Texts of judged entries, each once with the entries that have it."""
        found: dict[str, list[TableCell]] = {}
        for entry in self.judged:
            if entry.judgement is not None:
                for text in of(entry, entry.judgement):
                    found.setdefault(text, []).append(entry.cell)
        return [f"{text}: {self._places(cells)}." for text, cells in found.items()]

    def _places(self, cells: Sequence[TableCell]) -> str:
        quantized = [e.cell for e in self.judged if e.cell.name and e.cell.name.method != "fp"]
        for name, everything in (
            ("all that is compared", [entry.cell for entry in self.judged]),
            ("all that is quantized", quantized),
        ):
            if len(cells) > 1 and len(cells) == len(everything):
                return name
        columns: dict[int, list[str]] = {}
        for cell in cells:
            columns.setdefault(cell.row, []).append(head_text(self.table.columns[cell.column].head))
        texts = []
        for row, heads in columns.items():
            every = sum(1 for entry in self.judged if entry.cell.row == row)
            whole = every == len(heads) > 1
            where = "all columns" if whole else ", ".join(heads)
            texts.append(f"{line_text(self.table.lines[row])} ({where})")
        return "; ".join(texts)

    def conclusion(self) -> tuple[str, int]:
        """Return the sentence that closes a run, and its exit code.

        0: all numbers that are comparable are reproduced; 1: some are not; 2: none is comparable.
        """
        own = [entry for entry in self.entries.values() if entry.cell.name is not None]
        # A number that stands in several places of the table is one number.
        numbers = {(entry.cell.name, entry.cell.metric): entry for entry in own}.values()
        judgements = [entry.judgement for entry in numbers if entry.judgement is not None]
        verdicts = Counter(judgement.verdict for judgement in judgements)
        unlike = verdicts.pop(NOT_COMPARABLE, 0)
        if not verdicts:
            return f"Nothing is comparable with the published table: {_why_nothing(numbers)}.", 2
        missing = sum(1 for entry in numbers if entry.mark == MARKS[NOT_MEASURED])
        counts = ", ".join(f"{verdicts[name]} {name}" for name in MARKS if verdicts[name])
        others = ((unlike, NOT_COMPARABLE), (missing, NOT_MEASURED))
        rest = ", ".join(f"{number} {words}" for number, words in others if number)
        compared = count(len(judgements) - unlike, "number")
        sentence = f"Compared {compared}: {counts}{rest and f' ({rest})'}."
        return sentence, 0 if set(verdicts) == {REPRODUCED} else 1


def _why_nothing(numbers: Iterable[Entry]) -> str:
    done = [entry for entry in numbers if entry.item is not None]
    whys = unique(e.judgement.rule if e.judgement else e.cell.unpublished for e in done)
    if not done:
        return "nothing is measured"
    return f"{count(len(done), 'number')} measured, but {'; '.join(whys)}"


def bits_text(bits: str) -> str:
    """Return bits as papers print them: ``W4/A4``; ``FP`` for full precision."""
    return {FULL: "FP", UNSTATED: "bits unstated"}.get(bits, bits.upper().replace("A", "/A"))


def line_text(line: Line) -> str:
    """Return a line's name with its bits."""
    return head_text(line.row.head) + ("" if line.bits == FULL else f" {bits_text(line.bits)}")


def _number(value: float) -> str:
    return f"{value:.2f}"


def _entry(cell: TableCell, records: Sequence[ResultRecord]) -> Entry:
    found = [item for item in measurements(records) if item.metric == cell.metric]
    if not found:
        return Entry(cell)
    # All seeds of a cell share data, weights and settings, unless those have changed in between.
    item = max(found, key=lambda one: one.record.finished)
    if cell.published is None:
        return Entry(cell, item)
    return Entry(cell, item, judge(item, cell.published, load_names()))
