"""The demo detector on scenes annotated as other tools do: average precisions do not change."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_fakes import write_scenes
from detection_runs import MODEL, command, record_of
from PIL import Image
from safetensors.torch import load_file

from fimaq_core.errors import DataError
from fimaq_core.progress import silent
from tasks.common.request import DataRequest, ModelRequest
from tasks.common.task import Evaluation, LoadedModel
from tasks.detection.demo import coco_files
from tasks.detection.demo.models import DEMO
from tasks.detection.orientation import turned
from tasks.detection.task import TASK

Content = dict[str, Any]
CLASSES = coco_files.CLASSES
#: Scenes that are not square, so that a turned side is seen.
COUNT = 6


@pytest.fixture(scope="module")
def scenes() -> tuple[Any, ...]:
    found = [
        scene
        for scene in coco_files.scenes_of("val")
        if scene.pixels.shape[0] != scene.pixels.shape[1]
    ]
    return tuple(found[:COUNT])


@pytest.fixture(scope="module")
def content(scenes: tuple[Any, ...]) -> Content:
    return coco_files.annotations_of(scenes)


@pytest.fixture(scope="module")
def place(scenes: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    write_scenes(root, "val", scenes)
    return root


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return TASK.load(MODEL)


def evaluated(model: LoadedModel, path: Path, **changes: Any) -> Evaluation:
    device = torch.device("cpu")
    return TASK.evaluate(
        TASK.assemble(model, {}), model, DataRequest(path=path, **changes), device, 1, 0, silent
    )


@pytest.fixture(scope="module")
def usual(model: LoadedModel, place: Path) -> Evaluation:
    found = evaluated(model, place / "annotations" / "instances_val.json", keep_outputs=True)
    assert found.metrics["AP_box"].value > 40
    assert found.metrics["AP_mask"].value > 40
    return found


def written(place: Path, name: str, content: Content) -> Path:
    path = place / "annotations" / f"instances_val_{name}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def values(found: Evaluation, ending: str = "") -> dict[str, float]:
    return {name: metric.value for name, metric in found.metrics.items() if name.endswith(ending)}


def same(found: Evaluation, usual: Evaluation, ending: str = "") -> bool:
    return values(found) == pytest.approx(values(usual, ending), abs=1e-6)


def test_usual_file(usual: Evaluation) -> None:
    assert usual.notes == []
    assert usual.dataset.class_names_from == "model"
    assert usual.dataset.class_categories == CLASSES
    assert (usual.dataset.exif, usual.dataset.oriented_images) == (None, 0)


def test_categories_in_another_order(
    model: LoadedModel, place: Path, content: Content, usual: Evaluation
) -> None:
    extra = {"id": 77, "name": "background"}
    categories = [extra, *content["categories"][::-1]]
    found = evaluated(model, written(place, "order", {**content, "categories": categories}))
    assert same(found, usual)
    assert found.notes == [
        "Categories without annotations that the detector does not know are left out: 'background'"
    ]
    assert found.dataset.class_categories == CLASSES
    assert found.dataset.classes == 10


def permuted(order: np.ndarray) -> dict[str, torch.Tensor]:
    """Weights of the demo detector whose class i is what class ``order[i]`` was."""
    state = dict(load_file(DEMO.weights_path(MODEL.name)))
    rows = torch.from_numpy(order)
    for kind in ("weight", "bias"):
        scores, boxes, masks = (
            f"roi_head.{name}.{kind}"
            for name in ("bbox_head.fc_cls", "bbox_head.fc_reg", "mask_head.conv_logits")
        )
        state[scores] = torch.cat([state[scores][rows], state[scores][-1:]])
        state[boxes] = state[boxes].unflatten(0, (-1, 4))[rows].flatten(0, 1)
        state[masks] = state[masks][rows]
    return state


def test_classes_in_another_order(place: Path, usual: Evaluation, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(len(CLASSES))
    names = tuple(CLASSES[index] for index in order)
    annotations = place / "annotations" / "instances_val.json"
    path = tmp_path / "x.pth"
    for meta in ({"dataset_meta": {"classes": names}}, {"CLASSES": names}):
        torch.save({"state_dict": permuted(order), "meta": meta}, path)
        found = evaluated(TASK.load(ModelRequest(MODEL.name, weights=path)), annotations)
        assert same(found, usual)
        assert found.dataset.class_categories == names
    # Without names they are taken for the demo's own, which they are not.
    torch.save({"state_dict": permuted(order)}, path)
    wrong = evaluated(TASK.load(ModelRequest(MODEL.name, weights=path)), annotations)
    assert wrong.metrics["AP_box"].value < usual.metrics["AP_box"].value / 2


def test_fewer_categories_than_classes(
    model: LoadedModel, place: Path, content: Content, usual: Evaluation
) -> None:
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    kept = content["categories"][:4]
    numbers = [entry["id"] for entry in kept]
    fewer = [item for item in content["annotations"] if item["category_id"] in numbers]
    found = evaluated(
        model, written(place, "fewer", {**content, "categories": kept, "annotations": fewer})
    )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(place / "annotations" / "instances_val.json"))
        evaluation = COCOeval(
            truth, truth.loadRes(copy.deepcopy(usual.files["detections.json"])), "bbox"
        )
        evaluation.params.catIds = numbers
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert found.metrics["AP_box"].value == pytest.approx(100 * evaluation.stats[0], abs=1e-6)
    assert found.dataset.class_categories == (*CLASSES[:4], *[None] * 6)
    (note,) = found.notes
    assert "has no category for 6 of 10 classes, such as '4': AP is over the other 4" in note
    assert found.outcomes["found"].sum() < usual.outcomes["found"].sum()


def test_a_category_that_the_detector_cannot_find(
    model: LoadedModel, place: Path, content: Content
) -> None:
    categories = [{**content["categories"][0], "name": "zero"}, *content["categories"][1:]]
    with pytest.raises(
        DataError,
        match=r"annotations of categories that are no class of demo_mask_rcnn.digits-v1: 'zero'",
    ):
        evaluated(model, written(place, "zero", {**content, "categories": categories}))


def without(
    content: Content, *names: str, of: Callable[[int], bool] = lambda position: True
) -> Content:
    annotations = [
        {name: value for name, value in item.items() if name not in names or not of(position)}
        for position, item in enumerate(content["annotations"])
    ]
    return {**content, "annotations": annotations}


def test_boxes_alone(model: LoadedModel, place: Path, content: Content, usual: Evaluation) -> None:
    bare = without(content, "segmentation", "area", "iscrowd")
    total = len(bare["annotations"])
    found = evaluated(model, written(place, "boxes", bare))
    assert found.metrics["AP_box"].value == pytest.approx(usual.metrics["AP_box"].value, abs=1e-6)
    assert found.metrics["AP50_box"].value == pytest.approx(
        usual.metrics["AP50_box"].value, abs=1e-6
    )
    assert not values(found, "_mask")
    assert "AP_mask" not in found.outcomes
    assert found.notes == [
        f"{total} of {total} annotations have no mask: box AP is measured, mask AP is not",
        f"{total} of {total} annotations have no area, which tells small, medium and large objects "
        f"apart: it is taken from the mask of 0, and from the box of {total}",
    ]
    assert all(item["polygons"] == [] for example in found.examples for item in example["truth"])
    for item in bare["annotations"]:
        item.update(segmentation=[[]], area=0)
    assert values(evaluated(model, written(place, "empty", bare))) == values(found)


def test_areas_of_masks(
    model: LoadedModel, place: Path, content: Content, usual: Evaluation
) -> None:
    found = evaluated(model, written(place, "areas", without(content, "area")))
    total = len(content["annotations"])
    assert same(found, usual)
    assert found.notes[0].endswith(f"it is taken from the mask of {total}, and from the box of 0")


def test_some_masks(model: LoadedModel, place: Path, content: Content, usual: Evaluation) -> None:
    path = written(
        place, "some", without(content, "segmentation", of=lambda position: position < 2)
    )
    found = evaluated(model, path)
    assert same(found, usual, "_box")
    total = len(content["annotations"])
    assert found.notes == [
        f"2 of {total} annotations have no mask: box AP is measured, mask AP is not"
    ]


def stored(place: Path, folder: str, scenes: tuple[Any, ...], tags: list[int], turn: bool) -> Path:
    """Scenes as files with orientation tags; with ``turn``, they are upright only when turned."""
    exif = Image.Exif()
    for number, (scene, tag) in enumerate(zip(scenes, tags, strict=True)):
        back = {6: 8, 8: 6}.get(tag, tag)
        exif[0x0112] = tag
        path = place / folder / f"{number:05d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(turned(scene.pixels, back) if turn else scene.pixels).save(path, exif=exif)
    content = coco_files.annotations_of(scenes)
    for entry in content["images"]:
        entry["file_name"] = f"{folder}/{entry['file_name']}"
    return written(place, folder, content)


def test_orientations_that_sizes_tell(
    model: LoadedModel, place: Path, scenes: tuple[Any, ...], usual: Evaluation
) -> None:
    for folder, turn in (("sides_turned", True), ("sides_stored", False)):
        found = evaluated(model, stored(place, folder, scenes, [1, 5, 6, 7, 8, 6], turn))
        assert same(found, usual)
        assert found.dataset.oriented_images == 5
        assert (
            f"{5 * turn} are turned by it and {5 * (not turn)} are read as stored" in found.notes[0]
        )


def test_half_turns(
    model: LoadedModel, place: Path, scenes: tuple[Any, ...], usual: Evaluation
) -> None:
    """Orientations that the sizes do not tell: asked for, then measured by the answer."""
    tags = [3, 3, 2, 4, 3, 1]
    for folder, turn, right, wrong in (
        ("turned", True, "apply", "ignore"),
        ("as_stored", False, "ignore", "apply"),
    ):
        path = stored(place, folder, scenes, tags, turn)
        with pytest.raises(
            DataError,
            match=rf"5 images of instances_val_{folder} {folder} .*--exif apply .*--exif ignore",
        ):
            evaluated(model, path)
        found = evaluated(model, path, exif=right)
        assert same(found, usual)
        assert (found.dataset.exif, found.dataset.oriented_images) == (right, 5)
        assert (
            evaluated(model, path, exif=wrong).metrics["AP_box"].value
            < usual.metrics["AP_box"].value / 2
        )


def test_the_commands(
    place: Path, scenes: tuple[Any, ...], usual: Evaluation, tmp_path: Path
) -> None:
    """``--exif`` in every command, and another cell for each answer."""
    path = stored(place, "commands", scenes, [3] * COUNT, True)
    data = ["--data", path, "--calibration-data", path]
    small = [
        "--calibration-images",
        2,
        "--range-images",
        2,
        "--range-search",
        "minmax",
        "--range-candidates",
        16,
    ]
    start = ["--model", MODEL.name, *data, "--threads", 1, "--method", "rtn", *small]
    results = ["--results", tmp_path / "runs"]
    assert "6 images of" in command("run", *start[:6], "--method", "fp", *results, fails=True)
    assert "--exif ignore" in command(
        "calibrate", *start, "--out", tmp_path / "x.safetensors", fails=True
    )
    turned_by = ["--exif", "apply"]
    said = command("run", "--model", MODEL.name, *data, "--method", "fp", *turned_by, *results)
    record = record_of(said).record
    assert record.metrics["AP_box"].value == pytest.approx(usual.metrics["AP_box"].value, abs=1e-6)
    note = (
        "6 of 6 images have an EXIF orientation tag: 6 are turned by it and 0 are read as stored, "
        "by --exif apply"
    )
    assert record.notes == [note]
    assert f"note: {note}" in said
    assert (record.dataset.exif, record.dataset.oriented_images) == ("apply", 6)
    other = record_of(
        command("run", "--model", MODEL.name, *data, "--method", "fp", "--exif", "ignore", *results)
    )
    assert other.record.dataset.exif == "ignore"
    assert other.record.dataset.fingerprint != record.dataset.fingerprint
    checkpoint = tmp_path / "x.safetensors"
    said = command("calibrate", *start, *turned_by, "--out", checkpoint)
    assert "note: 2 of 2 calibration images have an EXIF orientation tag" in said
    said = command("evaluate", checkpoint, *data, *turned_by)
    assert f"note: {note}" in said
    assert "AP_box" in said


def test_demo_scenes_are_no_files(tmp_path: Path) -> None:
    said = command(
        "run",
        "--model",
        MODEL.name,
        "--method",
        "fp",
        "--exif",
        "apply",
        "--results",
        tmp_path,
        fails=True,
    )
    assert said == "error: The demo's scenes are no files with EXIF tags: leave --exif out.\n"
