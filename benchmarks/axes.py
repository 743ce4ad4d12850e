"""Axes of an ablation: one setting at a time varies around a grid's own settings, as in the papers' ablation tables."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.cells import Cell, make_point
from fimaq_core.errors import FimaqError, suggest
from fimaq_core.recipe import make_recipe

#: Axis to point to the recipe fields that the point changes, in the order of the tables.
Axes = dict[str, dict[str, dict[str, Any]]]

#: What a grid says of each cell by itself, so that its overrides may not.
_NOT_OVERRIDABLE = ("method", "seed", "w_bits", "a_bits", "scope")


class GridError(FimaqError):
    """A grid, or a filter on it, that does not make sense."""


def check_names(axes: object, where: str) -> None:
    """Refuse names of axes and points that are not words.

    YAML reads a bare ``on`` as true and ``1:0`` as sixty, so names that are no text have lost what was written.

    Raises:
        GridError: a name that is no text, is empty, or holds a blank or one of ``,|=``.
    """
    if not isinstance(axes, dict):
        return
    for axis, points in axes.items():
        for name in (axis, *(points if isinstance(points, dict) else ())):
            if not isinstance(name, str):
                raise GridError(f"{where}: the name {name!r} in axes is no text: write it in quotes.")
            if not re.fullmatch(r"[^\s,|=]+", name):
                raise GridError(f"{where}: '{name}' cannot name an axis or point: no blanks and none of , | = please.")


def check_overrides(overrides: Iterable[str], where: str) -> None:
    """Refuse overrides of what the grid's own lists say.

    Raises:
        GridError: naming the field.
    """
    for key in overrides:
        if key in _NOT_OVERRIDABLE:
            raise GridError(f"{where}: '{key}' cannot be an override: the grid's own lists say it for each cell.")


def check_axes(axes: Axes, methods: Sequence[str], overrides: Mapping[str, Any], where: str) -> None:
    """Check that every point makes a recipe for every method.

    Raises:
        GridError: an axis without points, or a point that changes what the grid's own lists say.
        RecipeError: an unknown field or a value that does not fit.
    """
    for axis, points in axes.items():
        if not points:
            raise GridError(f"{where}: axis '{axis}' has no points.")
        for point, changes in points.items():
            check_overrides(changes, f"{where}, axes.{axis}.{point}")
            for method in methods:
                make_recipe(method, overrides, changes)


def parse_axes(names: Iterable[str], axes: Axes, profile: str) -> None:
    """Check the names of a filter on axes.

    Raises:
        GridError: an axis that the profile does not have.
    """
    for name in names:
        if not axes:
            raise GridError(f"Profile '{profile}' has no axes: leave the filter '{name}' out.")
        if name not in axes:
            raise GridError(f"Unknown axis '{name}' in profile '{profile}'.{suggest(name, axes)}")


def with_points(base: Cell, axes: Axes, overrides: Mapping[str, Any]) -> list[Cell]:
    """Return ``base`` and a cell for each point of ``axes`` that differs from it.

    Points with the very recipe of ``base`` are that cell: it is run once and takes their places in the tables.

    Args:
        base: a cell with the grid's own settings.
        axes: the axes to vary, one at a time.
        overrides: those of the section, which the points change.
    """
    own = {"w_bits": base.w_bit, "a_bits": base.a_bit, "seed": base.seed, "scope": base.scope or None}
    places, cells = [], []
    for axis, points in axes.items():
        for point, changes in points.items():
            recipe = make_recipe(base.method, overrides, changes, own)
            if recipe == base.request.recipe:
                places.append((axis, point))
            else:
                cells.append(make_point(base, axis, point, recipe))
    return [replace(base, places=tuple(places)), *cells]
