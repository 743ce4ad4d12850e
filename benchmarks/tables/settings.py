"""Settings of methods in tables: their marks, and their changes of released settings."""

from collections.abc import Mapping, Sequence

import pandas as pd

from benchmarks.results.scores import Cells, Items, in_order, seeds_of, unique
from fimaq_core.recipe import METHODS, Recipe, make_recipe
from tasks.common import registry
from tasks.common.record import recipe_of

#: Columns of :func:`marks`.
MARKS = ("special quantizers", "optimised")
#: Settings that are always named, because numbers depend on them most.
_ALWAYS = (
    "steps", "batch_size", "calibration_images", "calibration_transform", "lr_alpha", "lr_scale",
    "mlp_steps", "mlp_lr",
)  # fmt: skip


def special_quantizers(recipe: Recipe | None) -> str:
    """Return the places of non-uniform quantizers, such as ``softmax, GELU``, or ``-``."""
    if recipe is None:
        return "-"
    places = {"softmax": recipe.softmax_quantizer, "GELU": recipe.gelu_quantizer}
    return ", ".join(name for name, kind in places.items() if kind != "uniform") or "-"


def optimised(recipe: Recipe | None) -> str:
    """Return what is optimised after calibration, such as ``blocks + MLPs``, or ``-``."""
    if recipe is None:
        return "-"
    parts = {"blocks": recipe.reconstruct, "MLPs": recipe.reconstruct_mlp, "weights": recipe.refit}
    return " + ".join(name for name, wanted in parts.items() if wanted) or "-"


def marks(cells: Cells) -> pd.DataFrame:
    """Return methods × :data:`MARKS`, in the order of tables, measured or not."""
    recipes = {cell.method: cell.request.recipe for cell in reversed(cells)}
    methods = in_order(recipes)
    rows = [(special_quantizers(recipes[name]), optimised(recipes[name])) for name in methods]
    return pd.DataFrame(rows, columns=list(MARKS), index=pd.Index(methods, name="method"))


def settings_lines(mine: Items) -> list[str]:
    """Return lines on settings and seeds of a section: shared by all methods, then different."""
    by_method: dict[str, list[Recipe]] = {}
    usual = registry.defaults(mine[0].cell.task) if mine else {}
    for item in mine:
        recipe = recipe_of(item.record)
        if recipe is None or recipe.method not in METHODS:
            continue
        if recipe.reconstruct or recipe.reconstruct_mlp:
            by_method.setdefault(recipe.method, []).append(recipe)
    methods = in_order(by_method)
    # Released settings depend on the bits of weights alone.
    released: dict[str, list[Recipe]] = {}
    for name, recipes in by_method.items():
        bits = dict.fromkeys(recipe.w_bits for recipe in recipes)
        released[name] = [make_recipe(name, usual, {"w_bits": width}) for width in bits]
    every = [recipe for recipes in by_method.values() for recipe in recipes]
    changed = [name for recipe in every for name in recipe.changes(usual)]
    parts = []
    for name in unique([*_ALWAYS, *changed]):
        bearing = [method for method in methods if _bears(name, by_method[method][0])]
        if bearing:
            values = _by_text({method: by_method[method] for method in bearing}, name)
            originals = _by_text({method: released[method] for method in bearing}, name)
            beside = "" if originals == values else f" (released: {_text(originals)})"
            parts.append(f"{name} {_text(values)}{beside}")
    lines = []
    if parts:
        listed = ", ".join(methods)
        lines.append(f"Settings of {listed}, as far as they have them: {', '.join(parts)}.")
    if seeds := seeds_of(mine):
        single = "; what has no ± ran with one" if len(seeds) > 1 else ""
        lines.append(f"Seeds: {', '.join(map(str, seeds))}{single}.")
    return lines


def _bears(name: str, recipe: Recipe) -> bool:
    """Return True for a setting that this recipe uses."""
    extra = Recipe.model_fields[name].json_schema_extra
    group = extra.get("group") if isinstance(extra, dict) else None
    if group == "mlp":
        return recipe.reconstruct_mlp
    return recipe.reconstruct or group not in ("reconstruction", "loss")


def _by_text(recipes: Mapping[str, Sequence[Recipe]], name: str) -> dict[str, list[str]]:
    """Return methods by the text of their values."""
    found: dict[str, list[str]] = {}
    for method, own in recipes.items():
        texts = unique(str(getattr(recipe, name)) for recipe in own)
        found.setdefault(" or ".join(texts), []).append(method)
    return found


def _text(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the most frequent value, then the other values with their methods."""
    largest = max(groups, key=lambda text: len(groups[text]))
    others = (f"{', '.join(own)} {text}" for text, own in groups.items() if text != largest)
    return "; ".join([largest, *others])
