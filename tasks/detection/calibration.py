"""Calibration images of a detector, each with its own size, and regions of its RoI heads."""

import hashlib
import json

import numpy as np
import torch
from torch import nn

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
from tasks.detection.roi import roi_inputs

#: Largest number of regions on which an RoI head is calibrated, over all images together.
REGIONS = 4096


def calibration_set(loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
    """Draw the calibration images, or take the images of a list.

    The drawn images are the first of a seeded permutation of the whole part, so a smaller sample is
    the beginning of a larger one. Raises DataError for too few images, a damaged image or a list
    that does not fit, and RecipeError for a transform other than the evaluation's.
    """
    transform = recipe.calibration_transform
    if transform != "eval":
        raise RecipeError(
            "Detectors are calibrated on images as in the evaluation: calibration_transform must "
            f"be eval, not {transform} (the random crops of the training depend on annotations)."
        )
    source, listed = open_source(loaded, data, "train"), data.calibration_list
    known, count = source.image_ids, recipe.calibration_images
    if listed is not None:
        names = [id_below(name, source.root) for name in read_list(listed).ids]
        order = positions_of(names, known, listed, f"{source.name} {source.split}")
    else:
        order = np.random.default_rng(recipe.seed).permutation(len(known)).tolist()
    source.orientations(order[:count])  # one question to the user about all images
    ids = [known[index] for index in order]

    def read(index: int) -> np.ndarray:
        return source.read(order[index])

    images = Images(ids, [0] * len(ids), read, loaded.eval_transform, data.skip_corrupt)
    drawn, positions, skipped = take(images, range(len(ids)), count, recipe.seed)
    chosen = [ids[position] for position in positions]
    indices = [order[position] for position in positions]
    _, notes = source.orientations(indices, "calibration images")
    samples = Samples([image for image, _ in drawn])
    shapes = [list(image.shape) for image in samples]
    digest = hashlib.sha256(json.dumps([transform, chosen, shapes]).encode())
    for image in samples:
        digest.update(np.ascontiguousarray(image.numpy()))
    return CalibrationSet(
        samples,
        chosen,
        transform,
        digest.hexdigest(),
        skipped,
        {DETECTOR: samples},
        metas=[meta for _, meta in drawn],
        notes=[*notes, *images.notes()],
        dataset=source.name,
        split=source.split,
        listed=listed is not None,
    )


def region_inputs(
    model: nn.Module, images: CalibrationSet, image_count: int, device: torch.device
) -> dict[str, Samples]:
    """Return the inputs of the RoI heads in the first ``image_count`` images.

    Each image gives at most ``REGIONS // image_count`` regions, and at least one.
    """
    limit = max(REGIONS // image_count, 1)
    chosen = images.images.first(image_count), images.metas[:image_count]
    return roi_inputs(model, *chosen, device, limit)
