"""Ranges of layers whose input comes out of a softmax or a GELU and has a quantizer made for that.

Searched by the squared error of the layer's output, the other operand quantized: the special
quantizer first, then the other operand by the recipe's own search, in rounds.
"""

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import ascending, grid_candidates
from fimaq_core.calibration.layer_ranges import (
    head_product,
    per_head,
    progressive_operand,
    progressive_weight,
    set_heads,
    set_minmax,
    set_rows,
    settings,
    start_heads,
    start_rows,
    unchanged,
)
from fimaq_core.calibration.output_error import best_of_heads
from fimaq_core.calibration.progressive import progressive_rows
from fimaq_core.calibration.special_ranges import (
    search_adalog_gelu,
    search_adalog_softmax,
    search_log_gelu,
    search_twin_gelu,
    search_twin_softmax,
)
from fimaq_core.calibration.weight_error import best_rows, input_moments
from fimaq_core.layers import QuantLinear, QuantMatMul
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.quantizers.special import AdaLogQuantizer, LogQuantizer, TwinQuantizer
from fimaq_core.recipe import Recipe


def calibrate_after_gelu(layer: QuantLinear, x: Tensor, recipe: Recipe) -> None:
    """Set the ranges of a linear layer with a special input quantizer, for inputs (..., d)."""
    weight, weights = layer.weight.detach(), layer.weight_quantizer
    flat, count = x.reshape(-1, x.shape[-1]), recipe.range_candidates
    candidates = None
    if not weights.off:
        if recipe.range_search == "minmax":
            set_minmax(weights, weight)
        elif recipe.range_search == "progressive":
            set_rows(weights, *progressive_rows(weight, None, None, weights.levels, count))
        else:
            candidates, rows = start_rows(weights, weight, count)
    if recipe.range_search == "minmax":
        _search_gelu(layer, flat, count)
        return
    for number in range(max(recipe.range_rounds, 1)):
        before = settings(layer.input_quantizer)
        if not layer.input_quantizer.off:
            _search_gelu(layer, flat, count)
        # With the input as before, the weight's next search would repeat itself, and so on.
        if weights.off or (number and unchanged(layer.input_quantizer, before)):
            return
        if candidates is None:
            progressive_weight(layer, flat, recipe)
        else:
            moments = input_moments(flat, layer.input_quantizer(flat), weight)
            rows = best_rows(weight, candidates, weights.levels, *moments, rows)
            set_rows(weights, *candidates.pick(rows))


def _search_gelu(layer: QuantLinear, flat: Tensor, count: int) -> None:
    """Search the input quantizer on inputs (tokens, d), the weight quantized as now."""
    quantizer, weight = layer.input_quantizer, layer.weight.detach()
    hat = layer.weight_quantizer.quantized(weight)
    if quantizer.off:
        return
    if isinstance(quantizer, AdaLogQuantizer):
        scale, q = search_adalog_gelu(flat, hat, weight, quantizer.levels, count)
        quantizer.set_base(q)
    elif isinstance(quantizer, LogQuantizer):
        scale = search_log_gelu(flat, hat, weight, float(quantizer.step), quantizer.levels, count)
    else:
        assert isinstance(quantizer, TwinQuantizer)
        scale = search_twin_gelu(flat, hat, weight, quantizer.levels, count)
    quantizer.set_scale(scale.view(1))


def calibrate_after_softmax(layer: QuantMatMul, a: Tensor, b: Tensor, recipe: Recipe) -> None:
    """Set the ranges of a product with a special left quantizer, one left range for all heads.

    Logarithmic quantizers of fixed base keep scale 1, a softmax's largest value.
    """
    left, right, count = layer.a_quantizer, layer.b_quantizer, recipe.range_candidates
    if not left.off:
        left.set_scale(torch.ones(1, 1, 1, 1, device=a.device))
    if recipe.range_search == "minmax":
        set_minmax(right, per_head(b), shape=(1, -1, 1, 1))
    else:
        start_heads(right, b, count)
    for number in range(max(recipe.range_rounds, 1)):
        hat, before = right(b), settings(left)
        if isinstance(left, AdaLogQuantizer) and not left.off:
            left.set_base(search_adalog_softmax(a, hat, b, left.levels, count))
        elif isinstance(left, TwinQuantizer) and not left.off:
            left.set_scale(search_twin_softmax(a, hat, b, left.levels).view(1, 1, 1, 1))
        if right.off or recipe.range_search == "minmax" or (number and unchanged(left, before)):
            return
        if recipe.range_search == "progressive":
            progressive_operand(right, b.mT, a.mT, left(a).mT, count)
        else:
            _search_heads(right, b.mT, a.mT, left(a).mT, count)


def _search_heads(
    quantizer: AffineQuantizer, x: Tensor, other: Tensor, other_hat: Tensor, count: int
) -> None:
    """Best range per head of the grid of linear layers; arguments of :func:`progressive_operand`."""
    candidates = grid_candidates(ascending(per_head(x)), quantizer.levels, count)
    product = head_product(x, other, other_hat, quantizer.levels)
    set_heads(
        quantizer, *candidates.pick(best_of_heads(product, candidates.scale, candidates.zero_point))
    )
