"""Published tables: reads `tables/<name>.yaml` and finds the CSV row and grid cell of each cell."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from benchmarks.grid.cell import CellName
from benchmarks.grid.names import PUBLISHED, UNSTATED, load_names
from benchmarks.grid.schema import FP, Grid, known_method, load_grid, parse_bits, point_recipe
from benchmarks.published.schema import Coordinates, Row, TableFile, head_text
from fimaq_core.documents import read_yaml, validate
from fimaq_core.errors import FimaqError, suggest
from fimaq_core.recipe import OFF, Recipe, make_recipe
from tasks.common.record import bits_name

TABLES = PUBLISHED / "tables"
#: Name of the bits of full precision.
FULL = bits_name(OFF, OFF)


class TableError(FimaqError):
    """Published table that does not exist, or whose file has a mistake."""


@dataclass(frozen=True)
class Line:
    """Line of a printed table: a row of the file at one bit-width."""

    row: Row
    bits: str

    @property
    def measured(self) -> bool:
        """True if cells of the line are measured here; False for context."""
        return self.row.measure is not None


@dataclass(frozen=True)
class TableCell:
    """Cell of a published table."""

    row: int  #: index in :attr:`PublishedTable.lines`
    column: int  #: index in :attr:`PublishedTable.columns`
    weights: str  #: full name of the model's weights, or ``unstated``
    published: Mapping[str, str] | None = None  #: row of the CSV file; None: no number is published
    unpublished: str = ""  #: reason why no number is published
    name: CellName | None = None  #: the grid cell that measures it; None: context
    metric: str | None = None  #: metric of the record that compares with the published number


class PublishedTable:
    """Layout and numbers of a published table, and the grid cells that are measured for it.

    Columns, lines and cells go from left to right and from top to bottom.

    Example:
        >>> table = load_table("fimaq")
        >>> len(table.lines), len(table.columns), len(table.measured)
        (23, 7, 21)
    """

    def __init__(self, name: str, file: TableFile) -> None:
        """Find the CSV row and grid cell of each cell; raise FimaqError where there is none."""
        self.name, self.profile, self.columns = name, file.profile, file.columns
        self.title, self.caption, self.paper = file.title, file.caption, file.paper
        self.footnotes, self._seeds = file.footnotes, file.seeds
        self._base = load_grid(file.profile)
        rows = [(row, row.bits or file.bits) for row in file.rows]
        order = dict.fromkeys([FULL, *file.bits, *(width for _, own in rows for width in own)])
        self.lines = tuple(Line(row, width) for width in order for row, own in rows if width in own)
        self.cells = tuple(self._find_cells(file))

    def _find_cells(self, file: TableFile) -> Iterator[TableCell]:
        heads = set().union(*(column.names for column in self.columns))
        for index, line in enumerate(self.lines):
            row, bits, where = line.row, line.bits, head_text(line.row.head)
            by_column = isinstance(row.unpublished, dict)
            for name in row.unpublished if by_column else ():
                _among(f"{where}: unknown column", name, heads)
            for number, column in enumerate(self.columns):
                reason = row.reason(column)
                measured: tuple[CellName | None, str | None] = (None, None)
                try:
                    stated = _merged(file, row, column)
                    models = _models(stated)
                    published = _published(stated, bits, models, reason)
                    if stated.measure is not None and not (reason and by_column):
                        measured = _measured(stated, bits, models[0], self._base, reason)
                except FimaqError as error:
                    place = f"{where} {bits}, {head_text(column.head)}"
                    raise TableError(f"{place}: {error}") from error
                yield TableCell(index, number, str(stated.model), published, reason, *measured)

    @cached_property
    def measured(self) -> tuple[CellName, ...]:
        """Measured grid cells, each once: box AP and mask AP of a detector are one grid cell."""
        return tuple(dict.fromkeys(cell.name for cell in self.cells if cell.name is not None))

    def grid(self) -> Grid:
        """Return the grid with exactly the measured cells of the table.

        These are cells of the table's profile, so both share finished cells.
        """
        tasks: dict[str, Any] = {}
        for section in dict.fromkeys(name.section for name in self.measured):
            names = [name for name in self.measured if name.section == section]
            models, methods, bits = (
                tuple(dict.fromkeys(getattr(name, field) for name in names))
                for field in ("model", "method", "bits")
            )
            changes: dict[str, Any] = {"models": models, "methods": methods, "available": ()}
            changes |= {"bits": tuple(b for b in bits if b != FULL) or None, "seeds": self._seeds}
            tasks[section] = self._base.tasks[section].model_copy(update=changes)
        # A point that equals the grid's own settings adds no cell: the cell without point then
        # also stands at this point of the axis.
        wanted = {line.row.point for line in self.lines}
        axes = {
            axis: {point: fields for point, fields in points.items() if f"{axis}={point}" in wanted}
            for axis, points in self._base.axes.items()
        }
        axes = {axis: points for axis, points in axes.items() if points}
        changes = {"name": self.name, "description": self.title, "tasks": tasks, "axes": axes}
        changes |= {"extra": (), "next": (), "only": frozenset(self.measured)}
        return self._base.model_copy(update=changes)


def table_names() -> list[str]:
    """Return the names of the tables in this repository."""
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


def load_table(name: str) -> PublishedTable:
    """Return the table with this name (``fimaq``), or the table in a YAML file.

    Raises:
        TableError: there is no such table, or a key, name, number or setting in its file is wrong.
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


@cache
def csv_rows(file: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file of published numbers, such as ``accuracy``, as texts."""
    with (PUBLISHED / f"{file}.csv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _among(problem: str, name: str, known: Iterable[str], where: str = "") -> None:
    """Raise TableError, with a suggestion, if ``name`` is not among ``known``."""
    if name not in known:
        raise TableError(f"{problem} '{name}'{where}.{suggest(name, known)}")


def _merged(*parts: Coordinates) -> Coordinates:
    """Return the coordinates of all parts; a later part replaces those of earlier parts."""
    stated: dict[str, Any] = {}
    for part in parts:
        stated |= part.model_dump(include=set(Coordinates.model_fields), exclude_none=True)
    needed = ["model", "method", "metric", "source"]
    needed += [] if "study" in stated else ["task", "dataset"]
    for field in [*needed, "section"] if "measure" in stated else needed:
        if field not in stated:
            raise TableError(f"neither table, row nor column states '{field}': add it to one.")
    return Coordinates(**stated)


def _models(c: Coordinates) -> list[str]:
    """Return published names of the weights; for full precision, the names of all scopes."""
    if c.model == UNSTATED:
        return [UNSTATED]
    models = load_names().models
    known = {name: entry for name, entry in models.items() if entry.tag == c.model}
    if not known:
        tags = [entry.tag for entry in models.values()]
        longer = [tag for tag in tags if tag.startswith(f"{c.model}.")]
        _among("unknown model", str(c.model), longer or tags, " (full names only)")
    chosen = [name for name, entry in known.items() if c.scope in (None, entry.scope)]
    if c.method != "FP" and len(chosen) != 1:
        scopes = ", ".join(str(entry.scope) for entry in known.values())
        raise TableError(f"{c.model} needs one scope of {scopes} (given: {c.scope}).")
    return list(known) if c.method == "FP" else chosen


def _published(
    c: Coordinates, bits: str, models: Sequence[str], reason: str
) -> dict[str, str] | None:
    """Return the only row of the CSV files at these coordinates.

    None if ``reason`` says why no number is published. Raises TableError if no row or several rows
    fit, and if a row fits in spite of a reason.
    """
    sources = c.source if isinstance(c.source, tuple) else (str(c.source),)
    rows = csv_rows("ablation" if c.study else "accuracy")
    for name in sources:
        _among("unknown source", name, {row["source"] for row in rows})
    if c.study:
        _among("unknown study", c.study, {row["study"] for row in rows})
    place = {"study": c.study} if c.study else {"task": c.task, "dataset": c.dataset}
    widths = ("", "") if bits == UNSTATED else map(str, _widths(bits))
    wanted = {"method": c.method, "metric": c.metric, "variant": c.variant or "", **place}
    wanted |= zip(("w_bit", "a_bit"), widths, strict=True)
    found = [
        row
        for row in rows
        if row["model"] in models
        and row["source"] in sources
        and all(row[name] == value for name, value in wanted.items())
    ]
    # The CSV files have no axis points: their numbers are of the method's own settings.
    if reason and found and c.point is None:
        source = found[0]["source"]
        raise TableError(f"is said to be unpublished ({reason}), but {source} has a number.")
    if reason or len(found) == 1:
        return None if reason else {"task": str(c.task), "dataset": str(c.dataset), **found[0]}
    fields = ("study", "method", "variant", "metric", "source")
    given = {name: getattr(c, name) for name in fields if getattr(c, name) is not None}
    asked = ", ".join(f"{name} '{value}'" for name, value in given.items())
    if not found:
        advice = "Correct that, or say why in 'unpublished'."
        raise TableError(f"no published number for {asked}. {advice}")
    advice = f"Name one source of: {'; '.join(row['source'] for row in found)}."
    raise TableError(f"{len(found)} published numbers for {asked}. {advice}")


def _widths(bits: str) -> tuple[int, int]:
    return (OFF, OFF) if bits in (FULL, UNSTATED) else parse_bits(bits)


def _measured(
    c: Coordinates, bits: str, model: str, grid: Grid, reason: str
) -> tuple[CellName, str]:
    """Return the grid cell that measures a number, and the metric of its record.

    Raises TableError if the grid has no such cell, or its settings are not those of the protocol.
    """
    name = _cell_name(c, bits, model, grid, not reason)
    entry = load_names().datasets.get(str(c.task), {}).get(str(c.dataset))
    metric = None if entry is None else entry.metrics.get(str(c.metric))
    if metric is None:
        raise TableError(f"names.yaml does not map the {c.metric} of {c.dataset} ({c.task}).")
    return name, metric


def _cell_name(c: Coordinates, bits: str, model: str, grid: Grid, published: bool) -> CellName:
    names, section, method = load_names(), str(c.section), str(c.measure)
    entry, lacks = names.models[model], f"profile '{grid.name}' has no"
    _among(f"{lacks} section", section, grid.tasks)
    part = grid.tasks[section]
    _among(f"{lacks} model", entry.id, (*part.models, *part.available), f" in {section}")
    known_method(method)
    theirs, variant = names.methods.get(str(c.method)), c.variant or ""
    allowed = None if theirs is None else theirs.comparable.get(variant)
    if theirs is None or allowed != method:
        raise TableError(
            f"'{method}' cannot be measured for {c.method} (variant '{variant}'). "
            f"names.yaml lets it compare with {allowed or 'no method here'}: correct "
            "'measure', or leave it out."
        )
    if method == FP:
        return CellName(section, entry.id, "", FP, FULL, "")
    scope = str(entry.scope) if part.scopes else ""
    if scope:
        _among(f"{lacks} scope", scope, part.scopes, f" in {section}")
    changes, (w_bits, a_bits) = {}, _widths(bits)
    if c.point:
        axis, _, name = c.point.rpartition("=")
        _among(f"{lacks} axis", axis, grid.axes)
        _among(f"axis '{axis}' has no point", name, grid.axes[axis])
        changes = point_recipe(grid.axes[axis][name])
    own = {"w_bits": w_bits, "a_bits": a_bits, "seed": grid.seeds[0], "scope": scope or None}
    overrides = grid.overrides_of(section, method)
    recipe = make_recipe(method, overrides, changes, own)
    if published and recipe != make_recipe(method, overrides, theirs.changes, own):
        where = c.point or "the released settings"
        raise TableError(f"its published number is not of {where}: add 'unpublished'.")
    if not c.protocol:
        raise TableError("no 'protocol': state the source's calibration as recipe fields.")
    for field, value in c.protocol.items():
        _among("unknown recipe field", field, Recipe.model_fields, " in protocol")
        if getattr(recipe, field) != value:
            raise TableError(
                f"the protocol says {field} {value}, but the recipe of {method} has "
                f"{getattr(recipe, field)}. The source decides which of them is wrong."
            )
    point = "" if recipe == make_recipe(method, overrides, own) else c.point
    return CellName(section, entry.id, scope, method, bits, point or "")
