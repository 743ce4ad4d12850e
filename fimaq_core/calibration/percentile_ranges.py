"""Ranges by RepQ-ViT's scheme (Li et al., ICCV 2023, arXiv:2212.08254): percentiles by own error.

Each range is the best of three percentiles. Weights have one range per output channel, activations
and attention operands one range per tensor. No range depends on a layer's output.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import (
    MIN_SCALE,
    MIN_WEIGHT_SCALE,
    Range,
    ascending,
    block_elements,
    from_bounds,
    quantiles,
)
from fimaq_core.calibration.linear_ranges import set_rows
from fimaq_core.calibration.own_error import best_by_own_error
from fimaq_core.calibration.thinning import conv_values
from fimaq_core.layers import QuantLayer, QuantLinear, QuantMatMul, WeightLayer
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.quantizers.logarithm import log_fake_quantize
from fimaq_core.quantizers.special import LogQuantizer

#: The upper quantiles.
_POINTS = [0.999, 0.9999, 0.99999]


def percentile_range(
    sorted_rows: Tensor, levels: int, min_scale: float = MIN_SCALE, *, extended: bool = False
) -> Range:
    """Return scale and zero point (groups,) between the quantiles 1 - p and p of least own error.

    ``sorted_rows`` (groups, n) are ascending. ``extended`` adds the extremes, without and with
    zero; the latter is the min-max range.
    """
    upper = quantiles(sorted_rows, _POINTS)
    lower = quantiles(sorted_rows, [1 - point for point in _POINTS])
    if extended:
        least, most = sorted_rows[:, 0], sorted_rows[:, -1]
        lower = torch.cat([lower, torch.stack([least, least.clamp(max=0)])])
        upper = torch.cat([upper, torch.stack([most, most.clamp(min=0)])])
    candidates = from_bounds(lower, upper, levels, min_scale)
    return candidates.pick(best_by_own_error(sorted_rows, candidates, levels))


def percentile_log_scale(
    x: Tensor, step: Tensor | float, levels: int, *, extended: bool = False
) -> Tensor:
    """Return the scale (scalar) of a logarithmic quantizer: the quantile of least own error.

    ``x`` are the values that are quantized, behind a GELU with the shift; ``step`` is in octaves.
    ``extended`` adds the largest value.
    """
    flat, points = x.reshape(-1), [*_POINTS, 1.0] if extended else _POINTS
    scales = quantiles(ascending(flat[None]), points)[:, 0].clamp(min=MIN_SCALE)
    errors = torch.zeros(len(scales), dtype=torch.float64, device=x.device)
    for part in torch.split(flat, block_elements(x.device)):
        for number, scale in enumerate(scales):
            error = log_fake_quantize(part, scale, step, levels).sub_(part).square_()
            errors[number] += error.sum(dtype=torch.float64)
    return scales[errors.argmin()]


def layer_percentiles(
    layer: QuantLayer, seen: tuple[Tensor, ...], *, extended: bool = False
) -> None:
    """Set the ranges of a layer of any kind for its inputs, given as by ``Capture``."""
    if isinstance(layer, QuantMatMul):
        for quantizer, x in zip((layer.a_quantizer, layer.b_quantizer), seen, strict=True):
            input_percentile(quantizer, x, (1, 1, 1, 1), extended=extended)
    elif isinstance(layer, QuantLinear):
        linear_percentiles(layer, seen[0], extended=extended)
    else:
        conv_percentiles(layer, seen[0] if len(seen) == 1 else seen, extended=extended)


def linear_percentiles(layer: QuantLinear, x: Tensor, *, extended: bool = False) -> None:
    """Set a linear layer's ranges for inputs (..., d)."""
    input_percentile(layer.input_quantizer, x, (1,), extended=extended)
    weight_percentiles(layer, extended=extended)


def set_known(layer: QuantLinear, ranges: Range, *, extended: bool = False) -> None:
    """Set a linear layer's ranges if the input's is known: a scalar, or (d,) per channel."""
    if isinstance(layer.input_quantizer, AffineQuantizer):
        layer.input_quantizer.set_range(ranges[0].view(-1), ranges[1].view(-1))
    weight_percentiles(layer, extended=extended)


def conv_percentiles(
    layer: WeightLayer, x: Tensor | Sequence[Tensor], *, extended: bool = False
) -> None:
    """Set a convolution's ranges for one or several inputs (N, C, H, W)."""
    if not layer.input_quantizer.off:
        input_percentile(layer.input_quantizer, conv_values(x), (1, 1, 1, 1), extended=extended)
    weight_percentiles(layer, extended=extended)


def weight_percentiles(
    layer: WeightLayer, weight: Tensor | None = None, *, extended: bool = False
) -> None:
    """Set the ranges of a layer's weight, or of ``weight`` (rows, d) in its place."""
    if not layer.weight_quantizer.off:
        rows = ascending(layer.weight.detach().flatten(1) if weight is None else weight)
        levels = layer.weight_quantizer.levels
        ranges = percentile_range(rows, levels, MIN_WEIGHT_SCALE, extended=extended)
        set_rows(layer.weight_quantizer, *ranges)


def input_percentile(
    quantizer: ActivationQuantizer, x: Tensor, shape: tuple[int, ...], *, extended: bool = False
) -> None:
    """Set one range for all of ``x``: the best percentile. ``shape`` is the scale's."""
    if quantizer.off:
        return
    if isinstance(quantizer, AffineQuantizer):
        ordered = ascending(x.reshape(1, -1))
        scale, zero = percentile_range(ordered, quantizer.levels, extended=extended)
        quantizer.set_range(scale.view(shape), zero.view(shape))
    else:
        assert isinstance(quantizer, LogQuantizer)  # recipes allow no other
        shifted = x + quantizer.shift if quantizer.shift else x
        levels, step = quantizer.levels, quantizer.step
        scale = percentile_log_scale(shifted, step, levels, extended=extended)
        quantizer.set_scale(scale.view(shape))
