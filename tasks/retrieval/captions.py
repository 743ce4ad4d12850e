"""Images with their captions: the scenes of the demo, or the files in a folder."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fimaq_core.errors import DataError
from tasks.common.data.files import composed, found_files
from tasks.common.data.folders import Source
from tasks.common.data.images import file_reader
from tasks.common.record import Dataset
from tasks.common.request import DataRequest
from tasks.common.task import LoadedModel
from tasks.retrieval import tags
from tasks.retrieval.caption_files import read_captions


@dataclass(frozen=True, eq=False)
class PairSource:
    """One part of an image-caption data set, such as ``Karpathy test`` of ``MS-COCO``.

    Raises DataError for images without captions, listed twice, or with an empty caption.

    Example:
        >>> source = PairSource("mine", "test", [("a.jpg", ["a dog", "a pet"])], lambda index: None)
        >>> source.captions
        ('a dog', 'a pet')
    """

    name: str
    split: str
    listed: Sequence[tuple[str, Sequence[str]]]  # (id, captions) of each image
    read: Callable[[int], Image.Image]  # image at a position
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        what = f"{self.name} {self.split}"
        if not self.listed:
            raise DataError(f"{what} holds no images.")
        counts = Counter(self.image_ids)
        problems = {
            "images more than once, such as": [name for name, n in counts.items() if n > 1],
            "images without a caption, such as": [name for name, own in self.listed if not own],
            "empty captions, such as one of": [
                name for name, own in self.listed for caption in own if not caption.strip()
            ],
        }
        for problem, names in problems.items():
            if names:
                raise DataError(f"{what} has {len(names)} {problem} {names[0]!r}.")

    @cached_property
    def image_ids(self) -> tuple[str, ...]:
        """Ids of the images, in order."""
        return tuple(name for name, _ in self.listed)

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """All captions. Captions of one image are neighbours."""
        return tuple(caption for _, own in self.listed for caption in own)

    @cached_property
    def starts(self) -> np.ndarray:
        """Starts (images + 1,) int64: image i has ``captions[starts[i]:starts[i + 1]]``."""
        return np.cumsum([0, *(len(own) for _, own in self.listed)], dtype=np.int64)

    @cached_property
    def image_of(self) -> np.ndarray:
        """Index of the image of each caption, (captions,) int64."""
        return np.repeat(np.arange(len(self.listed), dtype=np.int64), np.diff(self.starts))

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of image ids, captions and their assignment."""
        content = json.dumps([self.image_ids, self.captions, self.starts.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()

    def head(self, limit: int | None) -> "PairSource":
        """Return the first ``limit`` images with their captions, as a split with its own name."""
        if limit is None or limit >= len(self.listed):
            return self
        return replace(self, split=f"{self.split}[:{limit}]", listed=self.listed[:limit])

    def describe(self) -> Dataset:
        """Return the entry for the record."""
        return Dataset(
            name=self.name,
            split=self.split,
            count=len(self.listed),
            classes=0,
            fingerprint=self.fingerprint,
            captions=len(self.captions),
        )


class Counts(NamedTuple):
    """Numbers of images and captions in a split; captions are not checked if None."""

    images: int
    captions: int | None = None


@dataclass(frozen=True)
class Published:
    """A published data set with Karpathy's splits."""

    name: str
    file: str
    counts: dict[str, Counts]  # by split
    folders: tuple[str, ...] = ()  # possible folders of the images below the data folder

    def images(self, root: Path) -> Path:
        """Return the folder of the images: one of ``folders``, or else ``root`` itself."""
        return next((root / name for name in self.folders if (root / name).is_dir()), root)


_COCO_COUNTS = {"train": Counts(82_783), "restval": Counts(30_504)}
_COCO_COUNTS |= {"val": Counts(5_000), "test": Counts(5_000, 25_010)}
#: Calibration takes ``train`` without ``restval``, so it needs no images of the folder val2014.
COCO = Published("MS-COCO", tags.COCO_FILE, _COCO_COUNTS)
FLICKR30K = Published(
    "Flickr30k",
    tags.FLICKR30K_FILE,
    {"train": Counts(29_000), "val": Counts(1_014, 5_070), "test": Counts(1_000, 5_000)},
    ("flickr30k-images", "images"),
)
_PUBLISHED = {one.file: one for one in (COCO, FLICKR30K)}


def open_pairs(loaded: LoadedModel, data: DataRequest, part: str) -> PairSource:
    """Open the part ``train`` or ``test`` of the data for a model. Raises DataError."""
    if data.class_order is not None and data.evaluation != "zero-shot":
        raise DataError("Captions have no classes: --class-order goes with --eval zero-shot.")
    root = pairs_root(data, part)
    if root is not None:
        return open_captions(root, part)
    if loaded.data == tags.DEMO_DATA:
        return demo_scenes(part)
    raise DataError(f"{loaded.tag} needs data: give --data /path/to/captions. {tags.LAYOUT}.")


def pairs_root(data: DataRequest, part: str) -> Path | None:
    """Return the data folder of a part; None if the model brings its own data."""
    return (data.calibration_data if part == "train" else None) or data.path


def open_captions(root: Path, part: str) -> PairSource:
    """Open a part of the image-caption data in the folder ``root``. Raises DataError."""
    files = _caption_files(root)
    if files[0] in _PUBLISHED:
        return open_published(root, _PUBLISHED[files[0]], part)
    own = part if len(files) > 1 else None
    path = root / (files[0] if own is None else f"{part}{Path(files[0]).suffix}")
    listed = read_captions(path, own).get(part, ())
    if not listed:
        raise DataError(f"{path} has no images of the split {part!r}.")
    sibling = path.with_name(f"{'test' if part == 'train' else 'train'}{path.suffix}")
    if own is not None and sibling.is_file():
        others = read_captions(sibling, sibling.stem).get(sibling.stem, ())
        known = {composed(image) for image, _ in others}
        common = [image for image, _ in listed if composed(image) in known]
        if common:
            shared = f"share {len(common)} images, such as {common[0]!r}"
            raise DataError(f"{path} and {sibling} {shared}: leave each image in one file.")
    return _file_pairs(f"captions-{len(listed)}-images", part, root, listed, path)


def open_published(root: Path, published: Published, part: str) -> PairSource:
    """Open a part of a published data set. Raises DataError: its file has other counts."""
    path = root / published.file
    splits = read_captions(path)
    wrong = []
    for split in dict.fromkeys([*published.counts, *splits]):
        listed, wanted = splits.get(split, ()), published.counts.get(split, Counts(0))
        captions = sum(len(own) for _, own in listed)
        if len(listed) != wanted.images:
            wrong.append(f"{split} has {len(listed):,} images instead of {wanted.images:,}")
        elif wanted.captions is not None and captions != wanted.captions:
            wrong.append(f"{split} has {captions:,} captions instead of {wanted.captions:,}")
    if wrong:
        raise DataError(
            f"{path} does not hold the splits of {published.name}: {'; '.join(wrong)}. "
            f"Name the file {tags.FREE_FILE} if it holds other data."
        )
    name, split, folder = published.name, f"Karpathy {part}", published.images(root)
    return _file_pairs(name, split, folder, splits.get(part, ()), path)


def images_root(root: Path) -> Path:
    """Return the folder of the images; their ids are paths below it. Raises DataError."""
    published = _PUBLISHED.get(_caption_files(root)[0])
    return root if published is None else published.images(root)


def _caption_files(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise DataError(f"There is no folder {root}. {tags.LAYOUT}.")
    kinds = tags.caption_kinds(root)
    if not kinds:
        raise DataError(f"{root} holds no captions. {tags.LAYOUT}.")
    if len(kinds) > 1:
        present = [name for kind in kinds for name in kind if (root / name).is_file()]
        several = f"several kinds of captions: {', '.join(present)}"
        raise DataError(f"{root} holds {several}. Leave one. {tags.LAYOUT}.")
    return kinds[0]


def _file_pairs(
    name: str, split: str, folder: Path, listed: Sequence[tuple[str, Sequence[str]]], path: Path
) -> PairSource:
    """Return pairs of the captions file ``path``; image ids are paths below ``folder``."""
    paths, absent = found_files(folder, (image for image, _ in listed))
    if absent:
        raise DataError(
            f"{path} names {len(absent)} images of the split {split!r} that are not in {folder}, "
            f"such as {absent[0]!r}."
        )
    return PairSource(name, split, listed, file_reader(paths))


@lru_cache(maxsize=2)
def demo_scenes(part: str) -> PairSource:
    """Return a part of the demo's data. It is made once per process."""
    from tasks.retrieval.demo.scenes import DigitScenes  # for the demo model only

    scenes = DigitScenes(part)
    listed = [(name, [caption]) for name, caption in zip(scenes.ids, scenes.captions, strict=True)]
    return PairSource(tags.DEMO_DATA, part, listed, lambda index: scenes[index][0])


def imagenet_pairs(source: Source, classnames: Sequence[str]) -> PairSource:
    """Return labelled images, each with the caption ``a photo of a <class name>.``

    Raises DataError: the number of class names is not the number of classes.
    """
    if len(classnames) != source.classes:
        what = f"{source.name} {source.split} has {source.classes} classes"
        raise DataError(f"{what}, but there are {len(classnames)} class names.")
    captions = [[f"a photo of a {name}."] for name in classnames]
    samples = zip(source.ids, source.targets, strict=True)
    listed = [(name, captions[label]) for name, label in samples]
    return PairSource(source.name, source.split, listed, source.read, source.notes())
