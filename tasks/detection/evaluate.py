"""Detection and instance segmentation as COCO measures them, with images' contributions."""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fimaq_core.errors import DataError, ModelError, NumericsError
from fimaq_core.progress import OnProgress, Progress
from tasks.common.data.images import Images
from tasks.common.record import Metric
from tasks.common.task import Evaluation
from tasks.detection.annotations import Detections, Entry, area_of
from tasks.detection.coco import DetectionSource
from tasks.detection.example_objects import detection_examples
from tasks.detection.precision import Matches, averages, contributions, standard_error

#: Metrics by pycocotools' range of sizes and index of the IoU threshold; None: the mean over all thresholds.
METRICS: dict[str, tuple[str, int | None]] = {
    "AP": ("all", None),
    "AP50": ("all", 0),
    "AP75": ("all", 5),
    "APs": ("small", None),
    "APm": ("medium", None),
    "APl": ("large", None),
}
#: pycocotools' names of what is compared, by the ending of metrics.
KINDS = {"box": "bbox", "mask": "segm"}
#: Detections of an image and category at most; mmdet's own limit is as many of an image.
MAX_DETECTIONS = 100
#: (1, 3, H, W) on the device and mmdet's meta to mmdet's ``InstanceData``: boxes in pixels of the original image, scores, labels
#: and masks; or a ``DetDataSample`` with that in ``pred_instances``.
Predict = Callable[[Tensor, dict[str, Any]], Any]


def detect(
    predict: Predict,
    source: DetectionSource,
    prepare: Callable[[np.ndarray], tuple[Tensor, dict[str, Any]]],
    device: torch.device,
    on_progress: OnProgress,
    skip_corrupt: bool = False,
    workers: int = 0,
) -> Detections:
    """Find objects, one by one; ``prepare`` gives the input and meta of an image.

    Raises DataError for a damaged image (unless skipped), none left, or one of another size than
    annotated; ModelError where detector and image do not fit, and NumericsError for NaN or
    infinity.
    """
    images = Images(
        source.image_ids, [0] * len(source.image_ids), source.read, prepare, skip_corrupt
    )  # type: ignore[arg-type]
    loader = DataLoader(images, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    results: list[Entry] = []
    kept: list[int] = []
    for index, item in enumerate(loader):
        if isinstance(item, DataError):
            raise item
        if item is not None:
            (image, meta), _, position = item
            name = source.image_ids[position]
            found = _predicted(predict, image.to(device, non_blocking=True), meta, name)
            results += coco_results(found, source.images[position], source.ids_by_label, name)
            kept.append(position)
        on_progress(Progress("evaluate", index + 1, len(images)))
    if not kept:
        raise DataError(f"All {len(images)} images of {source.name} {source.split} are damaged.")
    return Detections(results, kept, images.notes())


def _as_it_is(item: Any) -> Any:
    return item


def _predicted(predict: Predict, image: Tensor, meta: dict[str, Any], name: str) -> Any:
    try:
        with torch.no_grad():
            found = predict(image, meta)
    except NumericsError as error:
        raise NumericsError(f"The image {name} of shape {tuple(image.shape)}: {error}") from error
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        raise ModelError(
            f"The model does not take the image {name} of shape {tuple(image.shape)}: {error}"
        ) from error
    return getattr(found, "pred_instances", found)


def coco_results(
    found: Any, image: Entry, categories: Sequence[int | None], name: str
) -> list[Entry]:
    """Turn the objects in an image into COCO's format of results, as mmdet does.

    ``categories`` are ids by label; objects of a class without one are left out. Raises ModelError
    for unknown labels or masks that do not fit the image, and NumericsError for NaN or infinity.
    """
    from pycocotools import mask as run_lengths

    boxes, scores = (value.detach().float().cpu().numpy() for value in (found.bboxes, found.scores))
    labels, masks = found.labels.detach().cpu().numpy(), found.masks
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise NumericsError(
            f"The model finds boxes or scores in the image {name} that are NaN or infinite."
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(categories):
        raise ModelError(
            f"The model finds objects of class {labels.max()} in the image {name}; there are {len(categories)}."
        )
    shape = (len(labels), image["height"], image["width"])
    if tuple(masks.shape) != shape or masks.dtype not in (torch.bool, torch.uint8):
        raise ModelError(
            f"The model's masks of the image {name} are {masks.dtype} {tuple(masks.shape)} instead of bool {shape}."
        )
    entries = []
    objects = zip(
        boxes.tolist(), scores.tolist(), labels.tolist(), masks.cpu().numpy(), strict=True
    )
    for (x1, y1, x2, y2), score, label, mask in objects:
        if (category := categories[label]) is None:
            continue
        code = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
        code = {"size": code["size"], "counts": code["counts"].decode("ascii")}
        box = [x1, y1, x2 - x1, y2 - y1]
        entry = {"image_id": image["id"], "category_id": category, "bbox": box, "score": score}
        entries.append({**entry, "segmentation": code})
    return entries


def measure(source: DetectionSource, detections: Detections, keep: bool = False) -> Evaluation:
    """Compare detections, which are kept as a file if asked for, with the annotations.

    Returns ``AP_box``, ``AP_mask`` and those of :data:`METRICS` likewise, in percent, with the
    jackknife's standard errors over images. A metric whose objects are all in one image has no such
    error and is left out, as mask AP is where an object has no mask. ``outcomes`` have one row per
    image: ``sample``, its id; ``AP_box`` and ``AP_mask``, its contributions, whose means are the
    metrics as fractions; ``objects`` (without crowd regions) and ``found``, their numbers. A
    skipped image takes its annotations along. Raises DataError for objects in fewer than two
    images.
    """
    metrics: dict[str, Metric] = {}
    shares: dict[str, np.ndarray] = {}
    kinds, notes = _measurable(source)
    for ending, kind in kinds.items():
        sizes = match(source, detections, kind)
        measured = {size: averages(found) for size, found in sizes.items()}
        for name, (size, level) in METRICS.items():
            chosen = slice(None) if level is None else slice(level, level + 1)
            found = measured[size]
            whole, without = found.whole[chosen].mean(), found.without[:, chosen].mean(axis=1)
            if len(without) > 1 and not np.isnan(without).any():
                shares[f"{name}_{ending}"] = share = contributions(float(whole), without)
                metrics[f"{name}_{ending}"] = Metric(
                    value=100 * float(whole), stderr=100 * standard_error(share)
                )
    if "AP_box" not in metrics:
        raise DataError(
            f"{source.name} {source.split} has objects in fewer than two of {len(detections.kept)} images: nothing to measure."
        )
    kept = set(detections.kept)
    return Evaluation(
        metrics,
        len(kept),
        _outcomes(source, detections, shares),
        source.describe(),
        [name for index, name in enumerate(source.image_ids) if index not in kept],
        examples=detection_examples(source, detections),
        files={"detections.json": detections.results} if keep else {},
        notes=[*source.notes, *notes, *detections.notes],
    )


def _measurable(source: DetectionSource) -> tuple[dict[str, str], list[str]]:
    """Metrics of :data:`KINDS` that annotations allow, and notes on missing parts."""
    annotations, notes = source.coco["annotations"], []
    without = sum("segmentation" not in entry for entry in annotations)
    kinds = {ending: kind for ending, kind in KINDS.items() if not (without and ending == "mask")}
    if without:
        notes.append(
            f"{without} of {len(annotations)} annotations have no mask: box AP is measured, mask AP is not"
        )
    areas = [entry for entry in annotations if "area" not in entry]
    if areas:
        of_masks = sum("segmentation" in entry for entry in areas)
        notes.append(
            f"{len(areas)} of {len(annotations)} annotations have no area, by which small, medium and large objects are told: "
            f"{of_masks} take it from their mask, {len(areas) - of_masks} from their box"
        )
    return kinds, notes


def _outcomes(
    source: DetectionSource, detections: Detections, shares: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    row = {source.images[index]["id"]: number for number, index in enumerate(detections.kept)}

    def counted(entries: list[Entry]) -> np.ndarray:
        objects = [entry["image_id"] for entry in entries if not entry.get("iscrowd")]
        owners = np.array([row[image] for image in objects if image in row], dtype=np.int64)
        return np.bincount(owners, minlength=len(row)).astype(np.int32)

    return {
        "sample": np.array([source.image_ids[index] for index in detections.kept]),
        **{name: shares[name] for name in ("AP_box", "AP_mask") if name in shares},
        "objects": counted(source.coco["annotations"]),
        "found": counted(detections.results),
    }


def match(source: DetectionSource, detections: Detections, kind: str) -> dict[str, list[Matches]]:
    """By range of sizes, detections of each category matched with objects by pycocotools."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = _objects(source, detections), _found(source, detections, kind)
        evaluation = COCOeval(truth, found, kind)
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
    params, images = evaluation.params, [source.images[index]["id"] for index in detections.kept]
    # pycocotools has them by rising id, which decides between equal scores.
    place = {image: position for position, image in enumerate(images)}
    entries = iter(evaluation.evalImgs)
    by_id = {
        (category, size): [(place[image], next(entries)) for image in params.imgIds]
        for category in params.catIds
        for size in params.areaRngLbl
    }
    levels = len(params.iouThrs)
    return {
        size: [_gathered(by_id[category, size], levels) for category in params.catIds]
        for size in params.areaRngLbl
    }


def _gathered(found: list[tuple[int, Entry | None]], levels: int) -> Matches:
    """Matches of one category and range of sizes, from pycocotools' entries by image."""
    truths = np.zeros(len(found), dtype=np.int64)
    images, scores = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    matched, ignored = [np.zeros((levels, 0), dtype=bool)], [np.zeros((levels, 0), dtype=bool)]
    for image, entry in found:
        if entry is not None:
            truths[image] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
            images.append(np.full(len(entry["dtScores"]), image))
            scores.append(np.asarray(entry["dtScores"], dtype=np.float64))
            matched.append(entry["dtMatches"] != 0)
            ignored.append(np.asarray(entry["dtIgnore"], dtype=bool))
    return Matches.of(
        np.concatenate(images),
        np.concatenate(scores),
        np.hstack(matched),
        np.hstack(ignored),
        truths,
    )


def _objects(source: DetectionSource, detections: Detections) -> Any:
    """Annotations of these images as pycocotools takes, and changes, them."""
    kept = {source.images[index]["id"]: source.images[index] for index in detections.kept}
    annotations = [entry for entry in source.coco["annotations"] if entry["image_id"] in kept]
    # It takes an object with the id 0 for none.
    areas = [area_of(entry, kept[entry["image_id"]]) for entry in annotations]
    pairs = enumerate(zip(annotations, areas, strict=True), 1)
    numbered = [{**entry, "id": number, "area": area} for number, (entry, area) in pairs]
    return _index(source, detections, numbered)


def _found(source: DetectionSource, detections: Detections, kind: str) -> Any:
    """Detections as pycocotools' ``loadRes`` makes them; masks have their own area, as in mmdet."""
    from pycocotools import mask as run_lengths

    annotations = []
    for number, entry in enumerate(detections.results, 1):
        _, _, width, height = entry["bbox"]
        area = width * height if kind == "bbox" else run_lengths.area(entry["segmentation"])
        annotations.append({**entry, "id": number, "iscrowd": 0, "area": area})
    return _index(source, detections, annotations)


def _index(source: DetectionSource, detections: Detections, annotations: list[Entry]) -> Any:
    from pycocotools.coco import COCO

    found, images = COCO(), [source.images[index] for index in detections.kept]
    found.dataset = {
        "images": images,
        "annotations": annotations,
        "categories": source.coco["categories"],
    }
    found.createIndex()
    return found
