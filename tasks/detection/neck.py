"""mmdet's FPN (Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, arXiv:1612.03144) as a block."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantConv2d
from fimaq_core.recipe import Recipe
from tasks.detection.mm import FPN, ConvModule
from tasks.detection.packing import pack, unpack


class ExplicitFPN(nn.Module):
    """mmdet's ``FPN`` with quantizable convolutions: packed stage outputs to packed maps P2, P3, ...

    The coarsest level that mmdet adds is a part of the one before, see :class:`Unpack`.

    Args of ``forward``: x, stage outputs by :func:`tasks.detection.packing.pack`.

    Attributes:
        in_channels, channels: of the packed maps that go in and come out, the finest first.

    Raises:
        ModelError: levels or convolutions of a kind that is not supported.
    """

    def __init__(self, fpn: FPN, recipe: Recipe) -> None:
        super().__init__()
        _check(fpn)
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
    """The tuple of maps that mmdet's heads take: those that were packed, and every second cell of the coarsest.

    Args:
        channels: of the packed maps, the finest first.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = unpack(x, self.channels)
        return (*maps, maps[-1][:, :, ::2, ::2])


def _check(fpn: FPN) -> None:
    if type(fpn) is not FPN:
        raise ModelError(f"A neck of type {type(fpn).__name__} is not supported: it has to be FPN.")
    levels = len(fpn.in_channels)
    if fpn.start_level != 0 or fpn.backbone_end_level != levels or fpn.num_outs != levels + 1 or fpn.add_extra_convs:
        raise ModelError(
            "An FPN has to use all stages of the backbone and to add one level, by subsampling: "
            f"start_level 0, end_level -1, num_outs {levels + 1}, add_extra_convs False."
        )
    if dict(fpn.upsample_cfg) != {"mode": "nearest"}:
        raise ModelError(f"An FPN that upsamples by {dict(fpn.upsample_cfg)} is not supported: it has to be the nearest cell.")
    for module in (*fpn.lateral_convs, *fpn.fpn_convs):
        if type(module) is not ConvModule or type(module.conv) is not nn.Conv2d or module.with_spectral_norm:
            raise ModelError(f"An FPN with convolutions of type {type(module.conv).__name__} is not supported.")
        if module.efficient_conv_bn_eval_forward is not None:
            raise ModelError("An FPN that folds its norms into convolutions (efficient_conv_bn_eval) is not supported.")
