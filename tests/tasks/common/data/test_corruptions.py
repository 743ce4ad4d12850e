"""Corruptions of evaluated images: one seed per image, after resizing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from fimaq_core.errors import DataError
from tasks.common.data.corruptions import corrupted
from tasks.common.data.elsewhere import CORRUPTIONS
from tasks.common.data.folders import Source
from tasks.common.data.images import Images

pytest.importorskip("imagecorruptions")

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
TRANSFORM = Compose([Resize(48), CenterCrop(40), ToTensor(), Normalize([0.5] * 3, [0.25] * 3)])


def source(mode: str = "RGB") -> Source:
    image = Image.fromarray(PIXELS).convert(mode)
    return Source("images", "val", ["a", "b"], [0, 1], 2, lambda _: image)


def read(text: str, index: int = 0, mode: str = "RGB") -> np.ndarray:
    return np.asarray(corrupted(source(mode), TRANSFORM, text)[0].read(index))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_corruption_is_the_same_at_every_reading(name: str) -> None:
    before = np.random.get_state()[1].copy()
    first, second = (read(f"{name}:2") for _ in range(2))
    assert (np.random.get_state()[1] == before).all()
    assert first.shape == (40, 40, 3)
    np.testing.assert_array_equal(first, second)
    clean = np.asarray(Compose(TRANSFORM.transforms[:2])(Image.fromarray(PIXELS)))
    assert (first != clean).any()
    assert read(f"{name}:2", mode="L").shape == (40, 40)


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "fog"])
def test_each_image_has_noise_of_its_own(name: str) -> None:
    assert (read(f"{name}:2", 0) != read(f"{name}:2", 1)).any()


@pytest.mark.parametrize(("severity", "factor"), [(1, 0.4), (5, 0.05)])
def test_contrast_against_its_formula_on_the_cropped_image(severity: int, factor: float) -> None:
    small = np.asarray(Compose(TRANSFORM.transforms[:2])(Image.fromarray(PIXELS))) / 255
    mean = small.mean(axis=(0, 1), keepdims=True)
    expected = 255 * ((small - mean) * factor + mean)
    assert abs(read(f"contrast:{severity}") - expected).max() <= 1


def test_the_rest_of_the_transform_and_the_name() -> None:
    found, rest = corrupted(source(), TRANSFORM, "brightness:1")
    assert found.name == "images, brightness:1"
    pixels = torch.from_numpy(np.array(found.read(0))).permute(2, 0, 1) / 255
    torch.testing.assert_close(rest(found.read(0)), (pixels - 0.5) / 0.25)


def test_a_small_image_has_one_message() -> None:
    tiny = Compose([Resize(20), *TRANSFORM.transforms[2:]])
    found, rest = corrupted(source(), tiny, "fog:1")
    item = Images(found.ids, found.targets, found.read, rest, False)[0]
    assert isinstance(item, DataError)
    assert "26 x 20 pixels" in str(item)


def test_a_missing_package_has_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imagecorruptions", None)
    transform: Callable[[Any], torch.Tensor] = TRANSFORM
    with pytest.raises(DataError, match=r"install the extra with pip install '.\[corruptions\]'"):
        corrupted(source(), transform, "fog:1")
