"""Labelled images in class folders, as in ImageNet."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import is_image_file

from fimaq_core.errors import DataError
from tasks.common.data.class_order import chosen, known_notes, ordered
from tasks.common.data.files import composed, counted, is_hidden, named
from tasks.common.data.imagenet import IMAGENET, LAYOUT, is_imagenet
from tasks.common.data.images import file_reader, is_image
from tasks.common.data.walk import files_by_class
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
    again: Sequence[str] = ()  # paths of links to images or folders that are there already
    label_notes: Sequence[str] = ()  # notes on the class names in the weights file
    outputs: Sequence[int] | None = None  # outputs of the model by label; None: all, in order
    # All right labels of each sample; None: the target is the only one.
    answers: Sequence[Sequence[int]] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of ids and labels."""
        pairs = zip(self.ids, self.answers or self.targets, strict=True)
        content = "\n".join(f"{name}\t{label}" for name, label in pairs)
        return hashlib.sha256(content.encode()).hexdigest()

    def head(self, limit: int | None) -> "Source":
        """Return the first ``limit`` samples, as a split with its own name."""
        if limit is None or limit >= len(self.ids):
            return self
        first = {"ids": self.ids[:limit], "targets": self.targets[:limit]}
        answers = None if self.answers is None else self.answers[:limit]
        return replace(self, split=f"{self.split}[:{limit}]", answers=answers, **first)

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
        """Describe files and links that were left out, and labels that follow the weights file."""
        files, links = counted(len(self.left_out), "file"), counted(len(self.again), "link")
        notes = {
            f"{files} that Pillow cannot open as an image": self.left_out,
            f"{links} to what is there already": self.again,
        }
        left_out = [f"{what}, left out: {named(names)}" for what, names in notes.items() if names]
        return [*left_out, *self.label_notes]


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
    classes = class_folders(folder)
    if not classes:
        raise DataError(f"{folder} holds no images in class folders. {LAYOUT}.")
    names, word = ordered(classes, folder, chosen(order, root), known, labels, wanted)
    sibling = root / ("val" if part == "train" else "train")
    if sibling.is_dir():
        own, others = ({*map(composed, found)} for found in (classes, class_folders(sibling)))
        if own != others:
            only = f"only one of them has {', '.join(sorted(own ^ others)[:5])}"
            raise DataError(f"{folder} and {sibling} do not have the same classes: {only}.")
    source = list_classes(root, part, names, word)
    notes = known_notes(names, word, known) if labels else []
    return replace(source, label_notes=notes) if notes else source


def open_images(root: Path) -> Source:
    """Open all images below a folder, without labels: its part ``train`` if it has one.

    Raises DataError: there is no folder, no image, or a part with unclear content.
    """
    if _is_part(root / "train"):
        return open_folder(root, "train", labels=False)
    if not root.is_dir():
        raise DataError(f"There is no folder {root}: give a folder of images to calibrate on.")
    whole = root.resolve()
    changed = (whole.stat().st_mtime_ns,)
    source = _listed_folder(whole.parent, "", (whole.name,), "alphabetical", changed)
    ids = _below(whole, (whole.parent / name for name in source.ids))
    return replace(source, name=f"folder-{len(ids)}-images", split="all", ids=ids)


def _is_part(folder: Path) -> bool:
    return folder.is_dir() and bool(class_folders(folder))


def list_classes(root: Path, part: str, names: Sequence[str], order: str) -> Source:
    """Return the images in the class folders ``names`` (by label) of a part of the data ``root``.

    ``order`` is the name of the order of ``names``. Raises DataError: a class has no images.
    """
    # The time of a folder changes when a file is added or removed.
    changed = tuple((root / part / name).stat().st_mtime_ns for name in ("", *names))
    return _listed_folder(root, part, tuple(names), order, changed)


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders below ``folder`` that are not hidden."""
    names = (name for name in os.listdir(folder) if not is_hidden(name))
    return [name for name in names if os.path.isdir(folder / name)]


@lru_cache(maxsize=4)
def _listed_folder(
    root: Path, part: str, names: tuple[str, ...], order: str, changed: tuple[int, ...]
) -> Source:
    """List a folder once per process until it has ``changed``; listing ImageNet takes minutes."""
    folder = root / part
    loose = sorted(name for name in os.listdir(folder) if not os.path.isdir(folder / name))
    # Only files with unusual suffixes are opened here. Damaged files are found when read.
    samples, others, repeated = files_by_class(
        folder, names, lambda path: is_image_file(path) or is_image(Path(path))
    )
    without = sorted({*range(len(names))} - {label for _, label in samples})
    if without:
        classes = named([names[label] for label in without])
        raise DataError(f"{folder} holds no images in class folders ({classes}). {LAYOUT}.")
    paths = [Path(path) for path, _ in samples]
    ids, left_out, again = (_below(root, found) for found in (paths, others, repeated))
    left_out = [*(f"{part}/{name}" for name in loose if not is_hidden(name)), *left_out]
    odd = next((name for name in ids if not name.isprintable()), None)
    if odd is not None:  # records hold names as text
        problem = f"a file whose name is not UTF-8 or has control characters: {odd!r}"
        raise DataError(f"{folder} holds {problem}. Rename it.")
    targets, read = [label for _, label in samples], file_reader(paths)
    name = data_name(part, len(paths), names)
    return Source(name, part, ids, targets, len(names), read, names, order, left_out, again)


def _below(root: Path, paths: Iterable[str | Path]) -> list[str]:
    return [Path(path).relative_to(root).as_posix() for path in paths]


def data_name(part: str, count: int, classes: Sequence[str]) -> str:
    """Return the name of a data set: ImageNet if its classes and number of images are complete."""
    official = count == _COUNTS.get(part) and is_imagenet(classes)
    return IMAGENET if official else f"folder-{len(classes)}-classes"
