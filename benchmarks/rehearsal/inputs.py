"""Random weights and images, in the formats of the published weights and data sets."""

import importlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks.grid.cell import Cell, Places
from benchmarks.rehearsal.cell import few_classes
from fimaq_core.files import replaced_whole
from tasks.common.data.imagenet import wordnet_ids
from tasks.common.data.images import open_image

#: (width, height), colour mode and file format of images. Like ImageNet, they include grey and CMYK
#: images, and a PNG file with the name of a JPEG file.
_KINDS = [
    ((500, 375), "RGB", "JPEG"), ((375, 500), "RGB", "JPEG"), ((500, 333), "L", "JPEG"),
    ((640, 480), "RGB", "JPEG"), ((300, 300), "CMYK", "JPEG"), ((160, 120), "RGB", "PNG"),
    ((480, 640), "RGB", "JPEG"), ((1200, 900), "RGB", "JPEG"),
]  # fmt: skip
#: Number of images in each part of COCO and Flickr30k, and of classes in `few_classes`.
_FEW = 8
#: Factor of a detector's random classification weights, so that it finds objects to mask.
_CERTAIN = 50.0


def make_weights(folder: Path, cells: Iterable[Cell]) -> None:
    """Write random weights of each model of `cells`, unless ``<model.tag>.safetensors`` exists."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, name in dict.fromkeys((cell.task, cell.model) for cell in cells):
        catalogue = importlib.import_module(f"tasks.{task}.tags").CATALOGUE
        if name in catalogue.demo_names:
            continue
        path = folder / f"{catalogue.full_name(name)}.safetensors"
        if not path.is_file():
            torch.manual_seed(0)
            state = _build(task, catalogue.full_name(name)).state_dict()
            tensors = {key: value.clone().contiguous() for key, value in state.items()}
            with replaced_whole(path) as temporary:
                save_file(tensors, temporary)


def _build(task: str, full_name: str) -> Any:
    """Return a model with random weights; `full_name` is ``model.tag``."""
    architecture = full_name.partition(".")[0]
    if task == "retrieval":
        import open_clip  # type: ignore[import-untyped, unused-ignore]

        return open_clip.create_model(architecture, pretrained=None)
    if task != "detection":
        import timm

        return timm.create_model(architecture, pretrained=False)
    from tasks.detection.configs import build, published_config

    model: Any = build(published_config(architecture))
    heads = model.roi_head.bbox_head
    for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
        head.fc_cls.weight.data.mul_(_CERTAIN)
    return model


def make_data(folder: Path, names: Iterable[str]) -> Places:
    """Make the data sets `names` in `folder`, unless they exist; return their folders."""
    makers = {"imagenet": _imagenet, "coco": _coco, "flickr": _flickr}
    found = {name: folder / name for name in sorted(names)}
    for name, place in found.items():
        done = place / "whole"
        if not done.is_file():
            shutil.rmtree(place, ignore_errors=True)
            makers[name](place)
            done.touch()
    return Places(**found)


def _imagenet(folder: Path) -> None:
    images = _images(folder / "images")
    for root, classes in ((folder, wordnet_ids()), (few_classes(folder), wordnet_ids()[:_FEW])):
        for part in ("train", "val"):
            for number, name in enumerate(classes):
                place = root / part / name
                place.mkdir(parents=True)
                shutil.copyfile(images[number % len(images)], place / f"{name}_{number}.JPEG")


def _coco(folder: Path) -> None:
    """Make images with the annotations of COCO 2017 and with the captions of COCO 2014."""
    from tasks.detection import mm

    names = mm.CocoDataset.METAINFO["classes"]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    for part in ("train2017", "val2017"):
        annotations: list[dict[str, Any]] = []
        images: list[dict[str, Any]] = []
        for number, path in enumerate(_images(folder / part), 1):
            with open_image(path) as image:
                width, height = image.size
            images.append({"id": number, "file_name": path.name, "width": width, "height": height})
            for category in range(number, len(categories), _FEW):
                x, y = 4.0 * (category % 20), 3.0 * (category % 25)
                w, h = width / 3, height / 3
                place = {"id": len(annotations) + 1000 * number, "image_id": number}
                shape = {"bbox": [x, y, w, h], "area": w * h}
                shape["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                annotations.append({**place, "category_id": category + 1, **shape, "iscrowd": 0})
        content = {"images": images, "annotations": annotations, "categories": categories}
        _write(folder / "annotations" / f"instances_{part}.json", content)
    _captions(folder, "dataset_coco.json", {"train": "train2014", "test": "val2014"})


def _flickr(folder: Path) -> None:
    _captions(folder, "dataset_flickr30k.json", {"train": "images", "test": "images"})


def _captions(folder: Path, file: str, parts: dict[str, str]) -> None:
    """Make images with five captions each. `parts` has the folder of images of each split."""
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
    """Write one smooth random image of each kind of `_KINDS`; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    random, found = np.random.default_rng(0), []
    for number, (size, mode, form) in enumerate(_KINDS):
        coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
        found.append(folder / f"{prefix}{number:012d}.jpg")
        image.save(found[-1], form)
    return found
