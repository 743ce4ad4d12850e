"""Content of the YAML file of a published table: rows, columns, and statements about cells."""

from typing import Any

from pydantic import Field

from fimaq_core.documents import Strict

#: A name in one part, or in two parts; neighbours may share the first.
Head = str | tuple[str, str]


def head_pair(head: Head) -> tuple[str, str]:
    """Return a head in two parts; the first may be empty."""
    return ("", head) if isinstance(head, str) else head


def head_text(head: Head) -> str:
    """Return a head in one part."""
    return " ".join(head_pair(head)).strip()


class Coordinates(Strict):
    """Statements about cells. A row replaces those of the table, and a column those of both."""

    task: str | None = None  #: name in the CSV files, like data set, metric, method, variant
    dataset: str | None = None
    metric: str | None = None
    model: str | None = None  #: full name of the weights, see ``names.yaml``, or ``unstated``
    scope: str | None = None  #: quantized part of the model
    method: str | None = None
    variant: str | None = None
    source: str | tuple[str, ...] | None = None  #: of several, exactly one has the number
    study: str | None = None  #: study in ``ablation.csv``; None: numbers of ``accuracy.csv``
    measure: str | None = None  #: id of the method that is measured here; None: context
    section: str | None = None  #: section of the grid that measures the cells
    point: str | None = None  #: axis point of that grid, such as ``loss=mse``
    #: Recipe fields as the source states them; the recipes of measured cells must have them.
    protocol: dict[str, Any] | None = None


class TableColumn(Coordinates):
    """Column of a published table."""

    head: Head

    @property
    def names(self) -> set[str]:
        """Names by which a row may refer to the column."""
        return {head_text(self.head), head_pair(self.head)[0] or head_text(self.head)}


class Row(Coordinates):
    """Row of a published table; it becomes one line per bit-width."""

    head: Head
    bits: tuple[str, ...] | None = None  #: ``fp``, ``unstated``, ``w4a4``; None: the table's
    #: Reason why no source has numbers of this row; the row may still be measured. Or reasons for
    #: single columns, by head or first part of a head; these cells stay empty.
    unpublished: str | dict[str, str] = ""

    def hole(self, column: TableColumn) -> str:
        """Return the reason why this column alone has no number; empty if it has one."""
        whys = self.unpublished if isinstance(self.unpublished, dict) else {}
        return next((why for name, why in whys.items() if name in column.names), "")


class TableFile(Coordinates):
    """Content of the file of a table."""

    title: str
    caption: str
    paper: str  #: the paper with the table, and its arXiv number
    profile: str  #: the grid that has the measured cells
    bits: tuple[str, ...] = Field(min_length=1)  #: in order, after full precision
    seeds: tuple[int, ...] = Field(min_length=1)  #: of the measured cells
    columns: tuple[TableColumn, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    footnotes: tuple[str, ...] = ()
