"""mmdet's FPN (Lin et al., CVPR 2017, arXiv:1612.03144) and RPN as segments on packed maps.

The blocks of a chain pass on one tensor, so the maps of a pyramid are packed into one tensor of the
coarsest map's size: the pixels of the finer maps become channels (pixel unshuffle).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.chain import Segment
from fimaq_core.errors import ModelError
from fimaq_core.families import expect
from fimaq_core.layers import QuantConv2d
from fimaq_core.recipe import Recipe
from tasks.detection.mm import FPN, RPNHead

#: Strides of the maps P2 to P6. P2 to P5 are packed, so the sides of a padded image must be
#: multiples of the stride of P5.
STRIDES = (4, 8, 16, 32, 64)

_LAYERS = ("rpn_conv", "rpn_cls", "rpn_reg")


def pack(maps: Sequence[Tensor]) -> Tensor:
    """Pack maps (B, C_i, h 2^(n-1-i), w 2^(n-1-i)) into (B, Σ C_i 4^(n-1-i), h, w)."""
    if not maps:
        raise ModelError("There are no maps to pack.")
    for fine, coarse in pairwise(maps):
        if fine.shape[-2] != 2 * coarse.shape[-2] or fine.shape[-1] != 2 * coarse.shape[-1]:
            sizes = ", ".join(f"{one.shape[-2]} x {one.shape[-1]}" for one in maps)
            raise ModelError(
                f"Maps of sizes {sizes} cannot be packed: each has to be twice as high and wide as "
                "the next. Pad the images to multiples of the coarsest map's stride "
                "(pad_size_divisor, 32 for Swin)."
            )
    last = len(maps) - 1
    cells = [F.pixel_unshuffle(one, 2 ** (last - level)) for level, one in enumerate(maps)]
    return torch.cat(cells, dim=1)


def unpack(packed: Tensor, channels: Sequence[int]) -> tuple[Tensor, ...]:
    """Undo :func:`pack` of maps with ``channels``. Raises ModelError for other channels."""
    last = len(channels) - 1
    shares = [count * 4 ** (last - level) for level, count in enumerate(channels)]
    if packed.shape[1] != sum(shares):
        raise ModelError(
            f"A packed tensor of {packed.shape[1]} channels does not hold maps of {list(channels)} "
            "channels."
        )
    maps = packed.split(shares, dim=1)
    return tuple(F.pixel_shuffle(one, 2 ** (last - level)) for level, one in enumerate(maps))


class ExplicitFPN(nn.Module):
    """mmdet's ``FPN``, quantizable: from packed stage outputs to packed maps P2 to P5.

    :func:`unpack_pyramid` adds P6.
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
        maps = unpack(x, self.in_channels)
        laterals = [conv(one) for conv, one in zip(self.lateral_convs, maps, strict=True)]
        for level in range(len(laterals) - 1, 0, -1):
            fine, coarse = laterals[level - 1], laterals[level]
            laterals[level - 1] = fine + F.interpolate(coarse, size=fine.shape[2:], mode="nearest")
        return pack([conv(one) for conv, one in zip(self.fpn_convs, laterals, strict=True)])


def unpack_pyramid(packed: Tensor, channels: Sequence[int]) -> tuple[Tensor, ...]:
    """Unpack the maps P2 to P5, and add P6: every second pixel of P5."""
    maps = unpack(packed, channels)
    return (*maps, maps[-1][:, :, ::2, ::2])


class RpnOutputs(nn.Module):
    """mmdet's ``RPNHead`` on packed maps P2 to P5, with its outputs in one tensor (B, L, 5 A).

    The L positions are in order of levels, finest first, then rows, then columns. Each position has
    A class logits, then the 4 deltas of anchor 0, of anchor 1, and so on.
    """

    def __init__(self, head: RPNHead) -> None:
        super().__init__()
        self.rpn_conv, self.rpn_cls, self.rpn_reg = (getattr(head, name) for name in _LAYERS)
        self.channels = [head.in_channels] * (len(STRIDES) - 1)

    def forward(self, packed: Tensor) -> Tensor:
        outputs = []
        for features in unpack_pyramid(packed, self.channels):
            hidden = F.relu(self.rpn_conv(features))
            found = torch.cat([self.rpn_cls(hidden), self.rpn_reg(hidden)], 1)
            outputs.append(found.flatten(2).transpose(1, 2))
        return torch.cat(outputs, 1)


def rpn_segment(model: nn.Module, recipe: Recipe) -> Segment:
    """Make a segment of the RPN, which is only calibrated; replace its layers in ``model``."""
    head = model.rpn_head
    expect(head, "A region proposal network", RPNHead)
    for name in _LAYERS:
        layer = getattr(head, name)
        expect(layer, f"A layer ({name}) in an RPNHead", nn.Conv2d)
        setattr(head, name, QuantConv2d.from_float(layer, recipe.w_bits, recipe.a_bits))
    return Segment("rpn_head", "predictor", RpnOutputs(head))


def rpn_levels(height: int, width: int) -> list[int]:
    """Count the RPN's positions per level. Raises ModelError for an image that is not padded."""
    if height % STRIDES[-2] or width % STRIDES[-2]:
        raise ModelError(
            f"An image of {height} x {width} pixels is not padded: the sides must be multiples of "
            f"{STRIDES[-2]}."
        )
    # Two negations round up: P6 keeps the last position of an odd side.
    return [-(-height // stride) * -(-width // stride) for stride in STRIDES]
