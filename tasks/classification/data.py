"""Images of classification: class folders, the demo's digit pairs, and calibration images."""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fimaq_core.errors import DataError, suggest
from fimaq_core.recipe import Recipe
from tasks.classification.demo import sources
from tasks.classification.demo.digit_pairs import DigitPairs
from tasks.classification.named_sets import open_named
from tasks.common.data.calibration import positions_of, read_list, take
from tasks.common.data.files import file_below
from tasks.common.data.folders import Source, open_folder, open_images
from tasks.common.data.imagenet import LAYOUT
from tasks.common.data.images import Images, file_reader
from tasks.common.hashing import file_sha256
from tasks.common.request import DRAWN, DataRequest
from tasks.common.task import CalibrationSet, LoadedModel


def open_source(
    loaded: LoadedModel, data: DataRequest, part: str, labelled: bool | None = None
) -> Source:
    """Open the part ``train`` or ``val`` of a model's data. Raises DataError.

    ``labelled`` is True if labels are needed; None: for all parts but ``train``.
    """
    if data.dataset is not None and part != "train":
        return open_named(loaded, data)
    if data.path is None and data.class_order is not None:
        raise DataError("--class-order is for class folders: give their folder with --data.")
    if loaded.data == "digit-pairs" and data.path is None:
        return digit_pairs("train" if part == "train" else "test")
    if data.path is None:
        raise DataError(f"{loaded.tag} needs data: give --data /path/to/imagenet. {LAYOUT}.")
    if labelled is None:
        labelled = part != "train"  # calibration does not use labels
    source = open_folder(data.path, part, data.class_order, loaded.class_names, labelled)
    if loaded.head is None and source.classes != loaded.classes:
        raise DataError(
            f"{data.path / part} has {source.classes} classes, but {loaded.tag} has "
            f"{loaded.classes}: use data or weights that fit."
        )
    return source


def calibration_source(loaded: LoadedModel, data: DataRequest) -> Source:
    """Open the images to calibrate on: the training part, or other data. Raises DataError."""
    other = data.calibration_data
    if other is None:
        return open_source(loaded, data, "train")
    if not str(other).startswith(DRAWN):
        return open_images(other)
    kind = str(other).removeprefix(DRAWN)
    if loaded.data != "digit-pairs":
        raise DataError(f"{other} is for the demo models: give a folder with --calibration-data.")
    if kind not in sources.KINDS:
        names = [DRAWN + name for name in sources.KINDS]
        raise DataError(f"There are no images '{other}'.{suggest(str(other), names)}")
    return sources.calibration_source(kind)


@lru_cache(maxsize=4)
def digit_pairs(part: str) -> Source:
    """Return a part of the demo's data. Each part is drawn only once."""
    pairs = DigitPairs(part)
    made = list(pairs.ids), list(pairs.targets), len(pairs.classes), lambda index: pairs[index][0]
    return Source("digit-pairs", part, *made, pairs.classes)


def calibration_set(loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
    """Draw the calibration images from :func:`calibration_source`, or take those of a list.

    The draw is a seeded permutation of the whole part. Random transforms have one seed per image,
    so other random numbers do not change the sample. Raises DataError.
    """
    source = None
    if data.calibration_list is None or loaded.data is not None:
        source = calibration_source(loaded, data)
    if data.calibration_list is not None:
        ids, read = _listed(data, data.calibration_list, source)
        order = np.arange(len(ids))
    else:
        assert source is not None
        ids, read = source.ids, source.read
        order = np.random.default_rng(recipe.seed).permutation(len(ids))
    name = recipe.calibration_transform
    transform = loaded.train_transform if name == "train" else loaded.eval_transform
    images = Images(ids, [0] * len(ids), read, transform, data.skip_corrupt)
    taken, positions, skipped = take(images, order, recipe.calibration_images, recipe.seed)
    pixels, names = torch.stack(taken), [ids[position] for position in positions]
    digest = hashlib.sha256("\n".join([name, *names]).encode())
    digest.update(pixels.numpy().tobytes())
    notes = [*(source.notes() if source is not None else ()), *images.notes()]
    return CalibrationSet(
        pixels,
        names,
        name,
        digest.hexdigest(),
        skipped,
        notes=notes,
        dataset=None if source is None else source.name,
        split=_common_folder(names) if source is None else source.split,
        listed=data.calibration_list is not None,
    )


def true_classes(
    loaded: LoadedModel, data: DataRequest, images: CalibrationSet
) -> torch.Tensor | None:
    """Return the classes (n,) of calibration images; None if they are not known."""
    try:
        source = open_source(loaded, data, "train", labelled=True)
    except DataError:  # listed images have no labels, and the order of folders may be unclear
        return None
    classes = dict(zip(source.ids, source.targets, strict=True))
    if not classes.keys() >= set(images.ids):
        return None
    return torch.tensor([classes[name] for name in images.ids])


def _common_folder(ids: Sequence[str]) -> str | None:
    """Return the folder below the data folder that holds all files; None if there is none."""
    parts = [Path(name).parts for name in ids]
    found = {own[0] if len(own) > 1 else None for own in parts} - {Path("/").root}
    return found.pop() if len(found) == 1 else None


def _listed(
    data: DataRequest, file: Path, source: Source | None
) -> tuple[list[str], Callable[[int], Image.Image]]:
    """Return ids and reader of the images in a calibration list or a result record."""
    ids = read_list(file).ids
    if source is not None:
        positions = positions_of(ids, source.ids, file, f"{source.name} {source.split}")
        return ids, lambda index: source.read(positions[index])
    root = data.path or Path()
    paths = [root / name for name in ids]
    outside = []
    # Ids seed random transforms, so they are relative to the root where possible. A file below the
    # root is also found if the list has another Unicode form of its name.
    for place, path in enumerate(paths):
        below = os.path.relpath(path, root)
        if below.startswith("../"):
            outside.append(place)
        else:
            below = path.relative_to(root).as_posix() if path.is_relative_to(root) else below
            paths[place] = file_below(root, below)
            ids[place] = paths[place].relative_to(root).as_posix()
    absent = [str(path) for path in paths if not os.path.isfile(path)]
    if absent:
        names = f"{len(absent)} files that are not there, such as {absent[0]}"
        raise DataError(f"The calibration list names {names}.")
    for place in outside:  # records are shared, and other folders are nobody's business
        ids[place] = f"{paths[place].name}#{file_sha256(paths[place])[:16]}"
    return ids, file_reader(paths)
