"""Tests of the demo detectors, of their training and of their committed weights."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from fimaq_core.errors import ModelError
from tasks.common.demo.digits import PARTS
from tasks.common.request import ModelRequest
from tasks.detection.demo import coco_files, models

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture
def detectors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that trains the demo detectors; it belongs to a script."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from demo_training import detection as detectors

    return detectors


@pytest.mark.parametrize(("name", "heads"), [("demo_mask_rcnn", 1), ("demo_cascade", 3)])
def test_models_are_small_detectors_of_mmdets_classes(name: str, heads: int) -> None:
    from tasks.detection import mm

    model = models.DEMO.build(name)
    assert isinstance(model, mm.MaskRCNN if heads == 1 else mm.CascadeRCNN)
    assert isinstance(model.backbone, mm.SwinTransformer)
    assert isinstance(model.rpn_head, mm.RPNHead)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    for stage in model.backbone.stages[:3]:
        assert [block.attn.shift_size for block in stage.blocks] == [0, 2]
    bbox, mask = model.roi_head.bbox_head, model.roi_head.mask_head
    bbox, mask = ([bbox], [mask]) if heads == 1 else (bbox, mask)
    assert len(bbox) == len(mask) == heads
    assert all(head.num_classes == 10 for head in (*bbox, *mask))
    with torch.inference_mode():
        maps = model.neck(model.backbone(torch.zeros(1, 3, 96, 64)))
    assert [tuple(x.shape) for x in maps] == [
        (1, 32, 24, 16),
        (1, 32, 12, 8),
        (1, 32, 6, 4),
        (1, 32, 3, 2),
        (1, 32, 2, 1),
    ]


def test_building_leaves_the_specification_as_it_is() -> None:
    spec = models.DEMO.spec("demo_cascade")
    before = copy.deepcopy(spec.kwargs)
    models.DEMO.build("demo_cascade")
    assert spec.kwargs == before
    assert type(spec.kwargs["roi_head"]) is dict


def test_unknown_names_are_explained() -> None:
    with pytest.raises(ModelError, match="Did you mean 'demo_mask_rcnn'"):
        models.DEMO.build("demo_mask_rcn")


def test_normalisation_constants_are_those_of_the_train_part() -> None:
    values = torch.cat(
        [torch.from_numpy(scene.pixels).flatten() for scene in coco_files.scenes_of("train")]
    ).double()
    assert values.mean().item() == pytest.approx(models.PIXEL_MEAN, abs=0.05)
    assert values.std().item() == pytest.approx(models.PIXEL_STD, abs=0.05)


@pytest.mark.parametrize("name", models.DEMO.names)
def test_metadata_describe_the_committed_weights(name: str) -> None:
    metadata, path = models.DEMO.metadata(name), models.DEMO.weights_path(name)
    model, stored = models.DEMO.load(ModelRequest(name), None)
    assert stored.path == path
    assert metadata["model"] == name
    assert metadata["class"] == f"mmdet.models.detectors.{type(model).__name__}"
    assert metadata["kwargs"] == json.loads(json.dumps(models.DEMO.spec(name).kwargs))
    assert metadata["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_size < 4_000_000
    state = load_file(path)
    assert state.keys() == model.state_dict().keys()
    assert all(
        value.dtype == torch.float32 for value in state.values() if value.is_floating_point()
    )
    assert metadata["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert metadata["data_fingerprints"] == {
        part: coco_files.fingerprint_of(coco_files.scenes_of(part)) for part in PARTS
    }
    assert metadata["test_count"] == 200


@pytest.mark.parametrize("name", models.DEMO.names)
def test_trained_models_find_digits(name: str, detectors: ModuleType) -> None:
    model, _ = models.DEMO.load(ModelRequest(name), None)
    measured, metadata = detectors.measure(model, "test"), models.DEMO.metadata(name)
    assert measured["test_AP_box"] >= 50
    for metric in ("AP_box", "AP_mask"):
        assert measured[f"test_{metric}"] == pytest.approx(metadata[f"test_{metric}"], abs=0.5)
    assert measured["test_count"] == 200


def test_training_scenes_are_of_the_train_part_and_repeatable(detectors: ModuleType) -> None:
    from tasks.common.demo.digits import split_digits

    torch.manual_seed(0)
    first = detectors.compose(20, 5)
    torch.manual_seed(0)
    again = detectors.compose(20, 5)
    assert coco_files.fingerprint_of(first) == coco_files.fingerprint_of(again)
    assert coco_files.fingerprint_of(first) != coco_files.fingerprint_of(detectors.compose(20, 6))
    assert {digit.source for scene in first for digit in scene.placed} <= set(
        split_digits()["train"]
    )


@pytest.mark.parametrize("name", models.DEMO.names)
def test_training_moves_all_weights(
    name: str, detectors: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = {}
    initialise = detectors.initialise

    def keep(model: torch.nn.Module, starts_from: str | None) -> None:
        initialise(model, starts_from)
        started.update({key: value.clone() for key, value in model.named_parameters()})

    monkeypatch.setattr(detectors, "initialise", keep)
    recipe = dataclasses.replace(detectors.RECIPES[name], scenes=8, batch_size=4, epochs=1, lr=0.01)
    model = detectors.train(name, recipe, 0)
    assert not model.training
    still = [key for key, value in model.named_parameters() if torch.equal(value, started[key])]
    assert still == []
    assert all(value.isfinite().all() for value in model.parameters())
