"""Grids: which cells a profile has. A grid is a YAML file; filters narrow or widen it; it expands to cells."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from benchmarks.axes import Axes, GridError, check_axes, check_names, check_overrides, parse_axes, with_points
from benchmarks.cells import Cell, CellName, Key, RunOptions, make_cell
from benchmarks.schema import Extra, Grid, TaskGrid
from fimaq_core.errors import suggest
from fimaq_core.recipe import METHODS, OFF, make_recipe

GRIDS = Path(__file__).parent / "grids"
FP = "fp"

T = TypeVar("T")


@dataclass(frozen=True)
class Filters:
    """What a run is narrowed to; None leaves the grid's own list."""

    tasks: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    bits: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    axes: tuple[str, ...] | None = None

    @property
    def active(self) -> bool:
        """Whether anything is filtered."""
        return any(value is not None for value in (self.tasks, self.models, self.methods, self.bits, self.seeds, self.axes))


def load_grid(profile: str) -> Grid:
    """Read a profile: a name (``demo``, ``paper``) or the path of a YAML file.

    Raises:
        GridError: no such profile or file, not YAML, an unknown key (with a suggestion), or a bad value.
    """
    if profile.endswith((".yaml", ".yml")):
        path = Path(profile)
    else:
        path = GRIDS / f"{profile}.yaml"
        known = [file.stem for file in GRIDS.glob("*.yaml")]
        if profile not in known:
            raise GridError(f"Unknown profile '{profile}'.{suggest(profile, known)} A path that ends in .yaml works too.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GridError(f"Cannot read the grid {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GridError(f"The grid {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise GridError(f"The grid {path} must hold 'key: value' lines.")
    return parse_grid(content, str(path))


def parse_grid(content: dict[str, Any], where: str = "the grid") -> Grid:
    """Validate a grid's content. See :func:`load_grid`."""
    check_names(content.get("axes"), where)
    try:
        grid = Grid.model_validate(content)
    except ValidationError as error:
        raise GridError(f"{where}: " + " ".join(_problem(item) for item in error.errors())) from error
    parts: list[Grid | TaskGrid | Extra] = [grid, *grid.tasks.values(), *grid.extra]
    for method in (name for part in parts for name in part.methods or ()):
        _known_method(method)
    for bits in (name for part in parts for name in part.bits or ()):
        parse_bits(bits)
    for extra in grid.extra:
        if extra.task not in grid.tasks:
            raise GridError(f"{where}: unknown task '{extra.task}' in extra.{suggest(extra.task, grid.tasks)}")
    check_overrides(grid.overrides, where)
    for section, part in grid.tasks.items():
        check_overrides(part.overrides, f"{where}, tasks.{section}")
        quantizing = [method for method in grid.methods_of(section) if method != FP]
        for method in quantizing:
            make_recipe(method, grid.overrides_of(section))
        check_axes(grid.axes, quantizing, grid.overrides_of(section), where)
    return grid


def _problem(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{place}: {item['msg']} (given: {item['input']!r})."
    parts: dict[str, type[BaseModel]] = {"tasks": TaskGrid, "extra": Extra}
    owner = parts[str(item["loc"][0])] if len(item["loc"]) > 1 else Grid
    return f"Unknown key '{place}'.{suggest(str(item['loc'][-1]), owner.model_fields)}"


def parse_bits(text: str) -> tuple[int, int]:
    """Return weight and activation bits of a name such as ``w3a3``."""
    match = re.fullmatch(r"w(\d+)a(\d+)", text)
    if match is None:
        raise GridError(f"'{text}' is no bit-width: write such as w3a3 or w4a8.")
    bits = (int(match[1]), int(match[2]))
    for value in bits:
        if value != OFF and not 2 <= value <= 8:
            raise GridError(f"'{text}': {value} bits is outside 2 to 8 (or {OFF} for off).")
    if bits == (OFF, OFF):
        raise GridError(f"'{text}' is full precision: that is the method '{FP}', which needs no bits.")
    return bits


def changes_model_only(method: str) -> bool:
    """Whether a method fixes its bits at 32/32: it measures a changed full-precision model, once for all bits."""
    settings = METHODS.get(method, {})
    return settings.get("w_bits") == OFF and settings.get("a_bits") == OFF


def _known_method(name: str) -> None:
    if name != FP and name not in METHODS:
        raise GridError(f"Unknown method '{name}'.{suggest(name, [FP, *METHODS])}")


def parse_filters(
    grid: Grid, tasks: str = "", models: str = "", methods: str = "", bits: str = "", seeds: str = "", axes: str = ""
) -> Filters:
    """Turn comma lists into filters on ``grid``; an empty text leaves that side unfiltered.

    Raises:
        GridError: a value that does not exist, with a suggestion.
    """
    wanted_tasks, wanted_models = _split(tasks), _split(models)
    known = [name for part in grid.tasks.values() for name in (*part.models, *part.available)]
    labels = list(dict.fromkeys([*grid.tasks, *map(grid.task_of, grid.tasks)]))
    kind = "profile" if grid.only is None else "table"
    for what, wanted, names in (("task", wanted_tasks, labels), ("model", wanted_models, known)):
        for name in wanted or ():
            if name not in names:
                raise GridError(f"Unknown {what} '{name}' in {kind} '{grid.name}'.{suggest(name, names)}")
    wanted_methods, wanted_bits, wanted_seeds = _split(methods), _split(bits), _split(seeds)
    for name in wanted_methods or ():
        _known_method(name)
    for name in wanted_bits or ():
        parse_bits(name)
    if grid.only is not None:
        _check_only(grid, grid.only, wanted_methods or (), wanted_bits or ())
    for name in wanted_seeds or ():
        if not re.fullmatch(r"\d+", name):
            raise GridError(f"'{name}' is no seed: seeds are whole numbers from 0.")
    numbers = None if wanted_seeds is None else tuple(int(name) for name in wanted_seeds)
    wanted_axes = _split(axes)
    parse_axes(wanted_axes or (), grid.axes, grid.name)
    return Filters(wanted_tasks, wanted_models, wanted_methods, wanted_bits, numbers, wanted_axes)


def _check_only(grid: Grid, only: Iterable[CellName], methods: Iterable[str], bits: Iterable[str]) -> None:
    for what, wanted, known in (
        ("method", methods, {cell.method for cell in only}),
        ("bits", bits, {cell.bits for cell in only}),
    ):
        for name in wanted:
            if name not in known:
                has = ", ".join(sorted(known))
                raise GridError(f"Table '{grid.name}' has no {what} '{name}'. It has: {has}.")


def _split(text: str) -> tuple[str, ...] | None:
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    return parts or None


def chosen_axes(grid: Grid, filters: Filters) -> Axes:
    """Return the axes of a grid that a filter leaves."""
    return {name: points for name, points in grid.axes.items() if filters.axes is None or name in filters.axes}


def expand(grid: Grid, filters: Filters, options: RunOptions) -> list[Cell]:
    """Return the cells: per section and model full precision first, then by bits, seed, scope and method, with axis points.

    A filter replaces the grid's list where it is given, so it may also name values the grid does not run by default; but of
    methods a section takes only what is its own, or no other section's either. Extra cells run if no filter excludes them.
    Methods that quantize nothing have one cell per seed and scope, whatever the bits. Where the grid names its cells one by
    one (``only``), no others are left.
    """
    cells: dict[Key, Cell] = {}
    axes = chosen_axes(grid, filters)

    def add(
        section: str, model: str, methods: tuple[str, ...], bits: tuple[str, ...], seeds: tuple[int, ...], axes: Axes
    ) -> None:
        overrides = grid.overrides_of(section)
        if FP in methods:
            cell = make_cell(grid, section, model, None, options)
            cells.setdefault(cell.key, cell)
        quantizing = [name for name in methods if name != FP]
        for width, seed, scope, method in itertools.product(
            bits or (None,), seeds, grid.tasks[section].scopes or (None,), quantizing
        ):
            if changes_model_only(method):
                w_bits, a_bits = OFF, OFF
            elif width is not None:
                w_bits, a_bits = parse_bits(width)
            else:
                continue
            own = {"w_bits": w_bits, "a_bits": a_bits, "seed": seed, "scope": scope}
            base = make_cell(grid, section, model, make_recipe(method, overrides, own), options)
            if base.key not in cells:
                cells.update((cell.key, cell) for cell in with_points(base, axes, overrides))

    sections = _sections(grid, filters)
    for section in sections:
        part = grid.tasks[section]
        here, methods = (*part.models, *part.available), _methods(grid, filters, section, sections)
        for model in part.models if filters.models is None else [name for name in here if name in filters.models]:
            add(section, model, methods, filters.bits or part.bits or grid.bits, filters.seeds or part.seeds or grid.seeds, axes)
            for extra in grid.extra:
                if extra.task == section and model in extra.models:
                    add(section, model, _keep(extra.methods, filters.methods), _keep(extra.bits, filters.bits),
                        _keep(extra.seeds, filters.seeds), {})  # fmt: skip
    return [cell for cell in cells.values() if grid.only is None or cell.name in grid.only]


def _sections(grid: Grid, filters: Filters) -> list[str]:
    """Labels of the sections that a filter leaves; it names them, or their tasks."""
    return [name for name in grid.tasks if filters.tasks is None or {name, grid.task_of(name)} & set(filters.tasks)]


def _methods(grid: Grid, filters: Filters, section: str, sections: list[str]) -> tuple[str, ...]:
    """Methods of a section; of a filter, those that it runs by default or that none of ``sections`` does.

    A section that leaves out what others run may have models that cannot have it.
    """
    if filters.methods is None:
        return grid.methods_of(section)
    known = {name: {*grid.methods_of(name), *(m for e in grid.extra if e.task == name for m in e.methods)} for name in sections}
    others = set().union(*known.values()) - known[section]
    return tuple(method for method in filters.methods if method not in others)


def _keep(values: tuple[T, ...], wanted: tuple[T, ...] | None) -> tuple[T, ...]:
    return values if wanted is None else tuple(value for value in values if value in wanted)
