"""Published tables: reads ``tables/<name>.yaml``, finds the CSV row and grid cell of each cell."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from benchmarks.grid.cell import CellName
from benchmarks.grid.names import PUBLISHED, UNSTATED, load_names
from benchmarks.grid.schema import FP, Grid, known_method, load_grid, parse_bits
from benchmarks.published.schema import Coordinates, Row, TableFile, head_text
from fimaq_core.documents import read_yaml, validate
from fimaq_core.errors import FimaqError, suggest
from fimaq_core.recipe import OFF, Recipe, make_recipe
from tasks.common.record import bits_name

TABLES = PUBLISHED / "tables"
#: Bits of full precision.
FULL = bits_name(OFF, OFF)


class TableError(FimaqError):
    """A published table that does not exist or does not make sense."""


@dataclass(frozen=True)
class Line:
    """A row at certain bits: one line of the layout."""

    row: Row
    bits: str

    @property
    def measured(self) -> bool:
        """True if cells of the line are measured here."""
        return self.row.measure is not None


@dataclass(frozen=True)
class TableCell:
    """One cell of a published table."""

    row: int  #: index in :attr:`PublishedTable.lines`
    column: int
    weights: str  #: full name of the model's weights, or ``unstated``
    published: Mapping[str, str] | None = None  #: row of the CSV file; None: no source has one
    unpublished: str = ""  #: reason why there is none
    name: CellName | None = None  #: the grid cell that measures it; None: context
    metric: str | None = None  #: measured metric that compares with the number


class PublishedTable:
    """A published table: its layout, its numbers, and the grid cells that are measured for it.

    Columns, lines and cells go from left to right and from top to bottom.

    Example:
        >>> table = load_table("fimaq")
        >>> len(table.lines), len(table.columns), len(table.measured)
        (23, 7, 21)
    """

    def __init__(self, name: str, file: TableFile) -> None:
        """Find the cells of ``file``. Raises FimaqError where a cell cannot be found."""
        self.name, self.profile, self.columns = name, file.profile, file.columns
        self.title, self.caption, self.paper = file.title, file.caption, file.paper
        self.footnotes, self._seeds, self.base = file.footnotes, file.seeds, load_grid(file.profile)
        rows = [(row, row.bits or file.bits) for row in file.rows]
        order = _unique([FULL, *file.bits, *(width for _, widths in rows for width in widths)])
        lines = (Line(row, width) for width in order for row, widths in rows if width in widths)
        self.lines = tuple(lines)
        self.cells = tuple(self._find_cells(file))

    def _find_cells(self, file: TableFile) -> Iterator[TableCell]:
        heads = set().union(*(column.names for column in self.columns))
        for index, line in enumerate(self.lines):
            where, whys = head_text(line.row.head), line.row.unpublished
            for name in whys if isinstance(whys, dict) else ():
                _among("unknown column", name, heads, prefix=f"{where}: ")
            for number, column in enumerate(self.columns):
                try:
                    finder = _Finder((file, line.row, column), line.bits, self.base)
                    hole, why = line.row.hole(column), whys if isinstance(whys, str) else ""
                    yield TableCell(index, number, *finder.facts(hole, why or hole))
                except FimaqError as error:
                    place = f"{where} {line.bits}, {head_text(column.head)}"
                    raise TableError(f"{place}: {error}") from error

    @cached_property
    def measured(self) -> tuple[CellName, ...]:
        """Measured grid cells, each once: box and mask AP of a detector are one cell."""
        return tuple(_unique(cell.name for cell in self.cells if cell.name is not None))

    def grid(self) -> Grid:
        """Return the grid with exactly the measured cells of the table.

        The cells are those of the table's profile: a run of one finds the other's finished cells.
        """
        tasks, wanted = {}, {line.row.point for line in self.lines}
        for section in _unique(name.section for name in self.measured):
            names = [name for name in self.measured if name.section == section]
            lists = {f"{field}s": _values(names, field) for field in ("model", "method")}
            bits = tuple(width for width in _values(names, "bits") if width != FULL)
            changes = {**lists, "bits": bits or None, "seeds": self._seeds, "available": ()}
            tasks[section] = self.base.tasks[section].model_copy(update=changes)
        # Points that equal the grid's own settings are kept: their cell takes their places.
        axes = {
            axis: {point: fields for point, fields in points.items() if f"{axis}={point}" in wanted}
            for axis, points in self.base.axes.items()
        }
        axes = {axis: points for axis, points in axes.items() if points}
        changes = {"name": self.name, "description": self.title, "tasks": tasks, "axes": axes}
        changes |= {"extra": (), "next": (), "only": frozenset(self.measured)}
        return self.base.model_copy(update=changes)


def table_names() -> list[str]:
    """Return the names of the tables in this repository."""
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


def load_table(name: str) -> PublishedTable:
    """Return a table: a name (``fimaq``) or the path of a YAML file.

    Raises:
        TableError: there is none, or a key, name, number or setting in it does not fit.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = TABLES / f"{name}.yaml"
        if name not in table_names():
            hint = f"{suggest(name, table_names())} A path that ends in .yaml works too."
            raise TableError(f"Unknown table '{name}'.{hint}")
    where = f"The table {path}"
    file = validate(TableFile, read_yaml(path, "table", TableError), where, TableError)
    try:
        return PublishedTable(path.stem, file)
    except FimaqError as error:
        raise TableError(f"{where}: {error}") from error


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _values(names: Iterable[CellName], field: str) -> tuple[str, ...]:
    return tuple(_unique(getattr(name, field) for name in names))


#: Columns of the CSV files that tell the numbers of one source apart.
_KEYS = ("task", "dataset", "study", "model", "method", "variant", "w_bit", "a_bit", "metric")


@cache
def _numbers(file: str) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Return the rows of a CSV file by :data:`_KEYS`; a missing column counts as empty."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    with (PUBLISHED / f"{file}.csv").open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            found.setdefault(tuple(row.get(key, "") for key in _KEYS), []).append(row)
    return found


@cache
def _known(file: str, column: str) -> set[str]:
    return {row[column] for rows in _numbers(file).values() for row in rows}


def _among(what: str, name: str, known: Iterable[str], where: str = "", prefix: str = "") -> None:
    """Raise TableError, with a suggestion, if ``name`` is not among ``known``."""
    if name not in known:
        raise TableError(f"{prefix}{what} '{name}'{where}.{suggest(name, known)}")


class _Finder:
    """Finds the CSV row and the grid cell of one table cell from what is stated about the cell."""

    def __init__(self, parts: Sequence[Coordinates], bits: str, grid: Grid) -> None:
        stated: dict[str, Any] = {}
        for part in parts:
            fields = set(Coordinates.model_fields)
            stated |= part.model_dump(include=fields, exclude_none=True)
        self._stated, self._bits, self._grid, self._names = stated, bits, grid, load_names()
        self._variant = stated.get("variant", "")
        self._widths = (OFF, OFF) if bits in (FULL, UNSTATED) else parse_bits(bits)

    def facts(self, hole: str, why: str) -> tuple[Any, ...]:
        """Return the fields of :class:`TableCell` from ``weights`` on; raise TableError.

        ``why`` is the reason for a missing number. A ``hole`` of one column is not measured either.
        """
        weights, models = self._needed("model"), self._models()
        found = self._published(models)
        # The CSV files have no axis points: their numbers are of the method's own settings.
        if why and found and "point" not in self._stated:
            source = found[0]["source"]
            raise TableError(f"is said to be unpublished ({why}), but {source} has a number.")
        if not why and len(found) != 1:
            raise TableError(self._not_one(found))
        name = metric = None
        if "measure" in self._stated and not hole:
            name, metric = self._name(models[0]), self._metric()
            if name.point and not why:
                raise TableError(f"its published number is not of {name.point}: add 'unpublished'.")
        return weights, None if why else found[0], why, name, metric

    def _needed(self, field: str) -> str:
        if field not in self._stated:
            raise TableError(f"neither table, row nor column states '{field}': add it to one.")
        return str(self._stated[field])

    def _models(self) -> list[str]:
        """Return published names of the weights; in full precision those of every scope."""
        weights, scope = self._needed("model"), self._stated.get("scope")
        if weights == UNSTATED:
            return [UNSTATED]
        known = {name: entry for name, entry in self._names.models.items() if entry.tag == weights}
        if not known:
            tags = [entry.tag for entry in self._names.models.values()]
            longer = [tag for tag in tags if tag.startswith(f"{weights}.")]
            _among("unknown model", weights, longer or tags, " (full names only)")
        if self._needed("method") == "FP":
            return list(known)
        chosen = [name for name, entry in known.items() if scope in (None, entry.scope)]
        if len(chosen) != 1:
            scopes = ", ".join(str(entry.scope) for entry in known.values())
            raise TableError(f"{weights} needs one scope of {scopes} (given: {scope}).")
        return chosen

    def _published(self, models: Sequence[str]) -> list[dict[str, str]]:
        """Return the rows of the CSV files that fit the statements."""
        study, source = self._stated.get("study", ""), self._stated.get("source")
        sources = source if isinstance(source, tuple) else (self._needed("source"),)
        file = "ablation" if study else "accuracy"
        for name in sources:
            _among("unknown source", name, _known(file, "source"))
        if study:
            _among("unknown study", study, _known(file, "study"))
        place = ("", "") if study else (self._needed("task"), self._needed("dataset"))
        widths = ("", "") if self._bits == UNSTATED else tuple(map(str, self._widths))
        rest = (self._needed("method"), self._variant, *widths, self._needed("metric"))
        keys = [(*place, study, model, *rest) for model in models]
        rows = [row for key in keys for row in _numbers(file).get(key, [])]
        return [row for row in rows if row["source"] in sources]

    def _not_one(self, found: Sequence[Mapping[str, str]]) -> str:
        """Return the message for no published number, or for several ones."""
        fields = ("study", "method", "variant", "metric", "source")
        given = {name: self._stated[name] for name in fields if name in self._stated}
        asked = ", ".join(f"{name} '{value}'" for name, value in given.items())
        if not found:
            return f"no published number for {asked}. Correct that, or say why in 'unpublished'."
        sources = "; ".join(row["source"] for row in found)
        return f"{len(found)} published numbers for {asked}. Name one source of: {sources}."

    def _metric(self) -> str:
        task, dataset, metric = map(self._needed, ("task", "dataset", "metric"))
        entry = self._names.datasets.get(task, {}).get(dataset)
        if entry is None or metric not in entry.metrics:
            raise TableError(f"names.yaml does not map the {metric} of {dataset} ({task}).")
        return entry.metrics[metric]

    def _name(self, model: str) -> CellName:
        """Return the identity of the grid cell; its settings must be those of the protocol."""
        grid, section, method = self._grid, self._needed("section"), self._needed("measure")
        where, entry = f"profile '{grid.name}' has no", self._names.models[model]
        _among(f"{where} section", section, grid.tasks)
        part = grid.tasks[section]
        _among(f"{where} model", entry.id, (*part.models, *part.available), f" in {section}")
        self._check_comparable(method)
        if method == FP:
            return CellName(section, entry.id, "", FP, FULL, "")
        scope, point = str(entry.scope) if part.scopes else "", self._stated.get("point", "")
        if scope:
            _among(f"{where} scope", scope, part.scopes, f" in {section}")
        bits = dict(zip(("w_bits", "a_bits"), self._widths, strict=True))
        own = {**bits, "seed": grid.seeds[0], "scope": scope or None}
        overrides, changes = grid.overrides_of(section), {}
        if point:
            axis, _, name = point.rpartition("=")
            _among(f"{where} axis", axis, grid.axes)
            _among(f"axis '{axis}' has no point", name, grid.axes[axis])
            changes = grid.axes[axis][name]
        recipe = make_recipe(method, overrides, changes, own)
        self._check_protocol(recipe)
        point = "" if recipe == make_recipe(method, overrides, own) else point
        return CellName(section, entry.id, scope, method, self._bits, point)

    def _check_comparable(self, measure: str) -> None:
        known_method(measure)
        method = self._needed("method")
        entry = self._names.methods.get(method)
        allowed = None if entry is None else entry.comparable.get(self._variant)
        if allowed != measure:
            raise TableError(
                f"'{measure}' cannot be measured for {method} (variant '{self._variant}'). "
                f"names.yaml lets it compare with {allowed or 'no method here'}: correct "
                "'measure', or leave it out."
            )

    def _check_protocol(self, recipe: Recipe) -> None:
        protocol = self._stated.get("protocol")
        if not protocol:
            raise TableError("no 'protocol': state the source's calibration as recipe fields.")
        for field, value in protocol.items():
            _among("unknown recipe field", field, Recipe.model_fields, " in protocol")
            if getattr(recipe, field) != value:
                raise TableError(
                    f"the protocol says {field} {value}, but the recipe of {recipe.method} has "
                    f"{getattr(recipe, field)}. The source decides which of them is wrong."
                )
