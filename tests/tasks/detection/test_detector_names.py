"""Names of detectors, their scopes, and what is missing of weights and data."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from fimaq_core.errors import ModelError
from fimaq_core.recipe import make_recipe
from tasks.common.hashing import file_sha256
from tasks.common.request import DataRequest, ModelRequest, describe_missing
from tasks.detection import tags
from tasks.detection.configs import BACKBONES, KINDS
from tasks.detection.models import load_model

NAMES = [f"{kind}_{backbone}" for kind in KINDS for backbone in BACKBONES]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A folder with the files of COCO 2017, all empty."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        (root / "annotations" / f"instances_{split}.json").touch()
    return root


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with a file called after one model."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "mask_rcnn_swin_tiny.coco_3x.pth").write_bytes(b"weights")
    return folder


def test_importing_the_names_imports_no_library() -> None:
    heavy = "torch", "mmdet", "mmcv", "mmengine", "cv2", "torchvision"
    code = f"import sys, tasks.detection.tags; print(sorted(set({heavy}) & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_names() -> None:
    assert list(tags.SHORT_NAMES) == list(tags.PUBLISHED) == NAMES
    for name in NAMES:
        full = tags.full_name(name)
        assert tags.full_name(full) == full
        if name == "mask_rcnn_swin_base":
            assert full == name
        else:
            assert full == f"{name}.coco_3x" == tags.model_tag(ModelRequest(name))
    assert tags.full_name("mask_rcnn_swin_tiny.coco_1x") == "mask_rcnn_swin_tiny.coco_1x"
    files = [file for published in tags.PUBLISHED.values() for file in published.values()]
    assert len(set(files)) == len(files) == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mask_rcnn_swin_tin",
            "Unknown model 'mask_rcnn_swin_tin'. Did you mean 'mask_rcnn_swin_tiny'?",
        ),
        ("demo_casade", "Unknown model 'demo_casade'. Did you mean 'demo_cascade'?"),
        (
            "mask_rcnn_swin_small.coco_1x",
            "no published weights 'coco_1x' of mask_rcnn_swin_small. Did you mean 'coco_3x'?",
        ),
        (
            "mask_rcnn_swin_base.coco_3x",
            "'coco_3x' of mask_rcnn_swin_base. There are none: give a file with --weights.",
        ),
        (
            "mask_rcnn_swin_base",
            "'mask_rcnn_swin_base' names no weights, and none were published for it: choose a "
            "local file",
        ),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        tags.model_tag(ModelRequest(name))
    assert message in str(caught.value)


def test_weights_from_files_have_a_tag_of_their_own(weights: Path) -> None:
    file = weights / "mask_rcnn_swin_tiny.coco_3x.pth"
    digest = file_sha256(file)
    assert (
        tags.model_tag(ModelRequest("mask_rcnn_swin_tiny", weights_folder=weights))
        == "mask_rcnn_swin_tiny.coco_3x"
    )
    assert (
        tags.weights_digest(ModelRequest("mask_rcnn_swin_tiny", weights_folder=weights)) == digest
    )
    assert (
        tags.model_tag(ModelRequest("mask_rcnn_swin_base", weights=file))
        == f"mask_rcnn_swin_base.local-{digest[:12]}"
    )


def test_scopes_are_all_that_is_not_nothing() -> None:
    assert tags.SCOPES[0] == "backbone+fpn+rpn+roi"
    found = {frozenset(scope.split("+")) for scope in tags.SCOPES}
    choices = {
        frozenset(n for n, take in zip(tags.PIECES, taken, strict=True) if take)
        for taken in product((0, 1), repeat=4)
    }
    assert found == choices - {frozenset()}
    assert len(tags.SCOPES) == 15


def test_settings_of_recipes_exist() -> None:
    recipe = make_recipe("fimaq", tags.DEFAULTS)
    assert {name: getattr(recipe, name) for name in tags.DEFAULTS} == tags.DEFAULTS


def test_missing_weights_name_the_published_file_and_are_not_looked_for_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(*_: object, **__: object) -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("tasks.common.models.hub.hub_answers", asked)
    requests = [
        ModelRequest(name) for name in ("mask_rcnn_swin_tiny", "cascade_mask_rcnn_swin_small")
    ]
    missing = [
        item
        for request in requests
        for item in tags.preflight(request, DataRequest())
        if "weights" in item.what
    ]
    text = describe_missing(missing)
    assert text is not None
    assert text.count("\n") == 0  # one line for all
    assert (
        "mask_rcnn_swin_tiny.coco_3x (published as v1.0.2/mask_rcnn_swin_tiny_patch4_window7.pth)"
        in text
    )
    assert "cascade_mask_rcnn_swin_small.coco_3x (published as" in text
    assert "WEIGHTS=/path" in text
    with pytest.raises(ModelError, match=r"Missing: the weights of mask_rcnn_swin_tiny\.coco_3x"):
        load_model(requests[0])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"There is no weights file .*none\.pth"):
        tags.preflight(
            ModelRequest("mask_rcnn_swin_tiny", weights=tmp_path / "none.pth"), DataRequest()
        )


def test_nothing_is_missing(coco: Path, weights: Path) -> None:
    request = ModelRequest("mask_rcnn_swin_tiny", weights_folder=weights)
    file = coco / "annotations" / "instances_val2017.json"
    for data in (
        DataRequest(coco),
        DataRequest(file),
        DataRequest(file, calibration_data=coco),
        DataRequest(coco, calibration_data=file),
    ):
        assert tags.preflight(request, data) == []


def test_missing_data(coco: Path, weights: Path) -> None:
    def missing(**data: Path) -> str:
        return (
            describe_missing(
                tags.preflight(
                    ModelRequest("mask_rcnn_swin_tiny", weights_folder=weights), DataRequest(**data)
                )
            )
            or ""
        )

    assert missing().startswith("Missing: the data set COCO 2017. Give its folder: COCO=/path")
    assert missing(path=coco / "none").startswith(
        f"Missing: the folder {coco / 'none'}. The folder of COCO 2017 is expected"
    )
    assert missing(path=coco / "none.json").startswith(f"Missing: the file {coco / 'none.json'}. ")
    assert missing(calibration_data=coco).startswith("Missing: the data set COCO 2017. ")
    assert missing(path=coco, calibration_data=coco / "none.json").startswith(
        f"Missing: the file {coco / 'none.json'}. "
    )
    (coco / "annotations" / "instances_val2017.json").unlink()
    (coco / "train2017").rmdir()
    file, folder = coco / "annotations" / "instances_val2017.json", coco / "train2017"
    assert missing(path=coco).startswith(f"Missing: the file {file} and the folder {folder}. ")
    assert missing(path=coco, calibration_data=coco).startswith(
        f"Missing: the file {file} and the folder {folder}. "
    )


def test_demo_models_bring_their_data() -> None:
    assert tags.missing_data(DataRequest(), brings_data=True) is None
    found = tags.missing_data(DataRequest(Path("/none")), brings_data=True)
    assert found is not None
    assert found.what == "the folder /none"
