"""Detection from images to outcomes: against mmdet's CocoMetric, by hand, and errors."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_fakes import (
    Instances,
    evaluate_detector,
    guesses,
    in_memory,
    random_coco,
    tiny,
    write_json,
)
from torch import Tensor

from benchmarks.results.outcomes import MetricPart, Outcomes, paired
from fimaq_core.errors import DataError, ModelError, NumericsError
from fimaq_core.progress import OnProgress, Progress, silent
from tasks.common.data.images import DamagedImage
from tasks.common.task import Evaluation
from tasks.detection import mm
from tasks.detection.coco import DetectionSource
from tasks.detection.evaluate import METRICS, coco_results, detect, measure

CPU = torch.device("cpu")
IMAGES = 14


def whole(array: np.ndarray) -> tuple[Tensor, dict[str, Any]]:
    image = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)[None]
    return image, {"ori_shape": array.shape[:2], "sum": int(array.sum())}


class Oracle:
    """A detector that knows images by their pixels and answers as it was told to."""

    def __init__(self, source: DetectionSource, answer: Callable[[int], Any]) -> None:
        self.index = {
            int(source.read(index).sum()): index for index in range(len(source.image_ids))
        }
        assert len(self.index) == len(source.image_ids)
        self.answer = answer
        self.asked: list[int] = []

    def __call__(self, image: Tensor, meta: dict[str, Any]) -> Any:
        assert image.shape[:2] == (1, 3)
        assert not torch.is_grad_enabled()
        self.asked.append(self.index[meta["sum"]])
        return self.answer(self.asked[-1])


def evaluated(
    source: DetectionSource,
    answer: Callable[[int], Any],
    on_progress: OnProgress = silent,
    **changes: Any,
) -> Evaluation:
    return evaluate_detector(Oracle(source, answer), source, whole, CPU, on_progress, **changes)


def wrapped(found: Instances) -> Any:
    instances = mm.InstanceData(
        bboxes=found.bboxes, scores=found.scores, labels=found.labels, masks=found.masks
    )
    return mm.DetDataSample(pred_instances=instances)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_metric_of_mmdet(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmdet.evaluation.metrics import coco_metric

    stats: dict[str, np.ndarray] = {}

    class Recording(coco_metric.COCOeval):  # type: ignore[misc]
        def summarize(self) -> None:
            super().summarize()
            stats[self.params.iouType] = self.stats

    monkeypatch.setattr(coco_metric, "COCOeval", Recording)
    content = random_coco(IMAGES, seed, size=400)
    source = in_memory(content)
    metric = mm.CocoMetric(
        ann_file=str(write_json(tmp_path / "x.json", content)), metric=["bbox", "segm"]
    )
    metric.dataset_meta = {"classes": [entry["name"] for entry in source.coco["categories"]]}
    for index, entry in enumerate(source.images):
        sample = wrapped(guesses(source.coco, index, seed))
        sample.set_metainfo({"img_id": entry["id"], "ori_shape": (entry["height"], entry["width"])})
        metric.process({}, [sample.to_dict()])
    rounded = metric.evaluate(IMAGES)
    found = evaluated(source, lambda index: wrapped(guesses(source.coco, index, seed)))
    names = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
    for ending, kind in (("box", "bbox"), ("mask", "segm")):
        for number, (name, theirs) in enumerate(zip(METRICS, names, strict=True)):
            value = found.metrics[f"{name}_{ending}"].value
            assert abs(value / 100 - stats[kind][number]) < 1e-12
            assert value / 100 == pytest.approx(rounded[f"coco/{kind}_{theirs}"], abs=0.00051)
            assert 0 < value < 100
    assert found.metrics["AP_box"].value != found.metrics["AP_mask"].value
    assert next(iter(found.metrics)) == "AP_box"
    assert len(found.metrics) == 12


def perfect(source: DetectionSource, index: int) -> Instances:
    """Detections equal to the annotations, without crowd regions."""
    found = guesses(source.coco, index, 0, spread=0.0, wrong=0.0)
    entry = source.images[index]
    own = [
        item
        for item in source.coco["annotations"]
        if item["image_id"] == entry["id"] and not item["iscrowd"]
    ]
    labels = {kind["id"]: label for label, kind in enumerate(source.coco["categories"])}
    boxes = torch.tensor([item["bbox"] for item in own], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    from pycocotools import mask as run_lengths

    masks = [torch.from_numpy(run_lengths.decode(item["segmentation"])).bool() for item in own]
    none = torch.zeros(0, entry["height"], entry["width"], dtype=torch.bool)
    found.bboxes, found.scores = boxes, torch.linspace(0.9, 0.5, len(own))
    found.labels = torch.tensor([labels[item["category_id"]] for item in own], dtype=torch.int64)
    found.masks = torch.stack(masks) if masks else none
    return found


def test_perfect_detections() -> None:
    source = in_memory(random_coco(IMAGES, 1))
    found = evaluated(source, lambda index: perfect(source, index))
    assert found.metrics["AP_box"].value == pytest.approx(100)
    assert found.metrics["AP_mask"].value == pytest.approx(100)
    assert found.metrics["AP_box"].stderr == pytest.approx(0, abs=1e-9)
    assert np.allclose(found.outcomes["AP_box"], 1)
    assert found.outcomes["found"].tolist() == found.outcomes["objects"].tolist()
    assert 0 in found.outcomes["objects"]


def test_outcomes_agree_with_metrics() -> None:
    source = in_memory(random_coco(IMAGES, 2))
    events: list[Progress] = []
    found = evaluated(source, lambda index: guesses(source.coco, index, 2), events.append)
    assert [(event.stage, event.done, event.total) for event in events] == [
        ("evaluate", n + 1, IMAGES) for n in range(IMAGES)
    ]
    assert found.n == IMAGES
    assert found.outcomes["sample"].tolist() == list(source.image_ids)
    assert {len(values) for values in found.outcomes.values()} == {IMAGES}
    for name in ("AP_box", "AP_mask"):
        shares = found.outcomes[name]
        assert 100 * shares.mean() == pytest.approx(found.metrics[name].value, abs=1e-9)
        assert 100 * shares.std(ddof=1) / np.sqrt(IMAGES) == pytest.approx(
            found.metrics[name].stderr
        )
    assert found.outcomes["found"].sum() == sum(
        len(guesses(source.coco, index, 2).labels) for index in range(IMAGES)
    )
    crowds = sum(entry["iscrowd"] for entry in source.coco["annotations"])
    assert found.outcomes["objects"].sum() == len(source.coco["annotations"]) - crowds
    assert found.dataset == source.describe()


def test_differences_of_two_methods() -> None:
    source = in_memory(random_coco(IMAGES, 3))
    first, second = (
        evaluated(source, lambda index, seed=seed: guesses(source.coco, index, seed))
        for seed in (0, 1)
    )
    every = np.arange(IMAGES)
    outcomes = [
        Outcomes(
            one.outcomes["sample"], every, {"AP_box": (MetricPart(every, one.outcomes["AP_box"]),)}
        )
        for one in (first, second)
    ]
    found = paired({0: outcomes[0]}, {0: outcomes[1]})
    assert found is not None
    assert found.difference == pytest.approx(
        first.metrics["AP_box"].value - second.metrics["AP_box"].value
    )
    gaps = 100 * (first.outcomes["AP_box"] - second.outcomes["AP_box"])
    assert found.se == pytest.approx(gaps.std(ddof=1) / np.sqrt(IMAGES))
    same = paired({0: outcomes[0]}, {0: outcomes[0]})
    assert same is not None
    assert (same.difference, same.se) == (0, 0)


def test_order_and_numbers_of_images_do_not_matter() -> None:
    content = random_coco(IMAGES, 4)
    source = in_memory(content)
    first = evaluated(source, lambda index: guesses(source.coco, index, 4))
    names = {entry["file_name"]: index for index, entry in enumerate(source.images)}
    other = copy.deepcopy(content)
    other["images"].reverse()
    for entry in other["annotations"]:
        entry["id"] -= 1  # pycocotools by itself takes an object with the id 0 for none
    turned = in_memory(other)
    second = evaluated(
        turned, lambda index: guesses(source.coco, names[turned.images[index]["file_name"]], 4)
    )
    assert second.outcomes["sample"].tolist() == first.outcomes["sample"].tolist()[::-1]
    assert {name: item.value for name, item in second.metrics.items()} == pytest.approx(
        {name: item.value for name, item in first.metrics.items()}, abs=1e-9
    )
    assert np.allclose(second.outcomes["AP_mask"][::-1], first.outcomes["AP_mask"])


def test_nothing_found() -> None:
    source = in_memory(random_coco(IMAGES, 5))

    def nothing(index: int) -> Instances:
        shape = (0, source.images[index]["height"], source.images[index]["width"])
        return Instances(
            torch.zeros(0, 4),
            torch.zeros(0),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(shape).bool(),
        )

    found = evaluated(source, nothing)
    assert found.metrics["AP_box"].value == found.metrics["AP_mask"].value == 0
    assert found.metrics["AP_box"].stderr == 0


def test_sizes_without_objects_are_left_out() -> None:
    content = random_coco(IMAGES, 6, size=64)
    source = in_memory(content)
    found = evaluated(source, lambda index: guesses(source.coco, index, 6))
    assert "APl_box" not in found.metrics
    assert "APl_mask" not in found.metrics
    assert "APm_box" in found.metrics
    assert min(metric.value for metric in found.metrics.values()) >= 0


@pytest.mark.parametrize("crowds", [0.0, 1.0])
def test_too_few_objects(crowds: float) -> None:
    content = random_coco(IMAGES, 7, crowds=crowds)
    if crowds == 0:
        one = content["annotations"][0]["image_id"]
        content["annotations"] = [
            entry for entry in content["annotations"] if entry["image_id"] == one
        ]
    source = in_memory(content)
    with pytest.raises(DataError, match=r"memory val has objects in fewer than two of 14 images"):
        evaluated(source, lambda index: guesses(source.coco, index, 7))


def test_damaged_images() -> None:
    content = random_coco(IMAGES, 8)
    sound = in_memory(content)

    def read(index: int) -> np.ndarray:
        if index in (2, 5):
            raise DamagedImage("truncated")
        return sound.read(index)

    source = in_memory(content, read)
    oracle = Oracle(sound, lambda index: guesses(sound.coco, index, 8))
    with pytest.raises(
        DataError, match=f"The image {source.image_ids[2]} is damaged .truncated.*--skip-corrupt"
    ):
        evaluate_detector(oracle, source, whole, CPU, silent)
    found = evaluate_detector(oracle, source, whole, CPU, silent, skip_corrupt=True)
    assert found.skipped == [source.image_ids[2], source.image_ids[5]]
    assert found.n == IMAGES - 2
    assert found.dataset.count == IMAGES
    gone = {content["images"][index]["id"] for index in (2, 5)}
    fewer = {
        "images": [entry for entry in content["images"] if entry["id"] not in gone],
        "annotations": [entry for entry in content["annotations"] if entry["image_id"] not in gone],
        "categories": content["categories"],
    }
    rest = in_memory(fewer)
    place = [index for index in range(IMAGES) if index not in (2, 5)]
    expected = evaluated(rest, lambda index: guesses(sound.coco, place[index], 8))
    assert found.metrics == expected.metrics

    def none(index: int) -> np.ndarray:
        raise DamagedImage("gone")

    with pytest.raises(DataError, match="All 14 images of memory val are damaged"):
        evaluate_detector(oracle, in_memory(content, none), whole, CPU, silent, skip_corrupt=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_another_size_stop_in_one_line(workers: int) -> None:
    content = random_coco(4, 9)

    def read(index: int) -> np.ndarray:
        raise DataError("The image a.jpg is 3 x 4 pixels")

    with pytest.raises(DataError, match=r"^The image a.jpg is 3 x 4 pixels$"):
        detect(
            lambda image, meta: None, in_memory(content, read), whole, CPU, silent, True, workers
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"bboxes": torch.tensor([[1.0, 2.0, float("nan"), 4.0]])},
            NumericsError,
            "here/1.png that are NaN or infinite",
        ),
        ({"scores": torch.tensor([float("inf")])}, NumericsError, "NaN or infinite"),
        (
            {"labels": torch.tensor([3])},
            ModelError,
            "objects of class 3 in the image here/1.png; there are 3",
        ),
        ({"labels": torch.tensor([-1])}, ModelError, "objects of class -1"),
        (
            {"masks": torch.zeros(1, 144, 128).bool()},
            ModelError,
            r"\(1, 144, 128\) instead of bool \(1, 128, 144\)",
        ),
        ({"masks": torch.zeros(1, 128, 144)}, ModelError, r"are torch.float32 \(1, 128, 144\)"),
        ({"masks": torch.zeros(2, 128, 144).bool()}, ModelError, r"\(2, 128, 144\)"),
    ],
)
def test_answers_that_do_not_fit(
    change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    entry = {"id": 1, "height": 128, "width": 144}
    found = Instances(
        torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        torch.ones(1),
        torch.zeros(1).long(),
        torch.zeros(1, 128, 144).bool(),
    )
    coco_results(found, entry, [1, 2, 3], "here/1.png")
    for name, value in change.items():
        setattr(found, name, value)
    with pytest.raises(error, match=message):
        coco_results(found, entry, [1, 2, 3], "here/1.png")


def test_results_can_be_kept(tmp_path: Path) -> None:
    source = in_memory(random_coco(IMAGES, 10))
    detections = detect(
        Oracle(source, lambda index: guesses(source.coco, index, 10)), source, whole, CPU, silent
    )
    stored = json.loads(json.dumps(detections.results))
    assert stored == detections.results
    assert set(stored[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    before = copy.deepcopy(detections.results)
    first, second = measure(source, detections), measure(source, detections)
    assert detections.results == before
    assert first.metrics == second.metrics


def test_a_model_that_fails() -> None:
    source = in_memory(random_coco(4, 11))

    def fails(image: Tensor, meta: dict[str, Any]) -> Any:
        raise RuntimeError("sizes must match")

    with pytest.raises(
        ModelError,
        match=r"does not take the image here/.*png of shape \(1, 3, 128, 144\): sizes must match",
    ):
        detect(fails, source, whole, CPU, silent)


def test_annotations_as_they_come() -> None:
    # Boxes of no size and beyond the image count as objects, as in pycocotools.
    source = in_memory(tiny())
    boxes = {
        40: [[3, 4, 23, 34], [30, 10, 70, 50]],
        20: [],
        30: [[5, 5, 5, 5]],
        10: [[-5, 20, 95, 40.5]],
    }
    labels = {40: [0, 2], 20: [], 30: [1], 10: [1]}

    def answer(index: int) -> Instances:
        entry = source.images[index]
        n = len(labels[entry["id"]])
        corners = torch.tensor(boxes[entry["id"]], dtype=torch.float32).reshape(n, 4)
        masks = torch.zeros(n, entry["height"], entry["width"], dtype=torch.bool)
        return Instances(
            corners,
            torch.full((n,), 0.5),
            torch.tensor(labels[entry["id"]], dtype=torch.int64),
            masks,
        )

    found = evaluated(source, answer)
    # A box of no size overlaps nothing, itself included: of the dogs one of two is found.
    for name in ("AP_box", "AP50_box"):
        assert found.metrics[name].value == pytest.approx(100 * (1 + 1 + 51 / 101) / 3)
    assert found.outcomes["objects"].tolist() == [2, 0, 1, 1]
