"""Groups: measured cells that differ in nothing but the seed, one per number of a table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

from benchmarks.grid.cell import Cell
from benchmarks.results.scores import (
    FULL,
    Column,
    Measured,
    in_order,
    over_seeds,
    scores,
    value_text,
)
from tasks.common.record import own_seconds


class Score(NamedTuple):
    """A mean over seeds.

    Attributes:
        error: half an error bar: the standard deviation over seeds, or with one seed the standard
            error from the finite number of samples.
        text: as tables have it, ``92.53 ± 0.46``.
        error_text: what the error is.
    """

    value: float
    seeds: int
    error: float
    text: str
    error_text: str


@dataclass(frozen=True)
class Group:
    """The cells of one subject, method, axis point and bits, one per seed.

    Attributes:
        id: of its provenance on the page; made here, so it is safe in links.
        items: at least one.
        scores: by metric.
    """

    id: str
    items: list[Measured]
    scores: dict[str, Score]

    @property
    def cell(self) -> Cell:
        """The first seed's cell: what all have in common."""
        return self.items[0].cell

    @property
    def method(self) -> str:
        """Its name in tables."""
        return row_name(self.cell)

    @cached_property
    def seconds(self) -> float:
        """Seconds of a cell, all stages together; mean over seeds."""
        return fmean(own_seconds(item.record) for item in self.items)


def row_name(cell: Cell) -> str:
    """Return the method, with the axis point: ``fimaq``, ``fimaq k=15``."""
    return f"{cell.method} {cell.point}".strip()


def make_groups(measured: Sequence[Measured]) -> list[Group]:
    """Group cells, in order of first appearance."""
    places: dict[tuple[str, ...], str] = {}
    ids = [places.setdefault(tuple(item.cell.name), f"p{len(places) + 1}") for item in measured]
    table = scores(measured)
    table["group"] = [ids[place] for place in table["item"]]
    found = {id: Group(id, [], {}) for id in places.values()}
    for item, id in zip(measured, ids, strict=True):
        found[id].items.append(item)
    for row in over_seeds(table, ["group", "metric"]).to_dict("records"):
        mean, sd, seeds = row["mean"], row["sd"], row["seeds"]
        error = sd if seeds > 1 else row["sampling"]
        kind = f"sd over {seeds} seeds" if seeds > 1 else "standard error over samples, one seed"
        score = Score(mean, seeds, error, value_text(mean, sd), f"± {error:.2f} {kind}")
        found[row["group"]].scores[row["metric"]] = score
    return list(found.values())


def rows_of(cells: Iterable[Cell]) -> list[str]:
    """Return names of a table's rows: methods in their order, each followed by its axis points."""
    names = {row_name(cell): cell.method for cell in cells}
    methods = in_order(names.values())
    return sorted(names, key=lambda name: (methods.index(names[name]), name != names[name]))


def find(groups: Iterable[Group], column: Column) -> dict[str, Group]:
    """Return the groups in a column by their row.

    What has no bits stands in all columns of its subject, and full precision in all of its model.
    """
    return {
        group.method: group
        for group in groups
        if group.cell.subject == (column.model if group.cell.method == "fp" else column.subject)
        and group.cell.bits in (FULL, column.bits)
    }
