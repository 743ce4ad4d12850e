"""Images of classification: ImageFolder data sets and the demo's digit pairs; calibration samples."""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fimaq_core.errors import DataError
from fimaq_core.recipe import Recipe
from tasks.classification.demo.digit_pairs import DigitPairs
from tasks.common.data.calibration import positions_of, read_list, take
from tasks.common.data.files import file_below
from tasks.common.data.folders import Source, open_folder
from tasks.common.data.imagenet import LAYOUT
from tasks.common.data.images import Images, file_reader
from tasks.common.request import DataRequest
from tasks.common.task import CalibrationSet, LoadedModel


def open_source(loaded: LoadedModel, data: DataRequest, part: str) -> Source:
    """Open the ``train`` part or ``val`` of the data for a model. Raises DataError."""
    if data.path is None and data.class_order is not None:
        raise DataError("--class-order is for class folders: give their folder with --data.")
    if loaded.data == "digit-pairs" and data.path is None:
        return digit_pairs("train" if part == "train" else "test")
    if data.path is None:
        raise DataError(f"{loaded.tag} needs data: give --data /path/to/imagenet. {LAYOUT}.")
    labelled = part != "train"  # calibration does not use labels
    source = open_folder(data.path, part, data.class_order, loaded.class_names, labelled)
    if source.classes != loaded.classes:
        raise DataError(
            f"{data.path / part} has {source.classes} classes, {loaded.tag} has {loaded.classes}: use data or weights that fit."
        )
    return source


@lru_cache(maxsize=4)
def digit_pairs(part: str) -> Source:
    """A part of the demo's data, composed once a process."""
    pairs = DigitPairs(part)
    made = list(pairs.ids), list(pairs.targets), len(pairs.classes), lambda index: pairs[index][0]
    return Source("digit-pairs", part, *made, pairs.classes)


def calibration_set(loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
    """Draw the calibration images from the training part, or take those of a list.

    The draw is a seeded permutation of the whole part; the ranges use its first images. Random
    transforms are seeded per image, so the sample does not depend on what else ran. Raises
    DataError.
    """
    source = (
        open_source(loaded, data, "train")
        if data.calibration_list is None or loaded.data is not None
        else None
    )
    transform = (
        loaded.train_transform if recipe.calibration_transform == "train" else loaded.eval_transform
    )
    if data.calibration_list is not None:
        ids, read = _listed(data, source)
        order = np.arange(len(ids))
    else:
        assert source is not None
        ids, read = source.ids, source.read
        order = np.random.default_rng(recipe.seed).permutation(len(ids))
    images = Images(ids, [0] * len(ids), read, transform, data.skip_corrupt)
    drawn = take(images, order, recipe.calibration_images, recipe.seed)
    chosen = torch.stack(drawn.images)
    names = [ids[position] for position in drawn.positions]
    digest = hashlib.sha256("\n".join([recipe.calibration_transform, *names]).encode())
    digest.update(chosen.numpy().tobytes())
    notes = [*(source.notes() if source is not None else ()), *images.notes()]
    made = chosen, names, recipe.calibration_transform, digest.hexdigest()
    return CalibrationSet(*made, drawn.skipped, notes=notes)


def _listed(
    data: DataRequest, source: Source | None
) -> tuple[list[str], Callable[[int], Image.Image]]:
    """Ids and reader of the images in a calibration list or a result record."""
    assert data.calibration_list is not None
    ids = read_list(data.calibration_list).ids
    if source is not None:
        positions = positions_of(
            ids, source.ids, data.calibration_list, f"{source.name} {source.split}"
        )
        return ids, lambda index: source.read(positions[index])
    root = data.path or Path()
    # Ids are relative to the data's folder where they can be: random transforms are seeded by them.
    paths = [root / name for name in ids]
    # Below the root a file is found in another Unicode form of its name, too.
    for place, path in enumerate(paths):
        if path.is_relative_to(root):
            paths[place] = file_below(root, path.relative_to(root).as_posix())
    ids = [
        path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        for path in paths
    ]
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        raise DataError(
            f"The calibration list names {len(absent)} files that are not there, such as {absent[0]}."
        )
    return ids, file_reader(paths)
