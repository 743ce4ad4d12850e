"""Digit scenes in COCO's format (Lin et al., ECCV 2014, arXiv:1405.0312)."""

import hashlib
import json
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from tasks.common.demo.digits import PARTS, SEED, check_part
from tasks.detection.demo.scenes import DATA, Scene, draw_scenes

#: Names of the categories, and their ids. Like COCO's ids, they start at one and have gaps.
CLASSES: tuple[str, ...] = tuple("0123456789")
CATEGORY_IDS = (1, 2, 3, 4, 6, 7, 9, 11, 13, 14)

SCENES = {"train": 1024, "val": 200, "test": 200}


@cache
def scenes_of(part: str) -> tuple[Scene, ...]:
    """Compose the scenes of a part, once per process (about a second). Raises ValueError."""
    check_part(part, DATA)
    # The number 2 makes a random stream that no other demo data use.
    rng = np.random.default_rng([SEED, PARTS.index(part), 2])
    return tuple(draw_scenes(part, SCENES[part], rng))


def read(part: str, index: int) -> Image.Image:
    """Return the image of a part at a position, RGB."""
    return Image.fromarray(scenes_of(part)[index].pixels).convert("RGB")


def annotations_of(scenes: tuple[Scene, ...]) -> dict[str, Any]:
    """Describe scenes as COCO does; the first image is ``00000.png`` with the id 1."""
    from pycocotools import mask as run_lengths

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, 1):
        height, width = scene.pixels.shape
        name = f"{number - 1:05d}.png"
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        masks = np.asfortranarray(scene.masks.transpose(1, 2, 0).astype(np.uint8))
        objects = scene.labels.tolist(), scene.boxes.tolist(), run_lengths.encode(masks)
        for label, (x1, y1, x2, y2), code in zip(*objects, strict=True):
            mask = {"size": code["size"], "counts": code["counts"].decode("ascii")}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": CATEGORY_IDS[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(run_lengths.area(code)),
                    "iscrowd": 0,
                    "segmentation": mask,
                }
            )
    categories = [
        {"id": number, "name": name, "supercategory": "digit"}
        for number, name in zip(CATEGORY_IDS, CLASSES, strict=True)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def fingerprint_of(scenes: tuple[Scene, ...]) -> str:
    """Compute the sha256 over annotations and pixels of scenes."""
    digest = hashlib.sha256(json.dumps(annotations_of(scenes), sort_keys=True).encode())
    for scene in scenes:
        digest.update(scene.pixels.tobytes())
    return digest.hexdigest()
