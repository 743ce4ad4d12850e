"""Logarithmic quantization, for values in [0, s] of which most are small, such as softmax outputs.

``k = round(-log2(clamp(x / s, 1e-15, 1)) / step)``, ``x̂ = s 2^(-step k)`` for k < L, else 0. L is
the number of levels; scale s and step broadcast to x. A step of 1 is log2, 1/2 is log√2 (RepQ-ViT:
Li et al., ICCV 2023, arXiv:2212.08254), q/37 with an integer q is AdaLog (Wu et al., ECCV 2024,
arXiv:2407.12951). GELU outputs are quantized with :data:`GELU_SHIFT` added, which the next layer
subtracts again.
"""

import torch
from torch import Tensor

#: Denominator of AdaLog's exponents.
ADALOG_R = 37
#: Minus the minimum of GELU (by the error function): in float32 ``gelu(x) + GELU_SHIFT >= -1e-7``.
GELU_SHIFT = 0.16997124254703522

#: Lower bound of x / s; all values below it have the same code.
LOWEST = 1e-15


def log_codes(x: Tensor, scale: Tensor, step: Tensor | float) -> Tensor:
    """Codes k in floating point, not limited by the number of levels; shape of x."""
    return (x / scale).clamp_(LOWEST, 1).log2_().neg_().div_(step).round_()


def log_fake_quantize(x: Tensor, scale: Tensor, step: Tensor | float, levels: int) -> Tensor:
    """Round ``x`` to the nearest point ``s 2^(-step k)`` in the logarithm, or to 0 for k >= L.

    Values above s become s; values up to 0 count as 1e-15 s.
    """
    codes = log_codes(x, scale, step)
    dropped = codes >= levels  # False for NaN, which therefore stays NaN
    return codes.mul_(-step).exp2_().mul_(scale).masked_fill_(dropped, 0.0)


def adalog_tables(q: int, levels: int) -> tuple[Tensor, Tensor]:
    """AdaLog's points as shifts and mantissas, (L,) float32 each, for inference without ``exp``.

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
    """:func:`log_fake_quantize` with :func:`adalog_tables`: ``s 2^(-shifts[k]) mantissas[k]``."""
    points = torch.cat([torch.exp2(-shifts) * mantissas, mantissas.new_zeros(1)])
    codes = log_codes(x, scale, step).clamp_(max=levels).int()
    return points.index_select(0, codes.flatten()).view(codes.shape).mul_(scale)


def learned_log_fake_quantize(
    x: Tensor, scale: Tensor, step: Tensor | float, levels: int, keep: Tensor | None = None
) -> Tensor:
    """:func:`log_fake_quantize` that is differentiable in ``x`` and ``scale``.

    ``round`` has a straight-through gradient. Inside the range, ``dx̂/dx = x̂ / x`` and ``dx̂/ds =
    0``; where x / s is clamped, ``dx̂/dx = 0`` and ``dx̂/ds = x̂ / s``; where k >= L, both are 0.
    These slopes are computed directly: the logarithm has no finite gradient at 0, and the two terms
    of ``dx̂/ds`` in its definition cancel inexactly. Values stay in full precision where the mask
    ``keep`` is 0.
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
