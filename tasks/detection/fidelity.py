"""Fidelity of detections: average precision with those in full precision as the truth.

Detections of the full-precision model with a score of :data:`LEAST_SCORE` or more are the objects.
``AP_box_to_full`` is COCO's box AP of the quantized model's detections against them.
"""

from dataclasses import replace

import numpy as np

from tasks.common.fidelity import Fidelity, RawOutputs
from tasks.common.record_entries import SignedMetric
from tasks.common.task import Evaluation
from tasks.detection.annotations import Detections, Entry
from tasks.detection.coco import DetectionSource
from tasks.detection.evaluate import match
from tasks.detection.precision import averages, contributions, standard_error

LEAST_SCORE = 0.5
NAME = "AP_box_to_full"


def raw_detections(detections: Detections) -> dict[str, np.ndarray]:
    """Return detections as arrays: ``image``, ``category`` (k,), ``score`` (k,), ``bbox`` (k, 4).

    Ids are those of the annotations; boxes are (x, y, width, height) in pixels.
    """
    found = detections.results
    return {
        "image": np.array([entry["image_id"] for entry in found], dtype=np.int64),
        "category": np.array([entry["category_id"] for entry in found], dtype=np.int64),
        "score": np.array([entry["score"] for entry in found], dtype=np.float32),
        "bbox": np.array([entry["bbox"] for entry in found], dtype=np.float32).reshape(-1, 4),
    }


def detection_fidelity(
    full: RawOutputs, evaluation: Evaluation, source: DetectionSource
) -> Fidelity:
    """Compare :func:`raw_detections` with those in full precision on the images of ``source``.

    The result is empty if fewer than two images have objects.
    """
    place = {name: index for index, name in enumerate(source.image_ids)}
    kept = [place[name] for name in evaluation.outcomes["sample"].tolist()]
    sure = {name: values[full["score"] >= LEAST_SCORE] for name, values in full.items()}
    truth = [
        {**entry, "iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3]}
        for entry in _entries(sure)
    ]
    objects = replace(source, coco={**source.coco, "annotations": truth})
    found = averages(
        match(objects, Detections(_entries(evaluation.outputs), kept, []), "bbox")["all"]
    )
    whole, without = float(found.whole.mean()), found.without.mean(axis=1)
    if len(without) < 2 or np.isnan(without).any():
        return Fidelity()
    share = contributions(whole, without)
    metric = SignedMetric(value=100 * whole, stderr=100 * standard_error(share))
    return Fidelity({NAME: metric}, {NAME: share.astype(np.float32)})


def _entries(raw: RawOutputs) -> list[Entry]:
    names = ("image_id", "category_id", "score", "bbox")
    columns = (raw[name].tolist() for name in ("image", "category", "score", "bbox"))
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
