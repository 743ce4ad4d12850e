"""What marks a method in tables, as the papers mark theirs: special quantizers, and what is optimised."""

from collections.abc import Sequence

import pandas as pd

from benchmarks.cells import Cell
from benchmarks.tables import in_order
from fimaq_core.recipe import Recipe

#: The columns.
MARKS = ("special quantizers", "optimised")


def special_quantizers(recipe: Recipe | None) -> str:
    """Return where a recipe quantizes otherwise than uniformly: ``softmax, GELU``, one of them, or ``-``."""
    if recipe is None:
        return "-"
    places = {"softmax": recipe.softmax_quantizer, "GELU": recipe.gelu_quantizer}
    return ", ".join(name for name, quantizer in places.items() if quantizer != "uniform") or "-"


def optimised(recipe: Recipe | None) -> str:
    """Return what a recipe optimises after calibration: ``blocks``, ``MLPs``, ``weights`` joined by ``+``, or ``-``."""
    if recipe is None:
        return "-"
    parts = {"blocks": recipe.reconstruct, "MLPs": recipe.reconstruct_mlp, "weights": recipe.refit}
    return " + ".join(name for name, wanted in parts.items() if wanted) or "-"


def marks(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return methods × :data:`MARKS`, in the order of tables, measured or not."""
    recipes: dict[str, Recipe | None] = {}
    for cell in cells:
        recipes.setdefault(cell.method, cell.request.recipe)
    methods = in_order(recipes)
    rows = [(special_quantizers(recipes[method]), optimised(recipes[method])) for method in methods]
    return pd.DataFrame(rows, columns=list(MARKS), index=pd.Index(methods, name="method"))
