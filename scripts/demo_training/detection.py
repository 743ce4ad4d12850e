"""Training of the detection task's demo models on the digit scenes."""

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import MMLogger
from safetensors.torch import load_file
from torch import Tensor, nn

from demo_training import common
from tasks.common.data.augment import RandomDigitWarp
from tasks.common.demo.digits import load_digits, split_digits
from tasks.detection import mm
from tasks.detection.demo import coco_files
from tasks.detection.demo.models import DEMO
from tasks.detection.demo.scenes import Scene, draw_scenes

VERSIONS = {name: version(name) for name in ("onedl-mmdetection", "onedl-mmengine", "mmcv-lite")}

# Scenes of the same warped digits: about one scene per warp, as each shows four digits.
_BLOCK = 675


@dataclass(frozen=True)
class DetectorRecipe(common.Recipe):
    """Hyperparameters; an epoch is a pass over all ``scenes``.

    Backbone, FPN and RPN are those of the demo model ``starts_from``, if it is not None.
    """

    epochs: int = 4
    batch_size: int = 8
    lr: float = 2e-3
    warmup_epochs: float = 0.1
    grad_clip: float = 10.0
    scenes: int = 6000
    starts_from: str | None = None


RECIPES = {
    "demo_mask_rcnn": DetectorRecipe(),
    "demo_cascade": DetectorRecipe(epochs=2, lr=1e-3, starts_from="demo_mask_rcnn"),
}


def fingerprint(part: str) -> str:
    """Fingerprint of a part of the data."""
    return coco_files.fingerprint_of(coco_files.scenes_of(part))


def compose(count: int, seed: int) -> tuple[Scene, ...]:
    """Compose training scenes of the train part's digits, warped anew for every 675 scenes."""
    images, chosen = load_digits()[0].copy(), np.asarray(split_digits()["train"])
    plain = torch.from_numpy(images[chosen])[:, None].float() / 255
    warp = RandomDigitWarp(degrees=12.0, rows=1, columns=1)
    scenes: list[Scene] = []
    for block in range(-(-count // _BLOCK)):
        images[chosen] = (255 * warp(plain)).round().byte().squeeze(1).numpy()
        rng = np.random.default_rng([seed, block])
        scenes.extend(draw_scenes("train", min(_BLOCK, count - len(scenes)), rng, images))
    return tuple(scenes)


def initialise(model: nn.Module, starts_from: str | None) -> None:
    """Set mmdet's initial weights, but a wider backbone, or take a demo model's."""
    MMLogger.get_current_instance().setLevel(
        logging.ERROR
    )  # mmengine tells of every single weight.
    model.init_weights()
    common.widen(model.backbone)
    if starts_from is not None:
        taken = load_file(DEMO.weights_path(starts_from))
        for piece in ("backbone", "neck", "rpn_head"):
            own = {
                key.removeprefix(f"{piece}."): value
                for key, value in taken.items()
                if key.startswith(f"{piece}.")
            }
            getattr(model, piece).load_state_dict(own)


def batch_of(scenes: tuple[Scene, ...], first: int = 0) -> dict[str, list[Any]]:
    """Images and annotations of scenes as mmdet takes them; ids begin at ``first`` + 1."""
    samples = []
    for number, scene in enumerate(scenes, first + 1):
        size = scene.pixels.shape
        meta = {"img_id": number, "img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
        masks = mm.BitmapMasks(scene.masks.astype(np.uint8), *size)
        boxes, labels = torch.from_numpy(scene.boxes).float(), torch.from_numpy(scene.labels)
        samples.append(mm.DetDataSample(metainfo=meta))
        samples[-1].gt_instances = mm.InstanceData(bboxes=boxes, labels=labels, masks=masks)
    images = [torch.from_numpy(scene.pixels).expand(3, -1, -1) for scene in scenes]
    return {"inputs": images, "data_samples": samples}


def measure(model: nn.Module, part: str) -> dict[str, Any]:
    """AP of boxes and masks in percent by mmdet's CocoMetric, and the number of scenes."""
    model.eval()
    scenes = coco_files.scenes_of(part)
    # pycocotools prints tables.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "annotations.json")
        path.write_text(json.dumps(coco_files.annotations_of(scenes)), encoding="utf-8")
        metric = mm.CocoMetric(ann_file=str(path), metric=["bbox", "segm"])
        metric.dataset_meta = {"classes": coco_files.CLASSES}
        with torch.inference_mode():
            for number, scene in enumerate(scenes):
                batch = batch_of((scene,), number)
                metric.process(batch, [sample.to_dict() for sample in model.test_step(batch)])
        values = metric.evaluate(len(scenes))
    named = {"AP_box": "bbox_mAP", "AP_mask": "segm_mAP"}
    measured = {
        f"{part}_{ours}": round(100 * values[f"coco/{theirs}"], 1) for ours, theirs in named.items()
    }
    return {**measured, f"{part}_count": len(scenes)}


def train(name: str, recipe: DetectorRecipe, seed: int) -> nn.Module:
    """Train a demo model; it is returned in eval mode."""
    common.seed_everything(seed)
    model = DEMO.build(name)
    initialise(model, recipe.starts_from)
    scenes = compose(recipe.scenes, seed)

    def batches(epoch: int) -> Callable[[slice], Tensor]:
        order = np.random.default_rng([seed, epoch]).permutation(len(scenes))

        def loss(batch: slice) -> Tensor:
            chosen = batch_of(tuple(scenes[index] for index in order[batch]))
            given = model.data_preprocessor(chosen, training=True)
            return model.parse_losses(model.loss(given["inputs"], given["data_samples"]))[0]

        return loss

    exempt = ("relative_position_bias_table",)
    common.fit(name, recipe, model, exempt, len(scenes) // recipe.batch_size, batches)
    return model.eval()
