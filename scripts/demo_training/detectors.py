"""Training of the detection task's demo models on the digit scenes, by mmengine's Runner."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from safetensors.torch import load_file
from torch import nn

from demo_training import common
from tasks.common.augment import RandomDigitWarp
from tasks.common.digits import PARTS, load_digits, split_digits
from tasks.detection import mm
from tasks.detection.demo import coco_files
from tasks.detection.demo.models import DEMO
from tasks.detection.demo.scenes import Scene, draw_scenes

NAMES = DEMO.names
VERSIONS = {name: version(name) for name in ("onedl-mmdetection", "onedl-mmengine", "mmcv-lite")}

spec_of = DEMO.spec
weights_path = DEMO.weights_path

# Scenes that are composed of the same warped digits: about one scene a warp, as each shows four digits.
_BLOCK = 675


@dataclass(frozen=True)
class DetectorRecipe(common.Recipe):
    """Hyperparameters, chosen on the val part.

    Attributes:
        scenes: Newly composed scenes; an epoch is a pass over all of them.
        starts_from: Demo model whose committed weights backbone, FPN and RPN start from; None starts from random ones.
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


class Progress(Hook):
    """Prints the mean loss of every 100 steps."""

    def __init__(self, name: str) -> None:
        """Starts the clock.

        Args:
            name: Name of the model, for the lines.
        """
        self._name = name
        self._losses: list[float] = []
        self._started = time.perf_counter()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Notes the step's loss."""
        self._losses.append(float(outputs["loss"].detach()))
        if len(self._losses) == 100:
            seconds, self._started = time.perf_counter() - self._started, time.perf_counter()
            line = f"{self._name} step {runner.iter + 1}/{runner.max_iters} loss {np.mean(self._losses):.3f}"
            print(f"{line} ({seconds:.1f} s)", flush=True)
            self._losses.clear()


def compose(count: int, seed: int) -> tuple[Scene, ...]:
    """Composes training scenes of the train part's digits, each digit warped anew for every 675 scenes."""
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
    """Sets initial weights as mmdet does, but for the backbone's: its 0.02 suits wide models, this one would hardly start.

    Args:
        model: The model.
        starts_from: Demo model that backbone, FPN and RPN are taken from, or None.
    """
    MMLogger.get_current_instance().setLevel(logging.ERROR)  # mmengine tells of every single weight.
    model.init_weights()
    for module in model.backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    if starts_from is not None:
        taken = load_file(weights_path(starts_from))
        for piece in ("backbone", "neck", "rpn_head"):
            own = {key.removeprefix(f"{piece}."): value for key, value in taken.items() if key.startswith(f"{piece}.")}
            getattr(model, piece).load_state_dict(own)


def files_of(folder: Path, part: str, pipeline: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the arguments of mmdet's CocoDataset for the files of a part, read and passed through a pipeline."""
    return {
        "data_root": str(folder),
        "ann_file": f"annotations/instances_{part}.json",
        "data_prefix": {"img": part},
        "metainfo": {"classes": coco_files.CLASSES},
        "pipeline": [{"type": "LoadImageFromFile", "backend_args": None}, *pipeline],
    }


def measure(model: nn.Module, part: str) -> dict[str, Any]:
    """Measures average precision of boxes and of masks by mmdet's CocoMetric, one image at a time.

    Args:
        model: The model; left in eval mode.
        part: Part of the scenes.

    Returns:
        AP (IoU .50:.95) of both in percent and the number of scenes.
    """
    model.eval()
    meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    pipeline = [{"type": "Resize", "scale_factor": 1.0, "keep_ratio": True}, {"type": "PackDetInputs", "meta_keys": meta}]
    with (
        tempfile.TemporaryDirectory() as name,
        mm.DefaultScope.overwrite_default_scope("mmdet"),
        contextlib.redirect_stdout(io.StringIO()),  # pycocotools prints tables.
    ):
        annotations = coco_files.write_scenes(Path(name), part, coco_files.scenes_of(part))
        data = mm.CocoDataset(**files_of(Path(name), part, pipeline), test_mode=True)
        metric = mm.CocoMetric(ann_file=str(annotations), metric=["bbox", "segm"])
        metric.dataset_meta = data.metainfo
        with torch.inference_mode():
            for item in data:
                batch = {key: [value] for key, value in item.items()}
                metric.process(batch, [sample.to_dict() for sample in model.test_step(batch)])
        values = metric.evaluate(len(data))
    named = {"AP_box": "bbox_mAP", "AP_mask": "segm_mAP"}
    measured = {f"{part}_{ours}": round(100 * values[f"coco/{theirs}"], 1) for ours, theirs in named.items()}
    return {**measured, f"{part}_count": len(data)}


def describe(measured: dict[str, Any], part: str) -> str:
    """Formats what `measure` returns."""
    return f"{part} AP {measured[f'{part}_AP_box']:.1f} box, {measured[f'{part}_AP_mask']:.1f} mask"


def fingerprints() -> dict[str, str]:
    """Returns the fingerprint of each part."""
    return {part: coco_files.fingerprint_of(coco_files.scenes_of(part)) for part in PARTS}


def train(name: str, recipe: DetectorRecipe, seed: int) -> nn.Module:
    """Trains one model.

    Args:
        name: Name of the demo model.
        recipe: Hyperparameters.
        seed: Seed of the initial weights, the composed scenes and the order.

    Returns:
        The trained model, in eval mode.
    """
    common.seed_everything(seed)
    model = DEMO.build(name)
    initialise(model, recipe.starts_from)
    with tempfile.TemporaryDirectory() as folder:
        coco_files.write_scenes(Path(folder), "train", compose(recipe.scenes, seed))
        mm.Runner(**runner_settings(model, recipe, Path(folder), seed), custom_hooks=[Progress(name)]).train()
    return model.eval()


def runner_settings(model: nn.Module, recipe: DetectorRecipe, folder: Path, seed: int) -> dict[str, Any]:
    """Returns the configuration of mmengine's Runner: AdamW, linear warmup, cosine; nothing is kept but the model itself.

    Args:
        model: The model.
        recipe: Hyperparameters.
        folder: Has the scenes as part `train`; logs go there too.
        seed: Seed of the order.
    """
    pipeline = [{"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}, {"type": "PackDetInputs"}]
    steps = recipe.scenes // recipe.batch_size
    warmup = max(1, round(recipe.warmup_epochs * steps))
    return {
        "model": model,
        "work_dir": str(folder / "logs"),
        "experiment_name": uuid.uuid4().hex,  # The Runner takes no name twice.
        "default_scope": "mmdet",
        "log_level": "ERROR",
        "randomness": {"seed": seed},
        "train_dataloader": {
            "batch_size": recipe.batch_size,
            "num_workers": 0,
            "drop_last": True,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "dataset": {"type": "CocoDataset", **files_of(folder, "train", pipeline)},
        },
        "train_cfg": {"type": "EpochBasedTrainLoop", "max_epochs": recipe.epochs},
        "optim_wrapper": {
            "type": "OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": recipe.lr, "weight_decay": recipe.weight_decay},
            "clip_grad": {"max_norm": recipe.grad_clip},
            "paramwise_cfg": {
                "norm_decay_mult": 0.0,
                "bias_decay_mult": 0.0,
                "custom_keys": {"relative_position_bias_table": {"decay_mult": 0.0}},
            },
        },
        "param_scheduler": [
            {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "begin": 0, "end": warmup},
            {"type": "CosineAnnealingLR", "by_epoch": False, "begin": warmup, "end": recipe.epochs * steps, "eta_min": 0.0},
        ],
        "default_hooks": {"checkpoint": None},
    }
