"""Labelled images in folders: ImageNet and whatever has its layout."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from fimaq_core.errors import DataError
from tasks.common.imagenet import IMAGENET, LAYOUT
from tasks.common.images import file_reader
from tasks.common.record import Dataset


class Source:
    """One part (train or val/test) of a data set: ids, labels, reading, and what the record says of it.

    ``class_names`` are what its classes are called here (folders), in the order of the labels; empty where they have no names.
    """

    def __init__(
        self,
        name: str,
        split: str,
        ids: list[str],
        targets: list[int],
        classes: int,
        read: Callable[[int], Image.Image],
        class_names: Sequence[str] = (),
    ):
        self.name, self.split, self.ids, self.targets, self.classes, self.read = name, split, ids, targets, classes, read
        self.class_names = tuple(class_names)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over ids and labels."""
        content = "\n".join(f"{name}\t{label}" for name, label in zip(self.ids, self.targets, strict=True))
        return hashlib.sha256(content.encode()).hexdigest()

    def head(self, limit: int | None) -> "Source":
        """The first ``limit`` samples, as a split of its own name."""
        if limit is None or limit >= len(self.ids):
            return self
        split, ids, targets = f"{self.split}[:{limit}]", self.ids[:limit], self.targets[:limit]
        return Source(self.name, split, ids, targets, self.classes, self.read, self.class_names)

    def describe(self) -> Dataset:
        """The record's entry."""
        return Dataset(name=self.name, split=self.split, count=len(self.ids), classes=self.classes, fingerprint=self.fingerprint)


def open_folder(root: Path, part: str) -> Source:
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
    count, classes = len(paths), len(found.classes)
    # The published numbers are on these 50,000 images; anything else goes by another name.
    official = (part == "val" and (count, classes) == (50_000, 1000)) or (
        part == "train" and (count, classes) == (1_281_167, 1000)
    )
    name = IMAGENET if official else f"folder-{classes}-classes"
    ids = [path.relative_to(root).as_posix() for path in paths]
    odd = next((name for name in ids if not name.isprintable()), None)
    if odd is not None:  # records hold names as text
        raise DataError(f"{folder} holds a file whose name is not UTF-8 or has control characters: {odd!r}. Rename it.")
    return Source(name, part, ids, [label for _, label in found.samples], classes, file_reader(paths), found.classes)
