"""What the page shows, as plain data: everything is computed before the templates see it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.report.charts.shapes import Chart
from benchmarks.report.gather import Failed, Problem
from benchmarks.report.groups import Column
from benchmarks.report.views import Board, ModuleMapView, Origin, Picture


@dataclass(frozen=True)
class Value:
    """A number in a table.

    Attributes:
        text: as it is shown.
        number: what it sorts by; None where nothing is measured.
        link: id of its provenance.
        best: whether it is the best of its column.
        near: whether it cannot be told from the best.
        share: length of the bar beneath it, 0 to 1; None for no bar.
        title: more of it in words.
    """

    text: str
    number: float | None = None
    link: str = ""
    best: bool = False
    near: bool = False
    share: float | None = None
    title: str = ""


@dataclass(frozen=True)
class Row:
    """A method's row; ``about`` says what the method does: special quantizers, what is optimised."""

    method: str
    values: Sequence[Value]
    about: tuple[str, str]


@dataclass(frozen=True)
class Wide:
    """A table of methods × (subject, bits)."""

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]

    @property
    def heads(self) -> list[tuple[str, str, int]]:
        """Subject, its model, and how many columns are its own, in order."""
        found: list[tuple[str, str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.subject:
                found[-1] = (column.subject, column.model, found[-1][2] + 1)
            else:
                found.append((column.subject, column.model, 1))
        return found


@dataclass(frozen=True)
class DataTable:
    """What a chart shows, in figures: a head, and rows whose first cell names them; ``methods`` are the rows' for filters."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    methods: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A chart with its title, its words, and its data."""

    id: str
    title: str
    chart: Chart
    data: DataTable
    subject: str = ""
    model: str = ""
    bits: str = ""
    note: str = ""


@dataclass
class Section:
    """A section of the grid: everything about one task on one data set."""

    name: str
    task: str
    metric: str
    unit: str
    data: Sequence[str]
    table: Wide
    others: Sequence[Wide]
    notes: Sequence[str]
    by_bits: Sequence[Figure]
    compared: Sequence[Figure]
    recovery: Wide | None
    errors: Sequence[Figure]
    fisher: Sequence[Figure]
    without_blocks: int
    times: Sequence[Figure]
    memory: Sequence[Figure]
    costs: Sequence[Figure]
    modules: Sequence[ModuleMapView]
    boards: Sequence[Board]
    without_examples: int
    origins: Sequence[Origin]
    axes: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()


@dataclass(frozen=True)
class Verdict:
    """A measured value beside a published one."""

    cells: Sequence[str]
    kind: str
    text: str
    reason: str


@dataclass(frozen=True)
class Published:
    """The comparison with published numbers; ``hidden`` says of what has none why, with how many values."""

    head: Sequence[str]
    rows: Sequence[Verdict]
    hidden: Sequence[tuple[str, int]]
    summary: str


@dataclass(frozen=True)
class TableRow:
    """A row of a published table.

    Attributes:
        bits, label: its first two cells.
        kind: ``measured``, ``context``, or ``beside`` for what stands below a measured row.
        cells: text and style of the verdict, by column.
    """

    bits: str
    label: str
    kind: str
    cells: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class PaperTable:
    """A published table in its own layout.

    Attributes:
        title, caption, source: its texts.
        groups: heads that several columns share, with the number of these; empty without any.
        columns: the heads below.
        rows: from top to bottom.
        lines: the conclusion, the legend and notes.
    """

    title: str
    caption: str
    source: str
    groups: Sequence[tuple[str, int]]
    columns: Sequence[str]
    rows: Sequence[TableRow]
    lines: Sequence[str]


@dataclass
class Page:
    """The whole report."""

    title: str
    profile: str
    description: str
    made: str
    measured_from: str
    measured_to: str
    planned: int
    done: int
    failed: int
    missing: int
    beyond: int
    foreign: int
    facts: Sequence[tuple[str, Sequence[str]]]
    sections: Sequence[Section]
    empty: Sequence[str]
    published: Published
    pictures: Sequence[Picture]
    failures: Sequence[Failed]
    problems: Sequence[Problem]
    filters: dict[str, Sequence[str]] = field(default_factory=dict)
    looks: dict[str, str] = field(default_factory=dict)
    reference: Sequence[str] = ()
    stages: dict[str, int] = field(default_factory=dict)
    table: PaperTable | None = None

    @property
    def by_id(self) -> dict[str, Picture]:
        """The pictures by their ids."""
        return {picture.id: picture for picture in self.pictures}

    @property
    def with_blocks(self) -> set[str]:
        """Methods that some chart of blocks shows."""
        return {method for section in self.sections for figure in section.errors for method in figure.data.head[1:]}
