"""Calibration images of a detector: of the training part, each of its own size."""

import hashlib
import json
from typing import Any

import numpy as np

from fimaq_core.errors import RecipeError
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.common.data.calibration import positions_of, read_list, take
from tasks.common.data.files import id_below
from tasks.common.data.images import Images
from tasks.common.request import DataRequest
from tasks.common.task import CalibrationSet, LoadedModel
from tasks.detection.coco import open_source
from tasks.detection.detector import DETECTOR


def calibration_set(loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
    """Draw the calibration images, or take those of a list.

    They come in a seeded permutation of the whole part: a smaller sample is the beginning of a
    larger one. Each keeps its own size. Raises DataError for fewer images than asked for, a damaged
    image or a list that does not fit, and RecipeError for a transform other than the evaluation's.
    """
    if recipe.calibration_transform != "eval":
        raise RecipeError(
            f"Detectors are calibrated on images as they are evaluated: calibration_transform must be eval, not "
            f"{recipe.calibration_transform} (random crops of the training depend on annotations)."
        )
    source = open_source(loaded, data, "train")
    if data.calibration_list is not None:
        names = [id_below(name, source.root) for name in read_list(data.calibration_list).ids]
        order = positions_of(
            names, source.image_ids, data.calibration_list, f"{source.name} {source.split}"
        )
    else:
        order = np.random.default_rng(recipe.seed).permutation(len(source.image_ids)).tolist()
    ids = [source.image_ids[index] for index in order]
    # Asked for all at once, before the first is read.
    source.orientations(order[: recipe.calibration_images])
    transform, labels = loaded.eval_transform, [0] * len(ids)
    images = Images(
        ids, labels, lambda index: source.read(order[index]), transform, data.skip_corrupt
    )
    drawn, positions, skipped = take(
        images, range(len(ids)), recipe.calibration_images, recipe.seed
    )
    chosen = [ids[position] for position in positions]
    _, notes = source.orientations(
        [order[position] for position in positions], "calibration images"
    )
    samples = Samples([image for image, _ in drawn])
    shapes: list[Any] = [list(image.shape) for image in samples]
    digest = hashlib.sha256(json.dumps([recipe.calibration_transform, chosen, shapes]).encode())
    for image in samples:
        digest.update(np.ascontiguousarray(image.numpy()))
    return CalibrationSet(
        samples,
        chosen,
        recipe.calibration_transform,
        digest.hexdigest(),
        skipped,
        {DETECTOR: samples},
        metas=[meta for _, meta in drawn],
        notes=[*notes, *images.notes()],
    )
