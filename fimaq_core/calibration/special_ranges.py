"""Ranges of quantizers made for softmax and GELU outputs: logarithmic and twin uniform.

Sources: AdaLog (Wu et al., ECCV 2024, arXiv:2407.12951) and PTQ4ViT (Yuan et al., ECCV 2022,
arXiv:2111.12293). Searches minimise the error of the product that the values enter. The other
operand is given quantized (``b_hat``, ``w_hat``) and in full precision (``b``, ``w``). Among equal
errors the first candidate is chosen.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.calibration.candidates import (
    MIN_SCALE,
    Candidates,
    ascending,
    block_elements,
    quantiles,
)
from fimaq_core.calibration.progressive import progressive
from fimaq_core.calibration.similar_ranges import Points, RangeErrors
from fimaq_core.errors import DataError
from fimaq_core.layers import QuantLinear
from fimaq_core.quantizers import logarithm
from fimaq_core.quantizers.logarithm import ADALOG_R, GELU_SHIFT, log_fake_quantize
from fimaq_core.quantizers.special import AdaLogQuantizer, LogQuantizer, TwinQuantizer
from fimaq_core.quantizers.twin import twin_gelu, twin_softmax

#: AdaLog's smallest numerator q; with many levels, smaller ones give finer steps.
_FIRST_Q = 10
#: AdaLog behind a GELU: numerators kept after the first step, and candidates kept after the others.
_FEW, _WIDTH = 8, 32
#: AdaLog behind a GELU: number of times that the scales are refined.
_ROUNDS = 5
#: Number of PTQ4ViT's splits, which are 2**-i.
_SPLITS = 20

#: Maps a tensor to its quantized form, a new tensor.
Quantizer = Callable[[Tensor], Tensor]


def product_errors(
    x: Tensor, other: Tensor, plain: Tensor, quantizers: Sequence[Quantizer]
) -> Tensor:
    """Return the squared error, float64 (quantizers,), of ``x̂ @ other`` against ``x @ plain``.

    As in :class:`.output_error.Product` the error is computed from the small errors ``D = x̂ - x``
    and ``R = x @ (other - plain)``. x is (batch, rows, inner), the others are (batch, inner,
    columns); or all are without batch. Quantizers are elementwise.
    """
    inner, columns = other.shape[-2:]
    gram, shared = columns > inner, other.ndim == 2
    errors = torch.zeros(len(quantizers), dtype=torch.float64, device=x.device)
    step = max(block_elements(x.device) // (x[0].numel() // inner * max(inner, columns)), 1)
    matrix = other @ other.mT if gram and shared else other
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        part, own = x[rows], other if shared else other[rows]
        term = part @ (own - (plain if shared else plain[rows]))
        product = matrix if shared else own
        if gram:
            errors += term.square().sum(dtype=torch.float64)
            term = 2 * (term @ own.mT)
            product = product if shared else own @ own.mT
        for number, quantize in enumerate(quantizers):
            delta = quantize(part).sub_(part)
            made = (delta @ product).add_(term)
            made = made.mul_(delta) if gram else made.square_()
            errors[number] += made.sum(dtype=torch.float64)
    return errors


def _numerators(x: Tensor, count: int, *, extended: bool) -> Tensor:
    """Return AdaLog's numerators 10 to ``count + 9``, from 1 on with ``extended`` candidates."""
    first = 1 if extended else _FIRST_Q
    return torch.arange(first, _FIRST_Q + count, device=x.device, dtype=x.dtype)


def search_adalog_softmax(
    a: Tensor, b_hat: Tensor, b: Tensor, levels: int, count: int, *, extended: bool = False
) -> int:
    """Search AdaLog's numerator q behind a softmax, with scale 1, among :func:`_numerators`."""
    a, b_hat, b = (part.flatten(0, 1) for part in (a, b_hat, b))
    numerators = _numerators(a, count, extended=extended)
    found = RangeErrors(a, b_hat, a @ (b_hat - b), _adalog_points(levels), _logarithm(a))
    return int(numerators[found.best(torch.ones_like(numerators), numerators, 1).argmin()])


def search_twin_softmax(a: Tensor, b: Tensor, levels: int) -> Tensor:
    """Search the split (scalar) of the twin quantizer behind a softmax among ``2^-i``, i < 20.

    The other operand is in full precision, as released.
    """
    splits = torch.exp2(-torch.arange(_SPLITS, device=a.device, dtype=a.dtype))
    quantizers = [partial(twin_softmax, split=split, levels=levels) for split in splits]
    errors = product_errors(a.flatten(0, 1), b.flatten(0, 1), b.flatten(0, 1), quantizers)
    return splits[errors.argmin()]


def search_after_gelu(
    layer: QuantLinear, x: Tensor, count: int, *, again: bool = False, extended: bool = False
) -> None:
    """Set the special input quantizer of a linear layer for inputs (tokens, d).

    The weight is quantized as the layer is set up now. ``again`` is True from the second round on;
    then AdaLog's q is first searched at the present scale.
    """
    quantizer, weight = layer.input_quantizer, layer.weight.detach()
    if quantizer.off:
        return
    hat, levels = layer.weight_quantizer.quantized(weight), quantizer.levels
    if isinstance(quantizer, AdaLogQuantizer):
        present = quantizer.scale if again else None
        scale, q = search_adalog_gelu(x, hat, weight, levels, count, present, extended=extended)
        quantizer.set_base(q)
    elif isinstance(quantizer, LogQuantizer):
        scale = search_log_gelu(x, hat, weight, float(quantizer.step), levels, count)
    else:
        assert isinstance(quantizer, TwinQuantizer)
        scale = search_twin_gelu(x, hat, weight, levels, count)
    quantizer.set_scale(scale.view(1))


def search_adalog_gelu(
    x: Tensor,
    w_hat: Tensor,
    w: Tensor,
    levels: int,
    count: int,
    present: Tensor | None = None,
    *,
    extended: bool = False,
) -> tuple[Tensor, int]:
    """Search AdaLog's scale (scalar) and numerator q behind a GELU, by the output's error.

    The quantizer sees ``x`` (tokens, d) plus the shift. The first step tries all numerators with
    the scale ``present`` (one value), by default the second largest of ``count`` scales (at least
    16). The best eight numerators times ``count / 8`` scales start a search that refines scales
    five times. The best candidate of all steps is returned, including the first one (see
    :func:`~.progressive.progressive`).
    """
    other = w_hat.t()[None]
    shifted, residual = (x + GELU_SHIFT)[:, None], (x @ (w_hat - w).t())[:, None]
    found = RangeErrors(shifted, other, residual, _adalog_points(levels), _logarithm(shifted))

    def errors(candidates: Candidates, width: int) -> Tensor:
        # The numerators take the place of zero points.
        return found.best(candidates.scale[:, 0], candidates.zero_point[:, 0], width)[:, None]

    numerators = _numerators(x, count, extended=extended)[:, None]
    first = _gelu_scales(x, count)[-2] if present is None else present
    look = Candidates(first.expand(len(numerators), 1), numerators)
    looked = errors(look, _FEW)
    order = looked[:, 0].argsort(stable=True)[:_FEW]
    scales = _gelu_scales(x, count // _FEW)
    few = numerators[order].repeat_interleave(len(scales), 0)
    start, spacing = Candidates(scales.repeat(_FEW)[:, None], few), (scales[1] - scales[0])[None]
    scale, q = progressive(errors, start, _WIDTH, max(count // _WIDTH, 2), _ROUNDS + 1, spacing)
    if looked[order[0], 0] <= errors(Candidates(scale[None], q[None]), 1)[0, 0]:
        scale, q = look.pick(order[:1])
    return scale[0], int(q)


def search_log_gelu(
    x: Tensor, w_hat: Tensor, w: Tensor, step: float, levels: int, count: int
) -> Tensor:
    """Search the scale (scalar) of a logarithmic quantizer with a fixed ``step``, in octaves."""

    def errors(candidates: Candidates, _: int) -> Tensor:
        def quantized(part: Tensor, scale: Tensor) -> Tensor:
            return log_fake_quantize(part + GELU_SHIFT, scale, step, levels).sub_(GELU_SHIFT)

        quantizers = [partial(quantized, scale=scale) for scale in candidates.scale[:, 0]]
        return product_errors(x, w_hat.t(), w.t(), quantizers)[:, None]

    scales = _gelu_scales(x, count)[:, None]
    start, spacing = Candidates(scales, torch.zeros_like(scales)), scales[1] - scales[0]
    scale, _ = progressive(errors, start, _WIDTH, max(count // _WIDTH, 2), 6, spacing)
    return scale[0]


def search_twin_gelu(x: Tensor, w_hat: Tensor, w: Tensor, levels: int, count: int = 100) -> Tensor:
    """Search the scale (scalar) of the twin quantizer's positive range, by the output's error.

    Candidates run evenly from 0.01 to 1.2 times ``max(x) / (levels / 2 - 0.5)``.
    """
    widest = x.amax().clamp(min=MIN_SCALE) / (levels // 2 - 0.5)
    scales = widest * torch.linspace(0.01, 1.2, count, device=x.device, dtype=x.dtype)
    quantizers = [partial(twin_gelu, scale=scale, levels=levels) for scale in scales]
    return scales[product_errors(x, w_hat.t(), w.t(), quantizers).argmin()]


def _adalog_points(levels: int) -> Points:
    """Return AdaLog's points, from its tables. Values are logarithms, kinds are numerators."""
    tables: dict[float, Tensor] = {}

    def points(values: Tensor, scale: Tensor, q: float) -> Tensor:
        if q not in tables:
            shifts, mantissas = logarithm.adalog_tables(int(q), levels)
            tables[q] = F.pad(torch.exp2(-shifts) * mantissas, (0, 1)).to(values)
        rate = ADALOG_R / q
        codes = torch.sub(scale.log2() * rate, values, alpha=rate)
        codes = codes.clamp_(0, min(levels, -math.log2(logarithm.LOWEST) * rate)).round_().int()
        return tables[q].index_select(0, codes.flatten()).view(codes.shape)

    return points


def _logarithm(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny).log2_()


def _gelu_scales(x: Tensor, count: int) -> Tensor:
    """Return scales (count,) between the 0.9 and 1.0 quantiles of positive values plus the shift.

    Raises:
        DataError: no value is positive.
    """
    positive = x[x > 0]
    if not len(positive):
        raise DataError(
            "No value behind a GELU is positive: there is nothing to find a scale from. "
            "Check the calibration images."
        )
    inner, top = (quantiles(ascending(positive[None]), [0.9, 1.0]) + GELU_SHIFT)[:, 0]
    share = torch.linspace(0, 1, count, device=x.device, dtype=x.dtype)
    return torch.lerp(inner, top, share)
