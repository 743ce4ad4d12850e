"""Preparation of images: bit for bit that of mmdet's own test pipeline, each image by itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_fakes import pixels
from PIL import Image

from tasks.detection import mm
from tasks.detection.models import Pipeline

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
RESIZE = {"scale": (1333, 800), "keep_ratio": True}


def preprocessor() -> Any:
    from mmdet.models.data_preprocessors import DetDataPreprocessor

    return DetDataPreprocessor(
        mean=MEAN, std=STD, bgr_to_rgb=True, pad_mask=True, pad_size_divisor=32
    )


def by_mmdet(path: Path, resize: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    from mmengine.dataset import Compose

    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    steps = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", **resize},
        {"type": "PackDetInputs", "meta_keys": keys},
    ]
    with mm.DefaultScope.overwrite_default_scope("mmdet"):
        packed = Compose(steps)({"img_path": str(path), "img_id": 0})
    batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
    done = preprocessor()(batch, training=False)
    return done["inputs"], done["data_samples"][0].metainfo


@pytest.mark.parametrize("size", [(427, 640), (640, 427), (200, 900), (801, 1334), (50, 50)])
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_equals_mmdet(size: tuple[int, int], ending: str, tmp_path: Path) -> None:
    import cv2

    path = tmp_path / f"a.{ending}"
    Image.fromarray(pixels(*size, 0)).save(path)
    expected, meta = by_mmdet(path, RESIZE)
    array = cv2.imread(str(path))
    before = array.copy()
    found, own = Pipeline(preprocessor(), RESIZE)(array)
    assert np.array_equal(array, before)
    assert found.dtype == torch.float32
    assert found.shape[0] == 1
    assert found.shape[2] % 32 == found.shape[3] % 32 == 0
    assert max(found.shape[2:]) <= 1344
    assert torch.equal(found, expected)
    assert own == {key: value for key, value in meta.items() if key not in ("img_id", "img_path")}
    assert set(own) == {"ori_shape", "img_shape", "scale_factor", "pad_shape", "batch_input_shape"}


def test_images_as_they_are_by_hand() -> None:
    array = pixels(45, 70, 1)
    found, meta = Pipeline(preprocessor())(array)
    assert found.shape == (1, 3, 64, 96)
    red_first = torch.from_numpy(array[:, :, ::-1].astype(np.float32)).permute(2, 0, 1)
    expected = (red_first - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.allclose(found[0, :, :45, :70], expected, atol=1e-6)
    assert found[0, :, 45:].abs().max() == found[0, :, :, 70:].abs().max() == 0
    assert meta == {
        "ori_shape": (45, 70),
        "img_shape": (45, 70),
        "pad_shape": (64, 96),
        "batch_input_shape": (64, 96),
        "scale_factor": (1.0, 1.0),
    }


def test_the_model_keeps_its_own_preprocessor() -> None:
    own = preprocessor()
    pipeline = Pipeline(own, RESIZE)
    own.to(torch.float64)
    own.mean += 1
    assert torch.equal(pipeline.preprocessor.mean, preprocessor().mean)
    image, _ = pipeline(pixels(40, 50, 0))
    assert image.dtype == torch.float32
