"""Images with annotated objects: COCO 2017, other files of its format, and the demo's scenes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from fimaq_core.errors import DataError
from tasks.common.data.images import DamagedImage, grey_bits, open_image, open_rgb
from tasks.common.record import Dataset
from tasks.common.request import DataRequest
from tasks.common.task import LoadedModel
from tasks.detection.annotations import Coco, Entry, checked, read_annotations
from tasks.detection.categories import COCO_CLASSES, Origin, match_categories
from tasks.detection.locate import data_root, image_folder, locate
from tasks.detection.orientation import Exif, Orientation, ask, orientation_of, turned
from tasks.detection.tags import LAYOUT, SPLITS, absent, annotation_file

COCO_NAME = "COCO 2017"
#: Number of images by part, and number of categories.
COUNTS = {"train": 118_287, "val": 5_000}
CATEGORIES = COCO_CLASSES
#: Formats read by OpenCV, like mmdet. It scales PPM differently and blends TIFF's alpha.
_READ_BY_OPENCV = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "WEBP")


@dataclass(frozen=True, eq=False)
class DetectionSource:
    """Part of a data set with annotated objects, such as ``val2017`` of COCO 2017."""

    name: str
    split: str
    image_ids: tuple[str, ...]  # paths below `root`, such as val2017/000000000139.jpg
    coco: Coco  # checked, with images in the order of `image_ids`; cached, not to be changed
    read: Callable[[int], np.ndarray]  # image by position, (H, W, 3) uint8, blue first
    root: Path | None = None  # folder of the data; None if images are no files
    orientation: Callable[[int], Orientation] | None = None  # by position; None without files
    exif: Exif | None = None  # the user's decision about EXIF orientations
    oriented: int | None = None  # number of images with an EXIF orientation, from `settled`
    labels: tuple[int | None, ...] | None = None  # see `ids_by_label`; None before matching
    classes_from: Origin | None = None  # source of the class names
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> list[Entry]:
        return self.coco["images"]

    @property
    def ids_by_label(self) -> tuple[int | None, ...]:
        """Category id of each class of the detector; None for a class without a category.

        Before classes are matched, all categories are classes in the file's order.
        """
        if self.labels is not None:
            return self.labels
        return tuple(entry["id"] for entry in self.coco["categories"])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the data, with the user's decision if images have EXIF orientations."""
        named = zip(self.image_ids, self.images, strict=True)
        sizes = [(name, entry["height"], entry["width"]) for name, entry in named]
        # The image ids of a file are arbitrary, so positions replace them.
        place = {entry["id"]: position for position, entry in enumerate(self.images)}
        annotations = [
            {**entry, "image_id": place[entry["image_id"]]} for entry in self.coco["annotations"]
        ]
        parts = [sizes, annotations, self.coco["categories"]]
        if self.exif is not None and self.oriented:
            parts.append([self.exif])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def head(self, limit: int | None) -> "DetectionSource":
        """Return the first ``limit`` images with their annotations, as a split of its own name."""
        if limit is None or limit >= len(self.image_ids):
            return self
        images = self.images[:limit]
        kept = {entry["id"] for entry in images}
        annotations = [entry for entry in self.coco["annotations"] if entry["image_id"] in kept]
        coco = {**self.coco, "images": images, "annotations": annotations}
        split = f"{self.split}[:{limit}]"
        return replace(self, split=split, image_ids=self.image_ids[:limit], coco=coco)

    def orientations(self, indices: Sequence[int], images: str = "images") -> tuple[int, list[str]]:
        """Count the images with an EXIF orientation; return also a note if there are any.

        Raises DataError if the user has to decide. Damaged files do not count here; reading them
        fails later.
        """
        if self.orientation is None:
            return 0, []
        found = {}
        for index in indices:
            with suppress(DamagedImage):
                found[index] = self.orientation(index)
        undecided = [self.image_ids[index] for index, one in found.items() if one.applied is None]
        if undecided:
            raise ask(undecided, f"{self.name} {self.split}")
        tagged = [bool(one.applied) for one in found.values() if one.tag != 1]
        if not tagged:
            return 0, []
        reason = "as their annotated sizes show" if self.exif is None else f"by --exif {self.exif}"
        note = (
            f"{len(tagged)} of {len(indices)} {images} have an EXIF orientation tag: "
            f"{sum(tagged)} are turned by it and {len(tagged) - sum(tagged)} are read as stored, "
            f"{reason}"
        )
        return len(tagged), [note]

    def settled(self) -> "DetectionSource":
        """Return these data with the number of oriented images and the note. Raises DataError."""
        count, notes = self.orientations(range(len(self.image_ids)))
        return replace(self, oriented=count, notes=(*self.notes, *notes))

    def describe(self) -> Dataset:
        """Make the entry of these data in a record."""
        categories = self.coco["categories"]
        names = {entry["id"]: entry["name"] for entry in categories}
        return Dataset(
            name=self.name,
            split=self.split,
            count=len(self.image_ids),
            classes=len(categories),
            fingerprint=self.fingerprint,
            exif=self.exif,
            oriented_images=self.oriented,
            class_names_from=self.classes_from,
            class_categories=tuple(names.get(number) for number in self.ids_by_label),
        )


def open_source(loaded: LoadedModel, data: DataRequest, part: str) -> DetectionSource:
    """Open ``val``, or ``train`` without annotations (of ``calibration_data`` if given).

    Raises DataError.
    """
    own = part == "train" and data.calibration_data is not None
    path = data.calibration_data if own else data.path
    if path is None and loaded.data is None:
        raise DataError(f"{loaded.tag} needs data: give --data /path/to/coco. {LAYOUT}.")
    if path is None and data.exif is not None and data.calibration_data is None:
        raise DataError("The demo's scenes are no files with EXIF tags: leave --exif out.")
    if path is not None and path.suffix == ".json" and part == "train" and not own:
        raise DataError(
            f"{path} lists no images to calibrate on: give --calibration-data, the folder of COCO "
            "2017 or another file in COCO's format."
        )
    source = open_part(path, part, data.exif)
    if part == "train":
        return source
    matched = match_categories(source.coco, loaded, f"{source.name} {source.split}")
    return replace(source, **matched._asdict())


def open_part(path: Path | None, part: str, exif: Exif | None = None) -> DetectionSource:
    """Open a part of COCO 2017, a file in its format, or a part of the demo. Raises DataError."""
    if path is None:
        return open_demo(part)
    if path.suffix == ".json":
        return open_file(path, part == "val", exif)
    return open_coco(path, part, exif)


def open_coco(root: Path, part: str, exif: Exif | None = None) -> DetectionSource:
    """Open a part of COCO 2017, ``train`` without annotations. Raises DataError."""
    missing = [item.removeprefix("the ") for item in absent(root, part)]
    if missing:
        raise DataError(f"There is no {' and no '.join(missing)}. {LAYOUT}.")
    path = annotation_file(root, part)
    coco = read_annotations(path, part == "val")
    images, categories = len(coco["images"]), len(coco["categories"])
    if (images, categories) != (COUNTS[part], CATEGORIES):
        raise DataError(
            f"{path} has {images:,} images of {categories} categories instead of the "
            f"{COUNTS[part]:,} of {CATEGORIES} of {COCO_NAME}: give a part of it, or other data, "
            "as a file (--data /path/to/file.json)."
        )
    return _of_files(COCO_NAME, root / SPLITS[part], root, coco, path, exif)


def open_file(path: Path, annotated: bool = True, exif: Exif | None = None) -> DetectionSource:
    """Open a file in COCO's format with its images. Raises DataError."""
    if not path.is_file():
        raise DataError(f"There is no file {path}. {LAYOUT}.")
    coco = read_annotations(path, annotated)
    folder, root = image_folder(path, coco["images"][0]["file_name"]), data_root(path.absolute())
    # The name of the published data set is for its own files only.
    name = path.name if path.stem == COCO_NAME else path.stem
    return _of_files(name, folder, root if folder.parent == root else None, coco, path, exif)


@lru_cache(maxsize=2)
def open_demo(part: str) -> DetectionSource:
    """Open the demo's scenes: ``train``, or ``test`` for ``val``. Raises DataError."""
    # Only the demo models need the demo's data.
    from tasks.detection.demo import coco_files, scenes

    own = "test" if part == "val" else part
    content = coco_files.annotations_of(coco_files.scenes_of(own))
    coco = checked(content, f"the part {own} of {scenes.DATA}", part == "val")

    def read(index: int) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(coco_files.read(own, index))[:, :, ::-1])

    ids = tuple(f"{own}/{entry['file_name']}" for entry in coco["images"])
    return DetectionSource(scenes.DATA, own, ids, coco, read)


def _of_files(
    name: str, folder: Path, root: Path | None, coco: Coco, path: Path, exif: Exif | None
) -> DetectionSource:
    """Make a source of image files whose names are relative to ``folder`` or to ``root``."""
    names = [entry["file_name"] for entry in coco["images"]]
    ids, paths = zip(*locate(names, folder, root, path), strict=True)
    sizes = [(entry["height"], entry["width"]) for entry in coco["images"]]
    files, split = ImageFiles(paths, sizes, path, exif), folder.name
    return DetectionSource(
        name, split, ids, coco, files.read, folder.parent, files.orientation, exif
    )


@dataclass(frozen=True)
class ImageFiles:
    """Image files that an annotation file describes, with their annotated (height, width)."""

    paths: Sequence[Path]
    sizes: Sequence[tuple[int, int]]
    annotations: Path
    exif: Exif | None = None

    def orientation(self, index: int) -> Orientation:
        """Read the EXIF orientation of the image at a position. Raises DamagedImage."""
        return orientation_of(self.paths[index], self.sizes[index], self.exif)

    def read(self, index: int) -> np.ndarray:
        """Read the image at a position: (H, W, 3) uint8, blue first.

        The result equals that of mmdet's ``LoadImageFromFile``. TIFF, PPM and grey images of more
        than 8 bits are read as in classification.

        Raises:
            DamagedImage: the file is damaged, or its values have no 8-bit form.
            DataError: the image does not have its annotated size, or the user has to decide about
                its EXIF orientation.
        """
        import cv2  # only the reading of images needs it

        path, size, orientation = self.paths[index], self.sizes[index], self.orientation(index)
        if orientation.applied is None:
            raise ask([str(path)], str(self.annotations))
        # OpenCV before version 5 invents the missing rest of a truncated file. Pillow refuses such
        # a file, also while it decodes only an eighth of the size.
        array = None
        with open_image(path) as image:
            if grey_bits(image) is None and image.format in _READ_BY_OPENCV:
                image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
                flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
                with suppress(cv2.error):
                    array = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), flags)
        if array is None:  # also for formats that OpenCV does not know
            array = np.asarray(open_rgb(path))[:, :, ::-1].copy()
        if orientation.applied:
            array = turned(array, orientation.tag)
        if array.shape[:2] != size:
            raise DataError(
                f"The image {path} is {array.shape[1]} x {array.shape[0]} pixels"
                f"{orientation.words}, but {self.annotations} says {size[1]} x {size[0]}: the two "
                "do not belong together, so boxes and masks would not fit."
                f"{orientation.advice(size)}"
            )
        return np.asarray(array)
