"""Twin uniform quantization (PTQ4ViT: Yuan et al., ECCV 2022, arXiv:2111.12293): two ranges.

Each range has ``H = L / 2`` of the L codes. L is a power of two, at least 4. Split and scale
broadcast to x.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fimaq_core.quantizers.logarithm import GELU_SHIFT


def twin_softmax(
    x: Tensor, split: Tensor, levels: int, rounded: Callable[[Tensor], Tensor] = torch.round
) -> Tensor:
    """Quantize values in [0, 1]: step ``split / (H - 1)`` below the split, else ``1 / (H - 1)``.

    Each range has the codes 0 … H - 1. So 0 has two codes, and values from the split to half a
    coarse step become 0. This is the paper's quantizer. The authors' code adds the results of both
    ranges, each on the value clamped to it: above the split, its results are larger by the split;
    below, they are the same if the split is less than half a coarse step.
    """
    top = levels // 2 - 1
    fine = split / top
    low = rounded(x / fine).clamp(0, top) * fine
    high = rounded(x * top).clamp(0, top) / top
    return torch.where(x < split, low, high)


def twin_gelu(
    x: Tensor, scale: Tensor, levels: int, rounded: Callable[[Tensor], Tensor] = torch.round
) -> Tensor:
    """Quantize GELU outputs: positive values with step ``scale``, others with ``GELU_SHIFT / H``.

    The codes are 0 … H - 1 for positive values and -1 … -H for negative values, down to GELU's
    minimum. Both ranges share one code for 0.
    """
    half = levels // 2
    fine = GELU_SHIFT / half
    positive = rounded(x / scale).clamp(0, half - 1) * scale
    negative = rounded(x / fine).clamp(-half, 0) * fine
    return torch.where(x >= 0, positive, negative)


def learned_twin(
    twin: Callable[..., Tensor], x: Tensor, scale: Tensor, levels: int, keep: Tensor | None = None
) -> Tensor:
    """Compute :func:`twin_softmax` or :func:`twin_gelu`, differentiable in ``x`` and ``scale``.

    ``round`` has a straight-through gradient; the choice of a range by the split has none. Where
    the mask ``keep`` is 0, values stay in full precision.
    """
    out = twin(x, scale, levels, lambda ratio: ratio + (torch.round(ratio) - ratio).detach())
    return out if keep is None else torch.where(keep.bool(), out, x)
