"""Twin uniform quantization (PTQ4ViT: Yuan et al., ECCV 2022, arXiv:2111.12293): two ranges.

With L codes, ``H = L / 2`` belong to each range. L is a power of two, at least 4. Split and scale
broadcast to x. The learned forms have a straight-through ``round``; where their mask ``keep`` is 0
the value stays in full precision.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fimaq_core.quantizers.logarithm import GELU_SHIFT


def twin_softmax(
    x: Tensor, split: Tensor, levels: int, rounded: Callable[[Tensor], Tensor] = torch.round
) -> Tensor:
    """Quantize values in [0, 1]: below the split by ``split / (H - 1)``, else by ``1 / (H - 1)``.

    Each range has the codes 0 … H - 1, so 0 has two, and values from the split to half a coarse
    step become 0. This is the paper's quantizer, one range or the other. The released code adds
    both ranges' values, each of the value clamped to its range: from the split on that is the split
    more than here, and below it as here wherever the split is below half a coarse step.
    """
    top = levels // 2 - 1
    fine = split / top
    low = rounded(x / fine).clamp(0, top) * fine
    high = rounded(x * top).clamp(0, top) / top
    return torch.where(x < split, low, high)


def twin_gelu(
    x: Tensor,
    positive_scale: Tensor,
    levels: int,
    rounded: Callable[[Tensor], Tensor] = torch.round,
) -> Tensor:
    """Quantize values behind a GELU: positive ones by their own step, others by ``GELU_SHIFT / H``.

    Codes are 0 … H - 1 for the positive range and -1 … -H for the negative one, which ends at GELU's
    minimum: L codes in all, since 0 is one code for both.
    """
    half = levels // 2
    fine = GELU_SHIFT / half
    positive = rounded(x / positive_scale).clamp(0, half - 1) * positive_scale
    negative = rounded(x / fine).clamp(-half, 0) * fine
    return torch.where(x >= 0, positive, negative)


def learned_twin_softmax(
    x: Tensor, split: Tensor, levels: int, keep: Tensor | None = None
) -> Tensor:
    """:func:`twin_softmax` that can be differentiated with respect to ``x`` and ``split``.

    The split is learned as what sets the lower range's step; that it also decides which range a
    value belongs to has no gradient.
    """
    return _kept(twin_softmax(x, split, levels, _through), x, keep)


def learned_twin_gelu(
    x: Tensor, positive_scale: Tensor, levels: int, keep: Tensor | None = None
) -> Tensor:
    """:func:`twin_gelu` that can be differentiated with respect to ``x`` and ``positive_scale``."""
    return _kept(twin_gelu(x, positive_scale, levels, _through), x, keep)


def _kept(quantized: Tensor, x: Tensor, keep: Tensor | None) -> Tensor:
    return quantized if keep is None else torch.where(keep.bool(), quantized, x)


def _through(ratio: Tensor) -> Tensor:
    """``round`` with a gradient of 1."""
    return ratio + (torch.round(ratio) - ratio).detach()
