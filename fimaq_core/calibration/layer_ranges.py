"""Ranges of one layer of any kind from its inputs, with the reparameterisation before it."""

from torch import Tensor

from fimaq_core.calibration.candidates import Range
from fimaq_core.calibration.conv_ranges import calibrate_conv, calibrate_conv_by_own_error
from fimaq_core.calibration.linear_ranges import calibrate_linear
from fimaq_core.calibration.percentile_ranges import (
    layer_percentiles,
    linear_percentiles,
    set_known,
)
from fimaq_core.calibration.product_ranges import calibrate_matmul
from fimaq_core.calibration.reparameterize import (
    channel_ranges,
    common_range,
    move_pair,
    norm_before,
)
from fimaq_core.chain import Segment
from fimaq_core.layers import QuantConv2d, QuantLayer, QuantLinear, QuantMatMul, WeightLayer
from fimaq_core.recipe import Recipe


def calibrate_layer(
    segment: Segment, name: str, layer: QuantLayer, seen: tuple[Tensor, ...], recipe: Recipe
) -> tuple[Tensor, ...]:
    """Set the ranges of layer ``name`` of a block from its inputs ``seen``, as of ``Capture``.

    Returns the inputs, which reparameterisation changes.
    """
    percentile, extended = recipe.range_search == "percentile", recipe.range_grid == "extended"
    if isinstance(layer, QuantLinear):
        x, known = _reparameterized(segment, name, layer, seen[0], recipe)
        if not percentile:
            calibrate_linear(layer, x, recipe)
        elif known is None:
            linear_percentiles(layer, x, extended=extended)
        else:
            set_known(layer, known, extended=extended)
        return (x,)
    if percentile:
        layer_percentiles(layer, seen, extended=extended)
    elif isinstance(layer, QuantMatMul):
        calibrate_matmul(layer, seen[0], seen[1], recipe)
    elif isinstance(layer, QuantConv2d) and segment.kind == "patch_embed":
        calibrate_conv(layer, one_or_more(seen), recipe)
    else:
        assert isinstance(layer, WeightLayer)  # another convolution
        calibrate_conv_by_own_error(layer, one_or_more(seen), recipe)
    return seen


def one_or_more(seen: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Return a convolution's input, or its inputs if they are several."""
    return seen[0] if len(seen) == 1 else seen


def _reparameterized(
    segment: Segment, name: str, layer: QuantLinear, x: Tensor, recipe: Recipe
) -> tuple[Tensor, Range | None]:
    """Reparameterise ``layer`` and its norm, if it has one; return its new inputs and their range.

    The range is None without reparameterisation.
    """
    pair = norm_before(segment, name, layer, recipe)
    if pair is None:
        return x, None
    ranges = channel_ranges(x.flatten(0, -2), layer.input_quantizer.levels, recipe)
    r, b = move_pair(segment, pair, layer, ranges)
    return x / r - b, common_range(ranges)
