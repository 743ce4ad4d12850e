"""Tests of the digit scenes for detection and of their files in COCO's format."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from coco_fakes import write_scenes
from PIL import Image

from tasks.common.demo.digits import PARTS, load_digits, split_digits
from tasks.detection.demo import coco_files, scenes

COUNTS = {"train": 1024, "val": 200, "test": 200}
FINGERPRINTS = {
    "train": "b967898cab6439da6b75166cf072c8f9666f621533be15da896b265e8c3a4723",
    "val": "222458dbbcb3024bc7077b9020099282f85cce1e1dd7f7a1b5a9e126f2187ca0",
    "test": "d15244e695fe29c01e767d3001c0c41a93596d147bfea00f90b7b0f2882c0982",
}


def slow_ink(source: int, side: int) -> np.ndarray:
    """A digit, resized by repeating pixels and averaging over each new pixel, without margins."""
    fine = load_digits()[0][source].astype(float).repeat(side, 0).repeat(side, 1)
    resized = np.floor(fine.reshape(side, 28, side, 28).mean((1, 3)) + 0.5)
    rows, columns = np.nonzero(resized >= 80)
    return resized[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def slow_layers(scene: scenes.Scene) -> np.ndarray:
    """Opacity of every digit of a scene on the whole canvas, shape (digits, height, width)."""
    layers = np.zeros((len(scene.placed), *scene.pixels.shape))
    for layer, digit in zip(layers, scene.placed, strict=True):
        ink = slow_ink(digit.source, digit.side)
        layer[digit.top : digit.top + ink.shape[0], digit.left : digit.left + ink.shape[1]] = ink
    return layers


@pytest.mark.parametrize("part", PARTS)
def test_data_are_those_of_the_fingerprint(part: str) -> None:
    assert len(coco_files.scenes_of(part)) == COUNTS[part]
    assert coco_files.fingerprint_of(coco_files.scenes_of(part)) == FINGERPRINTS[part]


def test_fingerprint_depends_on_pixels_and_on_masks() -> None:
    first, *others = coco_files.scenes_of("val")
    pixels, masks = first.pixels.copy(), first.masks.copy()
    pixels[-1, -1] ^= 1
    masks[0][tuple(np.argwhere(masks[0])[0])] = False
    for changed in ({"pixels": pixels}, {"masks": masks}):
        scene = scenes.Scene(**{**vars(first), **changed})
        assert coco_files.fingerprint_of((scene, *others)) != FINGERPRINTS["val"]
    assert coco_files.fingerprint_of((first, *others)) == FINGERPRINTS["val"]


def test_parts_share_no_digit() -> None:
    used = {
        part: {digit.source for scene in coco_files.scenes_of(part) for digit in scene.placed}
        for part in PARTS
    }
    for part, sources in used.items():
        assert sources <= set(split_digits()[part])
        assert len(sources) > 400
    for one, other in itertools.combinations(PARTS, 2):
        assert not used[one] & used[other]


@pytest.mark.parametrize("part", PARTS)
def test_scenes_vary_in_size_and_content(part: str) -> None:
    shapes = [scene.pixels.shape for scene in coco_files.scenes_of(part)]
    assert np.min(shapes) == 64
    assert np.max(shapes) == 128
    assert np.mean(np.asarray(shapes) % 32 > 0) > 0.9
    padded = {tuple(-(-side // 32) for side in shape) for shape in shapes}
    assert len(padded) >= 6
    assert {len(scene.placed) for scene in coco_files.scenes_of(part)} == {2, 3, 4, 5, 6}
    labels = np.concatenate([scene.labels for scene in coco_files.scenes_of(part)])
    assert np.bincount(labels, minlength=10).min() > len(labels) / 15


@pytest.mark.parametrize("part", PARTS)
def test_masks_are_apart_and_boxes_tight(part: str) -> None:
    _, labels = load_digits()
    for scene in coco_files.scenes_of(part):
        assert scene.pixels.dtype == np.uint8
        assert scene.masks.shape == (len(scene.shown), *scene.pixels.shape)
        assert scene.masks.sum(0).max() == 1
        assert scene.labels.tolist() == [labels[scene.placed[i].source] for i in scene.shown]
        for mask, (x1, y1, x2, y2) in zip(scene.masks, scene.boxes.tolist(), strict=True):
            inside = np.zeros_like(mask)
            inside[y1:y2, x1:x2] = True
            assert not (mask & ~inside).any()
            assert all(
                edge.any() for edge in (mask[y1], mask[y2 - 1], mask[:, x1], mask[:, x2 - 1])
            )


def test_masks_are_the_pixels_that_no_later_digit_hides() -> None:
    hidden = 0
    for scene in coco_files.scenes_of("test")[::4]:
        inks = slow_layers(scene) >= 80
        seen = np.stack([ink & ~inks[i + 1 :].any(0) for i, ink in enumerate(inks)])
        share = seen.sum((1, 2)) / inks.sum((1, 2))
        assert scene.shown == tuple(np.flatnonzero(share >= 0.5))
        assert np.array_equal(scene.masks, seen[list(scene.shown)])
        hidden += int((share < 1).sum())
    assert hidden > 10


def test_a_digit_that_is_mostly_hidden_is_not_annotated() -> None:
    cases = [
        scene for scene in coco_files.scenes_of("train") if len(scene.shown) < len(scene.placed)
    ]
    assert cases
    for scene in cases:
        inks = slow_layers(scene) >= 80
        (lost,) = set(range(len(scene.placed))) - set(scene.shown)
        assert 2 * (inks[lost] & ~inks[lost + 1 :].any(0)).sum() < inks[lost].sum()


def test_pixels_show_ink_over_a_grainy_ground() -> None:
    for scene in coco_files.scenes_of("test")[::4]:
        plain = np.full(scene.pixels.shape, float(scene.ground))
        layers = slow_layers(scene)
        for layer, digit in zip(layers / 255, scene.placed, strict=True):
            plain = layer * digit.ink + (1 - layer) * plain
        # Each digit put down rounds once, each time by at most a half.
        rounding = len(scene.placed) / 2
        assert (scene.pixels <= (plain + scene.grain).clip(0, 255) + rounding).all()
        assert (scene.pixels >= (plain - scene.grain).clip(0, 255) - rounding).all()
        if scene.ground >= scene.grain:
            ground = scene.pixels[(layers == 0).all(0)]
            # Variance of a uniform distribution over 2 g + 1 integers, from thousands of pixels.
            assert ground.var() == pytest.approx(scene.grain * (scene.grain + 1) / 3, rel=0.1)
            assert ground.mean() == pytest.approx(scene.ground, abs=1)


def test_boxes_overlap_at_most_by_half() -> None:
    most = 0.0
    for scene in coco_files.scenes_of("test"):
        boxes = []
        for digit in scene.placed:
            height, width = scenes.ink_of(load_digits()[0][digit.source], digit.side).shape
            boxes.append((digit.left, digit.top, digit.left + width, digit.top + height))
        for (a1, b1, a2, b2), (c1, d1, c2, d2) in itertools.combinations(boxes, 2):
            common = max(0, min(a2, c2) - max(a1, c1)) * max(0, min(b2, d2) - max(b1, d1))
            most = max(most, common / min((a2 - a1) * (b2 - b1), (c2 - c1) * (d2 - d1)))
    assert 0.4 < most <= 0.5


def test_other_pictures_of_the_digits_can_be_composed() -> None:
    blank = np.full((5000, 28, 28), 255, dtype=np.uint8)
    for scene in scenes.draw_scenes("val", 5, np.random.default_rng(0), blank):
        for i, mask in zip(scene.shown, scene.masks, strict=True):
            assert mask.sum() <= scene.placed[i].side ** 2
        last = scene.placed[-1]  # Nothing is put over it.
        assert scene.masks[-1].sum() == last.side**2
        assert scene.boxes[-1].tolist() == [
            last.left,
            last.top,
            last.left + last.side,
            last.top + last.side,
        ]


def test_files_are_a_data_set_in_cocos_format(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    path = write_scenes(tmp_path, "val", coco_files.scenes_of("val"))
    assert path == tmp_path / "annotations" / "instances_val.json"
    assert json.loads(path.read_text()) == coco_files.annotations_of(coco_files.scenes_of("val"))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list("0123456789")
    assert np.diff(coco.getCatIds()).max() > 1
    assert len(coco.getImgIds()) == COUNTS["val"]
    for i, scene in enumerate(coco_files.scenes_of("val")):
        (image,) = coco.loadImgs(i + 1)
        assert (image["height"], image["width"]) == scene.pixels.shape
        stored = Image.open(tmp_path / "val" / image["file_name"])
        assert np.array_equal(np.asarray(stored), scene.pixels)
        shown = coco_files.read("val", i)
        assert shown.mode == "RGB"
        assert np.array_equal(np.asarray(shown), np.asarray(stored.convert("RGB")))
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=i + 1))
        assert len(annotations) == len(scene.shown)
        for annotation, label, mask in zip(annotations, scene.labels, scene.masks, strict=True):
            assert coco.loadCats(annotation["category_id"])[0]["name"] == str(label)
            assert np.array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum()
            rows, columns = np.nonzero(mask)
            sides = [columns.max() - columns.min() + 1, rows.max() - rows.min() + 1]
            assert annotation["bbox"] == [columns.min(), rows.min(), *sides]
            assert annotation["iscrowd"] == 0


def test_unknown_parts_are_explained() -> None:
    with pytest.raises(
        ValueError, match="of the digit scenes for detection; possible parts: train, val, test"
    ):
        coco_files.scenes_of("validation")
    with pytest.raises(ValueError, match="possible parts"):
        next(scenes.draw_scenes("validation", 1, np.random.default_rng(0)))
