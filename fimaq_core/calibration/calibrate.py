"""Calibration of a whole chain in one walk, block by block, on full-precision inputs."""

import torch
from torch import Tensor

from fimaq_core import layers
from fimaq_core.calibration import percentile_ranges
from fimaq_core.calibration.candidates import Range
from fimaq_core.calibration.capture import Capture, quantizes
from fimaq_core.calibration.conv_ranges import calibrate_conv, calibrate_conv_by_own_error
from fimaq_core.calibration.linear_ranges import calibrate_linear
from fimaq_core.calibration.product_ranges import calibrate_matmul
from fimaq_core.calibration.refit import reduce_conv_error, reduce_linear_error
from fimaq_core.calibration.reparameterize import channel_ranges, reparameterize
from fimaq_core.chain import BlockChain, Kept, Segment
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

    Every layer is calibrated on its inputs in the full-precision model, so each block runs once.
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
    device = next(chain.parameters()).device
    layers.set_quantized(chain, False)
    if not any(quantizes(layer) for _, layer in layers.quant_layers(chain)):
        layers.set_quantized(chain, True)
        return
    x = Samples.of(images).first(recipe.range_images)
    x = Samples([sample for sample in x if len(sample)]) if x.varying else x.to(device)
    samples = len(x) if x.varying else None
    sides = [chain.side_of(part.to(device)) for part in x.batches(batch_size)]
    kept: list[Kept] = [()] * len(sides)
    for index, segment in enumerate(chain):
        on_progress(Progress("calibrate", index, len(chain), segment.label))
        captured = Capture(segment, recipe, samples)
        outputs = []
        for number, part in enumerate(x.batches(batch_size)):
            own = tuple(one.to(device) for one in kept[number])
            output = segment(part.to(device), sides[number], own)
            if samples is not None:
                captured.settle()
            more = segment.kept_with(output, kept[number])
            kept[number] = tuple(one.to(part.device) for one in more)
            outputs.append(output.to(part.device))
        captured.remove()
        for name, layer in captured.layers.items():
            _calibrate_layer(segment, name, layer, captured.inputs(name), recipe)
            captured.forget(name)
        x = x.joined(outputs) if outputs else x
        if not any(chain.segment(later).takes_kept for later in range(index + 1, len(chain))):
            kept = [()] * len(sides)
    on_progress(Progress("calibrate", len(chain), len(chain)))
    layers.set_quantized(chain, True)


def _calibrate_layer(
    segment: Segment, name: str, layer: QuantLayer, seen: tuple[Tensor, ...], recipe: Recipe
) -> None:
    """Set the ranges of layer ``name`` of a block from its full-precision inputs ``seen``."""
    percentile = recipe.range_search == "percentile"
    if isinstance(layer, QuantMatMul):
        if percentile:
            for quantizer, x in zip((layer.a_quantizer, layer.b_quantizer), seen, strict=True):
                percentile_ranges.input_percentile(quantizer, x, (1, 1, 1, 1))
        else:
            calibrate_matmul(layer, seen[0], seen[1], recipe)
    elif isinstance(layer, QuantLinear):
        x, common = _reparameterized(segment, name, layer, seen[0], recipe)
        if percentile:
            percentile_ranges.linear_percentiles(layer, x, common)
        else:
            calibrate_linear(layer, x, recipe)
        if recipe.refit:
            reduce_linear_error(layer, x, recipe)
    else:
        assert isinstance(layer, WeightLayer)  # a convolution
        inputs = seen[0] if len(seen) == 1 else seen
        embeds = isinstance(layer, QuantConv2d) and segment.kind == "patch_embed"
        if percentile:
            percentile_ranges.conv_percentiles(layer, inputs)
        elif isinstance(layer, QuantConv2d) and embeds:
            calibrate_conv(layer, inputs, recipe)
        else:
            calibrate_conv_by_own_error(layer, inputs, recipe)
        if recipe.refit and isinstance(layer, QuantConv2d) and embeds:
            reduce_conv_error(layer, inputs, recipe)


def _reparameterized(
    segment: Segment, name: str, layer: QuantLinear, x: Tensor, recipe: Recipe
) -> tuple[Tensor, Range | None]:
    """Reparameterise ``layer`` and its norm, if it has one; return its new inputs and their range.

    The range is None without reparameterisation.
    """
    bits, percentile = layer.input_quantizer.bits, recipe.range_search == "percentile"
    agree = percentile or bits == layer.weight_quantizer.bits
    pair = next((pair for pair in segment.pairs if pair.linear == name), None)
    if pair is None or not recipe.reparameterize or bits == OFF or not agree:
        return x, None
    scale, zero = channel_ranges(x.flatten(0, -2), layer.input_quantizer.levels, recipe)
    pad = None if pair.pad is None else segment.block.get_buffer(pair.pad)
    r, b = reparameterize(pair.norm, layer, scale, zero, pad)
    return x / r - b, (scale.mean(), zero.mean().round())
