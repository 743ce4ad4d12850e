"""Maps of a pyramid packed into one dense tensor and back: a chain's blocks hand one tensor on.

Each map is twice as wide and high as the next. At the grid of the coarsest one, cells of the finer maps become channels (pixel
unshuffle), so nothing is padded or lost, and all shapes follow from the packed tensor's.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.errors import ModelError


def pack(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, C_i, h 2^(n-1-i), w 2^(n-1-i)), the finest first, as one tensor (B, Σ C_i 4^(n-1-i), h, w).

    Raises:
        ModelError: no map, or one that is not twice as high and wide as the next.
    """
    if not maps:
        raise ModelError("There are no maps to pack.")
    for fine, coarse in pairwise(maps):
        if fine.shape[-2] != 2 * coarse.shape[-2] or fine.shape[-1] != 2 * coarse.shape[-1]:
            sizes = ", ".join(f"{one.shape[-2]} x {one.shape[-1]}" for one in maps)
            raise ModelError(
                f"Maps of sizes {sizes} cannot be packed: each has to be twice as high and wide as the next. Pad the images to "
                "multiples of the coarsest map's stride (pad_size_divisor, 32 for Swin)."
            )
    last = len(maps) - 1
    return torch.cat([F.pixel_unshuffle(one, 2 ** (last - level)) for level, one in enumerate(maps)], dim=1)


def packed_channels(channels: Sequence[int]) -> int:
    """Channels of the packed tensor of maps with ``channels``, the finest first."""
    return sum(_shares(channels))


def unpack(packed: Tensor, channels: Sequence[int]) -> tuple[Tensor, ...]:
    """The maps that :func:`pack` made ``packed`` of.

    Args:
        packed: (B, Σ C_i 4^(n-1-i), h, w).
        channels: C_i of each map, the finest first.

    Raises:
        ModelError: the number of channels is another.
    """
    if packed.shape[1] != packed_channels(channels):
        raise ModelError(f"{packed.shape[1]} channels are not those of maps with {list(channels)} channels, packed.")
    last = len(channels) - 1
    shares = packed.split(_shares(channels), dim=1)
    return tuple(F.pixel_shuffle(share, 2 ** (last - level)) for level, share in enumerate(shares))


def _shares(channels: Sequence[int]) -> list[int]:
    last = len(channels) - 1
    return [count * 4 ** (last - level) for level, count in enumerate(channels)]
