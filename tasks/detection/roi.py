"""The RoI heads of a detector as parts of their own, and what the float model lets them see."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.layers import quant_layers
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.detection.detector import described
from tasks.detection.heads import HeadOutputs, roi_heads, stages, swap_layers
from tasks.detection.mm import bbox2roi

#: Proposals that stand for the detections of an image in which there are none; mmdet's configs keep as many detections.
STAND_INS = 100


def roi_parts(model: nn.Module, recipe: Recipe) -> dict[str, BlockChain]:
    """A chain of one segment for every RoI head, ``bbox`` and ``mask``, or of a cascade ``bbox0``, ..., ``mask0``, ...

    A chain maps pooled features (n, C, h, w) to :class:`~tasks.detection.heads.HeadOutputs`. The layers are swapped for
    quantizable ones in ``model`` itself; norms stay in full precision.

    Args:
        model: mmdet's detector.
        recipe: bits of weights and inputs (32 where the RoI heads are out of scope).

    Raises:
        ModelError: heads or layers of another kind.
    """
    heads = roi_heads(model)
    for head in heads.values():
        swap_layers(head, recipe)
    return {name: BlockChain([Segment("head", "predictor", HeadOutputs(head))]) for name, head in heads.items()}


@torch.no_grad()
def roi_inputs(
    model: nn.Module,
    images: Samples | Tensor,
    metas: Sequence[Mapping[str, object]],
    device: torch.device,
    limit: int | None = None,
) -> dict[str, Samples]:
    """What each RoI head sees in the float model.

    Box heads see the float RPN's proposals, in a cascade those that the stages before have refined; mask heads see the
    detections, or the :data:`STAND_INS` best proposals of an image in which nothing is detected.

    Args:
        model: the float detector, mmdet's or assembled; it is moved to ``device``.
        images: normalised and padded, (1, 3, H, W) each.
        metas: what :data:`tasks.detection.detector.META` names, of each image.
        device: where to compute.
        limit: regions of an image that a head sees at most; of more, as many at equal distances in their order (of score, or
            of the proposals' score) are kept. None keeps all.

    Returns:
        By part, a tensor (regions, C, h, w) for every image, on the CPU; of an image without proposals there are no regions.

    Raises:
        DataError: a meta of which something is missing.
        ModelError: heads of another kind.
    """
    assert not any(layer.quantized for _, layer in quant_layers(model)), "the float model is asked"
    heads = roi_heads(model)
    model.to(device)
    kept: dict[str, list[Tensor]] = {name: [] for name in heads}
    for image, meta in zip(Samples.of(images), metas, strict=True):
        for name, pooled in _pooled(model, heads, image.to(device), meta).items():
            kept[name].append(_thinned(pooled, limit).cpu())
    return {name: Samples(items) for name, items in kept.items()}


@torch.no_grad()
def float_proposals(model: nn.Module, image: Tensor, meta: Mapping[str, object]) -> Tensor:
    """The float RPN's proposals (P, 4) for an image (1, 3, H, W), after NMS, in its pixels, by falling score."""
    boxes: Tensor = model.rpn_head.predict(model.extract_feat(image), [described(meta)], rescale=False)[0].bboxes
    return boxes


def class_logits_on(model: nn.Module, features: Sequence[Tensor], proposals: Tensor) -> Tensor:
    """Class logits (P, classes + 1) of the (first) box head, the background's last.

    Differentiable with respect to the features.

    Args:
        model: the detector.
        features: the pyramid of one image, each map (1, C, h, w), the finest first.
        proposals: (P, 4) in pixels of the padded image.
    """
    _, extractor = stages("bbox", model.roi_head.bbox_roi_extractor)[0]
    _, head = stages("bbox", model.roi_head.bbox_head)[0]
    logits: Tensor = head(extractor(tuple(features[: extractor.num_inputs]), bbox2roi([proposals])))[0]
    return logits


def _pooled(model: nn.Module, heads: Mapping[str, nn.Module], image: Tensor, meta: Mapping[str, object]) -> dict[str, Tensor]:
    """Pooled features (regions, C, h, w) of one image that enter each head."""
    sample, roi_head = described(meta), model.roi_head
    features = model.extract_feat(image)
    proposals = model.rpn_head.predict(features, [sample], rescale=False)
    with _inputs_of({name: head for name, head in heads.items() if name.startswith("bbox")}) as seen:
        (found,) = roi_head.predict_bbox(features, [sample.metainfo], proposals, rcnn_test_cfg=roi_head.test_cfg, rescale=False)
    # Without proposals no head is called.
    pooled = seen or _pool("bbox", roi_head, features, proposals[0].bboxes)
    if roi_head.with_mask:
        pooled |= _pool("mask", roi_head, features, found.bboxes if len(found) else proposals[0].bboxes[:STAND_INS])
    return pooled


def _pool(kind: str, roi_head: nn.Module, features: Sequence[Tensor], boxes: Tensor) -> dict[str, Tensor]:
    """Features of the same ``boxes`` (n, 4) for all heads of a kind, by part."""
    regions = bbox2roi([boxes])
    pools = stages(kind, getattr(roi_head, f"{kind}_roi_extractor"))
    return {name: extractor(tuple(features[: extractor.num_inputs]), regions) for name, extractor in pools}


@contextmanager
def _inputs_of(heads: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What each of ``heads`` is called with inside, by name."""
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor]) -> None:
            (seen[name],) = args

        return keep

    handles = [head.register_forward_pre_hook(keeper(name)) for name, head in heads.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _thinned(regions: Tensor, limit: int | None) -> Tensor:
    """At most ``limit`` rows at equal distances, the first among them."""
    if limit is None or len(regions) <= limit:
        return regions
    return regions[torch.arange(limit, device=regions.device) * len(regions) // limit]
