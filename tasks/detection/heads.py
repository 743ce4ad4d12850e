"""The RoI heads of a detector: which are supported, and their layers as quantizable ones."""

from typing import Any

import torch
from mmcv.cnn import Conv2d, ConvTranspose2d, Linear, is_norm
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.layers import FORMS, QuantConv2d, QuantConvTranspose2d, QuantLinear
from fimaq_core.recipe import Recipe
from tasks.detection.mm import (
    CascadeRoIHead,
    ConvFCBBoxHead,
    ConvModule,
    FCNMaskHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
    SingleRoIExtractor,
    StandardRoIHead,
)

_BOX_HEADS = (Shared2FCBBoxHead, Shared4Conv1FCBBoxHead, ConvFCBBoxHead)

#: Quantizable forms of layers; mmcv wraps PyTorch's for empty inputs, which PyTorch takes by itself today.
_FORMS: dict[type[nn.Module], Any] = {
    **FORMS,
    Linear: QuantLinear,
    Conv2d: QuantConv2d,
    ConvTranspose2d: QuantConvTranspose2d,
}


class HeadOutputs(nn.Module):
    """A RoI head with its outputs in one tensor; its layers stand here by their names in the head.

    Args of ``forward``: pooled features (n, C, h, w).

    Returns (n, ...): of a box head class logits, then box deltas; of a mask head its logits (n, classes, 2 h, 2 w).
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
    """The heads in order: ``bbox`` and ``mask``, in a cascade ``bbox0``, ``bbox1``, ..., ``mask0``, ...; masks where there are.

    Raises:
        ModelError: heads of another kind.
    """
    roi_head = getattr(model, "roi_head", None)
    if type(roi_head) not in (StandardRoIHead, CascadeRoIHead):
        raise ModelError(
            f"A RoI head of type {type(roi_head).__name__} is not supported: StandardRoIHead and CascadeRoIHead are."
        )
    if roi_head.with_shared_head:
        raise ModelError("A RoI head with a shared_head is not supported.")
    found = dict(stages("bbox", roi_head.bbox_head))
    for name, head in found.items():
        if type(head) not in _BOX_HEADS or not (head.with_cls and head.with_reg):
            raise ModelError(
                f"A box head ({name}) of type {type(head).__name__} (or without classes or boxes) is not supported: "
                f"{', '.join(known.__name__ for known in _BOX_HEADS)} are."
            )
    extractors = dict(stages("bbox", roi_head.bbox_roi_extractor))
    if roi_head.with_mask:
        masks = dict(stages("mask", roi_head.mask_head))
        for name, head in masks.items():
            if type(head) is not FCNMaskHead:
                raise ModelError(f"A mask head ({name}) of type {type(head).__name__} is not supported: only FCNMaskHead is.")
        found |= masks
        extractors |= stages("mask", roi_head.mask_roi_extractor)
    for name, extractor in extractors.items():
        if type(extractor) is not SingleRoIExtractor:
            raise ModelError(f"Pooling by {type(extractor).__name__} ({name}) is not supported: only SingleRoIExtractor is.")
    return found


def swap_layers(head: nn.Module, recipe: Recipe) -> None:
    """Replace all linear layers and convolutions inside ``head`` by quantizable ones, in place.

    Raises:
        ModelError: a layer with weights that is neither one of these nor a norm, or is not run as it stands.
    """
    for parent_name, parent in list(head.named_modules()):
        if isinstance(parent, ConvModule) and (parent.with_spectral_norm or parent.efficient_conv_bn_eval_forward is not None):
            raise ModelError(f"A ConvModule ({parent_name}) with spectral norm or a fused norm is not supported.")
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
