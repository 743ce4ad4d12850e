"""What a table says of the settings of the methods that optimise something, beside their released ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.tables import Measured, in_order, unique
from fimaq_core.recipe import METHODS, Recipe, make_recipe
from tasks.common import registry
from tasks.common.record import recipe_of

#: Settings named although they are not changed, because numbers depend on them most.
_ALWAYS = ("steps", "batch_size", "calibration_images", "calibration_transform", "lr_alpha", "lr_scale", "mlp_steps", "mlp_lr")


def settings_lines(mine: Sequence[Measured]) -> list[str]:
    """Return lines on settings and seeds of a section: what all methods share first, then what differs."""
    by_method: dict[str, list[Recipe]] = {}
    usual = registry.defaults(mine[0].cell.task) if mine else {}
    for item in mine:
        recipe = recipe_of(item.record)
        if recipe is not None and (recipe.reconstruct or recipe.reconstruct_mlp) and recipe.method in METHODS:
            by_method.setdefault(recipe.method, []).append(recipe)
    methods = in_order(by_method)
    released = {method: _released(recipes, usual) for method, recipes in by_method.items()}
    changed = [name for recipes in by_method.values() for recipe in recipes for name in recipe.changes(usual)]
    parts = []
    for name in unique([*_ALWAYS, *changed]):
        bearing = {method: by_method[method] for method in methods if _bears(name, by_method[method][0])}
        if bearing:
            parts.append(_setting(name, bearing, {method: released[method] for method in bearing}))
    lines = []
    if parts:
        lines.append(f"Settings of {', '.join(methods)}, as far as they have them: {', '.join(parts)}.")
    seeds = sorted({item.record.seed for item in mine if item.record.seed is not None})
    if seeds:
        single = "; what has no ± ran with one" if len(seeds) > 1 else ""
        lines.append(f"Seeds: {', '.join(map(str, seeds))}{single}.")
    return lines


def _bears(name: str, recipe: Recipe) -> bool:
    """Whether a setting has to do with what the recipe does."""
    extra = Recipe.model_fields[name].json_schema_extra
    group = extra.get("group") if isinstance(extra, dict) else None
    if group == "mlp":
        return recipe.reconstruct_mlp
    return recipe.reconstruct or group not in ("reconstruction", "loss")


def _setting(name: str, by_method: Mapping[str, Sequence[Recipe]], released: Mapping[str, Sequence[Recipe]]) -> str:
    """``name value (released: value)``; where methods differ, which has what."""
    values, originals = (
        _by_text({method: [getattr(recipe, name) for recipe in recipes] for method, recipes in group.items()})
        for group in (by_method, released)
    )
    text = f"{name} {_text(values)}"
    return text if originals == values else f"{text} (released: {_text(originals)})"


def _released(recipes: Sequence[Recipe], usual: Mapping[str, Any]) -> list[Recipe]:
    """The released settings of a method's recipes, once for each bit-width of weights, on which alone they depend."""
    widths = dict.fromkeys(recipe.w_bits for recipe in recipes)
    return [make_recipe(recipes[0].method, usual, {"w_bits": width}) for width in widths]


def _by_text(values: Mapping[str, Sequence[object]]) -> dict[str, list[str]]:
    """Methods by the text of their values."""
    found: dict[str, list[str]] = {}
    for method, own in values.items():
        found.setdefault(" or ".join(unique(map(str, own))), []).append(method)
    return found


def _text(groups: Mapping[str, Sequence[str]]) -> str:
    if len(groups) == 1:
        return next(iter(groups))
    largest = max(groups, key=lambda text: len(groups[text]))
    return "; ".join([largest, *(f"{', '.join(own)} {text}" for text, own in groups.items() if text != largest)])
