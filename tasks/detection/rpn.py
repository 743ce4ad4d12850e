"""The region proposal network as the last segment of a detector's chain."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.chain import Segment
from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantConv2d
from fimaq_core.recipe import Recipe
from tasks.detection.mm import RPNHead
from tasks.detection.neck import Unpack

#: Strides of the maps P2 to P6; all but the last are packed, so the sides of a padded image are multiples of the last but one.
_STRIDES = [4, 8, 16, 32, 64]
_DIVISOR = _STRIDES[-2]

_LAYERS = ("rpn_conv", "rpn_cls", "rpn_reg")


class RpnOutputs(nn.Module):
    """mmdet's ``RPNHead`` on a packed pyramid of P2 to P5, all its outputs in one tensor (B, L, 5
    A).

    Positions of all levels follow each other, the finest level first, each level row by row. A
    position has A class logits, then the 4 deltas of anchor 0, of anchor 1, and so on.
    """

    def __init__(self, head: RPNHead) -> None:
        super().__init__()
        self.rpn_conv, self.rpn_cls, self.rpn_reg = (getattr(head, name) for name in _LAYERS)
        self.unpack = Unpack([head.in_channels] * (len(_STRIDES) - 1))

    def forward(self, packed: Tensor) -> Tensor:
        outputs = []
        for features in self.unpack(packed):
            hidden = F.relu(self.rpn_conv(features))
            outputs.append(torch.cat([self.rpn_cls(hidden), self.rpn_reg(hidden)], 1).flatten(2).transpose(1, 2))
        return torch.cat(outputs, 1)


def rpn_segment(model: nn.Module, recipe: Recipe) -> Segment:
    """The RPN as a segment that is calibrated only; its layers are swapped in ``model.rpn_head``
    itself.

    Raises:
        ModelError: a head of another kind or on other levels.
    """
    head = getattr(model, "rpn_head", None)
    if type(head) is not RPNHead:
        raise ModelError(f"A region proposal network of type {type(head).__name__} is not supported: only RPNHead is.")
    if head.num_convs != 1 or not head.use_sigmoid_cls or head.bbox_coder.encode_size != 4:
        raise ModelError("An RPNHead is supported with one convolution (num_convs=1), sigmoid classes and 4 deltas a box only.")
    strides = rpn_strides(model)
    if strides != _STRIDES:
        raise ModelError(f"An RPNHead on levels of strides {strides} is not supported: its levels are P2 to P6, of {_STRIDES}.")
    for name in _LAYERS:
        layer = getattr(head, name)
        if type(layer) is not nn.Conv2d:
            raise ModelError(f"A layer of type {type(layer).__name__} ({name}) in an RPNHead is not supported: only Conv2d is.")
        setattr(head, name, QuantConv2d.from_float(layer, recipe.w_bits, recipe.a_bits))
    return Segment("rpn_head", "predictor", RpnOutputs(head))


def rpn_strides(model: nn.Module) -> list[int]:
    """Strides of the RPN's levels in pixels. Raises ModelError where they differ between the axes."""
    head = model.rpn_head
    assert isinstance(head, nn.Module)
    strides = [tuple(stride) for stride in head.prior_generator.strides]
    if any(across != down for across, down in strides):
        raise ModelError(f"Anchors with strides that differ between the axes ({strides}) are not supported.")
    return [int(across) for across, _ in strides]


def rpn_levels(height: int, width: int, strides: Sequence[int]) -> list[int]:
    """Positions on each level in the RPN's output, for a padded image.

    Raises ModelError for sides that are no multiples of 32.
    """
    if height % _DIVISOR or width % _DIVISOR:
        raise ModelError(f"An image of {height} x {width} pixels is not padded: the sides must be multiples of {_DIVISOR}.")
    # Negating twice rounds up: subsampling keeps the last position of an odd side.
    return [-(-height // stride) * -(-width // stride) for stride in strides]
