"""Labelled images in class folders, as in ImageNet."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import is_image_file, make_dataset

from fimaq_core.errors import DataError
from tasks.common.data.class_order import chosen, known_notes, ordered
from tasks.common.data.files import composed, counted, is_hidden, named
from tasks.common.data.imagenet import IMAGENET, LAYOUT, is_imagenet
from tasks.common.data.images import file_reader, is_image
from tasks.common.record import Dataset

#: Numbers of images in ImageNet-1k. Papers report results on the 50,000 images of ``val``.
_COUNTS = {"train": 1_281_167, "val": 50_000}


@dataclass(frozen=True, eq=False)
class Source:
    """One part of a data set with labels, such as ``train`` or ``val``."""

    name: str  # of the data set
    split: str  # of the part
    ids: list[str]  # of the samples, in order
    targets: list[int]  # labels of the samples
    classes: int  # number of classes
    read: Callable[[int], Image.Image]  # image at a position
    class_names: Sequence[str] = ()  # names of the class folders by label
    class_order: str | None = None  # name of the class order; None if classes are no folders
    left_out: Sequence[str] = ()  # paths of files that are neither hidden nor images
    label_notes: Sequence[str] = ()  # notes on the class names in the weights file

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of ids and labels."""
        pairs = zip(self.ids, self.targets, strict=True)
        content = "\n".join(f"{name}\t{label}" for name, label in pairs)
        return hashlib.sha256(content.encode()).hexdigest()

    def head(self, limit: int | None) -> "Source":
        """Return the first ``limit`` samples, as a split with its own name."""
        if limit is None or limit >= len(self.ids):
            return self
        ids, targets = self.ids[:limit], self.targets[:limit]
        return replace(self, split=f"{self.split}[:{limit}]", ids=ids, targets=targets)

    def describe(self) -> Dataset:
        """Return the entry for the record."""
        return Dataset(
            name=self.name,
            split=self.split,
            count=len(self.ids),
            classes=self.classes,
            fingerprint=self.fingerprint,
            class_order=self.class_order,
            left_out=len(self.left_out),
        )

    def notes(self) -> list[str]:
        """Describe files that were left out, and labels that follow the weights file."""
        files = counted(len(self.left_out), "file")
        note = f"{files} that Pillow cannot open as an image, left out: {named(self.left_out)}"
        return [*([note] if self.left_out else []), *self.label_notes]


def open_folder(
    root: Path,
    part: str,
    order: str | None = None,
    known: Sequence[str] | None = None,
    labels: bool = True,
    wanted: str = "that the weights were trained with",
) -> Source:
    """Open the part ``train`` or ``val`` of the data folder ``root``.

    The other arguments are those of :func:`tasks.common.data.class_order.ordered`.
    Raises DataError: there is no folder or no image, the two parts have different classes, or the
    labels are not clear.
    """
    folder = root / part
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. {LAYOUT}.")
    classes = _class_folders(folder)
    if not classes:
        raise DataError(f"{folder} holds no images in class folders. {LAYOUT}.")
    names, word = ordered(classes, folder, chosen(order, root), known, labels, wanted)
    sibling = root / ("val" if part == "train" else "train")
    if sibling.is_dir():
        own, others = ({*map(composed, found)} for found in (classes, _class_folders(sibling)))
        if own != others:
            only = f"only one of them has {', '.join(sorted(own ^ others)[:5])}"
            raise DataError(f"{folder} and {sibling} do not have the same classes: {only}.")
    # The time of a folder changes when a file is added or removed.
    changed = tuple((folder / name).stat().st_mtime_ns for name in ("", *names))
    source = _listed_folder(root, part, tuple(names), word, changed)
    notes = known_notes(names, word, known) if labels else []
    return replace(source, label_notes=notes) if notes else source


def _class_folders(folder: Path) -> list[str]:
    return [one.name for one in os.scandir(folder) if not is_hidden(one.name) and one.is_dir()]


@lru_cache(maxsize=4)
def _listed_folder(
    root: Path, part: str, names: tuple[str, ...], order: str, changed: tuple[int, ...]
) -> Source:
    """List a folder once per process until it has ``changed``; listing ImageNet takes minutes."""
    folder = root / part
    prefix = os.path.join(folder, "")
    loose = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
    left_out = [f"{part}/{name}" for name in loose if not is_hidden(name)]

    def is_sample(path: str) -> bool:
        below = path[len(prefix) :]
        if any(map(is_hidden, below.split(os.sep))):
            return False
        # Only files with unusual suffixes are opened here. Damaged files are found when read.
        if is_image_file(path) or is_image(Path(path)):
            return True
        left_out.append(f"{part}/{Path(below).as_posix()}")
        return False

    try:
        labels = {name: label for label, name in enumerate(names)}
        samples = make_dataset(folder, labels, is_valid_file=is_sample)
    except FileNotFoundError as error:
        problem = f"{folder} holds no images in class folders ({error})"
        raise DataError(f"{problem}. {LAYOUT}.") from error
    paths = [Path(path) for path, _ in samples]
    ids = [path.relative_to(root).as_posix() for path in paths]
    odd = next((name for name in ids if not name.isprintable()), None)
    if odd is not None:  # records hold names as text
        problem = f"a file whose name is not UTF-8 or has control characters: {odd!r}"
        raise DataError(f"{folder} holds {problem}. Rename it.")
    targets, read = [label for _, label in samples], file_reader(paths)
    name = data_name(part, len(paths), names)
    return Source(name, part, ids, targets, len(names), read, names, order, tuple(left_out))


def data_name(part: str, count: int, classes: Sequence[str]) -> str:
    """Return the name of a data set: ImageNet if its classes and number of images are complete."""
    official = count == _COUNTS.get(part) and is_imagenet(classes)
    return IMAGENET if official else f"folder-{len(classes)}-classes"
