"""ERQ's calibration of one layer (Zhong et al., ICML 2024, arXiv:2407.06794): refit, then rounding.

The inputs' range is set already. Weight and bias are refit to the quantized inputs by ridge
regression, the refit weight gets its ranges by percentiles, and its rounding is decided half by
half, what is left each time compensating. The float layer stays: the result is codes and a
quantized bias.

Differences from the released code: the ridge is the README's (its option coe 10000, times 0.1),
added to sums over all tokens; the released default is twice that. Layers without a token axis (the
classifier) are refit with a ridge of 0.1, as released.
"""

import torch
from torch import Tensor

from fimaq_core.calibration.conv_ranges import Inputs, eights, input_patches
from fimaq_core.calibration.percentile_ranges import weight_percentiles
from fimaq_core.calibration.refit import InputMoments, refine_rounding, refit_moments, ridge_refit
from fimaq_core.layers import QuantConv2d, QuantLinear
from fimaq_core.recipe import Recipe

#: Ridge of the first refit of layers whose inputs are (samples, d), and the factor of a convolution's, as released.
_CLASSIFIER_RIDGE, _CONV_FACTOR = 0.1, 10.0


def reduce_linear_error(layer: QuantLinear, x: Tensor, recipe: Recipe) -> None:
    """Refit a linear layer whose input range is set, on (..., d), and decide its rounding."""
    flat = x.reshape(-1, x.shape[-1])
    own = None if layer.bias is None else layer.bias.detach()
    moments = refit_moments(flat, layer.input_quantizer(flat))
    ridge = recipe.refit_ridge if x.ndim > 2 else min(_CLASSIFIER_RIDGE, recipe.refit_ridge)
    weight, bias = ridge_refit(layer.weight.detach(), own, moments, ridge)
    weight_percentiles(layer, weight)
    _decide(layer, weight, bias, moments, recipe, recipe.refit_ridge)


def reduce_conv_error(layer: QuantConv2d, x: Inputs, recipe: Recipe) -> None:
    """Decide a patch embedding's rounding on inputs (N, C, H, W); as released it is not refit.

    (Its input is not quantized.) Convolutions in groups, which no patch embedding has, keep
    rounding to nearest. So do those of necks and heads, for which this is not called: a kernel of 3
    x 3 x 256 has moments of 2304 x 2304, and an image of 800 x 1333 adds 66,800 patches at the
    finest level alone.
    """
    if layer.groups != 1:
        return
    patches = torch.cat([input_patches(layer, layer.input_quantizer(part), 0) for part in eights(x)])
    bias = None if layer.bias is None else layer.bias.detach()
    weight = layer.weight.detach().flatten(1)
    _decide(layer, weight, bias, refit_moments(patches, patches), recipe, _CONV_FACTOR * recipe.refit_ridge)


def _decide(
    layer: QuantLinear | QuantConv2d, weight: Tensor, bias: Tensor | None, moments: InputMoments, recipe: Recipe, ridge: float
) -> None:
    """Set codes and the quantized form's bias from a weight (rows, d) whose ranges are set."""
    quantizer = layer.weight_quantizer
    if not quantizer.off:
        scale, zero = quantizer.scale.detach(), quantizer.zero_point
        codes, bias = refine_rounding(weight, bias, scale, zero, quantizer.levels, moments, ridge, recipe.refit_flips)
        quantizer.set_codes(codes)
    if bias is not None:
        layer.quantized_bias = bias.detach().float().contiguous()
