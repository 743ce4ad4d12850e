"""Random images in the layouts of the real data sets."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.grid.cell import Places
from fimaq_core.files import replaced_whole
from tasks.common.data.imagenet import wordnet_ids

#: Width and height, mode and format of images. ImageNet has grey and CMYK images, and a PNG that
#: is named as a JPEG.
_KINDS = [
    ((500, 375), "RGB", "JPEG"), ((375, 500), "RGB", "JPEG"), ((500, 333), "L", "JPEG"),
    ((640, 480), "RGB", "JPEG"), ((300, 300), "CMYK", "JPEG"), ((160, 120), "RGB", "PNG"),
    ((480, 640), "RGB", "JPEG"), ((1200, 900), "RGB", "JPEG"),
]  # fmt: skip
#: Images of each part of COCO, of Flickr30k, and of ImageNet where classes are few.
_FEW = 8


def make_data(folder: Path, names: Iterable[str]) -> Places:
    """Make data sets below ``folder`` where they are not there; return the places of all ``names``."""
    makers = {"imagenet": _imagenet, "coco": _coco, "flickr": _flickr}
    found = {}
    for name in sorted(names):
        found[name] = folder / name
        done = found[name] / "whole"
        if not done.is_file():
            shutil.rmtree(found[name], ignore_errors=True)
            makers[name](found[name])
            done.touch()
    return Places(**found)


def few_classes(imagenet: Path) -> Path:
    """Return the folder below ``imagenet`` with the same layout and few classes that have names.

    Zero-shot classification embeds 80 texts per class, which takes hours on a CPU for 1000 classes.
    """
    return imagenet / "few-classes"


def _imagenet(folder: Path) -> None:
    images = _images(folder / "images")
    for root, classes in ((folder, wordnet_ids()), (few_classes(folder), wordnet_ids()[:_FEW])):
        for part in ("train", "val"):
            for number, name in enumerate(classes):
                place = root / part / name
                place.mkdir(parents=True)
                shutil.copyfile(images[number % len(images)], place / f"{name}_{number}.JPEG")
    names = "\n".join(f"thing {number}" for number in range(_FEW))
    (few_classes(folder) / "classnames.txt").write_text(names, encoding="utf-8")


def _coco(folder: Path) -> None:
    """Make both layouts: annotations of COCO 2017, and the captions of COCO 2014."""
    from tasks.detection import mm

    names = mm.CocoDataset.METAINFO["classes"]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    for part in ("train2017", "val2017"):
        annotations: list[dict[str, Any]] = []
        images: list[dict[str, Any]] = []
        for number, path in enumerate(_images(folder / part), 1):
            with Image.open(path) as image:
                width, height = image.size
            images.append({"id": number, "file_name": path.name, "width": width, "height": height})
            for category in range(number, len(categories), _FEW):
                x, y = 4.0 * (category % 20), 3.0 * (category % 25)
                box = [x, y, width / 3, height / 3]
                corners = [x, y, x + width / 3, y, x + width / 3, y + height / 3, x, y + height / 3]
                number_of_box = len(annotations) + 1000 * number
                place = {"id": number_of_box, "image_id": number, "category_id": category + 1}
                shape = {"bbox": box, "area": box[2] * box[3], "segmentation": [corners]}
                annotations.append({**place, **shape, "iscrowd": 0})
        content = {"images": images, "annotations": annotations, "categories": categories}
        _write(folder / "annotations" / f"instances_{part}.json", content)
    _captions(folder, "dataset_coco.json", {"train": "train2014", "test": "val2014"})


def _flickr(folder: Path) -> None:
    _captions(folder, "dataset_flickr30k.json", {"train": "images", "test": "images"})


def _captions(folder: Path, file: str, parts: dict[str, str]) -> None:
    images = []
    for split, place in parts.items():
        for number, path in enumerate(_images(folder / place, prefix=f"{split}-")):
            texts = [f"{split} picture {number} of {count} things" for count in range(5)]
            about = {"filepath": place, "filename": path.name, "split": split}
            images.append({**about, "sentences": [{"raw": text} for text in texts]})
    _write(folder / file, {"images": images})


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_whole(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def _images(folder: Path, prefix: str = "") -> list[Path]:
    """Write smooth random images, one of each of :data:`_KINDS`."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    found = []
    for number, (size, mode, form) in enumerate(_KINDS):
        coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
        found.append(folder / f"{prefix}{number:012d}.jpg")
        image.save(found[-1], form)
    return found
