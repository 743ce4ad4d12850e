"""Calibration images of a detector: of the training part, each of its own size."""

import hashlib
import json
from typing import Any

import numpy as np

from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.common.calibration import positions_of, read_list, take
from tasks.common.files import id_below
from tasks.common.images import Images
from tasks.common.request import DataRequest
from tasks.common.task import CalibrationSet, LoadedModel
from tasks.detection.coco import open_source
from tasks.detection.pipeline import calibration_pipeline

#: The part of a detector that takes images.
IMAGES_PART = "detector"


def calibration_set(loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
    """Draw the calibration images, or take those of a list.

    They come in a seeded permutation of the whole part, with or without annotations: a smaller sample is the beginning of a
    larger one.

    Args:
        loaded: its ``eval_transform`` is the detector's :class:`~tasks.detection.pipeline.Pipeline`.
        data: where the images are.
        recipe: says how many, which, and how they are transformed.

    Returns:
        ``images`` are :class:`~fimaq_core.samples.Samples` of varying shapes, (1, 3, H, W), and so
        are the ``inputs`` of the part :data:`IMAGES_PART`; ``metas`` go with them.

    Raises:
        DataError: fewer images than asked for, a damaged image, a list that does not fit.
        RecipeError: a transform that there is not.
    """
    transform = calibration_pipeline(loaded.eval_transform, recipe)  # type: ignore[arg-type]
    source = open_source(loaded, data, "train")
    if data.calibration_list is not None:
        names = [id_below(name, source.root) for name in read_list(data.calibration_list).ids]
        order = positions_of(names, source.image_ids, data.calibration_list, f"{source.name} {source.split}")
    else:
        order = np.random.default_rng(recipe.seed).permutation(len(source.image_ids)).tolist()
    ids = [source.image_ids[index] for index in order]
    # Asked for all at once, before the first is read.
    source.orientations(order[: recipe.calibration_images])
    images = Images(ids, [0] * len(ids), lambda position: source.read(order[position]), transform, data.skip_corrupt)  # type: ignore[arg-type, return-value]
    drawn, positions, skipped = take(images, range(len(ids)), recipe.calibration_images, recipe.seed)
    chosen = [ids[position] for position in positions]
    _, notes = source.orientations([order[position] for position in positions], "calibration images")
    samples = Samples([image for image, _ in drawn])
    return CalibrationSet(
        samples,
        chosen,
        recipe.calibration_transform,
        _fingerprint(recipe.calibration_transform, chosen, samples),
        skipped,
        {IMAGES_PART: samples},
        metas=[meta for _, meta in drawn],
        notes=[*notes, *images.notes()],
    )


def _fingerprint(transform: str, ids: list[str], samples: Samples) -> str:
    """sha256 over transform, ids, shapes and values."""
    content: list[Any] = [transform, ids, [list(image.shape) for image in samples]]
    digest = hashlib.sha256(json.dumps(content).encode())
    for image in samples:
        digest.update(np.ascontiguousarray(image.numpy()))
    return digest.hexdigest()
