"""Inputs of the RoI heads in the float model, against mmdet's prediction; without detections."""

from typing import Any

import pytest
import torch
from head_detectors import CLASSES, WIDTH, build, config, recipe, sample
from torch import Tensor, nn
from torchvision.ops import roi_align

import tasks.detection.mm as mm
from fimaq_core.samples import Samples
from tasks.detection import roi
from tasks.detection.detector import QuantizedDetector
from tasks.detection.roi import class_logits_on, float_proposals, roi_inputs, roi_parts

CPU = torch.device("cpu")
KINDS = {"mask": config(), "cascade": config(cascade=True), "boxes only": config(masks=False)}


def samples() -> tuple[Samples, list[dict[str, Any]]]:
    images, metas = zip(
        *(sample(*size, seed=seed) for seed, size in enumerate([(64, 96), (50, 75), (96, 32)])),
        strict=True,
    )
    return Samples(images), list(metas)


def recorded(model: mm.TwoStageDetector, image: Tensor, meta: dict[str, Any]) -> dict[str, Tensor]:
    """First arguments of all heads while mmdet predicts."""
    seen: dict[str, Tensor] = {}
    handles = []
    for kind in ("bbox", "mask"):
        heads = getattr(model.roi_head, f"{kind}_head", None)
        if heads is None:
            continue
        named = (
            {f"{kind}{i}": head for i, head in enumerate(heads)}
            if isinstance(heads, nn.ModuleList)
            else {kind: heads}
        )
        for name, head in named.items():
            handles.append(
                head.register_forward_pre_hook(
                    lambda _, args, name=name: seen.update({name: args[0].clone()})
                )
            )
    with torch.no_grad():
        model.predict(image, [mm.DetDataSample(metainfo=meta)])
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_heads_see_what_they_see_at_prediction(kind: str) -> None:
    model = build(KINDS[kind])
    images, metas = samples()
    found = roi_inputs(model, images, metas, CPU)
    assert all(len(items) == 3 for items in found.values())
    for index, (image, meta) in enumerate(zip(images, metas, strict=True)):
        expected = recorded(model, image, meta)
        assert expected.keys() == found.keys()
        for name, values in expected.items():
            assert torch.equal(found[name][index], values), name
            assert values.shape[1:] == (
                (WIDTH, 7, 7) if name.startswith("bbox") else (WIDTH, 14, 14)
            )
            assert len(values) > 4
    if kind == "cascade":
        assert not torch.equal(found["bbox0"][0], found["bbox1"][0])


def test_an_assembled_float_detector_gives_the_same() -> None:
    model = build(KINDS["mask"])
    images, metas = samples()
    expected, found = (
        roi_inputs(model, images, metas, CPU),
        roi_inputs(QuantizedDetector(model, {}), images, metas, CPU),
    )
    assert all(
        torch.equal(a, b)
        for name in expected
        for a, b in zip(expected[name], found[name], strict=True)
    )


@pytest.mark.parametrize("cascade", [False, True])
def test_without_detections_masks_are_pooled_from_the_best_proposals(
    cascade: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roi, "STAND_INS", 7)
    settings = config(cascade=cascade)
    settings["test_cfg"]["rcnn"]["score_thr"] = 1.0
    model = build(settings)
    image, meta = sample(64, 96)
    found = roi_inputs(model, image, [meta], CPU)
    (rpn,) = model.rpn_head.predict(
        model.extract_feat(image), [mm.DetDataSample(metainfo=meta)], rescale=False
    )
    assert len(rpn) > 7
    assert (rpn.scores[:-1] >= rpn.scores[1:]).all()
    boxes = rpn.bboxes[:7]
    # Level of a region by its size (Lin et al., CVPR 2017, arXiv:1612.03144), from 56 pixels on.
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    levels = (sides / 56).log2().floor().clamp(0, 3).long()
    with torch.no_grad():
        features = model.extract_feat(image)
    for name in ["mask0", "mask1", "mask2"] if cascade else ["mask"]:
        assert found[name][0].shape == (7, WIDTH, 14, 14)
        for index, level in enumerate(levels.tolist()):
            expected = roi_align(
                features[level], [boxes[index : index + 1]], 14, 1 / (4 * 2**level), 0, True
            )
            assert torch.allclose(found[name][0][index], expected[0], atol=1e-6)


def test_a_limit_keeps_regions_at_equal_distances() -> None:
    model = build(KINDS["mask"])
    image, meta = sample(64, 96)
    (whole,) = roi_inputs(model, image, [meta], CPU)["bbox"]
    (thinned,) = roi_inputs(model, image, [meta], CPU, limit=8)["bbox"]
    count = len(whole)
    assert count > 16
    assert torch.equal(thinned, whole[[index * count // 8 for index in range(8)]])
    (same,) = roi_inputs(model, image, [meta], CPU, limit=count)["bbox"]
    assert torch.equal(same, whole)


@pytest.mark.parametrize("cascade", [False, True])
def test_heads_see_nothing_of_an_image_without_proposals(cascade: bool) -> None:
    settings = config(cascade=cascade)
    settings["test_cfg"]["rpn"]["min_bbox_size"] = 1000
    images, metas = samples()
    model = build(settings)
    assert float_proposals(model, images[0], metas[0]).shape == (0, 4)
    found = roi_inputs(model, images, metas, CPU)
    assert found.keys() == roi_inputs(build(config(cascade=cascade)), images, metas, CPU).keys()
    for name, items in found.items():
        assert all(
            item.shape == ((0, WIDTH, 7, 7) if name.startswith("bbox") else (0, WIDTH, 14, 14))
            for item in items
        )


def test_proposals_are_those_of_the_rpn_and_lie_in_the_image() -> None:
    model = build(KINDS["cascade"])
    image, meta = sample(50, 75)
    boxes = float_proposals(model, image, meta)
    assert 20 < len(boxes) <= 60
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= 75).all()
    assert (boxes[:, 3] <= 50).all()
    (expected,) = model.rpn_head.predict(
        model.extract_feat(image), [mm.DetDataSample(metainfo=meta)], rescale=False
    )
    assert torch.equal(boxes, expected.bboxes)


@pytest.mark.parametrize("kind", ["mask", "cascade"])
def test_class_logits_equal_those_at_prediction(kind: str) -> None:
    model = build(KINDS[kind])
    image, meta = sample(64, 96)
    seen = recorded(model, image, meta)["bbox0" if kind == "cascade" else "bbox"]
    with torch.no_grad():
        found = class_logits_on(
            model, model.extract_feat(image), float_proposals(model, image, meta)
        )
        head = model.roi_head.bbox_head[0] if kind == "cascade" else model.roi_head.bbox_head
        assert torch.equal(found, head(seen)[0])
    assert found.shape == (len(seen), CLASSES + 1)


def test_class_logits_have_gradients_in_the_features() -> None:
    model = build(KINDS["cascade"]).double()
    roi_parts(model, recipe(4))  # of swapped layers too
    torch.manual_seed(2)
    features = [
        torch.randn(1, WIDTH, side, side, dtype=torch.float64, requires_grad=True)
        for side in (16, 8, 4, 2, 1)
    ]
    proposals = torch.tensor(
        [[3.0, 5.0, 40.0, 30.0], [10.0, 2.0, 60.0, 58.0], [0.0, 0.0, 8.0, 9.0]], dtype=torch.float64
    )
    weights = torch.randn(3, CLASSES + 1, dtype=torch.float64)
    value = (class_logits_on(model, features, proposals) * weights).sum()
    gradient = torch.autograd.grad(value, features[0])[0]
    assert gradient.abs().max() > 0
    direction, step = torch.randn_like(features[0]), 1e-6
    ends = []
    for sign in (1, -1):
        moved = [features[0] + sign * step * direction, *features[1:]]
        with torch.no_grad():
            ends.append((class_logits_on(model, moved, proposals) * weights).sum())
    slope = (ends[0] - ends[1]) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)
