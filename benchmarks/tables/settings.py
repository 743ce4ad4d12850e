"""Settings of methods in tables: columns that mark a method, and lines below the table."""

from collections.abc import Mapping, Sequence

import pandas as pd

from benchmarks.compare.alike import has_effect
from benchmarks.results.scores import Cells, Items, in_order, rows_of, seeds_of, unique
from fimaq_core.errors import CheckpointError
from fimaq_core.recipe import METHODS, Recipe, make_recipe
from tasks.common import registry
from tasks.common.record import recipe_of

#: Columns of the main table that describe a method.
MARKS = ("special quantizers", "optimised")
#: Settings that are always named, because they influence the numbers most.
_ALWAYS = (
    "steps", "batch_size", "calibration_images", "calibration_transform", "lr_alpha", "lr_scale",
    "mlp_steps", "mlp_lr",
)  # fmt: skip


def recipe_marks(recipe: Recipe | None) -> tuple[str, str]:
    """Return the texts of :data:`MARKS` for a recipe; ``-`` for none.

    The first names the places of non-uniform quantizers, such as ``softmax, GELU``; the second the
    parts that are optimised after calibration, such as ``blocks + MLPs``.
    """
    if recipe is None:
        return "-", "-"
    places = {"softmax": recipe.softmax_quantizer, "GELU": recipe.gelu_quantizer}
    closed_form = recipe.start != "nearest" and not recipe.reconstruct
    parts = {"blocks": recipe.reconstruct, "MLPs": recipe.reconstruct_mlp}
    parts |= {"weights": recipe.refit or closed_form, "whole model": recipe.finish_steps > 0}
    special = ", ".join(name for name, kind in places.items() if kind != "uniform")
    return special or "-", " + ".join(name for name, wanted in parts.items() if wanted) or "-"


def marks(cells: Cells) -> pd.DataFrame:
    """Return rows × :data:`MARKS` in the order of tables, measured or not."""
    recipes = {cell.row: cell.request.recipe for cell in reversed(cells)}
    names = rows_of(cells)
    rows = [recipe_marks(recipes[name]) for name in names]
    return pd.DataFrame(rows, columns=list(MARKS), index=pd.Index(names, name="method"))


def settings_lines(mine: Items) -> list[str]:
    """Return lines on the settings and the seeds of a section.

    Each setting has the value that most methods share, then other values with their methods, and
    last the released values if they differ.
    """
    usual = registry.defaults(mine[0].cell.task) if mine else {}
    recipes: dict[str, list[Recipe]] = {}
    lines = []
    for item in mine:
        try:
            recipe = recipe_of(item.record)
        except CheckpointError:
            why = "its recipe is of another version of fimaq"
            lines.append(f"Settings of {item.cell.label} are not listed, since {why}.")
            continue
        if recipe is None or recipe.method not in METHODS:
            continue
        if recipe.reconstruct or recipe.reconstruct_mlp:
            recipes.setdefault(recipe.method, []).append(recipe)
    recipes = {name: recipes[name] for name in in_order(recipes)}
    originals = {  # the released settings depend on no other setting than the bits of weights
        name: [make_recipe(name, usual, {"w_bits": bits}) for bits in {r.w_bits: 0 for r in own}]
        for name, own in recipes.items()
    }
    changed = [name for own in recipes.values() for r in own for name in r.changes(usual)]
    parts = []
    for name in unique([*_ALWAYS, *changed]):
        methods = [method for method, own in recipes.items() if has_effect(own[0], name)]
        values = {method: _values(recipes[method], name) for method in methods}
        released = {method: _values(originals[method], name) for method in methods}
        if values:
            beside = "" if released == values else f" (released: {_text(released)})"
            parts.append(f"{name} {_text(values)}{beside}")
    if parts:
        listed = ", ".join(recipes)
        lines.append(f"Settings of {listed}, where a method has them: {', '.join(parts)}.")
    if seeds := seeds_of(mine):
        single = " A number without ± has one seed." if len(seeds) > 1 else ""
        lines.append(f"Seeds: {', '.join(map(str, seeds))}.{single}")
    return lines


def _values(recipes: Sequence[Recipe], name: str) -> str:
    """Return the distinct values of a setting."""
    return " or ".join(unique(str(getattr(recipe, name)) for recipe in recipes))


def _text(values: Mapping[str, str]) -> str:
    """Return the most frequent value, then the other values with their methods."""
    methods: dict[str, list[str]] = {}
    for method, value in values.items():
        methods.setdefault(value, []).append(method)
    usual = max(methods, key=lambda value: len(methods[value]))
    others = (f"{', '.join(own)} {value}" for value, own in methods.items() if value != usual)
    return "; ".join([usual, *others])
