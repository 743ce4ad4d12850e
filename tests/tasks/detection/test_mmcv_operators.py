"""NMS and RoIAlign as mmcv calls them, against loops written from their definitions."""

import importlib.machinery
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tasks.detection.mm  # noqa: F401 - registers the operators
from fimaq_core.errors import ModelError
from tasks.detection import ops

mmcv_ops = pytest.importorskip("mmcv.ops")


def boxes_and_scores(count: int, seed: int, side: float = 40.0) -> tuple[Tensor, Tensor]:
    """Boxes with many overlaps, and scores without ties."""
    generator = torch.Generator().manual_seed(seed)
    corner, size = (
        torch.rand(count, 2, generator=generator) * 60,
        torch.rand(count, 2, generator=generator) * side + 1,
    )
    scores = (torch.randperm(count, generator=generator) + 1) / (count + 1)
    return torch.cat([corner, corner + size], 1), scores


def overlap(one: list[float], other: list[float], offset: int) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0]) + offset
    height = min(one[3], other[3]) - max(one[1], other[1]) + offset
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (one, other)]
    return shared / (sum(areas) - shared)


def slow_nms(boxes: Tensor, scores: Tensor, threshold: float, offset: int = 0) -> list[int]:
    kept: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda i: -float(scores[i])):
        if all(
            overlap(boxes[index].tolist(), boxes[other].tolist(), offset) <= threshold
            for other in kept
        ):
            kept.append(index)
    return kept


def bilinear(plane: Tensor, y: float, x: float) -> float:
    """Interpolate the plane (H, W); beyond the border it continues for one step, then is zero."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    total = 0.0
    for row in range(height):
        for column in range(width):
            total += (
                max(0.0, 1 - abs(y - row))
                * max(0.0, 1 - abs(x - column))
                * float(plane[row, column])
            )
    return total


def slow_roi_align(
    features: Tensor, rois: Tensor, size: tuple[int, int], scale: float, ratio: int, aligned: bool
) -> Tensor:
    out = torch.zeros(len(rois), features.shape[1], *size)
    for n, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (value * scale - (0.5 if aligned else 0.0) for value in corners)
        sides = [y2 - y1, x2 - x1] if aligned else [max(y2 - y1, 1.0), max(x2 - x1, 1.0)]
        bins = [side / count for side, count in zip(sides, size, strict=True)]
        grid = [ratio if ratio > 0 else math.ceil(side) for side in bins]
        for channel in range(features.shape[1]):
            for i in range(size[0]):
                for j in range(size[1]):
                    samples = [
                        bilinear(
                            features[int(image), channel],
                            y1 + (i + (a + 0.5) / grid[0]) * bins[0],
                            x1 + (j + (b + 0.5) / grid[1]) * bins[1],
                        )
                        for a in range(grid[0])
                        for b in range(grid[1])
                    ]
                    if samples:
                        out[n, channel, i, j] = sum(samples) / len(samples)
    return out


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    ("count", "threshold"), [(60, 0.5), (60, 0.1), (60, 0.9), (1, 0.5), (0, 0.5)]
)
def test_nms_is_the_greedy_loop(count: int, threshold: float, offset: int) -> None:
    boxes, scores = boxes_and_scores(count, seed=count + offset)
    dets, kept = mmcv_ops.nms(boxes, scores, threshold, offset=offset)
    expected = slow_nms(boxes, scores, threshold, offset)
    assert kept.tolist() == expected
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], 1)[expected])


def test_nms_with_a_score_threshold_and_a_limit() -> None:
    boxes, scores = boxes_and_scores(50, seed=3)
    _, kept = mmcv_ops.nms(boxes, scores, 0.4, score_threshold=0.3, max_num=5)
    expected = [index for index in slow_nms(boxes, scores, 0.4) if scores[index] > 0.3][:5]
    assert kept.tolist() == expected


def test_nms_counts_the_offset_in() -> None:
    boxes, scores = (
        torch.tensor([[0.0, 0, 3, 3], [0, 0, 3, 1]]),
        torch.tensor([0.9, 0.8]),
    )  # overlap 3/9, or 8/16
    assert mmcv_ops.nms(boxes, scores, 0.4, offset=0)[1].tolist() == [0, 1]
    assert mmcv_ops.nms(boxes, scores, 0.4, offset=1)[1].tolist() == [0]


@pytest.mark.parametrize("split", [10_000, 5])
@pytest.mark.parametrize("agnostic", [False, True])
def test_batched_nms_is_nms_of_each_class(agnostic: bool, split: int) -> None:
    boxes, scores = boxes_and_scores(45, seed=5)
    classes = torch.arange(45) % 3
    settings: dict[str, Any] = {"type": "nms", "iou_threshold": 0.4}
    dets, kept = mmcv_ops.batched_nms(
        boxes, scores, classes, {**settings, "split_thr": split}, class_agnostic=agnostic
    )
    found: dict[int, float] = {}
    groups = [(classes == label).nonzero()[:, 0] for label in range(3)]
    for group in (
        [torch.arange(45)] if agnostic and split > 45 else groups
    ):  # mmcv splits by class whether classes count or not
        taken = slow_nms(boxes[group], scores[group], 0.4)
        found.update(zip(group[taken].tolist(), scores[group][taken].tolist(), strict=True))
    expected = sorted(found, key=lambda index: -found[index])
    assert kept.tolist() == expected
    assert torch.equal(dets[:, :4], boxes[expected])
    assert torch.allclose(dets[:, 4], torch.tensor([found[index] for index in expected]), atol=2e-5)


def test_batched_nms_without_nms_sorts() -> None:
    boxes, scores = boxes_and_scores(9, seed=1)
    dets, kept = mmcv_ops.batched_nms(boxes, scores, torch.zeros(9), None)
    assert kept.tolist() == scores.argsort(descending=True).tolist()
    assert torch.equal(dets[:, 4], scores[kept])


#: Inside, across each border, outside, smaller than a cell, and without area; in pixels, which are
#: half as large as cells of the maps.
ROIS = torch.tensor(
    [
        [0, 2, 3, 13, 9],
        [1, -6, -5, 7, 8],
        [1, 9, 7, 25, 21],
        [0, 40, 40, 50, 50],
        [1, 5, 5, 5.5, 5.75],
        [0, 4, 4, 4, 9],
    ],
    dtype=torch.float32,
)


@pytest.mark.parametrize("ratio", [0, 1, 3])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_is_its_definition(aligned: bool, ratio: int) -> None:
    features = torch.randn(2, 2, 9, 11, generator=torch.Generator().manual_seed(0))
    layer = mmcv_ops.RoIAlign((2, 3), 0.5, ratio, "avg", aligned)
    expected = slow_roi_align(features, ROIS, (2, 3), 0.5, ratio, aligned)
    assert torch.allclose(layer(features, ROIS), expected, atol=1e-5)
    assert (expected[:3] != 0).float().mean() > 0.5
    assert torch.equal(layer(features, ROIS[:0]), torch.zeros(0, 2, 2, 3))


def test_the_gradient_of_roi_align_is_that_of_its_definition() -> None:
    features = torch.randn(2, 1, 6, 7, generator=torch.Generator().manual_seed(2))
    layer = mmcv_ops.RoIAlign((2, 2), 0.5, 0, "avg", True)
    weights = torch.randn(len(ROIS), 1, 2, 2, generator=torch.Generator().manual_seed(3))
    leaf = features.clone().requires_grad_()
    (layer(leaf, ROIS) * weights).sum().backward()
    # the operator is linear: its gradient by a value is its answer to that value alone
    for index in torch.randint(
        features.numel(), (12,), generator=torch.Generator().manual_seed(4)
    ).tolist():
        unit = torch.zeros(features.numel())
        unit[index] = 1.0
        expected = float(
            (slow_roi_align(unit.view_as(features), ROIS, (2, 2), 0.5, 0, True) * weights).sum()
        )
        assert leaf.grad is not None
        assert float(leaf.grad.flatten()[index]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(
    not isinstance(sys.modules["mmcv._ext"], ops.Operators), reason="mmcv is compiled here"
)
def test_max_pooling_and_soft_nms_say_that_a_compiled_mmcv_has_them() -> None:
    with pytest.raises(ModelError, match="max pooling needs a compiled mmcv"):
        mmcv_ops.RoIAlign((2, 2), 0.5, 0, "max", True)(torch.randn(2, 1, 6, 7), ROIS)
    with pytest.raises(ModelError, match=r"'softnms'.*compile mmcv 2\.1"):
        mmcv_ops.soft_nms(*boxes_and_scores(5, seed=1))


@pytest.mark.skipif(
    not isinstance(sys.modules["mmcv._ext"], ops.Operators), reason="mmcv is compiled here"
)
def test_another_operator_says_that_a_compiled_mmcv_has_it() -> None:
    with pytest.raises(ModelError, match=r"'nms_match'.*compile mmcv 2\.1"):
        mmcv_ops.nms_match(torch.rand(3, 5), 0.5)
    with pytest.raises(AttributeError, match="__path__"):
        _ = sys.modules["mmcv._ext"].__path__
    from mmengine.utils.dl_utils.misc import mmcv_full_available

    assert mmcv_full_available()  # mmengine asks for the module's specification
    assert "torchvision" in mmcv_ops.get_compiler_version()
    assert "torchvision" in mmcv_ops.get_compiling_cuda_version()


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a compiled module that mmcv finds; there is no operator module yet."""
    import mmcv

    monkeypatch.delitem(sys.modules, "mmcv._ext")  # put back afterwards
    monkeypatch.setattr(mmcv, "_ext", None, raising=False)  # as importing sets it
    monkeypatch.setattr(mmcv, "__path__", [str(tmp_path), *mmcv.__path__])
    importlib.invalidate_caches()
    return tmp_path / "_ext.py"


def test_a_compiled_module_is_preferred(compiled: Path) -> None:
    compiled.write_text("compiled = True\n")
    ops.install()
    assert sys.modules["mmcv._ext"].compiled
    ops.install()
    assert sys.modules["mmcv._ext"].compiled


def test_a_compiled_module_for_another_pytorch_is_named(compiled: Path) -> None:
    compiled.write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    with pytest.raises(ModelError, match=r"do not load with PyTorch .*undefined symbol.*mmcv-lite"):
        ops.install()
    assert "mmcv._ext" not in sys.modules


def test_without_one_the_operators_are_registered_once(compiled: Path) -> None:
    ops.install()
    first = sys.modules["mmcv._ext"]
    assert isinstance(first, ops.Operators)
    assert isinstance(first.__spec__, importlib.machinery.ModuleSpec)
    ops.install()
    assert sys.modules["mmcv._ext"] is first
