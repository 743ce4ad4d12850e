"""Images of classification: ImageFolder data sets and the demo's digit pairs; calibration samples."""

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fimaq_core.errors import DataError
from fimaq_core.recipe import Recipe
from tasks.classification.demo.digits import DigitPairs
from tasks.common.folders import Source, open_folder
from tasks.common.imagenet import LAYOUT
from tasks.common.images import Images, seeded_item
from tasks.common.request import DataRequest
from tasks.common.task import CalibrationSet, LoadedModel


def open_source(loaded: LoadedModel, data: DataRequest, part: str) -> Source:
    """Open the ``train`` or the evaluation part (``val``) of the data that goes with a model.

    Raises:
        DataError: missing or empty folder, or classes that do not fit the model.
    """
    if loaded.data == "digit-pairs" and data.path is None:
        return _digits("train" if part == "train" else "test")
    if data.path is None:
        raise DataError(f"{loaded.tag} needs data: give --data /path/to/imagenet. {LAYOUT}.")
    source = open_folder(data.path, part)
    if source.classes != loaded.classes:
        raise DataError(
            f"{data.path / part} has {source.classes} classes, {loaded.tag} has {loaded.classes}: use data or weights that fit."
        )
    return source


@lru_cache(maxsize=4)
def _digits(part: str) -> Source:
    pairs = DigitPairs(part)
    return Source("digit-pairs", part, list(pairs.ids), list(pairs.targets), len(pairs.classes), lambda index: pairs[index][0])


def calibration_set(loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
    """Draw the calibration images from the training part, or take those of a list.

    The draw is a seeded permutation of the whole part; the ranges use its first images. Random transforms are seeded
    per image, so the sample does not depend on what else ran.

    Raises:
        DataError: fewer images than asked for, a damaged image, a list that does not fit.
    """
    source = open_source(loaded, data, "train") if data.calibration_list is None or loaded.data is not None else None
    transform = loaded.train_transform if recipe.calibration_transform == "train" else loaded.eval_transform
    wanted = recipe.calibration_images
    if data.calibration_list is not None:
        ids, read = _listed(data, source)
        order = np.arange(len(ids))
    else:
        assert source is not None
        ids, read = source.ids, source.read
        order = np.random.default_rng(recipe.seed).permutation(len(ids))
    if len(ids) < wanted:
        raise DataError(
            f"{wanted} calibration images are asked for, but there are {len(ids)}: lower --calibration-images or give more."
        )
    images = Images(ids, [0] * len(ids), read, transform, data.skip_corrupt)
    chosen: list[Tensor] = []
    names: list[str] = []
    skipped: list[str] = []
    for index in order:
        if len(chosen) == wanted:
            break
        item = seeded_item(images, int(index), recipe.seed)
        if item is None:
            skipped.append(ids[index])
            continue
        chosen.append(item)
        names.append(ids[index])
    if len(chosen) < wanted:
        raise DataError(f"Only {len(chosen)} of {wanted} calibration images could be read; {len(skipped)} are damaged.")
    stacked = torch.stack(chosen)
    digest = hashlib.sha256("\n".join([recipe.calibration_transform, *names]).encode())
    digest.update(stacked.numpy().tobytes())
    return CalibrationSet(stacked, names, recipe.calibration_transform, digest.hexdigest(), skipped)


def _listed(data: DataRequest, source: Source | None) -> tuple[list[str], Callable[[int], Image.Image]]:
    """Ids and reader of the images in a calibration list: a text file of paths or ids, or a result record."""
    assert data.calibration_list is not None
    try:
        text = data.calibration_list.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the calibration list {data.calibration_list}: {error}.") from error
    if text.lstrip().startswith("{"):
        try:
            ids = list(json.loads(text)["calibration"]["ids"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{data.calibration_list} is not a result record with calibration ids.") from error
    else:
        ids = [line.strip() for line in text.splitlines() if line.strip()]
    if source is not None:
        positions = {name: position for position, name in enumerate(source.ids)}
        unknown = [name for name in ids if name not in positions]
        if unknown:
            raise DataError(
                f"The calibration list names {len(unknown)} samples that are not in {source.name} {source.split}, "
                f"such as {unknown[0]!r}."
            )
        return ids, lambda index: source.read(positions[ids[index]])
    root = data.path or Path()
    # Ids are relative to the data's folder where they can be: random transforms are seeded by them.
    paths = [path if (path := Path(name)).is_absolute() else root / path for name in ids]
    ids = [path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path) for path in paths]
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        raise DataError(f"The calibration list names {len(absent)} files that are not there, such as {absent[0]}.")

    def read(index: int) -> Image.Image:
        with Image.open(paths[index]) as image:
            return image.convert("RGB")

    return ids, read
