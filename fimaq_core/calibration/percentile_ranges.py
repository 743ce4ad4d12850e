"""Ranges by RepQ-ViT's scheme (Li et al., ICCV 2023, arXiv:2212.08254): percentiles by own error.

Of three percentiles the best is taken: weights per output channel, activations per tensor,
attention operands too. No range looks at a layer's output.
"""

from collections.abc import Sequence

from torch import Tensor

from fimaq_core.calibration.candidates import MIN_WEIGHT_SCALE, ascending
from fimaq_core.calibration.layer_ranges import set_rows
from fimaq_core.calibration.special_ranges import percentile_log_scale, percentile_range
from fimaq_core.calibration.thinning import conv_values
from fimaq_core.layers import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    QuantMatMul,
    WeightLayer,
)
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.quantizers.special import LogQuantizer

#: Scale and zero point, scalars, that reparameterisation left for an input.
Common = tuple[Tensor, Tensor]


def linear_percentiles(layer: QuantLinear, x: Tensor, common: Common | None = None) -> None:
    """Set a linear layer's ranges; ``common`` is the input's range where it is known."""
    input_percentile(layer.input_quantizer, x, (1,), common)
    weight_percentiles(layer)


def conv_percentiles(
    layer: QuantConv2d | QuantConvTranspose2d, x: Tensor | Sequence[Tensor]
) -> None:
    """Set a convolution's ranges for inputs (N, C, H, W); several are thinned beyond a bound."""
    if not layer.input_quantizer.off:
        input_percentile(layer.input_quantizer, conv_values(x), (1, 1, 1, 1))
    weight_percentiles(layer)


def matmul_percentiles(layer: QuantMatMul, a: Tensor, b: Tensor) -> None:
    """Set the ranges of an attention product."""
    input_percentile(layer.a_quantizer, a, (1, 1, 1, 1))
    input_percentile(layer.b_quantizer, b, (1, 1, 1, 1))


def weight_percentiles(layer: WeightLayer, weight: Tensor | None = None) -> None:
    """Set a weight's ranges; ``weight`` (rows, d) stands in for the layer's own."""
    if not layer.weight_quantizer.off:
        matrix = layer.weight.detach().flatten(1) if weight is None else weight
        scale, zero = percentile_range(
            ascending(matrix), layer.weight_quantizer.levels, MIN_WEIGHT_SCALE
        )
        set_rows(layer.weight_quantizer, scale, zero)


def input_percentile(
    quantizer: ActivationQuantizer, x: Tensor, shape: tuple[int, ...], common: Common | None = None
) -> None:
    """Set one range for all of ``x``; its scale has shape ``shape``."""
    if quantizer.off:
        return
    if isinstance(quantizer, AffineQuantizer):
        scale, zero = (
            common
            if common is not None
            else percentile_range(ascending(x.reshape(1, -1)), quantizer.levels)
        )
        quantizer.set_range(scale.view(shape), zero.view(shape))
    else:
        assert isinstance(quantizer, LogQuantizer)  # recipes allow no other
        shifted = x + quantizer.shift if quantizer.shift else x
        quantizer.set_scale(
            percentile_log_scale(shifted, quantizer.step, quantizer.levels).view(shape)
        )
