"""Groups: measured cells that differ in nothing but the seed. A number of a table, a point of a chart is one of these."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

from benchmarks.cells import MAIN_METRIC, Cell
from benchmarks.results.scores import FULL, Measured, in_order, unique
from tasks.common.record import own_seconds


@dataclass(frozen=True)
class Group:
    """The cells of one subject, method, axis point and bits, one a seed.

    Attributes:
        id: of its provenance on the page; made here, so it is safe in links.
        items: at least one.
    """

    id: str
    items: tuple[Measured, ...]

    @property
    def cell(self) -> Cell:
        """The first seed's cell: what all have in common."""
        return self.items[0].cell

    @property
    def method(self) -> str:
        """Its name in tables: the method, with the axis point where it lies on one."""
        return row_name(self.cell)

    @cached_property
    def seconds(self) -> float:
        """What a cell took, all stages together; mean over seeds."""
        return fmean(own_seconds(item.record) for item in self.items)

    def values(self, metric: str) -> list[float]:
        """What each seed scored."""
        return [item.record.metrics[metric].value for item in self.items if metric in item.record.metrics]

    def score(self, metric: str) -> "Score | None":
        """Mean and errors of a metric; None where no seed has it."""
        metrics = [item.record.metrics[metric] for item in self.items if metric in item.record.metrics]
        if not metrics:
            return None
        values = [found.value for found in metrics]
        sampling = math.sqrt(fmean(found.stderr**2 for found in metrics))
        return Score(fmean(values), stdev(values) if len(values) > 1 else None, sampling, len(values))


@dataclass(frozen=True)
class Score:
    """A mean over seeds.

    Attributes:
        sd: sample standard deviation over seeds; None where there is one.
        sampling: standard error of one seed from its finite number of samples.
    """

    mean: float
    sd: float | None
    sampling: float
    seeds: int

    @property
    def error(self) -> float:
        """Half the length of an error bar: the spread over seeds, or the sampling error where there is one seed."""
        return self.sampling if self.sd is None else self.sd

    @property
    def text(self) -> str:
        """As tables have it: ``92.53 ± 0.46``."""
        return f"{self.mean:.2f}" if self.sd is None else f"{self.mean:.2f} ± {self.sd:.2f}"

    @property
    def error_text(self) -> str:
        """What the error bar is."""
        if self.sd is None:
            return f"± {self.sampling:.2f} standard error over samples, one seed"
        return f"± {self.sd:.2f} sd over {self.seeds} seeds"


def row_name(cell: Cell) -> str:
    """The method, with the axis point: ``fimaq``, ``fimaq k=15``."""
    return f"{cell.method} {cell.point}" if cell.point else cell.method


def make_groups(measured: Iterable[Measured], start: int = 1) -> list[Group]:
    """Group cells of one section, in order of first appearance; ids count from ``start``."""
    found: dict[tuple[str, ...], list[Measured]] = {}
    for item in measured:
        cell = item.cell
        found.setdefault((cell.section, cell.subject, cell.method, cell.point, cell.bits), []).append(item)
    return [Group(f"p{number}", tuple(items)) for number, items in enumerate(found.values(), start)]


def main_metric(task: str, measured: Sequence[Measured]) -> str:
    """The metric that a task's tables and charts show."""
    present = unique(name for item in measured for name in item.record.metrics)
    wanted = MAIN_METRIC.get(task)
    return wanted if wanted is not None and wanted in present else present[0]


def rows_of(cells: Iterable[Cell]) -> list[str]:
    """Names of a table's rows: methods in their order, each with its axis points after it."""
    points: dict[str, list[str]] = {}
    for cell in cells:
        names = points.setdefault(cell.method, [])
        if row_name(cell) not in names:
            names.append(row_name(cell))
    return [name for method in in_order(points) for name in sorted(points[method], key=lambda name: name != method)]


@dataclass(frozen=True)
class Column:
    """A column of a table: a subject at some bits. ``model`` is the subject's, without its scope."""

    subject: str
    model: str
    bits: str


def columns_of(cells: Sequence[Cell]) -> list[Column]:
    """Columns as :func:`benchmarks.tables.wide` has them: subjects in order, and their bits."""
    columns = []
    for model in unique(cell.model for cell in cells):
        mine = [cell for cell in cells if cell.model == model]
        for subject in unique(cell.subject for cell in mine if cell.method != "fp") or [model]:
            here = unique(cell.bits for cell in mine if cell.subject == subject and cell.bits != FULL) or [FULL]
            columns += [Column(subject, model, bits) for bits in here]
    return columns


def find(groups: Iterable[Group], column: Column) -> dict[str, Group]:
    """The groups in a column by their row; what has no bits stands in all columns of its subject, full precision of its model."""
    found: dict[str, Group] = {}
    for group in groups:
        cell = group.cell
        subject = column.model if cell.method == "fp" else column.subject
        if cell.subject == subject and cell.bits in (FULL, column.bits):
            found[group.method] = group
    return found
