"""The digit scenes in COCO's format (Lin et al., ECCV 2014, arXiv:1405.0312)."""

import hashlib
import json
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from tasks.common.demo.digits import PARTS, SEED, check_part
from tasks.detection.demo.scenes import DATA, Scene, draw_scenes

# Names of the categories are the digits; like COCO's, their ids start at one and have gaps.
CLASSES: tuple[str, ...] = tuple("0123456789")
CATEGORY_IDS = (1, 2, 3, 4, 6, 7, 9, 11, 13, 14)

SCENES = {"train": 1024, "val": 200, "test": 200}


@cache
def scenes_of(part: str) -> tuple[Scene, ...]:
    """Compose the scenes of a part, once per process (about a second). Raises ValueError."""
    check_part(part, DATA)
    # One stream per part, none of them a stream of the pairs or of the captioned scenes.
    return tuple(
        draw_scenes(part, SCENES[part], np.random.default_rng([SEED, PARTS.index(part), 2]))
    )


def read(part: str, index: int) -> Image.Image:
    """Image of a part by its position, RGB."""
    return Image.fromarray(scenes_of(part)[index].pixels).convert("RGB")


def annotations_of(scenes: tuple[Scene, ...]) -> dict[str, Any]:
    """Describe scenes as COCO does; the first image is ``00000.png`` with the id 1."""
    from pycocotools import mask as run_lengths

    annotations: list[dict[str, Any]] = []
    for i, scene in enumerate(scenes):
        codes = run_lengths.encode(
            np.asfortranarray(scene.masks.transpose(1, 2, 0).astype(np.uint8))
        )
        for label, (x1, y1, x2, y2), code in zip(
            scene.labels.tolist(), scene.boxes.tolist(), codes, strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": CATEGORY_IDS[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(run_lengths.area(code)),
                    "iscrowd": 0,
                    "segmentation": {
                        "size": code["size"],
                        "counts": code["counts"].decode("ascii"),
                    },
                }
            )
    sizes = [scene.pixels.shape for scene in scenes]
    images = [
        {"id": i + 1, "file_name": f"{i:05d}.png", "height": h, "width": w}
        for i, (h, w) in enumerate(sizes)
    ]
    named = zip(CATEGORY_IDS, CLASSES, strict=True)
    categories = [{"id": number, "name": name, "supercategory": "digit"} for number, name in named]
    return {"images": images, "annotations": annotations, "categories": categories}


def fingerprint_of(scenes: tuple[Scene, ...]) -> str:
    """sha256 over the annotations and pixels of scenes."""
    digest = hashlib.sha256(json.dumps(annotations_of(scenes), sort_keys=True).encode())
    for scene in scenes:
        digest.update(scene.pixels.tobytes())
    return digest.hexdigest()
