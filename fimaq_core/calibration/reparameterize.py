"""LayerNorm reparameterisation (RepQ-ViT: Li et al., ICCV 2023, arXiv:2212.08254).

The range of a LayerNorm's output varies much between channels. The ranges (s_c, z_c) of the
channels become one common range: the norm's affine parameters scale and shift each channel, and the
next linear layer undoes that.
"""

import torch
from torch import Tensor, nn

from fimaq_core.calibration.candidates import MIN_SCALE, Range, ascending
from fimaq_core.calibration.own_error import best_by_own_error
from fimaq_core.calibration.percentile_ranges import percentile_range
from fimaq_core.calibration.progressive import candidates_of, progressive_rows
from fimaq_core.chain import NormPair, Segment
from fimaq_core.layers import QuantLayer, QuantLinear
from fimaq_core.recipe import Recipe


def norm_before(segment: Segment, name: str, layer: QuantLayer, recipe: Recipe) -> NormPair | None:
    """Return the norm to reparameterise with ``layer``, ``name`` of a segment's block, if any.

    There is none if the input is not quantized or, except with percentile ranges, if the bits of
    input and weight differ. There is none in rotated models, whose channels have similar ranges:
    with `fimaq` before any step, at 3 and 4 bits, reparameterisation behind the rotation made the
    divergence from full precision larger in all 4 pairs of runs of the demo ViT (by 6 to 21 %), and
    in 2 of 4 of the demo Swin (by -14 to 16 %).
    """
    if not recipe.reparameterize or recipe.rotate != "none":
        return None
    if segment.kind == "merge" and not recipe.reparameterize_merges:
        return None
    if not isinstance(layer, QuantLinear) or layer.input_quantizer.off:
        return None
    agree = layer.input_quantizer.bits == layer.weight_quantizer.bits
    if not agree and recipe.range_search != "percentile":
        return None
    return next((pair for pair in segment.pairs if pair.linear == name), None)


def channel_ranges(x: Tensor, levels: int, recipe: Recipe) -> Range:
    """Return scale and zero point (channels,) of each channel of ``x`` (tokens, channels).

    Each range minimises the channel's own squared error.
    """
    rows, count = x.t().contiguous(), recipe.range_candidates
    ordered = ascending(rows)
    if recipe.range_search == "percentile":
        return percentile_range(ordered, levels, extended=recipe.range_grid == "extended")
    candidates = candidates_of(ordered, levels, recipe=recipe, least_scale=MIN_SCALE)
    if recipe.range_search == "progressive":
        return progressive_rows(rows, levels, count, start=candidates, min_scale=MIN_SCALE)
    return candidates.pick(best_by_own_error(ordered, candidates, levels))


def common_range(ranges: Range) -> Range:
    """Return the one scale and zero point (scalars) that replace those of the channels."""
    return ranges[0].mean(), ranges[1].mean().round()


def move_pair(
    segment: Segment, pair: NormPair, layer: nn.Linear, ranges: Range
) -> tuple[Tensor, Tensor]:
    """Call :func:`reparameterize` for a norm of a segment and the layer behind it."""
    pad = None if pair.pad is None else segment.block.get_buffer(pair.pad)
    return reparameterize(pair.norm, layer, *ranges, pad)


def reparameterize(
    norm: nn.LayerNorm, linear: nn.Linear, scale: Tensor, zero: Tensor, pad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Move factors and shifts of channels into norm and linear layer, in place.

    With s = mean s_c, z = round(mean z_c), r = s_c / s and b = min_c / r - min (min_c = -z_c s_c,
    min = -z s) the norm's output becomes ``x / r - b``. The linear layer, its only consumer, undoes
    that, so the function of both together is unchanged. Missing biases are created. ``pad``
    (channels,) is the value padded between the two, in place of zeros; it changes like the output.

    Returns:
        ``r`` and ``b``, each (channels,).
    """
    common_scale, common_zero = common_range((scale, zero))
    r = scale / common_scale
    b = -zero * scale / r + common_zero * common_scale
    with torch.no_grad():
        if norm.bias is None:
            norm.bias = nn.Parameter(torch.zeros_like(norm.weight), requires_grad=False)
        if linear.bias is None:
            bias = linear.weight.new_zeros(linear.out_features)
            linear.bias = nn.Parameter(bias, requires_grad=False)
        norm.weight.div_(r)
        norm.bias.div_(r).sub_(b)
        linear.weight.mul_(r)
        linear.bias.add_(linear.weight @ b)
        if pad is not None:
            pad.div_(r).sub_(b)
    return r, b
