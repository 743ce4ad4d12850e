"""Recipes whose quantizers have an integer form."""

from fimaq_core.errors import RecipeError
from fimaq_core.recipe import OFF, Recipe


def check_exportable(recipe: Recipe) -> None:
    """Check that every quantizer of a recipe is uniform, with integer operands.

    Raises:
        RecipeError: a quantizer has no integer form, or nothing is quantized; the message names
            the nearest recipe that exports.
    """
    fields = ("softmax_quantizer", "gelu_quantizer")
    found = {name: kind for name in fields if (kind := getattr(recipe, name)) != "uniform"}
    if found:
        kinds = " and ".join(f"{name} {kind}" for name, kind in found.items())
        options = " ".join(f"--{name.replace('_', '-')} uniform" for name in found)
        raise RecipeError(
            f"The recipe of '{recipe.method}' has no integer form: codes of {kinds} do not lie on "
            "a uniform grid. The nearest recipe that exports is "
            f"--method {recipe.method} {options}: quantize with it first."
        )
    if recipe.w_bits == OFF:
        raise RecipeError(
            "The recipe leaves the weights in full precision (w_bits 32), so there are no integers "
            "to export: quantize with w_bits from 2 to 8 first."
        )
