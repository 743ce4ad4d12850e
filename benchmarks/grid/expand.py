"""Expansion of a grid to its cells, after filters narrowed or widened the grid."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.grid.cell import EXPORT, Cell, Key, RunOptions
from benchmarks.grid.schema import (
    CALIBRATION,
    FP,
    Axes,
    Extra,
    Grid,
    GridError,
    known_method,
    parse_bits,
    point_recipe,
)
from fimaq_core.documents import shown
from fimaq_core.errors import RecipeError, suggest
from fimaq_core.recipe import METHODS, OFF, Recipe, make_recipe
from tasks.common.cell import identity
from tasks.common.request import CellRequest, DataRequest, ModelRequest

T = TypeVar("T")
#: Filter of axes that keeps none of them: the cells of the grid's own settings.
NO_AXIS = "none"


@dataclass(frozen=True)
class Filters:
    """Lists that replace the lists of a grid; None keeps the list of the grid.

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


def parse_filters(grid: Grid, **texts: str) -> Filters:
    """Return filters from comma lists, which are named like the fields of :class:`Filters`.

    Raises:
        GridError: a value does not exist; the message suggests a known value.
    """
    chosen = Filters(**{name: _split(text) for name, text in texts.items()})
    kind = "profile" if grid.only is None else "table"
    if chosen.axes and not grid.axes:
        filtered = ",".join(chosen.axes)
        raise GridError(f"Profile '{grid.name}' has no axes: leave the filter '{filtered}' out.")
    tasks = dict.fromkeys([*grid.tasks, *map(grid.task_of, grid.tasks)])
    models = [name for part in grid.tasks.values() for name in (*part.models, *part.available)]
    for what, wanted, names in (
        ("task", chosen.tasks, tasks),
        ("model", chosen.models, models),
        ("axis", chosen.axes, _axis_names(grid)),
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
        if not (name.isascii() and name.isdigit() and len(name) < 20):
            raise GridError(f"{shown(name)} is no seed: seeds are whole numbers from 0.")
    return replace(chosen, seeds=chosen.seeds and tuple(map(int, chosen.seeds)))


def _split(text: str) -> tuple[str, ...] | None:
    parts = (part.strip() for part in text.split(","))
    return tuple(dict.fromkeys(filter(None, parts))) or None


def _axis_names(grid: Grid) -> list[str]:
    """Return the names that a filter of axes may have: ``k``, ``k=15``, :data:`NO_AXIS`."""
    points = [f"{axis}={point}" for axis, own in grid.axes.items() for point in own]
    return [*grid.axes, *points, NO_AXIS]


def chosen_axes(grid: Grid, filters: Filters) -> Axes:
    """Return the axes of a grid that a filter keeps, whole or with some of their points."""
    wanted = set(grid.axes if filters.axes is None else filters.axes)
    found = {
        axis: {k: v for k, v in points.items() if wanted & {axis, f"{axis}={k}"}}
        for axis, points in grid.axes.items()
    }
    return {axis: points for axis, points in found.items() if points}


def expand(grid: Grid, filters: Filters, options: RunOptions) -> list[Cell]:
    """Return the cells of a grid that filters keep, in the order of sections and models.

    Each model of a section has full precision first, then its cells by bits, seed, scope and
    method, each followed by its axis points and its export. A filter replaces the grid's list, so
    it can add values that the grid does not run by default. Extra cells run if no filter excludes
    them. Methods that quantize nothing have one cell per seed and scope, and ignore the bits.
    """
    cells: dict[Key, Cell] = {}
    wanted, axes = filters.tasks, chosen_axes(grid, filters)
    sections = [s for s in grid.tasks if wanted is None or {s, grid.task_of(s)} & set(wanted)]
    for section in sections:
        part = grid.tasks[section]
        own = Extra(  # the lists of the section, in the form of extra cells
            task=section,
            models=part.models if filters.models is None else (*part.models, *part.available),
            methods=_methods(grid, filters, section, sections),
            bits=filters.bits or part.bits or grid.bits,
            seeds=filters.seeds or part.seeds or grid.seeds,
        )
        for model in _keep(own.models, filters.models):
            for extra in (own, *grid.extra):
                if extra.task == section and model in extra.models:
                    points = axes if extra is own else {}
                    for cell in _cells(grid, filters, options, model, extra, points):
                        cells.setdefault(cell.key, cell)
    return [cell for cell in cells.values() if grid.only is None or cell.name in grid.only]


def _methods(grid: Grid, filters: Filters, section: str, sections: list[str]) -> tuple[str, ...]:
    """Return the methods of a section.

    A filter may name methods of this section, and methods that no section has. Methods of other
    sections are left out, because the models of this section may not be able to run them.
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


def _cells(
    grid: Grid, filters: Filters, options: RunOptions, model: str, lists: Extra, axes: Axes
) -> Iterator[Cell]:
    """Yield the cells of a model: full precision, each quantized cell, its points, its export."""
    section, methods = lists.task, _keep(lists.methods, filters.methods)
    if FP in methods:
        yield _make_cell(grid, section, model, None, options)
    scopes = grid.tasks[section].scopes or (None,)
    bits, seeds = _keep(lists.bits, filters.bits) or ("",), _keep(lists.seeds, filters.seeds)
    quantizing = [method for method in methods if method != FP]
    for width, seed, scope, method in itertools.product(bits, seeds, scopes, quantizing):
        settings = METHODS.get(method, {})
        if settings.get("w_bits") == OFF and settings.get("a_bits") == OFF:
            w_bits, a_bits = OFF, OFF  # the method changes the model but quantizes nothing
        elif width:
            w_bits, a_bits = parse_bits(width)
        else:
            continue
        overrides = grid.overrides_of(section, method)
        own = {"w_bits": w_bits, "a_bits": a_bits, "seed": seed, "scope": scope}
        base = _make_cell(grid, section, model, make_recipe(method, overrides, own), options)
        yield from _with_points(base, axes, overrides, own)
        if method in grid.tasks[section].export:
            yield replace(base, point=EXPORT, request=replace(base.request, export=True))


def _with_points(
    base: Cell, axes: Axes, overrides: Mapping[str, Any], own: Mapping[str, Any]
) -> list[Cell]:
    """Return ``base`` and one cell per point of ``axes`` whose recipe or data differs from it.

    A point with recipe and data of another cell adds no cell: the tables show that cell in its
    place. A point that the method's recipe does not allow adds none either.
    """
    cells = [base]
    for axis, points in axes.items():
        for point, changes in points.items():
            try:
                recipe = make_recipe(base.method, overrides, point_recipe(changes), own)
            except RecipeError:
                continue
            data, name = base.request.data, f"{axis}={point}"
            if CALIBRATION in changes:
                data = replace(data, calibration_data=Path(changes[CALIBRATION]))
            same = (cell.request.recipe == recipe and cell.request.data == data for cell in cells)
            if (place := next(itertools.compress(itertools.count(), same), None)) is not None:
                on = (*cells[place].axis_points, (axis, point))
                cells[place] = replace(cells[place], axis_points=on)
                continue
            # The name of a variant ends with the scope, which must not be repeated before it.
            whole = make_recipe(base.method, overrides, own).model_copy(update={"scope": None})
            variant = f"{identity.variant_name(replace(base.request, recipe=whole))} {name}"
            request = replace(base.request, recipe=recipe, data=data, variant=variant)
            for cell in cells:  # a finished cell starts from the cell without finishing
                if recipe.finish_steps and cell.request.recipe == recipe.unfinished():
                    request = replace(request, base_variant=cell.request.variant)
            cells.append(replace(base, request=request, point=name, axis_points=((axis, point),)))
    return cells


def _make_cell(
    grid: Grid, section: str, model: str, recipe: Recipe | None, options: RunOptions
) -> Cell:
    """Return the cell of a model and recipe (None: full precision) in a section of a grid."""
    part, task = grid.tasks[section], grid.task_of(section)
    data, weights, made_by = options.data.of(part.data), options.weights, ""
    if part.prepared is not None:
        data = weights = options.results / "prepared" / part.prepared.name
        made_by = part.prepared.command.replace("{folder}", str(data))
    request = CellRequest(
        task=task,
        model=ModelRequest(name=model, model_args=part.model_args, weights_folder=weights),
        data=DataRequest(data, evaluation=part.evaluation, dataset=part.on, corrupt=part.corrupt),
        recipe=recipe,
        variant=None if recipe is None else part.variant or grid.variant,
        results=options.results / "runs",
        device=options.device or grid.device,
        threads=options.threads or grid.threads,
        placement=options.placement or part.placement,
    )
    if recipe is None:
        return Cell(section, task, model, "fp", OFF, OFF, None, request, made_by=made_by)
    bits, scope = (recipe.w_bits, recipe.a_bits), recipe.scope or ""
    own = (recipe.method, *bits, recipe.seed)
    return Cell(section, task, model, *own, request, scope, made_by=made_by, home=part.home)
