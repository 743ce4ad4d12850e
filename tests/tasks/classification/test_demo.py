"""Tests of the digit pairs and of the committed demo models."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Subset

from fimaq_core.errors import ModelError
from tasks.classification.demo import digit_pairs, models
from tasks.common.data.augment import RandomDigitWarp
from tasks.common.demo.digits import PARTS, load_digits, split_digits

SIZES = {"train": 8192, "val": 1000, "test": 2000}


def load_trained(name: str) -> nn.Module:
    """Builds a demo model and loads its committed weights strictly."""
    model = models.DEMO.build(name)
    model.load_state_dict(load_file(models.DEMO.weights_path(name)), strict=True)
    return model


def test_split_is_disjoint_and_stratified() -> None:
    _, labels = load_digits()
    split = split_digits()
    assert {part: len(indices) for part, indices in split.items()} == {
        "train": 2700,
        "val": 500,
        "test": 1800,
    }
    assert len(set().union(*split.values())) == 5000
    for indices in split.values():
        assert len(set(np.bincount(labels[list(indices)], minlength=10).tolist())) == 1


@pytest.mark.parametrize("part", PARTS)
def test_part_is_composed_of_its_own_digits(part: str) -> None:
    data = digit_pairs.DigitPairs(part)
    assert len(data) == len(data.ids) == len(data.targets) == SIZES[part]
    assert data.pixels.shape == (SIZES[part], 32, 64)
    assert data.pixels.dtype == np.uint8
    assert len(set(data.ids)) == len(data)
    members = set(split_digits()[part])
    used = np.concatenate([data.plan.left, data.plan.right])
    assert set(used.tolist()) == members
    counts = np.unique(used, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1
    assert not (data.plan.left == data.plan.right).any()
    per_class = np.bincount(data.targets, minlength=100)
    assert per_class.max() - per_class.min() <= 1
    assert data.plan.offsets.min() == 0
    assert data.plan.offsets.max() == 4


def test_labels_and_pixels_match_the_composed_digits() -> None:
    images, labels = load_digits()
    data = digit_pairs.DigitPairs("test")
    for i in range(0, len(data), 97):
        name, _, sources = data.ids[i].partition("-")
        left, right = (int(source) for source in sources.split("+"))
        assert name == f"test/{i:05d}"
        assert data.targets[i] == 10 * labels[left] + labels[right]
        assert data.classes[data.targets[i]] == f"{labels[left]}{labels[right]}"
        expected = np.zeros((32, 64), dtype=np.uint8)
        for side, source in enumerate((left, right)):
            top, start = data.plan.offsets[i, side]
            start += 32 * side
            expected[top : top + 28, start : start + 28] = images[source]
        assert np.array_equal(data.pixels[i], expected)


def test_data_are_deterministic() -> None:
    first, second = digit_pairs.DigitPairs("test"), digit_pairs.DigitPairs("test")
    assert first.fingerprint == second.fingerprint
    assert first.ids == second.ids
    assert first.fingerprint != digit_pairs.DigitPairs("val").fingerprint


def test_fingerprint_depends_on_pixels() -> None:
    first, second = digit_pairs.DigitPairs("val"), digit_pairs.DigitPairs("val")
    second.pixels[-1, 0, 0] ^= 1
    assert first.fingerprint != second.fingerprint


def test_items_and_transforms() -> None:
    plain = digit_pairs.DigitPairs("val")
    image, label = plain[3]
    assert isinstance(image, Image.Image)
    assert image.mode == "L"
    assert image.size == (64, 32)
    assert label == plain.targets[3]
    tensor, _ = digit_pairs.DigitPairs("val", transform=digit_pairs.eval_transform())[3]
    expected = (plain.pixels[3] / 255 - digit_pairs.PIXEL_MEAN) / digit_pairs.PIXEL_STD
    assert tensor.shape == (1, 32, 64)
    assert tensor.dtype == torch.float32
    assert np.allclose(tensor[0].numpy(), expected, atol=1e-5)
    warped = digit_pairs.train_transform()(image)
    assert warped.shape == tensor.shape
    assert warped.dtype == torch.float32
    assert not torch.equal(warped, tensor)


def test_normalisation_constants_are_those_of_the_train_part() -> None:
    pixels = digit_pairs.DigitPairs("train").pixels / np.float32(255)
    assert float(pixels.mean()) == pytest.approx(digit_pairs.PIXEL_MEAN, abs=1e-3)
    assert float(pixels.std()) == pytest.approx(digit_pairs.PIXEL_STD, abs=1e-3)


def test_warp_keeps_each_digit_in_its_half() -> None:
    torch.manual_seed(0)
    canvas = torch.zeros(16, 1, 32, 64)
    canvas[..., 8:24, 8:24] = 1.0
    warped = RandomDigitWarp()(canvas)
    assert warped.shape == canvas.shape
    assert float(warped.min()) >= 0
    assert float(warped.max()) <= 1
    assert not warped[..., 32:].any()
    assert (warped[..., :32].flatten(1).sum(1) > 100).all()
    still = RandomDigitWarp(degrees=0, scale=0, shear=0, shift=0, elastic=0, contrast=0)(canvas)
    assert torch.allclose(still, canvas, atol=1e-4)


def test_unknown_names_are_explained() -> None:
    with pytest.raises(ValueError, match="train, val, test"):
        digit_pairs.DigitPairs("validation")
    with pytest.raises(ModelError, match="Did you mean 'demo_vit'"):
        models.DEMO.build("demo_vitt")
    with pytest.raises(ModelError, match="Known: demo_deit, demo_swin, demo_vit"):
        models.DEMO.weights_path("resnet50")
    with pytest.raises(ModelError, match="Unknown demo model"):
        models.DEMO.metadata("resnet50")


@pytest.mark.parametrize("name", models.DEMO.names)
def test_models_are_small_and_take_digit_pairs(name: str) -> None:
    model = models.DEMO.build(name)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) <= 400_000
    with torch.inference_mode():
        assert model(torch.zeros(2, 1, 32, 64)).shape == (2, 100)


def test_swin_shifts_windows_in_both_stages() -> None:
    model = models.DEMO.build("demo_swin")
    for stage in model.layers:
        assert any(shift > 0 for shift in stage.blocks[1].shift_size)


@pytest.mark.parametrize("name", models.DEMO.names)
def test_metadata_describe_the_committed_weights(name: str) -> None:
    metadata = models.DEMO.metadata(name)
    path = models.DEMO.weights_path(name)
    assert metadata["model"] == name
    assert metadata["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_size < 4_000_000
    assert metadata["test_accuracy"] >= 90
    assert metadata["test_count"] == SIZES["test"]
    for part in ("val", "test"):
        assert metadata["data_fingerprints"][part] == digit_pairs.DigitPairs(part).fingerprint
    kwargs = models.DEMO.spec(name).kwargs
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in kwargs.items()} == metadata[
        "kwargs"
    ]


@pytest.mark.parametrize("name", models.DEMO.names)
def test_trained_models_read_digit_pairs(name: str) -> None:
    model = load_trained(name)
    data = Subset(
        digit_pairs.DigitPairs("test", transform=digit_pairs.eval_transform()), range(500)
    )
    hits = 0
    with torch.inference_mode():
        for images, labels in DataLoader(data, batch_size=250):
            hits += int((model(images).argmax(dim=1) == labels).sum())
    assert 100 * hits / len(data) >= 88


def test_both_heads_of_the_distilled_model_are_trained() -> None:
    model = load_trained("demo_deit")
    data = digit_pairs.DigitPairs("val", transform=digit_pairs.eval_transform())
    images = torch.stack([data[i][0] for i in range(200)])
    labels = torch.tensor(data.targets[:200])
    with torch.inference_mode():
        features = model.forward_features(images)
        for head, token in ((model.head, 0), (model.head_dist, 1)):
            assert (head(features[:, token]).argmax(dim=1) == labels).float().mean() >= 0.85
