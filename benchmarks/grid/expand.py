"""Cells of a grid: filters narrow or widen the grid, then it expands to cells."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from benchmarks.grid.cell import Cell, Key, RunOptions
from benchmarks.grid.schema import (  # noqa: F401 names of a grid, for other modules
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
    """Lists that replace those of a grid; None keeps the grid's own list.

    Example:
        >>> grid = load_grid("demo")
        >>> parse_filters(grid, methods="fimaq", bits="w3a3,w4a4")
        Filters(tasks=None, models=None, methods=('fimaq',), bits=('w3a3', 'w4a4'), ...)
    """

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


def parse_filters(grid: Grid, **texts: str) -> Filters:
    """Turn comma lists into filters; ``texts`` are named as the fields of :class:`Filters`.

    Raises:
        GridError: a value does not exist; the message has a suggestion.
    """
    chosen = Filters(**{name: _split(text) for name, text in texts.items()})  # type: ignore[arg-type]
    kind = "profile" if grid.only is None else "table"
    if chosen.axes and not grid.axes:
        filtered = ",".join(chosen.axes)
        raise GridError(f"Profile '{grid.name}' has no axes: leave the filter '{filtered}' out.")
    tasks = dict.fromkeys([*grid.tasks, *map(grid.task_of, grid.tasks)])
    models = [name for part in grid.tasks.values() for name in (*part.models, *part.available)]
    for what, wanted, names in (
        ("task", chosen.tasks, tasks),
        ("model", chosen.models, models),
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
    for name in map(str, chosen.seeds or ()):
        if not (name.isascii() and name.isdigit()):
            raise GridError(f"'{name}' is no seed: seeds are whole numbers from 0.")
    return replace(chosen, seeds=chosen.seeds and tuple(map(int, chosen.seeds)))


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
    does not run by default; but a section takes only its own methods, and methods that no other
    section has. Extra cells run if no filter excludes them. Methods that quantize nothing have
    one cell per seed and scope, whatever the bits.
    """
    cells: dict[Key, Cell] = {}
    for product in _products(grid, filters):
        for cell in _cells(grid, product, options):
            cells.setdefault(cell.key, cell)
    return [cell for cell in cells.values() if grid.only is None or cell.name in grid.only]


class _Product(NamedTuple):
    """Lists whose product are cells of one model."""

    section: str
    model: str
    methods: Sequence[str]
    bits: Sequence[str]
    seeds: Sequence[int]
    axes: Axes


def _products(grid: Grid, filters: Filters) -> Iterator[_Product]:
    wanted, axes = filters.tasks, chosen_axes(grid, filters)
    sections = [s for s in grid.tasks if wanted is None or {s, grid.task_of(s)} & set(wanted)]
    for section in sections:
        part, methods = grid.tasks[section], _methods(grid, filters, section, sections)
        bits = filters.bits or part.bits or grid.bits
        seeds = filters.seeds or part.seeds or grid.seeds
        known = part.models if filters.models is None else (*part.models, *part.available)
        for model in _keep(known, filters.models):
            yield _Product(section, model, methods, bits, seeds, axes)
            for extra in grid.extra:
                if extra.task == section and model in extra.models:
                    kept = _keep(extra.methods, filters.methods), _keep(extra.bits, filters.bits)
                    seeds_kept = _keep(extra.seeds, filters.seeds)
                    yield _Product(section, model, *kept, seeds_kept, {})


def _methods(grid: Grid, filters: Filters, section: str, sections: list[str]) -> tuple[str, ...]:
    """Return the methods of a section; of a filter, its own and those that no section has.

    A section that leaves out a method of another section may have models that cannot run it.
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


def _cells(grid: Grid, product: _Product, options: RunOptions) -> Iterator[Cell]:
    """Yield the cells of a product: full precision, then each quantized cell and its points."""
    section, model, methods, bits, seeds, axes = product
    if FP in methods:
        yield _make_cell(grid, section, model, None, options)
    overrides, scopes = grid.overrides_of(section), grid.tasks[section].scopes or (None,)
    quantizing = [method for method in methods if method != FP]
    for width, seed, scope, method in itertools.product(bits or ("",), seeds, scopes, quantizing):
        settings = METHODS.get(method, {})
        if settings.get("w_bits") == OFF and settings.get("a_bits") == OFF:
            w_bits, a_bits = OFF, OFF  # the method measures a changed model without quantization
        elif width:
            w_bits, a_bits = parse_bits(width)
        else:
            continue
        own = {"w_bits": w_bits, "a_bits": a_bits, "seed": seed, "scope": scope}
        base = _make_cell(grid, section, model, make_recipe(method, overrides, own), options)
        yield from _with_points(base, axes, overrides, own)


def _with_points(
    base: Cell, axes: Axes, overrides: Mapping[str, Any], own: Mapping[str, Any]
) -> list[Cell]:
    """Return ``base`` and a cell per point of ``axes`` that differs from it.

    A point with the recipe of ``base`` is that cell, which takes the point's place in the tables.
    """
    places, cells = [], []
    for axis, points in axes.items():
        for point, changes in points.items():
            recipe, name = make_recipe(base.method, overrides, changes, own), f"{axis}={point}"
            if recipe == base.request.recipe:
                places.append((axis, point))
                continue
            # The scope comes once in the name of a variant, at its end.
            whole = make_recipe(base.method, overrides, own).model_copy(update={"scope": None})
            variant = f"{identity.variant_name(replace(base.request, recipe=whole))} {name}"
            request = replace(base.request, recipe=recipe, variant=variant)
            cells.append(replace(base, request=request, point=name, places=((axis, point),)))
    return [replace(base, places=tuple(places)), *cells]


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
