"""Logarithmic quantization, for values in [0, s] of which most are small, such as softmax outputs.

``k = round(-log2(clamp(x / s, 1e-15, 1)) / step)``, ``x̂ = s 2^(-step k)`` for k < L, else 0. L is
the number of levels; scale s and step broadcast to x. A step of 1 is log2, 1/2 is log√2 (RepQ-ViT:
Li et al., ICCV 2023, arXiv:2212.08254), q/37 with an integer q is AdaLog (Wu et al., ECCV 2024,
arXiv:2407.12951). :data:`GELU_SHIFT` is added to GELU outputs before, and subtracted after.
"""

import torch
from torch import Tensor

ADALOG_R = 37  # denominator of AdaLog's exponents
#: Minus the minimum of GELU (by the error function): in float32 ``gelu(x) + GELU_SHIFT >= -1e-7``.
GELU_SHIFT = 0.16997124254703522
LOWEST = 1e-15  # lower bound of x / s; all smaller values have the same code


def log_codes(x: Tensor, scale: Tensor, step: Tensor | float) -> Tensor:
    """Compute the codes k in floating point, not limited to the levels; shape of x."""
    return (x / scale).clamp_(LOWEST, 1).log2_().neg_().div_(step).round_()


def log_fake_quantize(x: Tensor, scale: Tensor, step: Tensor | float, levels: int) -> Tensor:
    """Round ``x`` to ``s 2^(-step k)`` with the nearest logarithm, or to 0 for k >= L.

    Values above s become s; values below 1e-15 s, also negative ones, count as 1e-15 s.
    """
    codes = log_codes(x, scale, step)
    dropped = codes >= levels  # False for NaN, which therefore stays NaN
    return codes.mul_(-step).exp2_().mul_(scale).masked_fill_(dropped, 0.0)


def adalog_tables(q: int, levels: int) -> tuple[Tensor, Tensor]:
    """Make AdaLog's points as shifts and mantissas, (L,) float32, for inference without ``exp``.

    Code k stands for ``2^(-kq/37)``. The shift is ``floor(kq / 37)``; the mantissa is ``2^(-(kq mod
    37)/37)``, rounded to a multiple of ``1 / (2L - 2)``. L is at least 2.
    """
    exponents = torch.arange(levels) * q
    unit = 2 * levels - 2
    rest = torch.exp2(-(exponents % ADALOG_R).double() / ADALOG_R)
    return (exponents // ADALOG_R).float(), (torch.round(rest * unit) / unit).float()


def adalog_fake_quantize(
    x: Tensor, scale: Tensor, shifts: Tensor, mantissas: Tensor, step: Tensor | float, levels: int
) -> Tensor:
    """Quantize as :func:`log_fake_quantize`, to points ``s 2^(-shifts[k]) mantissas[k]``.

    Shifts and mantissas come from :func:`adalog_tables`.
    """
    points = torch.cat([torch.exp2(-shifts) * mantissas, mantissas.new_zeros(1)])
    codes = log_codes(x, scale, step).clamp_(max=levels).int()
    return points.index_select(0, codes.flatten()).view(codes.shape).mul_(scale)


def learned_log_fake_quantize(
    x: Tensor, scale: Tensor, step: Tensor | float, levels: int, keep: Tensor | None = None
) -> Tensor:
    """Compute :func:`log_fake_quantize`, differentiable in ``x`` and ``scale``.

    ``round`` has a straight-through gradient. Inside the range, ``dx̂/dx = x̂ / x`` and ``dx̂/ds =
    0``; where x / s is clamped, ``dx̂/dx = 0`` and ``dx̂/ds = x̂ / s``; where k >= L, both are 0.
    Autograd would be inexact: the logarithm has no finite gradient at 0, and two terms of
    ``dx̂/ds`` cancel only up to rounding errors. Where the mask ``keep`` is 0, values stay in full
    precision.
    """
    values, largest = x.detach(), scale.detach()
    out = log_fake_quantize(values, largest, step, levels)
    ratio = values / largest
    inside = (ratio > LOWEST) & (ratio < 1)
    # Both slopes are 0 where k >= L, since x̂ is 0.
    slope = torch.where(inside, out / torch.where(inside, values, 1.0), 0.0)
    scale_slope = torch.where(inside, 0.0, out / largest)
    out = out + slope * (x - values) + scale_slope * (scale - largest)  # adds 0, exactly
    return out if keep is None else torch.where(keep.bool(), out, x)
