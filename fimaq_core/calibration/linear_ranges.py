"""Ranges of a linear layer from its full-precision inputs; setters for ranges of all layers."""

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import MIN_WEIGHT_SCALE, Candidates, ascending, minmax
from fimaq_core.calibration.output_error import Product, best_operand
from fimaq_core.calibration.own_error import best_by_own_error
from fimaq_core.calibration.progressive import candidates_of, progressive_heads, progressive_rows
from fimaq_core.calibration.special_ranges import search_after_gelu
from fimaq_core.calibration.weight_error import Moments, Rows, best_rows, input_moments
from fimaq_core.layers import QuantLinear
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import AffineQuantizer, WeightQuantizer
from fimaq_core.recipe import Recipe


def calibrate_linear(layer: QuantLinear, x: Tensor, recipe: Recipe) -> None:
    """Set the ranges of a linear layer for inputs (..., d).

    The first ranges of the weight (one per row) and of the input (one) minimise their own squared
    errors. Then rounds search the weight and the input by the squared error of the layer's output,
    with the other one quantized. A quantizer made for GELU outputs has no first range.
    """
    weights, inputs, weight = layer.weight_quantizer, layer.input_quantizer, layer.weight.detach()
    flat, uniform = x.reshape(-1, x.shape[-1]), isinstance(inputs, AffineQuantizer)
    extended = recipe.range_grid == "extended"
    if recipe.range_search == "minmax":
        set_minmax(weights, weight)
        if isinstance(inputs, AffineQuantizer):
            set_minmax(inputs, flat.reshape(1, -1), shape=(1,))
        else:
            search_after_gelu(layer, flat, recipe.range_candidates, extended=extended)
        return
    candidates, rows = None, torch.zeros(0, dtype=torch.long)
    if not weights.off and recipe.range_search == "progressive":
        _search_rows(layer, recipe)
    elif not weights.off:
        candidates, rows = start_rows(weights, weight, recipe)
    if uniform:
        _rounds(layer, x, candidates, rows, recipe)
    else:
        _rounds_after_gelu(layer, flat, candidates, rows, recipe)


def _rounds(
    layer: QuantLinear, x: Tensor, candidates: Candidates | None, rows: Tensor, recipe: Recipe
) -> None:
    """Search weight and input in turns; ``rows`` are the rows' first choices of candidates."""
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    assert isinstance(inputs, AffineQuantizer)
    flat = x.reshape(-1, x.shape[-1])
    if not inputs.off:
        ordered = ascending(flat.reshape(1, -1))
        grid = candidates_of(ordered, inputs.levels, recipe=recipe)
        index = int(best_by_own_error(ordered, grid, inputs.levels)[0])
        inputs.set_range(grid.scale[index], grid.zero_point[index])
    # A search depends on the other one's last choice only: a repeated choice ends the rounds.
    for number in range(recipe.range_rounds):
        if not weights.off:
            last, rows = rows, search_weight(layer, flat, candidates, rows, recipe)
            if number and candidates is not None and torch.equal(rows, last):
                break
        if inputs.off:
            break
        before, product = settings(inputs), _input_product(layer, x)
        if recipe.range_search == "progressive":
            count = recipe.range_candidates
            scale, zero = progressive_heads(product, grid, levels=inputs.levels, count=count)
            inputs.set_range(scale[0], zero[0])
        else:
            index = best_operand(product, grid.scale[:, 0], grid.zero_point[:, 0], index)
            inputs.set_range(grid.scale[index], grid.zero_point[index])
        if weights.off or unchanged(inputs, before):
            break


def _rounds_after_gelu(
    layer: QuantLinear, flat: Tensor, candidates: Candidates | None, rows: Tensor, recipe: Recipe
) -> None:
    """Search a special input quantizer and the weight in turns, on inputs (tokens, d)."""
    inputs, count = layer.input_quantizer, recipe.range_candidates
    extended = recipe.range_grid == "extended"
    for number in range(max(recipe.range_rounds, 1)):
        before = settings(inputs)
        search_after_gelu(layer, flat, count, again=number > 0, extended=extended)
        # With the same input quantizer, the weight's next search would give the same ranges.
        if layer.weight_quantizer.off or (number and unchanged(inputs, before)):
            return
        rows = search_weight(layer, flat, candidates, rows, recipe)


def search_weight(
    layer: QuantLinear, flat: Tensor, candidates: Candidates | None, rows: Tensor, recipe: Recipe
) -> Tensor:
    """Set the weight's ranges by the output's error on inputs (tokens, d); return the choices.

    ``rows`` are the last choices of ``candidates``. Without candidates the search is progressive.
    """
    weights, inputs, weight = layer.weight_quantizer, layer.input_quantizer, layer.weight.detach()
    if candidates is None:
        _search_rows(layer, recipe, input_moments(flat, inputs(flat), weight))
        return rows
    scale = inputs.scale if isinstance(inputs, AffineQuantizer) and not inputs.off else None
    moments = input_moments(flat, inputs(flat), weight, scale, inputs.levels)
    rows = best_rows(Rows(weight, weights.levels, *moments), candidates, rows)
    set_rows(weights, *candidates.pick(rows))
    return rows


def _search_rows(layer: QuantLinear, recipe: Recipe, moments: Moments | None = None) -> None:
    """Set the weight's ranges by progressive search, by the output's error if there are moments."""
    weight, levels = layer.weight.detach(), layer.weight_quantizer.levels
    start = candidates_of(ascending(weight), levels, recipe=recipe, min_scale=MIN_WEIGHT_SCALE)
    found = progressive_rows(weight, levels, recipe.range_candidates, moments=moments, start=start)
    set_rows(layer.weight_quantizer, *found)


def start_rows(
    quantizer: WeightQuantizer, weight: Tensor, recipe: Recipe
) -> tuple[Candidates, Tensor]:
    """Set a weight's ranges by its own error; return the candidates and each row's choice."""
    ordered = ascending(weight)
    levels = quantizer.levels
    candidates = candidates_of(ordered, levels, recipe=recipe, min_scale=MIN_WEIGHT_SCALE)
    rows = best_by_own_error(ordered, candidates, quantizer.levels)
    set_rows(quantizer, *candidates.pick(rows))
    return candidates, rows


def _input_product(layer: QuantLinear, x: Tensor) -> Product:
    """Return the product of inputs ``x`` (..., d) and the quantized weight, for range searches."""
    weight = layer.weight.detach()
    batched = x.view(1, 1, -1) if x.ndim < 2 else x.reshape(x.shape[0], -1, x.shape[-1])
    other = layer.weight_quantizer.quantized(weight).t().unsqueeze(0)
    return Product(batched, other, batched @ (other - weight.t()), layer.input_quantizer.levels)


def settings(quantizer: ActivationQuantizer) -> list[Tensor]:
    """Return all tensors of a quantizer that a search may set."""
    return list(quantizer.state_dict().values())


def unchanged(quantizer: ActivationQuantizer, before: list[Tensor]) -> bool:
    """Return True if the settings of a quantizer still equal ``before``."""
    return all(torch.equal(*pair) for pair in zip(before, settings(quantizer), strict=True))


def set_rows(quantizer: WeightQuantizer, scale: Tensor, zero_point: Tensor) -> None:
    """Set scales and zero points of a weight, each (rows,)."""
    quantizer.set_range(scale[:, None], zero_point[:, None])


def set_minmax(quantizer: AffineQuantizer, rows: Tensor, shape: tuple[int, ...] = (-1, 1)) -> None:
    """Set the min-max range of each row of ``rows`` (groups, n); ``shape`` is that of the scale."""
    if not quantizer.off:
        scale, zero = minmax(rows, quantizer.levels)
        quantizer.set_range(scale.view(shape), zero.view(shape))
