"""A published table beside measured numbers, with verdicts and notes: Markdown, CSV, LaTeX."""

import math
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.compare import diff
from benchmarks.compare.diff import NOT_COMPARABLE, Measurement
from benchmarks.grid.cell import CellName
from benchmarks.grid.names import UNSTATED, load_names
from benchmarks.published.schema import head_pair, head_text
from benchmarks.published.table import FULL, Line, PublishedTable, TableCell
from benchmarks.results.scores import Damaged, Measured, count, csv_text, seeds_of, unique
from benchmarks.tables import formats
from benchmarks.tables.summary import data_lines
from fimaq_core.terminal import one_line

NOT_MEASURED = "not measured"
UNREADABLE = "with unreadable records"
#: Text of a cell without a number.
NOTHING = "–"
#: Marks after numbers, with their meaning, by verdict.
_LEGEND = {
    diff.REPRODUCED: ("=", f"reproduced: {diff.INTERVAL} within ±{diff.MARGIN:g} point"),
    diff.ABOVE: ("↑", "above the published number"),
    diff.BELOW: ("↓", "below the published number"),
    diff.UNCERTAIN: ("?", "too uncertain, for the reason below"),
    NOT_COMPARABLE: ("×", "not comparable, for the reason below"),
    NOT_MEASURED: ("°", "published number, not measured yet"),
    UNREADABLE: ("!", "published number, measured, but the record cannot be read"),
    "": (NOTHING, "no number"),
}
#: Columns of the CSV file.
COLUMNS = [
    "row", "column", "model", "weights", "method", "bits", "metric", "measured", "se", "seeds", "n",
    "published", "source", "variant", "evidence", "difference", "verdict", "reason",
]  # fmt: skip


class Shown(NamedTuple):
    """A printed row. A line has its own row, and below it published numbers and differences."""

    line: Line
    own: bool
    label: str  #: name of the line; ``published`` or ``difference ± error`` in the rows below it
    texts: Sequence[str]  #: one per column
    verdicts: Sequence[str]  #: one per column; empty without a verdict


class Reproduction:
    """A published table with the measurements of its cells.

    Attributes:
        columns: indices of the columns that are shown.
        cells: one row per shown cell, see :func:`_cell`.
    """

    def __init__(
        self,
        table: PublishedTable,
        measured: Iterable[Measured],
        names: Collection[CellName] | None = None,
        damaged: Sequence[Damaged] = (),
    ) -> None:
        """Combine a table with finished cells of its grid.

        Shown are the lines and columns with cells of ``names`` (None: all cells), and the context
        at the same bits. ``damaged`` are cells of the whole grid with unreadable records.
        """
        self.damaged, unreadable = damaged, {one.cell.name for one in damaged}
        wanted = set(table.measured if names is None else names)
        self.table, self.measured = table, [item for item in measured if item.cell.name in wanted]
        places = [cell for cell in table.cells if names is None or cell.name in wanted]
        lines = {cell.row for cell in places}
        bits = {table.lines[row].bits for row in lines}
        context = (i for i, line in enumerate(table.lines) if not line.measured)
        lines |= {row for row in context if table.lines[row].bits in bits}
        self.columns = sorted({cell.column for cell in places})
        every = diff.measurements(item.record for item in self.measured)
        keys = {(item.cell.name, diff.settings_key(item.record)) for item in self.measured}
        rows = []
        for cell in table.cells:
            if cell.row in lines and cell.column in self.columns:
                own = [it for it in every if it.metric == cell.metric]
                own = [it for it in own if (cell.name, it.settings) in keys]
                # There are several if data, weights or settings differ between the seeds.
                item = max(own, key=lambda one: one.record.finished, default=None)
                missing = UNREADABLE if cell.name in unreadable else NOT_MEASURED
                rows.append(_cell(table, cell, item, missing))
        self.cells = pd.DataFrame(rows)

    @property
    def judged(self) -> pd.DataFrame:
        """The measured cells that have a published number."""
        return self.cells[self.cells["judged"]]

    @cached_property
    def shown(self) -> list[Shown]:
        """The printed rows: up to three for a line with measured numbers, else one."""
        found = []
        for index, own in self.cells.groupby("line"):
            line = self.table.lines[index]
            if not line.measured and (own["text"] == NOTHING).all():
                continue
            verdicts = own["verdict"].where(own["judged"], "").tolist()
            name = head_text(line.row.head)
            found.append(Shown(line, True, name, own["text"].tolist(), verdicts))
            beside = {"published": "published text", "difference ± error": "difference text"}
            for label, column in beside.items() if own["measured"].notna().any() else ():
                if not own[column].isin([NOTHING, ""]).all():
                    texts, none = own[column].tolist(), [""] * len(own)
                    found.append(Shown(line, False, label, texts, none))
        return found

    @property
    def legend(self) -> str:
        """Meaning of the marks in the table, in one line."""
        texts = " ".join(text for row in self.shown for text in row.texts)
        parts = [f"{mark} {words}" for mark, words in _LEGEND.values() if mark in texts]
        if (self.cells["measured"].notna() & ~self.cells["judged"]).any():
            parts.append("a measured number without a mark: no number is published")
        if any(not row.line.measured for row in self.shown):
            parts.append("rows without marks: published numbers, for context")
        return "; ".join(parts) + "."

    @property
    def notes(self) -> list[str]:
        """Reasons for missing verdicts, remarks and footnotes, one line each."""
        noted, order = self.judged.explode("notes").dropna(subset="notes"), {"×": 0, "?": 1}
        texts = sorted(unique(noted["notes"]), key=lambda text: order.get(text[0], 2))
        lines = [f"{text}: {self._places(noted[noted['notes'] == text])}." for text in texts]
        return [*lines, *self.table.footnotes, *(one.line for one in self.damaged)]

    def _places(self, cells: pd.DataFrame) -> str:
        """Return the names of judged cells, summarised where they are all of a kind."""
        quantized = self.judged[self.judged["method"] != "fp"]
        for name, every in (("compared", self.judged), ("quantized", quantized)):
            if len(every) == len(cells) > 1:
                return f"all {name} numbers"
        texts = []
        for line, own in cells.groupby("line", sort=False):
            complete = (self.judged["line"] == line).sum() == len(own) > 1
            where = "all columns" if complete else ", ".join(own["column"])
            texts.append(f"{line_text(self.table.lines[line])} ({where})")
        return "; ".join(texts)

    def conclusion(self) -> tuple[str, int]:
        """Return the last sentence of a run, and its exit code.

        0: all comparable numbers are reproduced; 1: some are not; 2: no number is comparable, or
        records cannot be read.
        """
        # A number that the table repeats counts once.
        numbers = self.cells[self.cells["name"] != ""].drop_duplicates(["name", "metric"])
        verdicts = numbers.loc[numbers["judged"], "verdict"].value_counts()
        unlike = verdicts.pop(NOT_COMPARABLE) if NOT_COMPARABLE in verdicts else 0
        if verdicts.empty:
            done = numbers[numbers["measured"].notna()]
            why = f"{count(len(done), 'number')} measured, but {'; '.join(unique(done['rule']))}"
            why = why if len(done) else "nothing is measured"
            return f"Nothing is comparable with the published table: {why}.", 2
        missing, unread = (
            int((numbers["mark"] == _LEGEND[why][0]).sum()) for why in (NOT_MEASURED, UNREADABLE)
        )
        counts = ", ".join(f"{verdicts[name]} {name}" for name in _LEGEND if name in verdicts)
        others = ((unlike, NOT_COMPARABLE), (missing, NOT_MEASURED), (unread, UNREADABLE))
        rest = ", ".join(f"{number} {words}" for number, words in others if number)
        sentence = f"Compared {count(verdicts.sum(), 'number')}: {counts}{rest and f' ({rest})'}."
        same = set(verdicts.index) == {diff.REPRODUCED}
        return sentence, 2 if self.damaged else 0 if same else 1

    def markdown(self, width: int | None = None) -> str:
        """Return the table with legend and notes, split to fit the ``width`` of a terminal."""
        table, seeds = self.table, seeds_of(self.measured)
        heads = [head_text(table.columns[column].head) for column in self.columns]
        labels = [line_text(row.line) if row.own else row.label for row in self.shown]
        index = pd.Index(labels, name="method")
        body = pd.DataFrame([row.texts for row in self.shown], columns=heads, index=index)
        lines = [self.legend, *data_lines(self.measured)]
        lines += [f"Seeds: {', '.join(map(str, seeds))}."] if seeds else []
        parts = [
            f"# {table.title}",
            f"{table.caption} Source: {table.paper}.",
            *formats.markdown(body, width),
            "\n".join(f"- {one_line(line)}" for line in [*lines, *self.notes]),
        ]
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """Return one CSV line per cell with a measured or published number."""
        cells = self.cells.dropna(subset=["measured", "published"], how="all")
        return csv_text(cells[COLUMNS].astype({"seeds": "Int64", "n": "Int64"}))

    def tex(self) -> str:
        """Return the table as LaTeX that needs only the package booktabs."""
        table, words, last = self.table, [], ""
        for row in self.shown:
            bits = bits_text(row.line.bits)
            name = row.label if row.own else f"  {row.label}"
            words.append((bits if row.own and bits != last else "", name))
            last = bits
        body = pd.DataFrame(
            [row.texts for row in self.shown],
            index=pd.MultiIndex.from_tuples(words, names=["Bits", "Method"]),
            columns=[head_pair(table.columns[column].head) for column in self.columns],
        )
        caption = f"{table.title}. {table.caption} Source: {table.paper}."
        text = formats.latex(body, caption, table.name, " ".join([self.legend, *self.notes]))
        return f"{formats.PREAMBLE}\n\n{text}\n"


def _cell(
    table: PublishedTable, cell: TableCell, item: Measurement | None, missing: str
) -> dict[str, Any]:
    """Return a cell of a published table with its measurement; ``missing`` says why it has none.

    Returns:
        :data:`COLUMNS`; ``line``, the index of the line; ``name`` of the grid's cell (empty for
        context); ``judged``, True if both numbers exist; ``mark``, ``rule`` and ``notes`` of the
        verdict; ``text``, the measured or else the published number, with its mark; ``published
        text``; ``difference text``.
    """
    row, line, name = cell.published or {}, table.lines[cell.row], cell.name
    number = float(row["value"]) if row else None
    judged = diff.judge(item, row, load_names()) if item and row else None
    missing = "context" if name is None else missing if item is None else NOT_COMPARABLE
    verdict = judged.verdict if judged else missing
    mark = _LEGEND[verdict][0] if row and verdict in _LEGEND else ""
    unclear = judged and verdict in (NOT_COMPARABLE, diff.UNCERTAIN)
    notes = [f"{mark} {judged.rule}"] if judged and unclear else []
    value, gap = item.mean if item else number, judged.difference if judged else math.nan
    return {
        "row": head_text(line.row.head),
        "column": head_text(table.columns[cell.column].head),
        "model": name.model if name else row.get("model", ""),
        "weights": cell.weights,
        "method": name.method if name else row.get("method", ""),
        "bits": line.bits,
        "metric": cell.metric or row.get("metric", ""),
        "measured": item and item.mean,
        "se": item and item.se,
        "seeds": item and item.seeds,
        "n": item and item.record.n,
        "published": number,
        **{field: row.get(field, "") for field in ("source", "variant", "evidence")},
        "difference": gap,
        "verdict": verdict,
        "reason": judged.reason if judged else cell.unpublished,
        "line": cell.row,
        "name": str(name or ""),
        "judged": judged is not None,
        "mark": mark,
        "rule": judged.rule if judged else cell.unpublished,
        "notes": [*notes, *(judged.remarks if judged else ())],
        "text": NOTHING if value is None else f"{value:.2f} {mark}".strip(),
        "published text": NOTHING if number is None else f"{number:.2f}",
        "difference text": "" if item is None or math.isnan(gap) else f"{gap:+.2f} ± {item.se:.2f}",
    }


def bits_text(bits: str) -> str:
    """Return bits as papers print them: ``W4/A4``; ``FP`` for full precision."""
    return {FULL: "FP", UNSTATED: "bits unstated"}.get(bits, bits.upper().replace("A", "/A"))


def line_text(line: Line) -> str:
    """Return the name of a line with its bits."""
    return head_text(line.row.head) + ("" if line.bits == FULL else f" {bits_text(line.bits)}")
