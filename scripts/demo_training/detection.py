"""Training of the demo models for detection, on scenes of digits."""

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Sequence
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
_SHARED = {"batch_size": 8, "warmup_epochs": 0.1, "grad_clip": 10.0, "scenes": 6000}
#: One epoch takes all ``scenes``. Backbone, FPN and RPN start with the weights of ``starts_from``.
SETTINGS = {
    "demo_mask_rcnn": common.settings(epochs=4, lr=2e-3, **_SHARED, starts_from=None),
    "demo_cascade": common.settings(epochs=2, lr=1e-3, **_SHARED, starts_from="demo_mask_rcnn"),
}
#: Number of scenes after which all digits are warped again. A scene shows four digits.
_BLOCK = 675


def fingerprint(part: str) -> str:
    """Return the fingerprint of a part of the data."""
    return coco_files.fingerprint_of(coco_files.scenes_of(part))


def compose(count: int, seed: int) -> tuple[Scene, ...]:
    """Compose ``count`` training scenes of warped digits of the train part."""
    images, chosen = load_digits()[0].copy(), np.asarray(split_digits()["train"])
    plain = torch.from_numpy(images[chosen])[:, None].float() / 255
    warp = RandomDigitWarp(degrees=12.0, rows=1, columns=1)
    scenes: list[Scene] = []
    for block in range(-(-count // _BLOCK)):
        images[chosen] = (255 * warp(plain)).round().byte().squeeze(1).numpy()
        rng = np.random.default_rng([seed, block])
        scenes.extend(draw_scenes("train", min(_BLOCK, count - len(scenes)), rng, images))
    return tuple(scenes)


def initialise(model: Any, starts_from: str | None) -> None:
    """Set mmdet's initial weights, enlarged in the backbone, then those of ``starts_from``."""
    MMLogger.get_current_instance().setLevel(logging.ERROR)  # mmengine logs every single weight
    model.init_weights()
    common.widen(model.backbone)
    if starts_from is not None:
        taken = load_file(DEMO.weights_path(starts_from))
        for piece in ("backbone.", "neck.", "rpn_head."):
            own = {key.removeprefix(piece): x for key, x in taken.items() if key.startswith(piece)}
            model.get_submodule(piece[:-1]).load_state_dict(own)


def batch_of(scenes: Sequence[Scene], first: int = 0) -> dict[str, list[Any]]:
    """Return images and annotations in mmdet's form; ids begin at ``first`` + 1."""
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


def measure(model: Any, part: str) -> dict[str, Any]:
    """Return AP of boxes and masks in percent by mmdet's CocoMetric, and the number of scenes."""
    model.eval()
    scenes = coco_files.scenes_of(part)
    # pycocotools prints tables, which are dropped here.
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
    found = {"AP_box": values["coco/bbox_mAP"], "AP_mask": values["coco/segm_mAP"]}
    scores = {f"{part}_{name}": round(100 * value, 1) for name, value in found.items()}
    return {**scores, f"{part}_count": len(scenes)}


def train(name: str, settings: common.Settings) -> nn.Module:
    """Train a demo model and return it in eval mode."""
    model = common.start(DEMO, name, settings["seed"])
    initialise(model, settings["starts_from"])
    scenes = compose(settings["scenes"], settings["seed"])

    def draw(rng: np.random.Generator) -> common.BatchLoss:
        order = rng.permutation(len(scenes))

        def loss(batch: slice) -> Tensor:
            given = model.data_preprocessor(
                batch_of([scenes[i] for i in order[batch]]), training=True
            )
            return model.parse_losses(model.loss(given["inputs"], given["data_samples"]))[0]

        return loss

    exempt = ("relative_position_bias_table",)
    common.fit(model, settings, draw, count=len(scenes), exempt=exempt)
    return model.eval()
