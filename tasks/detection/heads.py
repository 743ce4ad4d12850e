"""The RoI heads of a detector: the supported ones, and their layers as quantizable ones."""

from typing import Any

import torch
from mmcv.cnn import Conv2d, ConvTranspose2d, Linear, is_norm
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from fimaq_core.recipe import Recipe
from tasks.detection.mm import CascadeRoIHead, ConvFCBBoxHead, FCNMaskHead, Shared2FCBBoxHead, StandardRoIHead, expect

#: Quantizable forms of layers; mmcv wraps PyTorch's for empty inputs, which PyTorch takes by itself today.
_FORMS: dict[type[nn.Module], Any] = {
    nn.Linear: QuantLinear,
    Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    Conv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    ConvTranspose2d: QuantConvTranspose2d,
}


class HeadOutputs(nn.Module):
    """A RoI head on pooled features (n, C, h, w), its outputs in one tensor (n, ...).

    A box head gives class logits, then box deltas; a mask head its logits (n, classes, 2 h, 2 w).
    The layers have the names that they have in the head.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        for name, child in head.named_children():
            if any(True for _ in child.parameters()):
                self.add_module(name, child)
        # Runs the layers; not a child, or each of them would be here twice.
        self._head = (head,)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor | tuple[Tensor, Tensor] = self._head[0](x)
        return out if isinstance(out, Tensor) else torch.cat(out, 1)


def roi_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The heads in order: ``bbox`` and ``mask``, or of a cascade ``bbox0``, ..., ``mask0``, ..."""
    roi_head = model.roi_head
    expect(roi_head, "A RoI head", StandardRoIHead, CascadeRoIHead)
    found = dict(stages("bbox", roi_head.bbox_head))
    for name, head in found.items():
        expect(head, f"A box head ({name})", Shared2FCBBoxHead, ConvFCBBoxHead)
    masks = stages("mask", roi_head.mask_head) if roi_head.with_mask else []
    for name, head in masks:
        expect(head, f"A mask head ({name})", FCNMaskHead)
    return {**found, **dict(masks)}


def swap_layers(head: nn.Module, recipe: Recipe) -> None:
    """Make all linear layers and convolutions of ``head`` quantizable. Raises ModelError for
    others.
    """
    for parent_name, parent in list(head.named_modules()):
        for name, child in list(parent.named_children()):
            form = _FORMS.get(type(child))
            if form is not None:
                setattr(parent, name, form.from_float(child, recipe.w_bits, recipe.a_bits))
            elif any(True for _ in child.parameters(recurse=False)) and not is_norm(child):
                where = f"{parent_name}.{name}".lstrip(".")
                raise ModelError(f"A layer of type {type(child).__name__} ({where}) in a {type(head).__name__} is not supported.")


def stages(kind: str, heads: nn.Module) -> list[tuple[str, nn.Module]]:
    """One head, or those of a cascade, with the names of their parts."""
    if isinstance(heads, nn.ModuleList):
        return [(f"{kind}{stage}", head) for stage, head in enumerate(heads)]
    return [(kind, heads)]


def region_examples(model: nn.Module) -> dict[str, Tensor]:
    """Inputs (zeros) of each RoI head for one image, to count operations: its most regions, by
    part.
    """
    roi_head, settings = model.roi_head, model.test_cfg
    found = {}
    for kind, count in (("bbox", settings.rpn.max_per_img), ("mask", settings.rcnn.max_per_img)):
        extractors = getattr(roi_head, f"{kind}_roi_extractor", None)
        for name, extractor in [] if extractors is None else stages(kind, extractors):
            found[name] = torch.zeros(count, extractor.out_channels, *extractor.roi_layers[0].output_size)
    return found
