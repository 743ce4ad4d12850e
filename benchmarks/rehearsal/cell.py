"""Rehearsal of one cell: a smaller request, one kill of its process, and a file of its events."""

import json
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fimaq_core.documents import parse_json, read_text
from fimaq_core.errors import FimaqError
from fimaq_core.progress import OnProgress, Progress
from fimaq_core.recipe import Recipe, make_recipe
from tasks.common.request import CellRequest
from tasks.detection.tags import annotation_file

#: Optimisation steps per block and per MLP. On a GPU, a graph is captured after the third step.
STEPS, GPU_STEPS = 2, 5
#: Numbers of images on a CPU. A detector takes minutes per image.
_IMAGES, _DETECTOR_IMAGES = 2, 1
#: File of events in the folder of a cell.
_EVENTS = "rehearsal.jsonl"


def in_small(request: CellRequest) -> CellRequest:
    """Return `request` with few steps per block and few images.

    On a GPU, batches and range images keep their real size. The peak of memory is then real, except
    for the inputs and outputs of blocks, which grow with the number of calibration images.
    """
    is_gpu, is_detector = request.device.startswith("cuda"), request.task == "detection"
    data, images = request.data, _DETECTOR_IMAGES if is_detector else _IMAGES
    if is_gpu and not is_detector:
        images = request.eval_batch
    if data.path is not None and data.evaluation == "zero-shot" and not is_gpu:
        data = replace(data, path=few_classes(data.path))
    if data.path is not None and is_detector:
        # A folder is checked to be the complete COCO; an annotation file is not.
        val, train = (annotation_file(data.path, part) for part in ("val", "train"))
        data = replace(data, path=val, calibration_data=train)
    recipe = request.recipe and _recipe_in_small(request.task, request.recipe, images, is_gpu)
    limit = max(images, 2)  # a standard error needs two images
    batch = min(request.eval_batch, images)
    return replace(request, recipe=recipe, data=replace(data, limit=limit), eval_batch=batch)


def few_classes(imagenet: Path) -> Path:
    """Return the folder in `imagenet` with the same layout but few classes.

    Zero-shot classification embeds 80 texts per class. On a CPU, 1000 classes would take hours.
    """
    return imagenet / "few-classes"


def _recipe_in_small(task: str, recipe: Recipe, images: int, is_gpu: bool) -> Recipe:
    """Return `recipe` with few steps, and with `images` images on a CPU."""
    if is_gpu:
        images = max(recipe.range_images, recipe.batch_size, recipe.mlp_batch)
    most: dict[str, int] = dict.fromkeys(("steps", "mlp_steps"), GPU_STEPS if is_gpu else STEPS)
    most |= dict.fromkeys(("calibration_images", "batch_size", "mlp_batch"), images)
    most |= {"range_images": images if is_gpu else 1, "range_candidates": 16, "range_rounds": 1}
    if task == "retrieval":
        most["divergence_batch"] = images
    changes = {name: min(getattr(recipe, name), value) for name, value in most.items()}
    return make_recipe(recipe.method, recipe.model_dump(mode="json"), changes)


def rehearse_cell(request: CellRequest, on_progress: OnProgress) -> Path:
    """Measure a cell in small, kill its process once, and return the path of its record.

    Raises:
        FimaqError: a finished block was computed again after the kill.
    """
    from tasks.common.cell.identity import planned_folder
    from tasks.common.cell.run import run_cell

    request = in_small(request)
    folder = planned_folder(request)
    folder.mkdir(parents=True, exist_ok=True)
    return run_cell(request, _Killer(request, folder / _EVENTS, on_progress))


class _Killer:
    """Callback that writes each progress to a file, and kills the process in its first attempt.

    It kills the process when the second block of the longest stage begins. If an earlier cell has
    already made all blocks, it kills the process when the evaluation begins.
    """

    def __init__(self, request: CellRequest, path: Path, on_progress: OnProgress) -> None:
        recipe = request.recipe
        self._stage = "evaluate" if recipe is None else "calibrate"
        if recipe is not None and (recipe.reconstruct or recipe.reconstruct_mlp):
            self._stage = "reconstruct" if recipe.reconstruct else "reconstruct MLPs"
        self._path, self._on_progress, self._device = path, on_progress, request.device
        earlier = read_events(path.parent)
        self._attempt = 1 + max((event["attempt"] for event in earlier), default=0)
        # All stages except calibration have checkpoints: all blocks but the last one are finished.
        begun = [event["block"] for event in earlier if event["stage"] == self._stage]
        self._finished = set(begun) - set(begun[-1:]) if self._stage != "calibrate" else set()
        self._first = ""  # first block of the stage in this attempt

    def __call__(self, progress: Progress) -> None:
        from tasks.common.cell.environment import peak_memory, resolve_device

        memory = peak_memory(resolve_device(self._device))
        if self._device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
        event = {"attempt": self._attempt, "time": time.monotonic(), "memory": memory}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event | asdict(progress)) + "\n")
        is_in_stage = progress.stage == self._stage
        if is_in_stage and not self._first:
            self._first = progress.block
            if self._first in self._finished:
                raise FimaqError(
                    f"The stage '{self._stage}' computes {self._first} again, which was finished "
                    "before the kill."
                )
        is_due = progress.stage in ("evaluate", "embed classes")
        if is_in_stage and progress.block:
            is_due = progress.block != self._first
        if self._attempt == 1 and is_due:
            os.kill(os.getpid(), signal.SIGKILL)
        self._on_progress(progress)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of the cell in `folder` in order, without an incomplete last line.

    Each event has the fields of `fimaq_core.progress.Progress`, ``attempt`` (from 1), ``time`` in
    seconds, and ``memory``: the peak in bytes since the stage began.
    """
    path = folder / _EVENTS
    lines = read_text(path, FimaqError).split("\n")[:-1] if path.is_file() else []
    return [parse_json(line, str(path), FimaqError) for line in lines]
