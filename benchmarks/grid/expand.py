"""Cells of a grid: filters narrow or widen it, then it expands to cells."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from benchmarks.grid.cell import Cell, Key, RunOptions
from benchmarks.grid.schema import (  # noqa: F401 the names of a grid, for importers
    FP,
    GRIDS,
    Axes,
    Grid,
    GridError,
    known_method,
    load_grid,
    parse_bits,
    parse_grid,
)
from fimaq_core.errors import suggest
from fimaq_core.recipe import METHODS, OFF, Recipe, make_recipe
from tasks.common.cell import identity
from tasks.common.request import CellRequest, DataRequest, ModelRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Filters:
    """Lists that a run is narrowed to; None leaves the grid's own list."""

    tasks: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    bits: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    axes: tuple[str, ...] | None = None

    @property
    def active(self) -> bool:
        """True if anything is filtered."""
        return any(value is not None for value in vars(self).values())


def parse_filters(
    grid: Grid,
    tasks: str = "",
    models: str = "",
    methods: str = "",
    bits: str = "",
    seeds: str = "",
    axes: str = "",
) -> Filters:
    """Turn comma lists into filters on ``grid``; an empty text leaves that side unfiltered.

    Raises:
        GridError: a value that does not exist, with a suggestion.
    """
    chosen = Filters(*map(_split, (tasks, models, methods, bits)), axes=_split(axes))
    labels = dict.fromkeys([*grid.tasks, *map(grid.task_of, grid.tasks)])
    known = [name for part in grid.tasks.values() for name in (*part.models, *part.available)]
    kind = "profile" if grid.only is None else "table"
    if chosen.axes and not grid.axes:
        raise GridError(f"Profile '{grid.name}' has no axes: leave the filter '{axes}' out.")
    for what, wanted, names in (
        ("task", chosen.tasks, labels),
        ("model", chosen.models, known),
        ("axis", chosen.axes, grid.axes),
    ):
        for name in sorted(set(wanted or ()).difference(names)):
            hint = suggest(name, names)
            raise GridError(f"Unknown {what} '{name}' in {kind} '{grid.name}'.{hint}")
    for name in chosen.methods or ():
        known_method(name)
    for name in chosen.bits or ():
        parse_bits(name)
    for what, wanted in (("method", chosen.methods), ("bits", chosen.bits)):
        has = sorted({getattr(cell, what) for cell in grid.only or ()})
        for name in sorted(set(wanted or ()).difference(has)) if has else ():
            text = f"Table '{grid.name}' has no {what} '{name}'. It has: {', '.join(has)}."
            raise GridError(text)
    numbers = _split(seeds)
    for name in numbers or ():
        if not (name.isascii() and name.isdigit()):
            raise GridError(f"'{name}' is no seed: seeds are whole numbers from 0.")
    return replace(chosen, seeds=None if numbers is None else tuple(map(int, numbers)))


def _split(text: str) -> tuple[str, ...] | None:
    parts = (part.strip() for part in text.split(","))
    return tuple(dict.fromkeys(filter(None, parts))) or None


def chosen_axes(grid: Grid, filters: Filters) -> Axes:
    """Return the axes of a grid that a filter leaves."""
    wanted = grid.axes if filters.axes is None else filters.axes
    return {name: points for name, points in grid.axes.items() if name in wanted}


def expand(grid: Grid, filters: Filters, options: RunOptions) -> list[Cell]:
    """Return the cells of a grid that a filter leaves.

    Each section and model has full precision first, then cells by bits, seed, scope and method,
    with axis points. A filter replaces the grid's list, so it may also name values that the grid
    does not run by default; but of methods, a section takes its own and those that no other
    section has. Extra cells run if no filter excludes them. Methods that quantize nothing have
    one cell per seed and scope, whatever the bits.
    """
    cells: dict[Key, Cell] = {}
    for section, model, methods, bits, seeds, axes in _products(grid, filters):
        overrides = grid.overrides_of(section)
        if FP in methods:
            cell = _make_cell(grid, section, model, None, options)
            cells.setdefault(cell.key, cell)
        quantizing = [method for method in methods if method != FP]
        scopes = grid.tasks[section].scopes or (None,)
        lists = (bits or ("",), seeds, scopes, quantizing)
        for width, seed, scope, method in itertools.product(*lists):
            if _quantizes_nothing(method):
                w_bits, a_bits = OFF, OFF
            elif width:
                w_bits, a_bits = parse_bits(width)
            else:
                continue
            own = {"w_bits": w_bits, "a_bits": a_bits, "seed": seed, "scope": scope}
            base = _make_cell(grid, section, model, make_recipe(method, overrides, own), options)
            if base.key not in cells:
                cells |= {cell.key: cell for cell in _with_points(base, axes, overrides)}
    return [cell for cell in cells.values() if grid.only is None or cell.name in grid.only]


#: Section, model, methods, bits, seeds and axes.
_Product = tuple[str, str, Sequence[str], Sequence[str], Sequence[int], Axes]


def _products(grid: Grid, filters: Filters) -> Iterator[_Product]:
    """Yield the products of lists that the cells come from."""
    wanted, axes = filters.tasks, chosen_axes(grid, filters)
    sections = [s for s in grid.tasks if wanted is None or {s, grid.task_of(s)} & set(wanted)]
    for section in sections:
        part, methods = grid.tasks[section], _methods(grid, filters, section, sections)
        bits = filters.bits or part.bits or grid.bits
        seeds = filters.seeds or part.seeds or grid.seeds
        known = part.models if filters.models is None else (*part.models, *part.available)
        for model in _keep(known, filters.models):
            yield section, model, methods, bits, seeds, axes
            for extra in grid.extra:
                if extra.task == section and model in extra.models:
                    kept = _keep(extra.methods, filters.methods), _keep(extra.bits, filters.bits)
                    yield section, model, *kept, _keep(extra.seeds, filters.seeds), {}


def _quantizes_nothing(method: str) -> bool:
    """Return whether a method fixes its bits at 32/32: it measures a changed model."""
    settings = METHODS.get(method, {})
    return settings.get("w_bits") == OFF and settings.get("a_bits") == OFF


def _with_points(base: Cell, axes: Axes, overrides: Mapping[str, Any]) -> list[Cell]:
    """Return ``base`` and a cell for each point of ``axes`` that differs from it.

    Points with the very recipe of ``base`` are that cell, which takes their places in the tables.
    """
    scope = base.scope or None
    own = {"w_bits": base.w_bit, "a_bits": base.a_bit, "seed": base.seed, "scope": scope}
    places, cells = [], []
    for axis, points in axes.items():
        for point, changes in points.items():
            recipe = make_recipe(base.method, overrides, changes, own)
            if recipe == base.request.recipe:
                places.append((axis, point))
            else:
                cells.append(_make_point(base, axis, point, recipe))
    return [replace(base, places=tuple(places)), *cells]


def _methods(grid: Grid, filters: Filters, section: str, sections: list[str]) -> tuple[str, ...]:
    """Return the section's methods; of a filter, its own or those that none of ``sections`` has.

    A section that leaves out what others run may have models that cannot have it.
    """
    if filters.methods is None:
        return grid.methods_of(section)
    own = {name: set(grid.methods_of(name)) for name in sections}
    for extra in grid.extra:
        if extra.task in own:
            own[extra.task] |= set(extra.methods)
    others = set().union(*own.values()) - own[section]
    return tuple(method for method in filters.methods if method not in others)


def _keep(values: Iterable[T], wanted: tuple[T, ...] | None) -> tuple[T, ...]:
    return tuple(value for value in values if wanted is None or value in wanted)


def _make_cell(
    grid: Grid, section: str, model: str, recipe: Recipe | None, options: RunOptions
) -> Cell:
    """Return the cell of a model and recipe (None: full precision) in a section of a grid."""
    part, task = grid.tasks[section], grid.task_of(section)
    request = CellRequest(
        task=task,
        model=ModelRequest(name=model, weights_folder=options.weights),
        data=DataRequest(path=options.data.of(part.data), evaluation=part.evaluation),
        recipe=recipe,
        variant=None if recipe is None else grid.variant,
        results=options.results / "runs",
        device=options.device or grid.device,
        threads=options.threads or grid.threads,
        placement=options.placement or part.placement,
    )
    if recipe is None:
        return Cell(section, task, model, "fp", OFF, OFF, None, request)
    bits, scope = (recipe.w_bits, recipe.a_bits), recipe.scope or ""
    return Cell(section, task, model, recipe.method, *bits, recipe.seed, request, scope)


def _make_point(base: Cell, axis: str, point: str, recipe: Recipe) -> Cell:
    """Return the cell beside ``base`` at a point of an axis; its variant names the point."""
    name = f"{axis}={point}"
    assert base.request.recipe is not None
    # The scope comes last in a variant's name, and once.
    settings = replace(base.request, recipe=base.request.recipe.model_copy(update={"scope": None}))
    request = replace(
        base.request, recipe=recipe, variant=f"{identity.variant_name(settings)} {name}"
    )
    return replace(base, request=request, point=name, places=((axis, point),))
