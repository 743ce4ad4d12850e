"""Calibration of a whole chain in one walk, block by block."""

import torch
from torch import Tensor

from fimaq_core import layers
from fimaq_core.calibration.candidates import Range
from fimaq_core.calibration.capture import Capture, quantizes
from fimaq_core.calibration.conv_ranges import calibrate_conv, calibrate_conv_by_own_error
from fimaq_core.calibration.linear_ranges import calibrate_linear
from fimaq_core.calibration.percentile_ranges import (
    layer_percentiles,
    linear_percentiles,
    set_known,
)
from fimaq_core.calibration.product_ranges import calibrate_matmul
from fimaq_core.calibration.refit import reduce_conv_error, reduce_linear_error
from fimaq_core.calibration.reparameterize import (
    channel_ranges,
    common_range,
    move_pair,
    norm_before,
)
from fimaq_core.calibration.sequential import calibrate_behind
from fimaq_core.calibration.walk import Walk
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.layers import QuantConv2d, QuantLayer, QuantLinear, QuantMatMul, WeightLayer
from fimaq_core.progress import OnProgress, Progress, silent
from fimaq_core.recipe import OFF, Recipe
from fimaq_core.samples import Samples


@torch.no_grad()
def calibrate(
    chain: BlockChain,
    images: Samples | Tensor,
    recipe: Recipe,
    on_progress: OnProgress = silent,
    batch_size: int = 32,
) -> None:
    """Set all ranges of ``chain``, in place, and switch its layers to their quantized form.

    Layers are calibrated on their inputs in the full-precision model, so each block runs once. With
    ``range_inputs`` quantized they are calibrated on their inputs behind quantized layers, and a
    block runs once per layer, see :func:`.sequential.calibrate_behind`. A refit takes the inputs in
    the full-precision model.

    LayerNorm reparameterisation changes norms and weights, but not the float function. Convolutions
    outside the patch embedding are calibrated by their own errors and not refit.

    The time of weight searches does not depend on the number of images; that of all others grows
    with it. Memory: outputs of the block and inputs of its quantizable layers for all images, about
    five copies of the inputs of the layer just searched, and temporaries of fixed size. Images of
    varying shapes keep a bounded number of rows per layer, see :class:`.capture.Capture`.

    Args:
        images: (N, ...) inputs of the chain; the first ``recipe.range_images`` are used. If shapes
            vary, a sample may have any number of rows, also none (an image without proposals).
        on_progress: receives one unit per block.
        batch_size: samples per forward pass.

    Raises:
        NumericsError: a weight or activation is not finite, or a layer gets no input.
    """
    layers.set_quantized(chain, False)
    if not any(quantizes(layer) for _, layer in layers.quant_layers(chain)):
        layers.set_quantized(chain, True)
        return
    x = Samples.of(images).first(recipe.range_images)
    device = next(chain.parameters()).device
    x = Samples([sample for sample in x if len(sample)]) if x.varying else x.to(device)
    behind = Walk(chain, x, batch_size) if recipe.range_inputs == "quantized" else None
    full = Walk(chain, x, batch_size) if behind is None or recipe.refit else None
    for index, segment in enumerate(chain):
        on_progress(Progress("calibrate", index, len(chain), segment.label))
        if behind is not None:
            calibrate_behind(behind, recipe)
        if full is not None:
            captured = Capture(segment, recipe, len(x) if x.varying else None)
            outputs = full.run(captured)
            captured.remove()
            for name, layer in captured.layers.items():
                seen = captured.inputs(name)
                if behind is None:
                    seen = _calibrate_layer(segment, name, layer, seen, recipe)
                if recipe.refit:
                    _refit(segment, layer, seen, recipe)
                captured.forget(name)
            full.advance(outputs)
    on_progress(Progress("calibrate", len(chain), len(chain)))
    layers.set_quantized(chain, True)


def _calibrate_layer(
    segment: Segment, name: str, layer: QuantLayer, seen: tuple[Tensor, ...], recipe: Recipe
) -> tuple[Tensor, ...]:
    """Set the ranges of layer ``name`` of a block from its full-precision inputs ``seen``.

    Returns the inputs, which reparameterisation changes.
    """
    percentile = recipe.range_search == "percentile"
    if isinstance(layer, QuantLinear):
        x, known = _reparameterized(segment, name, layer, seen[0], recipe)
        if not percentile:
            calibrate_linear(layer, x, recipe)
        elif known is None:
            linear_percentiles(layer, x)
        else:
            set_known(layer, known)
        return (x,)
    if percentile:
        layer_percentiles(layer, seen)
    elif isinstance(layer, QuantMatMul):
        calibrate_matmul(layer, seen[0], seen[1], recipe)
    elif isinstance(layer, QuantConv2d) and segment.kind == "patch_embed":
        calibrate_conv(layer, _images(seen), recipe)
    else:
        assert isinstance(layer, WeightLayer)  # another convolution
        calibrate_conv_by_own_error(layer, _images(seen), recipe)
    return seen


def _images(seen: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Return a convolution's input, or its inputs if they are several."""
    return seen[0] if len(seen) == 1 else seen


def _refit(segment: Segment, layer: QuantLayer, seen: tuple[Tensor, ...], recipe: Recipe) -> None:
    """Refit a linear layer or patch embedding to its full-precision inputs; its ranges are set."""
    if isinstance(layer, QuantLinear):
        reduce_linear_error(layer, seen[0], recipe)
    elif isinstance(layer, QuantConv2d) and segment.kind == "patch_embed":
        reduce_conv_error(layer, _images(seen), recipe)


def _reparameterized(
    segment: Segment, name: str, layer: QuantLinear, x: Tensor, recipe: Recipe
) -> tuple[Tensor, Range | None]:
    """Reparameterise ``layer`` and its norm, if it has one; return its new inputs and their range.

    The range is None without reparameterisation.
    """
    bits, pair = layer.input_quantizer.bits, norm_before(segment, name, recipe)
    agree = recipe.range_search == "percentile" or bits == layer.weight_quantizer.bits
    if pair is None or bits == OFF or not agree:
        return x, None
    ranges = channel_ranges(x.flatten(0, -2), layer.input_quantizer.levels, recipe)
    r, b = move_pair(segment, pair, layer, ranges)
    return x / r - b, common_range(ranges)
