"""Logarithmic quantization: ``k = round(-log2(clamp(x / s, 1e-15, 1)) / step)`` and
``x̂ = s 2^(-step k)``.

x̂ is 0 where k >= L, the number of codes. For values in [0, s] of which most are small, as behind a
softmax. ``step`` (octaves) 1 is log2, 1/2 is log√2 (RepQ-ViT: Li et al., ICCV 2023,
arXiv:2212.08254), q/37 with an integer q is AdaLog (Wu et al., ECCV 2024, arXiv:2407.12951). Behind a
GELU the values are quantized with :data:`GELU_SHIFT` added, which the layer behind takes away again.
Scale and step broadcast to x.
"""

import torch
from torch import Tensor

#: Denominator of AdaLog's exponents.
ADALOG_R = 37
#: Minus the minimum of GELU (by the error function) up to float32's rounding: ``gelu(x) + GELU_SHIFT >= -1e-7``.
GELU_SHIFT = 0.16997124254703522

#: Lower bound of x / s, below which there is one code for all values.
LOWEST = 1e-15


def log_codes(x: Tensor, scale: Tensor, step: Tensor | float) -> Tensor:
    """Codes k of the definition, not limited by the number of levels, as floating point."""
    return (x / scale).clamp_(LOWEST, 1).log2_().neg_().div_(step).round_()


def log_fake_quantize(x: Tensor, scale: Tensor, step: Tensor | float, levels: int) -> Tensor:
    """Round ``x`` to a point ``s 2^(-step k)`` with k < L, or to 0.

    Nearest is meant in the logarithm. Values above s become s; values up to 0 count as 1e-15 s.
    """
    codes = log_codes(x, scale, step)
    dropped = codes >= levels  # asked this way round, NaN stays NaN
    return codes.mul_(-step).exp2_().mul_(scale).masked_fill_(dropped, 0.0)


def adalog_tables(q: int, levels: int) -> tuple[Tensor, Tensor]:
    """AdaLog's points as shifts and mantissas, (L,) float32 each: inference without exponentials.

    Code k stands for ``2^(-kq/37)``: a shift by ``floor(kq / 37)`` of ``2^(-(kq mod 37)/37)``,
    which is rounded to a multiple of ``1 / (2L - 2)``. L is at least 2.
    """
    exponents = torch.arange(levels) * q
    unit = 2 * levels - 2
    rest = torch.exp2(-(exponents % ADALOG_R).double() / ADALOG_R)
    return (exponents // ADALOG_R).float(), (torch.round(rest * unit) / unit).float()


def adalog_fake_quantize(
    x: Tensor, scale: Tensor, shifts: Tensor, mantissas: Tensor, step: Tensor | float, levels: int
) -> Tensor:
    """:func:`log_fake_quantize` by :func:`adalog_tables`: ``s 2^(-shifts[k]) mantissas[k]``."""
    points = torch.cat([torch.exp2(-shifts) * mantissas, mantissas.new_zeros(1)])
    codes = log_codes(x, scale, step).clamp_(max=levels).int()
    return points.index_select(0, codes.flatten()).view(codes.shape).mul_(scale)


def learned_log_fake_quantize(
    x: Tensor, scale: Tensor, step: Tensor | float, levels: int, keep: Tensor | None = None
) -> Tensor:
    """:func:`log_fake_quantize` that can be differentiated with respect to ``x`` and ``scale``.

    ``round`` has a straight-through gradient. Within the range that makes ``dx̂/dx = x̂ / x`` and
    ``dx̂/ds = 0``; where x / s is clamped, ``dx̂/dx = 0`` and ``dx̂/ds = x̂ / s``; where k >= L
    both are 0. These are written down: the definition's logarithm has no finite gradient at 0, and
    its two terms of ``dx̂/ds`` cancel inexactly. Where the mask ``keep`` is 0 the value stays in
    full precision.
    """
    values, largest = x.detach(), scale.detach()
    out = log_fake_quantize(values, largest, step, levels)
    ratio = values / largest
    inside = (ratio > LOWEST) & (ratio < 1)
    # x̂ is 0 where k >= L, and so are both slopes.
    slope = torch.where(inside, out / torch.where(inside, values, 1.0), 0.0)
    scale_slope = torch.where(inside, 0.0, out / largest)
    out = out + slope * (x - values) + scale_slope * (scale - largest)  # adds 0, exactly
    return out if keep is None else torch.where(keep.bool(), out, x)
