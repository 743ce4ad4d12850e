"""Ranges behind layers that are quantized already (RepQ-ViT: Li et al., ICCV 2023).

In the released code (arXiv:2212.08254) the first forward pass of the quantized model sets each
range when the layer is called. So a layer's input comes from layers that are quantized, weights and
inputs. Layers behind a reparameterised norm have one input range per channel in this pass. Then the
norms are reparameterised, and the layers behind them get new ranges of their weights.

Searches other than percentiles reparameterise each norm at once.
"""

import torch

from fimaq_core.calibration.candidates import Range
from fimaq_core.calibration.capture import Capture, quantizes
from fimaq_core.calibration.layer_ranges import calibrate_layer
from fimaq_core.calibration.percentile_ranges import set_known
from fimaq_core.calibration.reparameterize import (
    channel_ranges,
    common_range,
    move_pair,
    norm_before,
)
from fimaq_core.calibration.walk import Walk
from fimaq_core.chain import NormPair
from fimaq_core.layers import QuantLinear, quant_layers, set_quantized
from fimaq_core.recipe import Recipe


@torch.no_grad()
def calibrate_behind(walk: Walk, recipe: Recipe) -> None:
    """Set all ranges of the walk's current segment, and go to the next segment.

    Layers are set in the order of their first calls. The segment runs once per layer, and once for
    its output. It is left in full precision, with reparameterised norms.

    Args:
        walk: walk whose earlier segments were quantized when it ran them.
        recipe: all settings.

    Raises:
        NumericsError: a weight or activation is not finite, or a layer gets no input.
    """
    percentile, extended = recipe.range_search == "percentile", recipe.range_grid == "extended"
    segment, samples = walk.segment, len(walk.x) if walk.x.varying else None
    waiting = {name: layer for name, layer in quant_layers(segment.block) if quantizes(layer)}
    moved: list[tuple[NormPair, QuantLinear, Range]] = []
    while waiting:
        captured = Capture(segment, recipe, samples, waiting)
        walk.run(captured)
        captured.remove()
        # If no layer was called, reading the inputs raises the error.
        name = captured.first or next(iter(waiting))
        layer, seen = waiting.pop(name), captured.inputs(name)
        pair = norm_before(segment, name, layer, recipe)
        if isinstance(layer, QuantLinear) and pair is not None and percentile:
            tokens, levels = seen[0].flatten(0, -2), layer.input_quantizer.levels
            ranges = channel_ranges(tokens, levels, recipe)
            set_known(layer, ranges, extended=extended)
            moved.append((pair, layer, ranges))
        else:
            calibrate_layer(segment, name, layer, seen, recipe)
        layer.quantized = True
    walk.advance(walk.run())
    set_quantized(segment.block, False)
    for pair, layer, ranges in moved:
        move_pair(segment, pair, layer, ranges)
        set_known(layer, common_range(ranges), extended=extended)
