"""Images with annotated objects: COCO 2017, other files in its format, and the demo's scenes."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType

import numpy as np

from fimaq_core.errors import DataError
from tasks.common.files import absent_files
from tasks.common.record import Dataset
from tasks.common.request import DataRequest
from tasks.common.task import LoadedModel
from tasks.detection.annotations import Coco, Entry, checked, read_annotations
from tasks.detection.layout import LAYOUT, SPLITS, absent, annotation_file, image_folders, is_file_of_annotations

COCO_NAME = "COCO 2017"
#: Images of its splits, and categories.
COUNTS: Mapping[str, int] = MappingProxyType({"train": 118_287, "val": 5_000})
CATEGORIES = 80
PARTS = tuple(SPLITS)


@dataclass(frozen=True, eq=False)
class DetectionSource:
    """One part of a data set with annotated objects.

    Attributes:
        name: of the data set, such as ``COCO 2017``.
        split: such as ``val2017``.
        image_ids: stable and distinct, in the order of ``coco["images"]``, such as ``val2017/000000000139.jpg``.
        coco: checked ``images``, ``annotations`` and ``categories``, see :func:`~tasks.detection.annotations.checked`; not to be
            changed. Of images to calibrate on, no annotations.
        read: gives the image of an index as (H, W, 3) uint8, blue first, as mmdet's configurations expect it.
        root: ids are paths below it; None where images are no files.
    """

    name: str
    split: str
    image_ids: tuple[str, ...]
    coco: Coco
    read: Callable[[int], np.ndarray]
    root: Path | None = None

    @property
    def images(self) -> list[Entry]:
        """Id, file name and size of each image."""
        return self.coco["images"]

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories in the file's order: the classes 0, 1, ... of a model."""
        return tuple(entry["name"] for entry in self.coco["categories"])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over ids and sizes of the images, annotations and categories."""
        sizes = [(name, entry["height"], entry["width"]) for name, entry in zip(self.image_ids, self.images, strict=True)]
        place = {entry["id"]: position for position, entry in enumerate(self.images)}
        # The numbers that a file gives its images say nothing: only whose each annotation is.
        annotations = [{**entry, "image_id": place[entry["image_id"]]} for entry in self.coco["annotations"]]
        content = json.dumps([sizes, annotations, self.coco["categories"]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def head(self, limit: int | None) -> "DetectionSource":
        """The first ``limit`` images with their annotations, as a split of its own name."""
        if limit is None or limit >= len(self.image_ids):
            return self
        images = self.images[:limit]
        kept = {entry["id"] for entry in images}
        annotations = [entry for entry in self.coco["annotations"] if entry["image_id"] in kept]
        coco = {"images": images, "annotations": annotations, "categories": self.coco["categories"]}
        return replace(self, split=f"{self.split}[:{limit}]", image_ids=self.image_ids[:limit], coco=coco)

    def describe(self) -> Dataset:
        """The record's entry."""
        return Dataset(
            name=self.name,
            split=self.split,
            count=len(self.image_ids),
            classes=len(self.coco["categories"]),
            fingerprint=self.fingerprint,
        )


def open_source(loaded: LoadedModel, data: DataRequest, part: str) -> DetectionSource:
    """Open the ``train`` part (images only, to calibrate on) or the ``val`` part of the data that goes with a model.

    The training part is that of ``data.calibration_data`` where this is given: a folder of COCO 2017, or a file.

    Raises:
        DataError: no data, categories that are not the model's classes, or what the readers refuse.
    """
    if part not in PARTS:
        raise DataError(f"There is no part {part!r} of annotated images: {' or '.join(PARTS)}.")
    own = part == "train" and data.calibration_data is not None
    path = data.calibration_data if own else data.path
    if path is None:
        if loaded.data is None:
            raise DataError(f"{loaded.tag} needs data: give --data /path/to/coco. {LAYOUT}.")
        source = open_demo(part)
    elif not is_file_of_annotations(path):
        source = open_coco(path, part)
    elif part == "train" and not own:
        raise DataError(
            f"{path} says nothing of images to calibrate on: give --calibration-data, the folder of COCO 2017 or another file of "
            "COCO's format."
        )
    else:
        source = open_file(path, annotated=part == "val")
    _check_classes(source, loaded)
    return source


def open_annotated(path: Path) -> DetectionSource:
    """Open what is measured on: the evaluation part of COCO 2017, or a file in its format. Raises DataError."""
    return open_file(path) if is_file_of_annotations(path) else open_coco(path, "val")


def open_coco(root: Path, part: str, counts: Mapping[str, int] | None = None, categories: int = CATEGORIES) -> DetectionSource:
    """Open a part of COCO 2017.

    Args:
        root: with ``annotations/`` and the folders of images.
        part: ``train`` or ``val``; of the first no annotations.
        counts: images that the parts must have instead of the published; they do not get the published name then.
        categories: likewise.

    Raises:
        DataError: files that are not there, other counts, or what :func:`~tasks.detection.annotations.checked` refuses.
    """
    missing = absent(root, part)
    if missing:
        raise DataError(f"There is no {' and no '.join(item.removeprefix('the ') for item in missing)}. {LAYOUT}.")
    path, split = annotation_file(root, part), SPLITS[part]
    coco = read_annotations(path, part == "val")
    wanted, found = (COUNTS if counts is None else counts)[part], len(coco["images"])
    if (found, len(coco["categories"])) != (wanted, categories):
        raise DataError(
            f"{path} has {found:,} images of {len(coco['categories'])} categories instead of the {wanted:,} of {categories} of "
            f"{COCO_NAME}: give a part of it, or other data, as a file of their own (--data /path/to/file.json)."
        )
    published = (wanted, categories) == (COUNTS[part], CATEGORIES)
    return _of_files(COCO_NAME if published else root.name, split, root / split, coco, path)


def open_file(path: Path, annotated: bool = True) -> DetectionSource:
    """Open a file in COCO's format with the images beside it, see :func:`~tasks.detection.layout.image_folders`.

    Raises:
        DataError: no such file, images that are not there, or what :func:`~tasks.detection.annotations.checked` refuses.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}. {LAYOUT}.")
    coco = read_annotations(path, annotated)
    folders = image_folders(path.absolute())
    first = coco["images"][0]["file_name"]
    folder = next((folder for folder in folders if (folder / first).is_file()), None)
    if folder is None:
        raise DataError(f"The images of {path} are not there: {first!r} was looked for in {', '.join(map(str, folders))}.")
    return _of_files(path.stem, folder.name, folder, coco, path)


@lru_cache(maxsize=2)
def open_demo(part: str) -> DetectionSource:
    """Open the demo's scenes: ``train``, or ``test`` for ``val``. Raises DataError."""
    # Only the demo models need the demo's data.
    from tasks.detection.demo import coco_files, scenes

    own = "test" if part == "val" else part
    coco = checked(coco_files.coco_dict(own), f"the part {own} of {scenes.DATA}", part == "val")

    def read(index: int) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(coco_files.read(own, index))[:, :, ::-1])

    ids = tuple(f"{own}/{entry['file_name']}" for entry in coco["images"])
    return DetectionSource(scenes.DATA, own, ids, coco, read)


def _of_files(name: str, split: str, folder: Path, coco: Coco, path: Path) -> DetectionSource:
    files = [entry["file_name"] for entry in coco["images"]]
    missing = absent_files(folder, files)
    if missing:
        raise DataError(f"{path} names {len(missing)} images that are not in {folder}, such as {missing[0]!r}.")
    ids = tuple(f"{folder.name}/{file}" for file in files)
    sizes = [(entry["height"], entry["width"]) for entry in coco["images"]]
    return DetectionSource(name, split, ids, coco, file_reader([folder / file for file in files], sizes, path), folder.parent)


def file_reader(paths: Sequence[Path], sizes: Sequence[tuple[int, int]], annotations: Path) -> Callable[[int], np.ndarray]:
    """Gives the image file of an index as mmdet's ``LoadImageFromFile`` does: (H, W, 3) uint8, blue first.

    Args:
        paths: of the files.
        sizes: (height, width) that each must have: its boxes are given in these pixels.
        annotations: where these come from, for people.

    Raises (when it reads):
        OSError: a damaged file.
        UnknownRange: values that have no 8-bit form, see :func:`~tasks.common.images.as_rgb`.
        DataError: an image of another size.
    """

    def read(index: int) -> np.ndarray:
        # Only the reading of images needs these.
        import cv2
        from PIL import Image

        from tasks.common.images import grey_bits, open_rgb

        path = paths[index]
        # OpenCV before version 5 fills in what a truncated file lacks; Pillow refuses, decoding an eighth of the size.
        with Image.open(path) as image:
            grey_bits(image)
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
        array = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        if array is None:  # a format that only Pillow knows
            array = np.asarray(open_rgb(path))[:, :, ::-1].copy()
        if array.shape[:2] != tuple(sizes[index]):
            (height, width), (given_height, given_width) = array.shape[:2], sizes[index]
            raise DataError(
                f"The image {path} is {width} x {height} pixels, but {annotations} says {given_width} x {given_height}: they do "
                "not belong together, so that boxes and masks would not fit."
            )
        return np.asarray(array)

    return read


def _check_classes(source: DetectionSource, loaded: LoadedModel) -> None:
    """Refuse data whose categories are not the model's classes: its own names, or with 80 those of COCO."""
    found = source.categories
    what = f"{source.name} {source.split}"
    if len(found) != loaded.classes:
        raise DataError(
            f"{what} has {len(found)} categories, {loaded.tag} has {loaded.classes} classes: use data or weights that fit."
        )
    # As mmdet names a model's classes.
    known = (getattr(loaded.model, "dataset_meta", None) or {}).get("classes")
    if known is None and loaded.data is None and loaded.classes == CATEGORIES:
        from tasks.detection import mm

        known = mm.CocoDataset.METAINFO["classes"]
    differ = [(mine, theirs) for mine, theirs in zip_longest(known, found) if mine != theirs] if known else []
    if differ:
        raise DataError(
            f"{what} has other categories than {loaded.tag} has classes, or in another order: {differ[0][1]!r} where the model "
            f"has {differ[0][0]!r} ({len(differ)} of {len(found)} differ)."
        )
