"""The commands of the detection task, on the demo's data and on a file in COCO's format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_fakes import write_scenes
from detection_runs import FLAGS, LIMIT, MODEL, Done, command, record_of, run
from PIL import Image
from safetensors.torch import load_file, save_file

from tasks.detection.demo import coco_files
from tasks.detection.demo.models import DEMO
from tasks.detection.tags import SHORT_NAMES

RTN = ["--method", "rtn", "--w-bits", 4, "--a-bits", 4, *FLAGS]
#: Height and width of an image without objects.
EMPTY = (90, 130)


def write(folder: Path, part: str, count: int) -> Path:
    """A file and its images: scenes of the demo, an image without objects, a crowd region."""
    path = write_scenes(folder, part, coco_files.scenes_of(part)[:count])
    content = json.loads(path.read_text(encoding="utf-8"))
    Image.fromarray(np.full(EMPTY, 40, np.uint8)).save(folder / part / "empty.png")
    content["images"].insert(
        1, {"id": 99, "file_name": "empty.png", "height": EMPTY[0], "width": EMPTY[1]}
    )
    first = content["images"][0]
    height, width = first["height"], first["width"]
    crowd = {"size": [height, width], "counts": [0, 20 * height, (width - 20) * height]}
    box = [0, 0, 20, height]
    content["annotations"].append(
        {
            "id": 0,
            "image_id": first["id"],
            "category_id": 6,
            "bbox": box,
            "area": 20 * height,
            "iscrowd": 1,
            "segmentation": crowd,
        }
    )
    return rewritten(path, content)


def rewritten(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    write(root, "train", 4)
    write(root, "val", 6)
    return root


def files(place: Path) -> list[object]:
    annotations = place / "annotations"
    return [
        "--data",
        annotations / "instances_val.json",
        "--calibration-data",
        annotations / "instances_train.json",
    ]


@pytest.fixture(scope="module")
def own(place: Path) -> Done:
    return record_of(
        run(*RTN, *files(place), "--results", place / "runs", "--calibration-images", 5)
    )


def test_run_says_every_metric(tmp_path: Path) -> None:
    said = run(*RTN, "--limit", LIMIT, "--results", tmp_path / "runs")
    record = record_of(said).record
    *lines, fidelity, last = said.splitlines()
    assert fidelity.startswith("fidelity to full precision: AP_box_to_full ")
    assert last.startswith("record: ")
    shown = [
        f"{record.model} rtn {name} {metric.value:.2f} ± {metric.stderr:.2f} "
        f"(n = {LIMIT}, full precision {record.fp_metrics[name].value:.2f})"
        for name, metric in record.metrics.items()
    ]
    assert lines == shown
    assert len(shown) >= 8


def test_a_file_in_cocos_format(own: Done) -> None:
    record, data = own.record, own.record.dataset
    assert (data.name, data.split, data.count, data.classes) == ("instances_val", "val", 7, 10)
    assert record.n == 7
    assert record.calibration is not None
    assert sorted(record.calibration.ids) == sorted(
        [*(f"train/{index:05d}.png" for index in range(4)), "train/empty.png"]
    )
    assert record.fp_metrics["AP_box"].value > 40
    objects = [len(scene.labels) for scene in coco_files.scenes_of("val")[:6]]
    with np.load(own.folder / record.outcomes) as outcomes:
        assert outcomes["sample"].tolist() == [
            "val/00000.png",
            "val/empty.png",
            *(f"val/{index:05d}.png" for index in range(1, 6)),
        ]
        # the crowd region is no object to find
        assert outcomes["objects"].tolist() == [objects[0], 0, *objects[1:]]


def test_the_numbers_of_the_file_are_those_of_pycocotools(
    own: Done, place: Path, tmp_path: Path
) -> None:
    """Metrics of the full-precision model against pycocotools on mmdet's own test step."""
    import contextlib
    import io

    import torch
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from tasks.detection.mm import DetDataSample
    from tasks.detection.task import TASK

    model = TASK.load(MODEL).model
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(place / "annotations" / "instances_val.json"))
        found = []
        for entry in truth.dataset["images"]:
            pixels = np.array(Image.open(place / "val" / entry["file_name"]).convert("RGB"))[
                :, :, ::-1
            ].copy()
            size = pixels.shape[:2]
            sample = DetDataSample(
                metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
            )
            with torch.no_grad():
                (done,) = model.test_step(
                    {
                        "inputs": [torch.from_numpy(pixels).permute(2, 0, 1)],
                        "data_samples": [sample],
                    }
                )
            each = done.pred_instances
            for (x1, y1, x2, y2), score, label in zip(
                each.bboxes.tolist(), each.scores.tolist(), each.labels.tolist(), strict=True
            ):
                category = coco_files.CATEGORY_IDS[label]
                row = {
                    "image_id": entry["id"],
                    "category_id": category,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                }
                found.append(row)
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert own.record.fp_metrics["AP_box"].value == pytest.approx(
        100 * evaluation.stats[0], abs=1e-6
    )
    assert own.record.fp_metrics["AP50_box"].value == pytest.approx(
        100 * evaluation.stats[1], abs=1e-6
    )


def test_models() -> None:
    said = command("models").splitlines()
    assert {line.split()[0] for line in said} == {*SHORT_NAMES, "demo_mask_rcnn", "demo_cascade"}
    assert (
        next(line for line in said if line.startswith("mask_rcnn_swin_tiny ")).split()[1]
        == "mask_rcnn_swin_tiny.coco_3x"
    )
    # a column of its own for what names mean, however long they are
    assert len({len(line) - len(line.split(maxsplit=1)[1]) for line in said}) == 1


def test_scopes_of_the_help() -> None:
    said = command("run", "--help")
    assert "--scope [backbone+fpn+rpn+roi|" in said.replace("\n", "").replace("  ", "")
    assert "fimaq: rpn]" in said
    assert "--calibration-data" in said
    assert "--eval " not in said


def refused(place: Path, *arguments: object) -> str:
    """The message of a run that is refused: one error, of a few lines."""
    said = run(*RTN, *arguments, "--results", place / "refused", fails=True)
    assert said.startswith("error: ")
    assert said.count("error: ") == 1
    assert said.count("\n") <= 8
    assert "Traceback" not in said
    return said


def test_data_that_is_not_there(place: Path, tmp_path: Path) -> None:
    lost = tmp_path / "nothing.json"
    assert f"There is no file {lost}" in refused(place, "--data", lost, "--calibration-data", lost)
    assert "give --calibration-data" in refused(place, "--data", files(place)[1])
    assert f"There is no folder {tmp_path / 'x'}" in refused(place, "--data", tmp_path / "x")
    content = json.loads(Path(str(files(place)[1])).read_text(encoding="utf-8"))
    content["images"][2]["file_name"] = "away.png"
    path = rewritten(place / "annotations" / "instances_away.json", content)
    (place / "annotations" / "instances_away").symlink_to(place / "val")
    said = refused(place, "--data", path, *files(place)[2:])
    assert "names 1 image missing from" in said
    assert "'away.png'" in said


def test_data_that_does_not_fit(place: Path, tmp_path: Path) -> None:
    content = json.loads(Path(str(files(place)[1])).read_text(encoding="utf-8"))
    other = {
        **content,
        "categories": [*content["categories"][:9], {**content["categories"][9], "name": "ten"}],
    }
    path = rewritten(place / "annotations" / "instances_val_other.json", other)
    said = refused(place, "--data", path, *files(place)[2:])
    assert "annotations of categories that are no class of demo_mask_rcnn.digits-v1: 'ten'" in said
    small = {**content, "images": [{**content["images"][0], "height": 10}, *content["images"][1:]]}
    small["annotations"] = [
        item for item in content["annotations"] if item["image_id"] != content["images"][0]["id"]
    ]
    path = rewritten(place / "annotations" / "instances_val_small.json", small)
    assert "do not belong together" in refused(place, "--data", path, *files(place)[2:])


def test_weights_that_do_not_fit(place: Path, tmp_path: Path) -> None:
    state = load_file(DEMO.weights_path(MODEL.name))
    path = tmp_path / "other.safetensors"
    save_file(
        {
            **state,
            "roi_head.bbox_head.fc_cls.weight": state["roi_head.bbox_head.fc_cls.weight"][:5],
        },
        path,
    )
    said = refused(place, "--weights", path, "--limit", LIMIT)
    assert "roi_head.bbox_head.fc_cls.weight" in said
    lost = tmp_path / "lost.safetensors"
    assert str(lost) in refused(place, "--weights", lost, "--limit", LIMIT)
    save_file({name: value for name, value in state.items() if "rpn_cls" not in name}, path)
    assert "rpn_head.rpn_cls" in refused(place, "--weights", path, "--limit", LIMIT)


def test_settings_that_do_not_fit(place: Path) -> None:
    assert "calibration_transform must be eval, not train" in refused(
        place, "--limit", LIMIT, "--calibration-transform", "train"
    )
    assert "one at a time: set batch_size 1" in refused(
        place, "--limit", LIMIT, "--method", "qdrop", "--batch-size", 2
    )
    assert "Unknown model 'mask_rcnn_swin_tinny'" in refused(
        place, "--model", "mask_rcnn_swin_tinny"
    )
