"""MS-COCO captions and Flickr30k in the splits of Karpathy and Fei-Fei (CVPR 2015, arXiv:1412.2306), from their JSON files.

A file holds ``images``, each with ``filename``, ``split``, ``sentences`` (of these ``raw``), and in MS-COCO ``filepath``. The
part ``train`` is the split train: MS-COCO's restval, which some train on as well, is left out, so that calibration needs the
images of train2014 only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fimaq_core.errors import DataError
from tasks.common.files import composed, image_id, parse_json, read_text, state_of
from tasks.retrieval.files import check_split, file_pairs
from tasks.retrieval.layout import COCO_FILE, FLICKR30K_FILE, FREE_FILE
from tasks.retrieval.pairs import PairSource


class Counts(NamedTuple):
    """Images and captions of a split; None where the captions are not counted."""

    images: int
    captions: int | None = None


@dataclass(frozen=True)
class Published:
    """A published data set.

    Attributes:
        name: which only data with the published counts get.
        file: its JSON file.
        counts: of its splits.
        folders: where its images may be below the data's folder, tried in order before that folder itself.
    """

    name: str
    file: str
    counts: Mapping[str, Counts]
    folders: tuple[str, ...] = ()


COCO = Published(
    "MS-COCO",
    COCO_FILE,
    MappingProxyType({"train": Counts(82_783), "restval": Counts(30_504), "val": Counts(5_000), "test": Counts(5_000, 25_010)}),
)
FLICKR30K = Published(
    "Flickr30k",
    FLICKR30K_FILE,
    MappingProxyType({"train": Counts(29_000), "val": Counts(1_014, 5_070), "test": Counts(1_000, 5_000)}),
    ("flickr30k-images", "images"),
)

_Splits = Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]]


def open_karpathy(root: Path, published: Published, part: str, counts: Mapping[str, Counts] | None = None) -> PairSource:
    """Open the part ``train`` or ``test``.

    Args:
        counts: what the file must hold instead of the published counts; the data then do not get the published name.

    Raises:
        DataError: other counts, a file that is not of this format, images that are not there.
    """
    path = root / published.file
    splits = read_karpathy(path)
    _check_counts(path, published, splits, published.counts if counts is None else counts)
    listed = splits.get(part, ())
    named = counts is None or dict(counts) == dict(published.counts)
    name = published.name if named else free_name(len(listed))
    return file_pairs(name, f"Karpathy {part}", images_folder(root, published), listed, path)


def images_folder(root: Path, published: Published) -> Path:
    """The folder that the ids of a published data set's images are paths below."""
    return next((root / name for name in published.folders if (root / name).is_dir()), root)


def open_free(root: Path, part: str) -> PairSource:
    """Open a part of any data in the same format: ``captions.json``, whatever it counts. Raises DataError."""
    path = root / FREE_FILE
    listed = read_karpathy(path).get(part, ())
    if not listed:
        raise DataError(f"{path} has no images of the split {part!r}.")
    return file_pairs(free_name(len(listed)), part, root, listed, path)


def free_name(images: int) -> str:
    """Name of data that are not a published data set."""
    return f"captions-{images}-images"


def read_karpathy(path: Path) -> _Splits:
    """(Image id, captions) of each split in the file's order; read once while the file stays as it is. Raises DataError."""
    return _read(path, state_of(path))


@lru_cache(maxsize=2)
def _read(path: Path, state: tuple[int, int]) -> _Splits:
    content = parse_json(read_text(path), str(path), _without_tokens)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{path} has no list 'images': it is not a file of Karpathy's format.")
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    split_of: dict[str, str] = {}
    for number, entry in enumerate(entries):
        where = f"{path}, image {number} (counted from 0)"
        try:
            folder, file, split = entry.get("filepath", ""), entry["filename"], entry["split"]
            captions = tuple(sentence["raw"] for sentence in entry["sentences"])
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: filename, split and sentences with raw are expected ({error!r}).") from error
        if not all(isinstance(text, str) for text in (folder, file, *captions)):
            raise DataError(f"{where}: names and captions must be text.")
        image = image_id(f"{folder}/{file}" if folder else file, where)
        split = check_split(split, where)
        if (other := split_of.setdefault(composed(image), split)) != split:
            raise DataError(f"{where}: {image!r} is in the splits {other!r} and {split!r}.")
        found.setdefault(split, []).append((image, captions))
    return {split: tuple(listed) for split, listed in found.items()}


def _without_tokens(item: dict[str, Any]) -> dict[str, Any]:
    # MS-COCO's captions cut into words take more memory than all the rest, and are not used.
    item.pop("tokens", None)
    return item


def _check_counts(path: Path, published: Published, splits: _Splits, expected: Mapping[str, Counts]) -> None:
    wrong = []
    for split in dict.fromkeys([*expected, *splits]):
        listed, wanted = splits.get(split, ()), expected.get(split, Counts(0))
        captions = sum(len(own) for _, own in listed)
        if len(listed) != wanted.images:
            wrong.append(f"{split} has {len(listed):,} images instead of {wanted.images:,}")
        elif wanted.captions is not None and captions != wanted.captions:
            wrong.append(f"{split} has {captions:,} captions instead of {wanted.captions:,}")
    if wrong:
        raise DataError(
            f"{path} does not hold the splits of {published.name}: {'; '.join(wrong)}. Other data of this format are read from a "
            f"file called {FREE_FILE}."
        )
