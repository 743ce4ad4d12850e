"""The region proposal network as the last segment of a detector's chain."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.chain import Segment
from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantConv2d
from fimaq_core.recipe import Recipe
from tasks.detection.mm import RPNHead, expect
from tasks.detection.neck import Unpack

#: Strides of the maps P2 to P6; all but the last are packed, so the sides of a padded image are multiples of the last but one.
STRIDES = (4, 8, 16, 32, 64)

_LAYERS = ("rpn_conv", "rpn_cls", "rpn_reg")


class RpnOutputs(nn.Module):
    """mmdet's ``RPNHead`` on a packed pyramid of P2 to P5, all its outputs in one tensor (B, L, 5
    A).

    Positions follow level by level, the finest first, and row by row. A position has A class
    logits, then the 4 deltas of anchor 0, of anchor 1, and so on.
    """

    def __init__(self, head: RPNHead) -> None:
        super().__init__()
        self.rpn_conv, self.rpn_cls, self.rpn_reg = (getattr(head, name) for name in _LAYERS)
        self.unpack = Unpack([head.in_channels] * (len(STRIDES) - 1))

    def forward(self, packed: Tensor) -> Tensor:
        outputs = []
        for features in self.unpack(packed):
            hidden = F.relu(self.rpn_conv(features))
            outputs.append(torch.cat([self.rpn_cls(hidden), self.rpn_reg(hidden)], 1).flatten(2).transpose(1, 2))
        return torch.cat(outputs, 1)


def rpn_segment(model: nn.Module, recipe: Recipe) -> Segment:
    """The RPN as a segment that is calibrated only; its layers are swapped in ``model.rpn_head``
    itself.
    """
    head = model.rpn_head
    expect(head, "A region proposal network", RPNHead)
    for name in _LAYERS:
        layer = getattr(head, name)
        expect(layer, f"A layer ({name}) in an RPNHead", nn.Conv2d)
        setattr(head, name, QuantConv2d.from_float(layer, recipe.w_bits, recipe.a_bits))
    return Segment("rpn_head", "predictor", RpnOutputs(head))


def rpn_levels(height: int, width: int) -> list[int]:
    """Positions per level in the RPN's output. Raises ModelError for images that are not padded."""
    if height % STRIDES[-2] or width % STRIDES[-2]:
        raise ModelError(f"An image of {height} x {width} pixels is not padded: the sides must be multiples of {STRIDES[-2]}.")
    # Negating twice rounds up: subsampling keeps the last position of an odd side.
    return [-(-height // stride) * -(-width // stride) for stride in STRIDES]
