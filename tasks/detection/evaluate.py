"""Detection and instance segmentation as COCO measures them, with each image's contribution."""

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

#: By metric: pycocotools' range of sizes, and the index of the IoU threshold; None is the mean over
#: all thresholds.
METRICS: dict[str, tuple[str, int | None]] = {
    "AP": ("all", None),
    "AP50": ("all", 0),
    "AP75": ("all", 5),
    "APs": ("small", None),
    "APm": ("medium", None),
    "APl": ("large", None),
}
#: By ending of a metric: pycocotools' name for the kind of shapes that are compared.
KINDS = {"box": "bbox", "mask": "segm"}
#: Highest number of detections per image and category that count; mmdet finds as many per image.
MAX_DETECTIONS = 100
#: From an image (1, 3, H, W) on the device and its meta to mmdet's ``InstanceData``, with boxes in
#: pixels of the original image, or to a ``DetDataSample`` that has it as ``pred_instances``.
Predict = Callable[[Tensor, dict[str, Any]], Any]
#: From an image (H, W, 3) uint8 to the detector's input and meta.
Prepare = Callable[[np.ndarray], tuple[Tensor, dict[str, Any]]]


def detect(
    predict: Predict,
    source: DetectionSource,
    prepare: Prepare,
    device: torch.device,
    on_progress: OnProgress,
    skip_corrupt: bool = False,
    workers: int = 0,
) -> Detections:
    """Find the objects in all images, one image at a time.

    Raises:
        DataError: an image is damaged (unless skipped) or does not have its annotated size, or no
            image is left.
        ModelError: the detector does not accept an image, or its output does not fit the image.
        NumericsError: NaN or infinity in the output.
    """
    labels = [0] * len(source.image_ids)
    images: Any = Images(source.image_ids, labels, source.read, prepare, skip_corrupt)
    loader = DataLoader(images, batch_size=None, num_workers=workers, collate_fn=_unchanged)
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


def _unchanged(item: Any) -> Any:
    return item


def _predicted(predict: Predict, image: Tensor, meta: dict[str, Any], name: str) -> Any:
    where = f"image {name} of shape {tuple(image.shape)}"
    try:
        with torch.no_grad():
            found = predict(image, meta)
    except NumericsError as error:
        raise NumericsError(f"The {where}: {error}") from error
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        raise ModelError(f"The model does not take the {where}: {error}") from error
    return getattr(found, "pred_instances", found)


def coco_results(
    found: Any, image: Entry, categories: Sequence[int | None], name: str
) -> list[Entry]:
    """Convert the objects found in one image to COCO's format of results, as mmdet does.

    ``categories`` are ids by label; objects of a class without an id are left out. Raises
    ModelError for unknown labels or masks that do not fit the image, NumericsError for NaN or
    infinity.
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
            f"The model finds objects of class {labels.max()} in the image {name}; there are "
            f"{len(categories)}."
        )
    shape = (len(labels), image["height"], image["width"])
    if tuple(masks.shape) != shape or masks.dtype not in (torch.bool, torch.uint8):
        raise ModelError(
            f"The model's masks of the image {name} are {masks.dtype} {tuple(masks.shape)} instead "
            f"of bool {shape}."
        )
    entries = []
    values = boxes.tolist(), scores.tolist(), labels.tolist(), masks.cpu().numpy()
    for (x1, y1, x2, y2), score, label, mask in zip(*values, strict=True):
        if (category := categories[label]) is None:
            continue
        code = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
        code = {"size": code["size"], "counts": code["counts"].decode("ascii")}
        box = [x1, y1, x2 - x1, y2 - y1]
        entry = {"image_id": image["id"], "category_id": category, "bbox": box, "score": score}
        entries.append({**entry, "segmentation": code})
    return entries


def measure(source: DetectionSource, detections: Detections, keep: bool = False) -> Evaluation:
    """Compare detections with the annotations; ``keep`` also writes the detections to a file.

    Metrics are ``AP_box``, ``AP_mask`` and the others of :data:`METRICS`, in percent, with the
    jackknife's standard error over images. Mask AP is left out if an object has no mask. A metric
    whose objects are all in one image has no standard error, and is left out too.

    Outcomes have one row per image: ``sample`` is its id; ``AP_box`` and ``AP_mask`` are its
    contributions, whose means are the metrics as fractions; ``objects`` (without crowd regions) and
    ``found`` are counts. The annotations of a skipped image do not count. Raises DataError for
    objects in fewer than two images.
    """
    metrics: dict[str, Metric] = {}
    shares: dict[str, np.ndarray] = {}
    kinds, notes = _measurable(source)
    for ending, kind in kinds.items():
        sizes = match(source, detections, kind)
        measured = {size: averages(found) for size, found in sizes.items()}
        for name, (size, level) in METRICS.items():
            chosen = slice(None) if level is None else slice(level, level + 1)
            whole = float(measured[size].whole[chosen].mean())
            without = measured[size].without[:, chosen].mean(axis=1)
            if len(without) > 1 and not np.isnan(without).any():
                share = shares[f"{name}_{ending}"] = contributions(whole, without)
                error = 100 * standard_error(share)
                metrics[f"{name}_{ending}"] = Metric(value=100 * whole, stderr=error)
    if "AP_box" not in metrics:
        raise DataError(
            f"{source.name} {source.split} has objects in fewer than two of "
            f"{len(detections.kept)} images: nothing to measure."
        )
    kept = set(detections.kept)
    return Evaluation(
        metrics,
        len(kept),
        _outcomes(source, detections, shares),
        source.describe(),
        skipped=[name for index, name in enumerate(source.image_ids) if index not in kept],
        examples=detection_examples(source, detections),
        files={"detections.json": detections.results} if keep else {},
        notes=[*source.notes, *notes, *detections.notes],
    )


def _measurable(source: DetectionSource) -> tuple[dict[str, str], list[str]]:
    """Return the entries of :data:`KINDS` that can be measured, and notes on missing data."""
    annotations, kinds, notes = source.coco["annotations"], dict(KINDS), []
    without = sum("segmentation" not in entry for entry in annotations)
    if without:
        del kinds["mask"]
        notes.append(
            f"{without} of {len(annotations)} annotations have no mask: box AP is measured, mask "
            "AP is not"
        )
    areas = [entry for entry in annotations if "area" not in entry]
    if areas:
        of_masks = sum("segmentation" in entry for entry in areas)
        notes.append(
            f"{len(areas)} of {len(annotations)} annotations have no area, which tells small, "
            f"medium and large objects apart: it is taken from the mask of {of_masks}, and from "
            f"the box of {len(areas) - of_masks}"
        )
    return kinds, notes


def _outcomes(
    source: DetectionSource, detections: Detections, shares: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    row = {source.images[index]["id"]: number for number, index in enumerate(detections.kept)}

    def counts(entries: list[Entry]) -> np.ndarray:
        images = [entry["image_id"] for entry in entries if not entry.get("iscrowd")]
        rows = np.array([row[image] for image in images if image in row], dtype=np.int64)
        return np.bincount(rows, minlength=len(row)).astype(np.int32)

    return {
        "sample": np.array([source.image_ids[index] for index in detections.kept]),
        **{name: shares[name] for name in ("AP_box", "AP_mask") if name in shares},
        "objects": counts(source.coco["annotations"]),
        "found": counts(detections.results),
    }


def match(source: DetectionSource, detections: Detections, kind: str) -> dict[str, list[Matches]]:
    """Match detections with objects by pycocotools; list categories by range of sizes."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = _objects(source, detections), _found(source, detections, kind)
        evaluation = COCOeval(truth, found, kind)
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
    params, images = evaluation.params, [source.images[index]["id"] for index in detections.kept]
    place = {image: position for position, image in enumerate(images)}
    # pycocotools orders its entries by category, range of sizes and image id. Between equal scores
    # the smaller image id comes first.
    entries = iter(evaluation.evalImgs)
    matches: dict[str, list[Matches]] = {size: [] for size in params.areaRngLbl}
    for _ in params.catIds:
        for of_size in matches.values():
            each = [(place[image], next(entries)) for image in params.imgIds]
            of_size.append(_gathered(each, len(params.iouThrs)))
    return matches


def _gathered(found: list[tuple[int, Entry | None]], levels: int) -> Matches:
    """Gather pycocotools' entries of all images for one category and range of sizes."""
    truths, none = np.zeros(len(found), dtype=np.int64), np.zeros((levels, 0), dtype=bool)
    parts = [(np.zeros(0, dtype=np.int64), np.zeros(0), none, none)]
    for image, entry in found:
        if entry is not None:
            truths[image] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
            scores = np.asarray(entry["dtScores"], dtype=np.float64)
            ignored = np.asarray(entry["dtIgnore"], dtype=bool)
            parts.append((np.full(len(scores), image), scores, entry["dtMatches"] != 0, ignored))
    return Matches.of(*(np.concatenate(one, axis=-1) for one in zip(*parts, strict=True)), truths)


def _objects(source: DetectionSource, detections: Detections) -> Any:
    """Copy the annotations of the evaluated images for pycocotools, which changes them."""
    kept = {source.images[index]["id"]: source.images[index] for index in detections.kept}
    annotations = [
        {**entry, "area": area_of(entry, kept[entry["image_id"]])}
        for entry in source.coco["annotations"]
        if entry["image_id"] in kept
    ]
    return _indexed(source, detections, annotations)


def _found(source: DetectionSource, detections: Detections, kind: str) -> Any:
    """Make annotations of detections as pycocotools' ``loadRes``; masks have their own area."""
    from pycocotools import mask as run_lengths

    annotations = []
    for entry in detections.results:
        _, _, width, height = entry["bbox"]
        area = width * height if kind == "bbox" else run_lengths.area(entry["segmentation"])
        annotations.append({**entry, "iscrowd": 0, "area": area})
    return _indexed(source, detections, annotations)


def _indexed(source: DetectionSource, detections: Detections, annotations: list[Entry]) -> Any:
    from pycocotools.coco import COCO

    # pycocotools takes a match with the object 0 for no match, so ids start at 1.
    for number, entry in enumerate(annotations, 1):
        entry["id"] = number
    found, images = COCO(), [source.images[index] for index in detections.kept]
    categories = source.coco["categories"]
    found.dataset = {"images": images, "annotations": annotations, "categories": categories}
    found.createIndex()
    return found
