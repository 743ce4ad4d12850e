"""Calibration images of varying size: drawn by the seed or listed; damaged files, bad lists."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_fakes import CATEGORIES, loaded, write_images, write_json

from fimaq_core.errors import DataError, RecipeError
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.common.request import DataRequest
from tasks.common.task import CalibrationSet
from tasks.detection.calibration import calibration_set

COUNT = 12


def prepared(array: np.ndarray) -> tuple[torch.Tensor, dict[str, Any]]:
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)[None], {
        "ori_shape": array.shape[:2]
    }


def content() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 40, (COUNT, 2)).tolist()
    images = [
        {"id": n, "file_name": f"{n}.png", "height": h, "width": w}
        for n, (h, w) in enumerate(sizes)
    ]
    return {"images": images, "annotations": [], "categories": CATEGORIES}


@pytest.fixture
def data(tmp_path: Path) -> DataRequest:
    path = write_json(tmp_path / "instances_train.json", content())
    write_images(tmp_path / "images", content())
    return DataRequest(calibration_data=path)


def drawn(data: DataRequest, count: int = 5, seed: int = 3, **changes: Any) -> CalibrationSet:
    recipe = Recipe(
        calibration_images=count,
        range_images=count,
        calibration_transform="eval",
        seed=seed,
        **changes,
    )
    return calibration_set(loaded(transform=prepared), data, recipe)


def test_a_seeded_draw_of_images_as_they_are(data: DataRequest) -> None:
    found = drawn(data)
    order = np.random.default_rng(3).permutation(COUNT)[:5]
    entries = [content()["images"][index] for index in order]
    assert found.ids == [f"images/{entry['file_name']}" for entry in entries]
    assert isinstance(found.images, Samples)
    assert [tuple(image.shape) for image in found.images] == [
        (1, 3, entry["height"], entry["width"]) for entry in entries
    ]
    assert [meta["ori_shape"] for meta in found.metas] == [
        (entry["height"], entry["width"]) for entry in entries
    ]
    assert found.inputs["detector"] is found.images
    assert found.transform == "eval"
    assert found.skipped == []
    assert drawn(data, 3).ids == found.ids[:3]
    assert drawn(data, seed=4).ids != found.ids


def test_fingerprint_tells_images_apart(data: DataRequest) -> None:
    once = drawn(data)
    assert drawn(data).fingerprint == once.fingerprint
    others = {once.fingerprint, drawn(data, 4).fingerprint, drawn(data, seed=1).fingerprint}

    def brighter(array: np.ndarray) -> tuple[torch.Tensor, dict[str, Any]]:
        image, meta = prepared(array)
        return image + 1, meta

    def flat(array: np.ndarray) -> tuple[torch.Tensor, dict[str, Any]]:
        image, meta = prepared(array)
        return image.transpose(2, 3).contiguous().view_as(image.transpose(2, 3)), meta

    recipe = Recipe(calibration_images=5, range_images=5, calibration_transform="eval", seed=3)
    others |= {
        calibration_set(loaded(transform=transform), data, recipe).fingerprint
        for transform in (brighter, flat)
    }
    assert len(others) == 5


def test_listed_images(data: DataRequest, tmp_path: Path) -> None:
    first = drawn(data)
    path = tmp_path / "list.txt"
    path.write_text("\n".join(first.ids))
    listed = replace(data, calibration_list=path)
    again = drawn(listed, seed=9)
    assert again.ids == first.ids
    assert again.fingerprint == first.fingerprint
    path.write_text("\n".join(str(tmp_path / name) for name in first.ids))
    assert drawn(listed).ids == first.ids
    path.write_text(json.dumps({"calibration": {"ids": first.ids, "captions": None}}))
    assert drawn(listed, 4).ids == first.ids[:4]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["images/0.png", "images/x.png", "y"],
            "names 2 images that are not in instances_train images, such as 'images/x.png'",
        ),
        (
            ["images/0.png", "images/1.png", "images/0.png"],
            "names 1 images more than once, such as 'images/0.png'",
        ),
        (["images/0.png"], "5 calibration images are asked for, but there are 1"),
    ],
)
def test_bad_lists(lines: list[str], message: str, data: DataRequest, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        drawn(replace(data, calibration_list=path))


def test_damaged_images(data: DataRequest, tmp_path: Path) -> None:
    first = drawn(data)
    (tmp_path / first.ids[1]).write_bytes(b"none")
    with pytest.raises(DataError, match=f"The image {first.ids[1]} is damaged .*--skip-corrupt"):
        drawn(data)
    found = drawn(replace(data, skip_corrupt=True))
    assert found.skipped == [first.ids[1]]
    assert found.ids[:4] == [first.ids[0], *first.ids[2:]]
    assert len(found.ids) == len(found.images) == len(found.metas) == 5
    with pytest.raises(
        DataError, match="Only 11 of 12 calibration images could be read; 1 are damaged"
    ):
        drawn(replace(data, skip_corrupt=True), COUNT)


def test_refused(data: DataRequest) -> None:
    with pytest.raises(DataError, match=r"13 calibration images are asked for, but there are 12"):
        drawn(data, COUNT + 1)
    recipe = Recipe(calibration_images=5, range_images=5, calibration_transform="train")
    with pytest.raises(RecipeError, match="calibration_transform must be eval"):
        calibration_set(loaded(transform=prepared), data, recipe)
    path = data.calibration_data
    with pytest.raises(DataError, match="give --calibration-data"):
        drawn(DataRequest(path=path))
