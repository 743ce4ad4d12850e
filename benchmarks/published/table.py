"""Published tables: reads ``tables/<name>.yaml`` and finds the CSV row and the grid cell of each table cell."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from benchmarks.cells import CellName
from benchmarks.grid import FP, load_grid, parse_bits
from benchmarks.names import PUBLISHED, UNSTATED, MethodName, load_names
from benchmarks.schema import Grid, Strict
from fimaq_core.errors import FimaqError, suggest
from fimaq_core.recipe import METHODS, OFF, Recipe, make_recipe
from tasks.common.record import bits_name

TABLES = PUBLISHED / "tables"
#: Name of the bits of what is not quantized.
FULL = bits_name(OFF, OFF)
#: A name in one part, or in two of which the first is shared by several rows or columns.
Head = str | tuple[str, str]


class TableError(FimaqError):
    """A published table that does not exist or does not make sense."""


class Coordinates(Strict):
    """What a table, a row or a column states of its cells; a row's value replaces the table's, a column's both.

    Attributes:
        task, dataset, metric: as the CSV files name them.
        model: full name of the weights, as ``names.yaml`` maps it; ``unstated`` where the source names none.
        scope: which part of the model is quantized, where ``names.yaml`` distinguishes scopes of the same weights.
        method, variant: as the CSV files name them.
        source: where the numbers were read; of several sources, one has the number of a cell.
        study: a study of ``ablation.csv``, which has the numbers then; None: ``accuracy.csv`` has them.
        measure: id of the method that is measured here; None: the numbers are context.
        section: section of the profile's grid that measures the cells.
        point: point of an axis of the profile's grid, such as ``loss=mse``; None: the grid's own settings.
        protocol: recipe fields as the source states them, which the recipes of measured cells must have.
    """

    task: str | None = None
    dataset: str | None = None
    metric: str | None = None
    model: str | None = None
    scope: str | None = None
    method: str | None = None
    variant: str | None = None
    source: str | tuple[str, ...] | None = None
    study: str | None = None
    measure: str | None = None
    section: str | None = None
    point: str | None = None
    protocol: dict[str, Any] | None = None


class Column(Coordinates):
    """A column; ``head`` names it."""

    head: Head


class Row(Coordinates):
    """A row, which stands once for each of its bits.

    Attributes:
        head: names it.
        bits: ``fp``, ``unstated`` or such as ``w4a4``; None: all bits of the table.
        unpublished: why no source has its numbers; such a row may be measured all the same. Or the same for
            single columns, by their heads or the first parts of these; such cells stay empty.
    """

    head: Head
    bits: tuple[str, ...] | None = None
    unpublished: str | dict[str, str] = ""


class _File(Coordinates):
    """Content of a table's file.

    Attributes:
        title, caption: above the table.
        paper: the paper whose table it is, with its arXiv number.
        profile: the grid that has the measured cells.
        bits: in the order of the table, after full precision.
        seeds: of the measured cells.
        footnotes: below the table.
    """

    title: str
    caption: str
    paper: str
    profile: str
    bits: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    columns: tuple[Column, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    footnotes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TableCell:
    """One cell of a published table.

    Attributes:
        row, column: its place; the row is one of :attr:`PublishedTable.lines`.
        weights: full name of the model's weights, or ``unstated``.
        scope: which part of the model is quantized; None where the source leaves no choice.
        published: the row of the CSV file; None where no source has a number.
        unpublished: why there is none.
        name: identity of the grid's cell that measures it; None for context.
        metric: the measured metric that compares with the number, where the cell is measured.
    """

    row: int
    column: int
    weights: str
    scope: str | None
    published: Mapping[str, str] | None
    unpublished: str
    name: CellName | None
    metric: str | None


@dataclass(frozen=True)
class Line:
    """A row at certain bits: what the layout shows as one line."""

    row: Row
    bits: str

    @property
    def measured(self) -> bool:
        """Whether the line has cells that this project measures."""
        return self.row.measure is not None


class PublishedTable:
    """A published table: its layout, its numbers, and the grid cells that are measured for it.

    Attributes:
        name: of the file, and of the files that a run writes.
        title, caption, paper, footnotes: its texts.
        profile: name of the profile that has the measured cells.
        columns: from left to right.
        lines: from top to bottom.
        cells: from left to right and top to bottom.
    """

    def __init__(self, name: str, file: _File) -> None:
        """Resolve the cells of ``file``. Raises TableError where one is not to be had."""
        self.name, self.profile, self.columns = name, file.profile, file.columns
        self.title, self.caption, self.paper = file.title, file.caption, file.paper
        self.footnotes, self._file = file.footnotes, file
        rows = [row.model_copy(update={"bits": row.bits or file.bits}) for row in file.rows]
        widths = dict.fromkeys((FULL, *file.bits, *(bits for row in rows for bits in row.bits or ())))
        self.lines = tuple(Line(row, bits) for bits in widths for row in rows if bits in (row.bits or ()))
        self._base = load_grid(file.profile)
        self.cells = tuple(_Resolver(self).cells())

    @property
    def coordinates(self) -> Coordinates:
        """What the table states of all its cells."""
        return self._file

    @property
    def base(self) -> Grid:
        """The grid of its profile."""
        return self._base

    @cached_property
    def measured(self) -> tuple[CellName, ...]:
        """Identities of the measured grid cells, each once; a detector's box and mask score are of one cell."""
        return tuple(dict.fromkeys(cell.name for cell in self.cells if cell.name is not None))

    def grid(self) -> Grid:
        """Return the grid that has exactly the table's measured cells, as its profile has them.

        The cells are the profile's own: each finds what the other has finished.
        """
        base, tasks = self._base, {}
        for section in dict.fromkeys(name.section for name in self.measured):
            names = [name for name in self.measured if name.section == section]
            part = base.tasks[section]
            bits = tuple(dict.fromkeys(name.bits for name in names if name.bits != FULL))
            scopes = [scope for scope in part.scopes if any(name.scope == scope for name in names)]
            tasks[section] = part.model_copy(update={
                "models": tuple(dict.fromkeys(name.model for name in names)), "available": (),
                "methods": tuple(dict.fromkeys(name.method for name in names)), "bits": bits or None,
                "seeds": self._file.seeds, "scopes": tuple(scopes),
            })  # fmt: skip
        points = {name.point for name in self.measured} | {
            str(line.row.point) for line in self.lines if line.row.point is not None
        }
        axes = {
            axis: kept
            for axis, known in base.axes.items()
            if (kept := {point: changes for point, changes in known.items() if f"{axis}={point}" in points})
        }
        return base.model_copy(update={
            "name": self.name, "description": self.title, "tasks": tasks, "axes": axes, "extra": (), "next": (),
            "methods": tuple(dict.fromkeys(name.method for name in self.measured)),
            "bits": tuple(dict.fromkeys(n.bits for n in self.measured if n.bits != FULL)) or base.bits,
            "seeds": self._file.seeds, "only": frozenset(self.measured),
        })  # fmt: skip


def table_names() -> list[str]:
    """Return the names of the tables that are here."""
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


def load_table(name: str) -> PublishedTable:
    """Return a table: a name (``fimaq``) or the path of a YAML file.

    Raises:
        TableError: there is no such table or file, it is no YAML, or a key, a name, a number or a setting in it does
            not fit; the text says which, and what would.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else TABLES / f"{name}.yaml"
    if path.parent == TABLES and name not in table_names():
        raise TableError(f"Unknown table '{name}'.{suggest(name, table_names())} A path that ends in .yaml works too.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableError(f"Cannot read the table {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TableError(f"The table {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise TableError(f"The table {path} must hold 'key: value' lines.")
    try:
        return PublishedTable(path.stem, _File.model_validate(content))
    except ValidationError as error:
        raise TableError(f"The table {path}: {' '.join(_problem(item) for item in error.errors())}") from error
    except FimaqError as error:
        raise TableError(f"The table {path}: {error}") from error


def _problem(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{place}: {item['msg']} (given: {item['input']!r})."
    parts: dict[str, type[Strict]] = {"columns": Column, "rows": Row}
    owner = parts.get(str(item["loc"][0]), _File)
    return f"Unknown key '{place}'.{suggest(str(item['loc'][-1]), owner.model_fields)}"


def head_text(head: Head) -> str:
    """Return a head in one part."""
    return head if isinstance(head, str) else " ".join(head)


#: Columns of the CSV files that tell apart the numbers of one source.
_KEYS = ("task", "dataset", "study", "model", "method", "variant", "w_bit", "a_bit", "metric")


@cache
def _numbers(file: Literal["accuracy", "ablation"]) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Rows of a CSV file by their :data:`_KEYS`; empty where the file has no such column."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    with (PUBLISHED / f"{file}.csv").open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            found.setdefault(tuple(row.get(key, "") for key in _KEYS), []).append(row)
    return found


@cache
def _known(file: Literal["accuracy", "ablation"], column: str) -> set[str]:
    return {row[column] for rows in _numbers(file).values() for row in rows}


class _Resolver:
    """Finds the CSV row and the grid cell of each cell of a table."""

    def __init__(self, table: PublishedTable) -> None:
        self._table, self._names = table, load_names()

    def cells(self) -> Iterator[TableCell]:
        heads = {text for column in self._table.columns for text in (head_text(column.head), _first(column.head))}
        for line in self._table.lines:
            for head in line.row.unpublished if isinstance(line.row.unpublished, dict) else ():
                if head not in heads:
                    raise TableError(f"{head_text(line.row.head)}: unknown column '{head}'.{suggest(head, heads)}")
        for row, line in enumerate(self._table.lines):
            for column, place in enumerate(self._table.columns):
                where = f"{head_text(line.row.head)} {line.bits}, {head_text(place.head)}"
                try:
                    yield self._cell(row, line, column, place)
                except FimaqError as error:
                    raise TableError(f"{where}: {error}") from error

    def _cell(self, row: int, line: Line, column: int, place: Column) -> TableCell:
        stated = _merged(self._table.coordinates, line.row, place)
        model = _needed(stated, "model")
        models = self._models(model, stated)
        why, hole = _why_unpublished(line.row, place)
        found = self._published(stated, models, line.bits)
        if why and stated.point is None and found:
            raise TableError(f"is said to be unpublished ({why}), but {found[0]['source']} has a number.")
        if not why and len(found) != 1:
            raise TableError(_not_one(found, stated))
        name = metric = None
        if stated.measure is not None and not hole:
            name = self._name(stated, models, line.bits)
            metric = self._metric(stated)
            if name.point and not why:
                raise TableError(f"is measured at {name.point}, but its published number is of the method's own settings.")
        published = None if why else found[0]
        return TableCell(row, column, model, stated.scope, published, why, name, metric)

    def _models(self, weights: str, stated: Coordinates) -> list[str]:
        """Published names of the weights; full precision has no scope, so names of every scope are its own."""
        names = self._names
        if weights == UNSTATED:
            return [UNSTATED]
        found = {name: entry for name, entry in names.models.items() if entry.tag == weights}
        if not found:
            known = [entry.tag for entry in names.models.values()]
            raise TableError(f"unknown model '{weights}' (names.yaml maps full names).{suggest(weights, known)}")
        if stated.method == "FP":
            return list(found)
        chosen = [name for name, entry in found.items() if stated.scope in (None, entry.scope)]
        if len(chosen) != 1:
            scopes = ", ".join(str(entry.scope) for entry in found.values())
            raise TableError(f"{weights} needs one scope of {scopes} (given: {stated.scope}).")
        return chosen

    def _published(self, stated: Coordinates, models: Sequence[str], bits: str) -> list[dict[str, str]]:
        file: Literal["accuracy", "ablation"] = "accuracy" if stated.study is None else "ablation"
        sources = _sources(stated)
        for column, values in (
            ("source", sources),
            ("study", [stated.study] if stated.study else []),
        ):
            for value in values:
                if value not in _known(file, column):
                    raise TableError(f"unknown {column} '{value}'.{suggest(value, _known(file, column))}")
        w_bits, a_bits = ("", "") if bits == UNSTATED else map(str, _widths(bits))
        place = ("", "") if stated.study else (_needed(stated, "task"), _needed(stated, "dataset"))
        return [
            row
            for model in models
            for row in _numbers(file).get((
                *place, stated.study or "", model, _needed(stated, "method"), stated.variant or "",
                w_bits, a_bits, _needed(stated, "metric"),
            ), [])
            if row["source"] in sources
        ]  # fmt: skip

    def _metric(self, stated: Coordinates) -> str:
        datasets = self._names.datasets.get(str(stated.task), {})
        entry = datasets.get(str(stated.dataset))
        if entry is None or stated.metric not in entry.metrics:
            raise TableError(f"names.yaml maps no {stated.metric} of {stated.dataset} ({stated.task}) to a measured one.")
        return entry.metrics[stated.metric]

    def _name(self, stated: Coordinates, models: Sequence[str], bits: str) -> CellName:
        """Return the identity of the grid's cell, once its model, method, point and recipe are the profile's."""
        grid, section, method = (
            self._table.base,
            _needed(stated, "section"),
            _needed(stated, "measure"),
        )
        if section not in grid.tasks:
            raise TableError(f"profile '{grid.name}' has no section '{section}'.{suggest(section, grid.tasks)}")
        part, entry = grid.tasks[section], self._names.models[models[0]]
        known = (*part.models, *part.available)
        if entry.id not in known:
            raise TableError(f"profile '{grid.name}' has no model '{entry.id}' in {section}.{suggest(entry.id, known)}")
        self._check_comparable(stated)
        scope = (entry.scope or "") if part.scopes and method != FP else ""
        if part.scopes and scope not in ("", *part.scopes):
            raise TableError(f"profile '{grid.name}' has no scope '{scope}' in {section}.{suggest(scope, part.scopes)}")
        if method == FP:
            return CellName(section, entry.id, "", FP, FULL, "")
        w_bits, a_bits = _widths(bits)
        own = {"w_bits": w_bits, "a_bits": a_bits, "seed": grid.seeds[0], "scope": scope or None}
        overrides = grid.overrides_of(section)
        recipe = base = make_recipe(method, overrides, own)
        point = ""
        if stated.point is not None:
            recipe = make_recipe(method, overrides, _changes(grid, stated.point), own)
            point = "" if recipe == base else stated.point
        _check_protocol(stated, recipe)
        return CellName(section, entry.id, scope, method, bits, point)

    def _check_comparable(self, stated: Coordinates) -> None:
        method, variant, measure = str(stated.method), stated.variant or "", str(stated.measure)
        if measure != FP and measure not in METHODS:
            raise TableError(f"unknown method '{measure}' in measure.{suggest(measure, [FP, *METHODS])}")
        entry = self._names.methods.get(method, MethodName(id=""))
        if entry.comparable.get(variant) != measure:
            raise TableError(
                f"'{measure}' cannot be measured for {method} ('{variant}'): names.yaml says that this variant "
                f"compares with {entry.comparable.get(variant) or 'no method here'}. Correct measure or variant, "
                "or leave measure out."
            )


def _merged(table: Coordinates, row: Coordinates, column: Coordinates) -> Coordinates:
    fields = list(Coordinates.model_fields)
    parts = [part.model_dump(include=set(fields), exclude_none=True) for part in (table, row, column)]
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= part
    return Coordinates.model_construct(**merged)


def _needed(stated: Coordinates, name: str) -> str:
    value = getattr(stated, name)
    if value is None:
        raise TableError(f"neither table, row nor column states '{name}': add it to one of them.")
    return str(value)


def _sources(stated: Coordinates) -> tuple[str, ...]:
    return (_needed(stated, "source"),) if not isinstance(stated.source, tuple) else stated.source


def _widths(bits: str) -> tuple[int, int]:
    return (OFF, OFF) if bits == FULL else parse_bits(bits)


def _first(head: Head) -> str:
    return head if isinstance(head, str) else head[0]


def _why_unpublished(row: Row, column: Column) -> tuple[str, bool]:
    """Return why a cell has no published number (empty: it has one), and whether it is a hole of its row."""
    if isinstance(row.unpublished, str):
        return row.unpublished, False
    why = row.unpublished.get(head_text(column.head), row.unpublished.get(_first(column.head), ""))
    return why, bool(why)


def _not_one(found: Sequence[Mapping[str, str]], stated: Coordinates) -> str:
    wanted = {name: getattr(stated, name) for name in ("study", "method", "variant", "metric", "source")}
    asked = ", ".join(f"{name} '{value}'" for name, value in wanted.items() if value is not None)
    if not found:
        return f"no published number for {asked}. Correct them, or say why in 'unpublished'."
    sources = "; ".join(row["source"] for row in found)
    return f"{len(found)} published numbers for {asked}: name one source. They are from {sources}."


def _changes(grid: Grid, point: str) -> dict[str, Any]:
    axis, _, name = point.rpartition("=")
    if axis not in grid.axes:
        raise TableError(f"profile '{grid.name}' has no axis '{axis}'.{suggest(axis, grid.axes)}")
    if name not in grid.axes[axis]:
        raise TableError(f"axis '{axis}' has no point '{name}'.{suggest(name, grid.axes[axis])}")
    return grid.axes[axis][name]


def _check_protocol(stated: Coordinates, recipe: Recipe) -> None:
    if not stated.protocol:
        raise TableError("no 'protocol': say in recipe fields what the source states of calibration and steps.")
    for field, value in stated.protocol.items():
        if field not in Recipe.model_fields:
            raise TableError(f"unknown recipe field '{field}' in protocol.{suggest(field, Recipe.model_fields)}")
        if getattr(recipe, field) != value:
            raise TableError(
                f"protocol says {field} {value}, but the recipe of {recipe.method} has {getattr(recipe, field)}: "
                "one of them is not what the source states."
            )
