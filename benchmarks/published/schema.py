"""Content of the YAML file of a published table: rows, columns, and coordinates of their cells."""

from typing import Any

from pydantic import Field

from fimaq_core.documents import Strict

#: Heading of a row or column in one or two parts. Neighbours may share the first of two parts.
Head = str | tuple[str, str]


def head_pair(head: Head) -> tuple[str, str]:
    """Return a heading in two parts; the first may be empty."""
    return ("", head) if isinstance(head, str) else head


def head_text(head: Head) -> str:
    """Return a heading as one text."""
    return " ".join(head_pair(head)).strip()


class Coordinates(Strict):
    """Facts that find the published number of a cell, and the grid cell that measures it.

    The table, its rows and its columns may state each of them. A row goes before the table, and a
    column before both.
    """

    #: Task, data set, metric, method and variant have their names in the CSV files.
    task: str | None = None
    dataset: str | None = None
    metric: str | None = None
    model: str | None = None  #: full name of the weights (``names.yaml``), or ``unstated``
    scope: str | None = None  #: quantized part of the model
    method: str | None = None
    variant: str | None = None
    source: str | tuple[str, ...] | None = None  #: exactly one of them has the number
    study: str | None = None  #: study in ``ablation.csv``; None: take ``accuracy.csv``
    measure: str | None = None  #: method that is measured here; None: context only
    section: str | None = None  #: section of the grid that measures the cells
    point: str | None = None  #: axis point of that grid, such as ``loss=mse``
    #: Recipe fields as the source states them; the recipes of measured cells must have them.
    protocol: dict[str, Any] | None = None


class TableColumn(Coordinates):
    """Column of a published table."""

    head: Head

    @property
    def names(self) -> set[str]:
        """Names of the column for `Row.unpublished`."""
        return {head_text(self.head), head_pair(self.head)[0] or head_text(self.head)}


class Row(Coordinates):
    """Row of a published table; it becomes one line per bit-width."""

    head: Head
    bits: tuple[str, ...] | None = None  #: ``fp``, ``unstated``, ``w4a4``; None: the table's
    #: Reason why no source has numbers of this row; the row may still be measured. Or reasons by
    #: heading, or first part of a heading, of single columns; their cells are not measured.
    unpublished: str | dict[str, str] = ""

    def reason(self, column: TableColumn) -> str:
        """Return the reason why the row has no published number in a column; empty if it has."""
        if isinstance(self.unpublished, str):
            return self.unpublished
        return next((text for name, text in self.unpublished.items() if name in column.names), "")


class TableFile(Coordinates):
    """Content of the YAML file of a published table."""

    title: str
    caption: str
    paper: str  #: the paper with the table, and its arXiv number
    profile: str  #: the grid that has the measured cells
    bits: tuple[str, ...] = Field(min_length=1)  #: in the order of the lines, after full precision
    seeds: tuple[int, ...] = Field(min_length=1)  #: of the measured cells
    columns: tuple[TableColumn, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    footnotes: tuple[str, ...] = ()
