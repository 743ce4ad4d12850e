"""RoI heads of a detector as chains, with their calibration inputs from the float model.

The classes of the float model's proposals, an optional term of the divergence, are here too.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from mmcv.cnn import Conv2d, ConvTranspose2d, Linear, is_norm
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Kept, Segment
from fimaq_core.errors import DataError, ModelError
from fimaq_core.families import expect
from fimaq_core.layers import FORMS, QuantConv2d, QuantConvTranspose2d, QuantLinear, quant_layers
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.detection import mm
from tasks.detection.neck import ExplicitFPN, unpack_pyramid

#: Number of proposals that replace the detections of an image without detections. It equals the
#: highest number of detections per image in mmdet's configurations.
STAND_INS = 100
#: Entries of an image's meta that mmdet's heads need: its size before and after padding, the size
#: of the original image, and the factors (x, y) from the original to the resized image.
META = ("img_shape", "pad_shape", "ori_shape", "scale_factor")
#: Quantizable forms of layers. mmcv subclasses PyTorch's layers to accept empty inputs; PyTorch's
#: own layers accept them too.
_FORMS: dict[type[nn.Module], Any] = {
    **FORMS,
    Linear: QuantLinear,
    Conv2d: QuantConv2d,
    ConvTranspose2d: QuantConvTranspose2d,
}


class HeadOutputs(nn.Module):
    """RoI head on pooled features (n, C, h, w), with its outputs in one tensor (n, ...).

    A box head gives class logits, then box deltas. A mask head gives its logits (n, classes, 2 h,
    2 w). The layers keep their names.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        for name, child in head.named_children():
            if _has_parameters(child):
                self.add_module(name, child)
        self._head = (head,)  # in a tuple, so that its layers are not children twice

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor | tuple[Tensor, Tensor] = self._head[0](x)
        return out if isinstance(out, Tensor) else torch.cat(out, 1)


def _has_parameters(module: nn.Module, recurse: bool = True) -> bool:
    return next(module.parameters(recurse), None) is not None


def roi_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Find heads by name: ``bbox`` and ``mask``; in a cascade ``bbox0``, ..., ``mask0``, ..."""
    roi_head = model.roi_head
    expect(roi_head, "A RoI head", mm.StandardRoIHead, mm.CascadeRoIHead)
    boxes = by_stage("bbox", roi_head.bbox_head)
    masks = by_stage("mask", roi_head.mask_head) if roi_head.with_mask else {}
    for name, head in boxes.items():
        expect(head, f"A box head ({name})", mm.Shared2FCBBoxHead, mm.ConvFCBBoxHead)
    for name, head in masks.items():
        expect(head, f"A mask head ({name})", mm.FCNMaskHead)
    return boxes | masks


def by_stage(kind: str, modules: nn.Module) -> dict[str, nn.Module]:
    """Name one module, or one per stage of a cascade, as their RoI heads are named."""
    if isinstance(modules, nn.ModuleList):
        return {f"{kind}{stage}": module for stage, module in enumerate(modules)}
    return {kind: modules}


def roi_parts(model: nn.Module, recipe: Recipe) -> dict[str, BlockChain]:
    """Make one chain per RoI head: one segment from pooled features (n, C, h, w) to the outputs.

    The layers are replaced in ``model`` itself; norms stay in full precision. Raises ModelError.
    """
    heads = roi_heads(model)
    for head in heads.values():
        _swap_layers(head, recipe)
    return {
        name: BlockChain([Segment("head", "predictor", HeadOutputs(head))])
        for name, head in heads.items()
    }


def _swap_layers(head: nn.Module, recipe: Recipe) -> None:
    """Replace linear layers and convolutions of ``head`` by quantizable ones. Raises ModelError."""
    for parent_name, parent in list(head.named_modules()):
        for name, child in list(parent.named_children()):
            form = _FORMS.get(type(child))
            if form is not None:
                setattr(parent, name, form.from_float(child, recipe.w_bits, recipe.a_bits))
            elif _has_parameters(child, recurse=False) and not is_norm(child):
                where = f"{parent_name}.{name}".lstrip(".")
                raise ModelError(
                    f"A layer of type {type(child).__name__} ({where}) in a {type(head).__name__} "
                    "is not supported."
                )


def region_examples(model: nn.Module) -> dict[str, Tensor]:
    """Make each RoI head's largest input for one image, of zeros, to count its operations."""
    roi_head, limits = model.roi_head, model.test_cfg
    counts, found = {"bbox": limits.rpn.max_per_img}, {}
    if roi_head.with_mask:
        counts["mask"] = limits.rcnn.max_per_img
    for kind, count in counts.items():
        for name, extractor in by_stage(kind, getattr(roi_head, f"{kind}_roi_extractor")).items():
            size = extractor.roi_layers[0].output_size
            found[name] = torch.zeros(count, extractor.out_channels, *size)
    return found


@torch.no_grad()
def roi_inputs(
    model: nn.Module,
    images: Samples | Tensor,
    metas: Sequence[Mapping[str, object]],
    device: torch.device,
    limit: int | None = None,
) -> dict[str, Samples]:
    """Compute each RoI head's inputs: pooled features (regions, C, h, w) per image.

    They come from the float model. Box heads get the proposals of the RPN, in a cascade refined by
    the previous stages. Mask heads get the detections, or the :data:`STAND_INS` best proposals of
    an image without detections. Each head keeps at most ``limit`` regions per image, at equal
    distances in their order.
    """
    assert not any(layer.quantized for _, layer in quant_layers(model)), "needs the float model"
    heads = roi_heads(model)
    model.to(device)
    kept: dict[str, list[Tensor]] = {name: [] for name in heads}
    for image, meta in zip(Samples.of(images), metas, strict=True):
        for name, pooled in _pooled(model, heads, image.to(device), meta).items():
            count = len(pooled) if limit is None else min(limit, len(pooled))
            chosen = torch.arange(count, device=device) * len(pooled) // max(count, 1)
            kept[name].append(pooled[chosen].cpu())
    return {name: Samples(items) for name, items in kept.items()}


def _pooled(
    model: nn.Module, heads: Mapping[str, nn.Module], image: Tensor, meta: Mapping[str, object]
) -> dict[str, Tensor]:
    """Pool the features (regions, C, h, w) of one image (1, 3, H, W) for each head."""
    sample, roi_head = sample_of(meta), model.roi_head
    features = model.extract_feat(image)
    proposals = model.rpn_head.predict(features, [sample], rescale=False)
    pooled: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        (pooled[name],) = args

    with ExitStack() as hooks:
        for name, head in heads.items():
            if name.startswith("bbox"):
                hooks.enter_context(head.register_forward_pre_hook(partial(keep, name)))
        (found,) = roi_head.predict_bbox(
            features, [sample.metainfo], proposals, rcnn_test_cfg=roi_head.test_cfg, rescale=False
        )
    boxes = proposals[0].bboxes
    if not pooled:  # mmdet calls no head for an image without proposals
        pooled = _pool("bbox", roi_head, features, boxes)
    if roi_head.with_mask:
        masked = found.bboxes if len(found) else boxes[:STAND_INS]
        pooled |= _pool("mask", roi_head, features, masked)
    return pooled


def _pool(
    kind: str, roi_head: nn.Module, features: Sequence[Tensor], boxes: Tensor
) -> dict[str, Tensor]:
    """Pool the features of the same ``boxes`` (n, 4) for all heads of a kind."""
    regions = mm.bbox2roi([boxes])
    extractors = by_stage(kind, getattr(roi_head, f"{kind}_roi_extractor"))
    return {
        name: extractor(tuple(features[: extractor.num_inputs]), regions)
        for name, extractor in extractors.items()
    }


@torch.no_grad()
def float_proposals(model: nn.Module, image: Tensor, meta: Mapping[str, object]) -> Tensor:
    """Compute the float RPN's proposals (P, 4) for an image (1, 3, H, W), best score first."""
    features, sample = model.extract_feat(image), sample_of(meta)
    boxes: Tensor = model.rpn_head.predict(features, [sample], rescale=False)[0].bboxes
    return boxes


def class_logits_on(model: nn.Module, features: Sequence[Tensor], proposals: Tensor) -> Tensor:
    """Compute the first box head's class logits (P, classes + 1), with gradient in ``features``.

    ``features`` is the pyramid of one image; ``proposals`` (P, 4) are in pixels of the padded
    image.
    """
    extractor = _first(model.roi_head.bbox_roi_extractor)
    pooled = extractor(tuple(features[: extractor.num_inputs]), mm.bbox2roi([proposals]))
    logits: Tensor = _first(model.roi_head.bbox_head)(pooled)[0]
    return logits


def _first(modules: nn.Module) -> nn.Module:
    return modules[0] if isinstance(modules, nn.ModuleList) else modules


class FloatProposals(nn.Module):
    """Side of the chain: from an image (1, 3, H, W) to the float RPN's proposals (1, P, 4).

    Make it before any layer is replaced, since it copies the detector. The chain neither counts nor
    saves this copy.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [copy.deepcopy(model).requires_grad_(False)]  # in a list: not a child

    def model_on(self, device: torch.device) -> nn.Module:
        return self._model[0].to(device)

    def forward(self, image: Tensor) -> Tensor:
        size = tuple(image.shape[2:])  # the padding counts as part of the image
        meta = {"img_shape": size, "pad_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
        return float_proposals(self.model_on(image.device), image, meta).unsqueeze(0)


class _AppendLogits(nn.Module):
    """Appends the class logits of all proposals to the RPN's outputs: (1, L, 5 A) to (1, M)."""

    def __init__(self, proposals: FloatProposals, channels: Sequence[int]) -> None:
        super().__init__()
        self._proposals = [proposals]  # in a list, so that it is no child: the chain owns it
        self.channels = channels

    def forward(self, x: Tensor, side: Tensor, kept: Kept) -> Tensor:
        # RoIAlign works in float32 only.
        with torch.autocast(x.device.type, enabled=False):
            features = unpack_pyramid(kept[-1].float(), self.channels)
            model = self._proposals[0].model_on(x.device)
            logits = class_logits_on(model, features, side[0].float())
        return torch.cat([x.flatten(1).float(), logits.reshape(1, -1)], 1)


def logits_segment(neck: Segment, proposals: FloatProposals) -> Segment:
    """Make the segment that appends the class logits, from maps that ``neck`` keeps for it."""
    assert isinstance(neck.block, ExplicitFPN)
    neck.keep = nn.Identity()
    append, block = _AppendLogits(proposals, neck.block.channels), nn.Identity()
    return Segment("roi_terms", "predictor", block, append, takes_side=True, takes_kept=True)


def sample_of(meta: Mapping[str, object]) -> mm.DetDataSample:
    """Convert ``meta`` for mmdet's heads. Raises DataError for a missing entry of :data:`META`."""
    missing = [name for name in META if name not in meta]
    if missing:
        raise DataError(f"The meta of an image lacks {', '.join(missing)}.")
    return mm.DetDataSample(metainfo=dict(meta))
