"""Calibration of a whole chain in one walk, block by block."""

import torch
from torch import Tensor

from fimaq_core.calibration.capture import Capture, quantizes
from fimaq_core.calibration.layer_ranges import calibrate_layer, one_or_more
from fimaq_core.calibration.refit import reduce_conv_error, reduce_linear_error
from fimaq_core.calibration.sequential import calibrate_behind
from fimaq_core.calibration.walk import Walk
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.layers import QuantConv2d, QuantLayer, QuantLinear, quant_layers, set_quantized
from fimaq_core.progress import OnProgress, Progress, silent
from fimaq_core.recipe import Recipe
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
    set_quantized(chain, False)
    if not any(quantizes(layer) for _, layer in quant_layers(chain)):
        set_quantized(chain, True)
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
                    seen = calibrate_layer(segment, name, layer, seen, recipe)
                if recipe.refit:
                    _refit(segment, layer, seen, recipe)
                captured.forget(name)
            full.advance(outputs)
    on_progress(Progress("calibrate", len(chain), len(chain)))
    set_quantized(chain, True)


def _refit(segment: Segment, layer: QuantLayer, seen: tuple[Tensor, ...], recipe: Recipe) -> None:
    """Refit a linear layer or patch embedding to its full-precision inputs; its ranges are set."""
    if isinstance(layer, QuantLinear):
        reduce_linear_error(layer, seen[0], recipe)
    elif isinstance(layer, QuantConv2d) and segment.kind == "patch_embed":
        reduce_conv_error(layer, one_or_more(seen), recipe)
