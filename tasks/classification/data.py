"""Images of classification: ImageFolder data sets and the demo's digit pairs; calibration samples."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torchvision.datasets import ImageFolder

from fimaq_core.errors import DataError
from fimaq_core.recipe import Recipe
from tasks.classification.demo.digits import DigitPairs
from tasks.classification.tags import LAYOUT
from tasks.common.record import Dataset
from tasks.common.request import DataRequest
from tasks.common.task import CalibrationSet, LoadedModel

IMAGENET = "ImageNet-1k val"


class Images(TorchDataset[tuple[Tensor, int, int] | DataError | None]):
    """Samples with stable ids. An item is (image, label, position); for a damaged image None where such are skipped, else the
    error for the caller to raise (raised in a data-loading process, its message would arrive inside a traceback).

    Args:
        ids: sample ids, in order.
        targets: labels.
        read: gives the PIL image of a position.
        transform: PIL image to float32 tensor.
        skip_corrupt: whether damaged images become None instead of an error.
    """

    def __init__(
        self,
        ids: Sequence[str],
        targets: Sequence[int],
        read: Callable[[int], Image.Image],
        transform: Callable[[Any], Tensor],
        skip_corrupt: bool,
    ) -> None:
        self.ids, self.targets, self.read = ids, targets, read
        self.transform, self.skip_corrupt = transform, skip_corrupt

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | DataError | None:
        try:
            image = self.read(index)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if self.skip_corrupt:
                return None
            return DataError(
                f"The image {self.ids[index]} is damaged ({error}): repair or remove it, or leave such images out with "
                "--skip-corrupt."
            )
        return self.transform(image), int(self.targets[index]), index


class Source:
    """One part (train or val/test) of a data set: ids, labels, reading, and what the record says of it."""

    def __init__(
        self, name: str, split: str, ids: list[str], targets: list[int], classes: int, read: Callable[[int], Image.Image]
    ):
        self.name, self.split, self.ids, self.targets, self.classes, self.read = name, split, ids, targets, classes, read

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over ids and labels."""
        content = "\n".join(f"{name}\t{label}" for name, label in zip(self.ids, self.targets, strict=True))
        return hashlib.sha256(content.encode()).hexdigest()

    def head(self, limit: int | None) -> "Source":
        """The first ``limit`` samples, as a split of its own name."""
        if limit is None or limit >= len(self.ids):
            return self
        return Source(self.name, f"{self.split}[:{limit}]", self.ids[:limit], self.targets[:limit], self.classes, self.read)

    def describe(self) -> Dataset:
        """The record's entry."""
        return Dataset(name=self.name, split=self.split, count=len(self.ids), classes=self.classes, fingerprint=self.fingerprint)


def open_source(loaded: LoadedModel, data: DataRequest, part: str) -> Source:
    """Open the ``train`` or the evaluation part (``val``) of the data that goes with a model.

    Raises:
        DataError: missing or empty folder, or classes that do not fit the model.
    """
    if loaded.data == "digit-pairs" and data.path is None:
        return _digits("train" if part == "train" else "test")
    if data.path is None:
        raise DataError(f"{loaded.tag} needs data: give --data /path/to/imagenet. {LAYOUT}.")
    source = _folder(data.path, part)
    if source.classes != loaded.classes:
        raise DataError(
            f"{data.path / part} has {source.classes} classes, {loaded.tag} has {loaded.classes}: use data or weights that fit."
        )
    return source


@lru_cache(maxsize=4)
def _digits(part: str) -> Source:
    pairs = DigitPairs(part)
    return Source("digit-pairs", part, list(pairs.ids), list(pairs.targets), len(pairs.classes), lambda index: pairs[index][0])


def _folder(root: Path, part: str) -> Source:
    folder = root / part
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. {LAYOUT}.")
    # A folder's time changes when a file comes or goes.
    changed = tuple(sorted((entry.name, entry.stat().st_mtime_ns) for entry in folder.iterdir() if entry.is_dir()))
    return _listed_folder(root, part, changed)


@lru_cache(maxsize=4)
def _listed_folder(root: Path, part: str, changed: tuple[tuple[str, int], ...]) -> Source:
    """List a folder, once a process as long as it does not change: ImageNet's 1.3 million files take minutes."""
    folder = root / part
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no images in class folders ({error}). {LAYOUT}.") from error
    sibling = root / ("val" if part == "train" else "train")
    if sibling.is_dir():
        others = {entry.name for entry in sibling.iterdir() if entry.is_dir()}
        if others != set(found.classes):
            odd = sorted(others ^ set(found.classes))
            raise DataError(f"{folder} and {sibling} do not have the same classes: {', '.join(odd[:5])} is in one of them only.")
    paths = [Path(path) for path, _ in found.samples]

    def read(index: int) -> Image.Image:
        with Image.open(paths[index]) as image:
            return image.convert("RGB")

    count, classes = len(paths), len(found.classes)
    # The published numbers are on these 50,000 images; anything else goes by another name.
    official = (part == "val" and (count, classes) == (50_000, 1000)) or (
        part == "train" and (count, classes) == (1_281_167, 1000)
    )
    name = IMAGENET if official else f"folder-{classes}-classes"
    ids = [path.relative_to(root).as_posix() for path in paths]
    return Source(name, part, ids, [label for _, label in found.samples], classes, read)


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
        item = _seeded(images, int(index), recipe.seed)
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


def _seeded(images: Images, index: int, seed: int) -> Tensor | None:
    """Item ``index`` with every generator that transforms use seeded by (seed, index), and put back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        own = int.from_bytes(hashlib.sha256(f"{seed}/{images.ids[index]}".encode()).digest()[:4], "big")
        random.seed(own)
        np.random.seed(own)
        torch.manual_seed(own)
        try:
            item = images[index]
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
    if isinstance(item, DataError):
        raise item
    return None if item is None else item[0]


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
