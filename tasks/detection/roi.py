"""The RoI heads of a detector as parts of their own, and their inputs in the float model.

Also the optional term of the divergence: classes of the full-precision model's proposals.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmcv.cnn import Conv2d, ConvTranspose2d, Linear, is_norm
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Kept, Segment
from fimaq_core.errors import DataError, ModelError
from fimaq_core.layers import FORMS, QuantConv2d, QuantConvTranspose2d, QuantLinear, quant_layers
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.detection import mm
from tasks.detection.neck import ExplicitFPN, Unpack

#: Proposals that stand for the detections of an image in which there are none; mmdet's configs keep as many detections.
STAND_INS = 100
#: What mmdet's heads ask of an image: its size before padding and with it, the original one, and factors (x, y) to the former.
META = ("img_shape", "pad_shape", "ori_shape", "scale_factor")
#: Quantizable forms of layers; mmcv wraps PyTorch's for empty inputs, which PyTorch takes by itself today.
_FORMS: dict[type[nn.Module], Any] = {
    **FORMS,
    Linear: QuantLinear,
    Conv2d: QuantConv2d,
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
    mm.expect(roi_head, "A RoI head", mm.StandardRoIHead, mm.CascadeRoIHead)
    found = dict(stages("bbox", roi_head.bbox_head))
    for name, head in found.items():
        mm.expect(head, f"A box head ({name})", mm.Shared2FCBBoxHead, mm.ConvFCBBoxHead)
    masks = stages("mask", roi_head.mask_head) if roi_head.with_mask else []
    for name, head in masks:
        mm.expect(head, f"A mask head ({name})", mm.FCNMaskHead)
    return {**found, **dict(masks)}


def swap_layers(head: nn.Module, recipe: Recipe) -> None:
    """Make linear layers and convolutions of ``head`` quantizable. Raises ModelError."""
    for parent_name, parent in list(head.named_modules()):
        for name, child in list(parent.named_children()):
            form = _FORMS.get(type(child))
            if form is not None:
                setattr(parent, name, form.from_float(child, recipe.w_bits, recipe.a_bits))
            elif any(True for _ in child.parameters(recurse=False)) and not is_norm(child):
                where = f"{parent_name}.{name}".lstrip(".")
                raise ModelError(
                    f"A layer of type {type(child).__name__} ({where}) in a {type(head).__name__} is not supported."
                )


def stages(kind: str, heads: nn.Module) -> list[tuple[str, nn.Module]]:
    """One head, or those of a cascade, with the names of their parts."""
    if isinstance(heads, nn.ModuleList):
        return [(f"{kind}{stage}", head) for stage, head in enumerate(heads)]
    return [(kind, heads)]


def region_examples(model: nn.Module) -> dict[str, Tensor]:
    """Zeros that each RoI head takes for one image, to count operations, by part."""
    roi_head, settings = model.roi_head, model.test_cfg
    found = {}
    for kind, count in (("bbox", settings.rpn.max_per_img), ("mask", settings.rcnn.max_per_img)):
        extractors = getattr(roi_head, f"{kind}_roi_extractor", None)
        for name, extractor in [] if extractors is None else stages(kind, extractors):
            found[name] = torch.zeros(
                count, extractor.out_channels, *extractor.roi_layers[0].output_size
            )
    return found


def roi_parts(model: nn.Module, recipe: Recipe) -> dict[str, BlockChain]:
    """A chain of one segment for every RoI head, from pooled features (n, C, h, w) to its outputs.

    The layers are swapped for quantizable ones in ``model`` itself; norms stay in full precision.
    """
    heads = roi_heads(model)
    for head in heads.values():
        swap_layers(head, recipe)
    return {
        name: BlockChain([Segment("head", "predictor", HeadOutputs(head))])
        for name, head in heads.items()
    }


@torch.no_grad()
def roi_inputs(
    model: nn.Module,
    images: Samples | Tensor,
    metas: Sequence[Mapping[str, object]],
    device: torch.device,
    limit: int | None = None,
) -> dict[str, Samples]:
    """Pooled features (regions, C, h, w) that the float model's RoI heads get per image.

    Box heads get the float RPN's proposals, refined by a cascade's stages before; mask heads get
    the detections, or the :data:`STAND_INS` best proposals if there are none. A head keeps at most
    ``limit`` regions of an image, at equal distances in their order.
    """
    assert not any(layer.quantized for _, layer in quant_layers(model)), "the float model is asked"
    heads = roi_heads(model)
    model.to(device)
    kept: dict[str, list[Tensor]] = {name: [] for name in heads}
    for image, meta in zip(Samples.of(images), metas, strict=True):
        for name, pooled in _pooled(model, heads, image.to(device), meta).items():
            count = len(pooled) if limit is None else min(limit, len(pooled))
            chosen = torch.arange(count, device=device) * len(pooled) // max(count, 1)
            kept[name].append(pooled[chosen].cpu())
    return {name: Samples(items) for name, items in kept.items()}


@torch.no_grad()
def float_proposals(model: nn.Module, image: Tensor, meta: Mapping[str, object]) -> Tensor:
    """The float RPN's proposals (P, 4) for an image (1, 3, H, W), after NMS, by falling score."""
    boxes: Tensor = model.rpn_head.predict(
        model.extract_feat(image), [described(meta)], rescale=False
    )[0].bboxes
    return boxes


def class_logits_on(model: nn.Module, features: Sequence[Tensor], proposals: Tensor) -> Tensor:
    """Class logits (P, classes + 1) of the (first) box head, differentiable by ``features``.

    ``features`` is the pyramid of one image, ``proposals`` (P, 4) are in pixels of the padded
    image.
    """
    _, extractor = stages("bbox", model.roi_head.bbox_roi_extractor)[0]
    _, head = stages("bbox", model.roi_head.bbox_head)[0]
    logits: Tensor = head(
        extractor(tuple(features[: extractor.num_inputs]), mm.bbox2roi([proposals]))
    )[0]
    return logits


def _pooled(
    model: nn.Module, heads: Mapping[str, nn.Module], image: Tensor, meta: Mapping[str, object]
) -> dict[str, Tensor]:
    """Pooled features (regions, C, h, w) of one image for each head."""
    sample, roi_head = described(meta), model.roi_head
    features = model.extract_feat(image)
    proposals = model.rpn_head.predict(features, [sample], rescale=False)
    with _inputs_of(
        {name: head for name, head in heads.items() if name.startswith("bbox")}
    ) as seen:
        (found,) = roi_head.predict_bbox(
            features, [sample.metainfo], proposals, rcnn_test_cfg=roi_head.test_cfg, rescale=False
        )
    # Without proposals no head is called.
    pooled = seen or _pool("bbox", roi_head, features, proposals[0].bboxes)
    if roi_head.with_mask:
        pooled |= _pool(
            "mask",
            roi_head,
            features,
            found.bboxes if len(found) else proposals[0].bboxes[:STAND_INS],
        )
    return pooled


def _pool(
    kind: str, roi_head: nn.Module, features: Sequence[Tensor], boxes: Tensor
) -> dict[str, Tensor]:
    """Features of the same ``boxes`` (n, 4) for all heads of a kind, by part."""
    regions = mm.bbox2roi([boxes])
    pools = stages(kind, getattr(roi_head, f"{kind}_roi_extractor"))
    return {
        name: extractor(tuple(features[: extractor.num_inputs]), regions)
        for name, extractor in pools
    }


@contextmanager
def _inputs_of(heads: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the input of each of ``heads``, by name, while the context lasts."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        (seen[name],) = args

    handles = [head.register_forward_pre_hook(partial(keep, name)) for name, head in heads.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Hidden(nn.Module):
    """Holds a float detector outside of the chain: neither counted nor kept in checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]

    def there(self, device: torch.device) -> nn.Module:
        return self._model[0].to(device)


class _Proposals(_Hidden):
    """The side of the chain: an image (1, 3, H, W) to the float RPN's proposals (1, P, 4)."""

    def forward(self, image: Tensor) -> Tensor:
        size = tuple(image.shape[2:])  # No part of it is padding.
        meta = {"img_shape": size, "pad_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
        return float_proposals(self.there(image.device), image, meta).unsqueeze(0)


class _Terms(_Hidden):
    """Appends the class logits of all proposals to the RPN's outputs: (1, L, 5 A) to (1, M)."""

    def __init__(self, model: nn.Module, unpack: Unpack) -> None:
        super().__init__(model)
        self.unpack = unpack

    def forward(self, x: Tensor, side: Tensor, kept: Kept) -> Tensor:
        # RoIAlign has no form of fewer digits.
        with torch.autocast(x.device.type, enabled=False):
            logits = class_logits_on(
                self.there(x.device), self.unpack(kept[-1].float()), side[0].float()
            )
        return torch.cat([x.flatten(1).float(), logits.reshape(1, -1)], 1)


class ProposalTerms:
    """The optional term's modules, made from a detector before any of its layers is swapped."""

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False)
        self.proposals = _Proposals(self._model)

    def added(self, segments: list[Segment]) -> list[Segment]:
        """``segments`` up to the RPN, and one behind them that adds the logits to the output."""
        (neck,) = (segment for segment in segments if segment.kind == "neck")
        assert isinstance(neck.block, ExplicitFPN)
        neck.keep = nn.Identity()
        terms = _Terms(self._model, Unpack(neck.block.channels))
        return [
            *segments,
            Segment(
                "roi_terms", "predictor", nn.Identity(), terms, takes_side=True, takes_kept=True
            ),
        ]


def class_count(model: nn.Module) -> int:
    """Number of logits per proposal: the classes and the background."""
    _, head = stages("bbox", model.roi_head.bbox_head)[0]
    return int(head.fc_cls.out_features)


def described(meta: Mapping[str, object]) -> mm.DetDataSample:
    """``meta`` as mmdet's heads take it. Raises DataError if a part of :data:`META` is missing."""
    missing = [name for name in META if name not in meta]
    if missing:
        raise DataError(f"An image comes without {', '.join(missing)}.")
    return mm.DetDataSample(metainfo=dict(meta))
