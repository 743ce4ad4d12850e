"""mmdet's FPN (Lin et al., CVPR 2017, arXiv:1612.03144) as a block, and its maps as one tensor.

A chain's blocks hand one tensor on, so the maps of a pyramid are packed: each is twice as wide and
high as the next. At the grid of the coarsest one, cells of the finer maps become channels (pixel
unshuffle), so nothing is padded or lost, and all shapes follow from the packed tensor's.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantConv2d
from fimaq_core.recipe import Recipe
from tasks.detection.mm import FPN, expect


def pack(maps: Sequence[Tensor]) -> Tensor:
    """Pack maps (B, C_i, h 2^(n-1-i), w 2^(n-1-i)), the finest first, into (B, Σ C_i 4^(n-1-i), h,
    w).
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


def unpack(packed: Tensor, channels: Sequence[int]) -> tuple[Tensor, ...]:
    """Undo :func:`pack` of maps with ``channels``, the finest first. Raises ModelError for others."""
    last = len(channels) - 1
    shares = [count * 4 ** (last - level) for level, count in enumerate(channels)]
    if packed.shape[1] != sum(shares):
        raise ModelError(f"{packed.shape[1]} channels are not those of maps with {list(channels)} channels, packed.")
    maps = packed.split(shares, dim=1)
    return tuple(F.pixel_shuffle(one, 2 ** (last - level)) for level, one in enumerate(maps))


class ExplicitFPN(nn.Module):
    """mmdet's ``FPN`` with quantizable convolutions: packed stage outputs to packed maps P2, P3,
    ...

    The coarsest level that mmdet adds is a part of the one before, see :class:`Unpack`.
    """

    def __init__(self, fpn: FPN, recipe: Recipe) -> None:
        super().__init__()
        expect(fpn, "A neck", FPN)
        self.in_channels = list(fpn.in_channels)
        self.channels = [fpn.out_channels] * len(self.in_channels)
        self.lateral_convs, self.fpn_convs = fpn.lateral_convs, fpn.fpn_convs
        for module in (*self.lateral_convs, *self.fpn_convs):
            module.conv = QuantConv2d.from_float(module.conv, recipe.w_bits, recipe.a_bits)

    def forward(self, x: Tensor) -> Tensor:
        laterals = [conv(one) for conv, one in zip(self.lateral_convs, unpack(x, self.in_channels), strict=True)]
        for level in range(len(laterals) - 1, 0, -1):
            fine = laterals[level - 1]
            laterals[level - 1] = fine + F.interpolate(laterals[level], size=fine.shape[2:], mode="nearest")
        return pack([conv(one) for conv, one in zip(self.fpn_convs, laterals, strict=True)])


class Unpack(nn.Module):
    """The maps that mmdet's heads take: those that were packed, and every second cell of the coarsest."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = unpack(x, self.channels)
        return (*maps, maps[-1][:, :, ::2, ::2])
