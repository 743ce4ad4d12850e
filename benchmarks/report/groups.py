"""Groups of measured cells that differ only in their seeds: one group per number in a table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.grid.cell import Cell, CellName
from benchmarks.results.scores import FULL, Column, Measured, over_seeds, scores, value_text


class Score(NamedTuple):
    """A metric of a group, averaged over seeds."""

    value: float
    error: float  #: half the error bar: sd over seeds; for one seed, standard error over samples
    text: str  #: value and sd, as in tables: ``92.53 ± 0.46``
    error_text: str  #: error and its kind


@dataclass(frozen=True)
class Group:
    """Measured cells of one subject, method, axis point and bits, one per seed."""

    id: str  #: id of the group's provenance on the page
    items: list[Measured]  #: at least one
    scores: dict[str, Score]  #: by metric

    @property
    def cell(self) -> Cell:
        """The cell of the first seed."""
        return self.items[0].cell

    @property
    def method(self) -> str:
        """Name of the group's row in tables."""
        return self.cell.row


def make_groups(measured: Sequence[Measured]) -> list[Group]:
    """Group cells that differ only in their seeds, in order of first appearance."""
    groups: dict[CellName, Group] = {}
    for item in measured:
        empty = Group(f"p{len(groups) + 1}", [], {})
        groups.setdefault(item.cell.name, empty).items.append(item)
    table = scores(measured)
    table["group"] = [groups[measured[place].cell.name].id for place in table["item"]]
    by_id = {group.id: group for group in groups.values()}
    for row in over_seeds(table, ["group", "metric"]).to_dict("records"):
        mean, sd, seeds, error = row["mean"], row["sd"], row["seeds"], row["sampling"]
        kind = "standard error over samples, one seed"
        if seeds > 1:
            error, kind = sd, f"sd over {seeds} seeds"
        score = Score(mean, error, value_text(mean, sd), f"± {error:.2f} {kind}")
        by_id[row["group"]].scores[row["metric"]] = score
    return list(groups.values())


def find(groups: Iterable[Group], column: Column) -> dict[str, Group]:
    """Return the groups of a column by row name.

    Full precision belongs to all columns of its model, and a group without bits to all columns of
    its subject.
    """
    return {
        group.method: group
        for group in groups
        if group.cell.subject == (column.model if group.cell.method == "fp" else column.subject)
        and group.cell.bits in (FULL, column.bits)
    }
