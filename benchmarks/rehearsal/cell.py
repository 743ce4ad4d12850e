"""One cell in small: what is smaller, the kill in its midst, and the times of its steps."""

import json
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.rehearsal.images import few_classes
from fimaq_core.errors import FimaqError
from fimaq_core.progress import OnProgress, Progress
from fimaq_core.recipe import Recipe, make_recipe
from tasks.common.request import CellRequest
from tasks.detection.tags import annotation_file

#: Optimisation steps per block and per MLP; on a GPU a graph of a step is captured behind three.
STEPS, GPU_STEPS = 2, 5
#: Images of a rehearsal on a CPU; a detector takes minutes per image.
_IMAGES, _DETECTOR_IMAGES = 2, 1
_EVENTS = "rehearsal.jsonl"


def in_small(request: CellRequest) -> CellRequest:
    """Return ``request`` with few steps per block and few images.

    On a GPU batches and calibration ranges keep their real number of images, so the peak of memory
    is the real one but for what is kept of all calibration images.
    """
    gpu, detector = request.device.startswith("cuda"), request.task == "detection"
    recipe, data = request.recipe, request.data
    images = _DETECTOR_IMAGES if detector else _IMAGES
    if gpu and not detector:
        images = request.eval_batch
    if data.evaluation == "zero-shot" and not gpu and data.path is not None:
        data = replace(data, path=few_classes(data.path))
    if detector and data.path is not None:  # what goes by COCO's name must be whole
        val, train = (annotation_file(data.path, part) for part in ("val", "train"))
        data = replace(data, path=val, calibration_data=train)
    return replace(
        request,
        recipe=None if recipe is None else _recipe_in_small(request.task, recipe, images, gpu),
        data=replace(data, limit=max(images, 2)),  # standard errors need two
        eval_batch=min(request.eval_batch, images),
    )


def _recipe_in_small(task: str, recipe: Recipe, images: int, gpu: bool) -> Recipe:
    if gpu:
        images = max(recipe.range_images, recipe.batch_size, recipe.mlp_batch)
    most: dict[str, int] = dict.fromkeys(("steps", "mlp_steps"), GPU_STEPS if gpu else STEPS)
    names = ("calibration_images", "range_images", "batch_size", "mlp_batch")
    most |= {**dict.fromkeys(names, images), "range_candidates": 16, "range_rounds": 1}
    if task == "retrieval":
        most["divergence_batch"] = images
    if not gpu:
        most["range_images"] = 1
    changes = {name: min(getattr(recipe, name), value) for name, value in most.items()}
    return make_recipe(recipe.method, recipe.model_dump(mode="json"), changes)


def rehearse_cell(request: CellRequest, on_progress: OnProgress) -> Path:
    """Measure a cell in small, killing its process once in its midst; return the record's path.

    Raises:
        FimaqError: after the kill, something finished was done again.
    """
    from tasks.common.cell.identity import planned_folder
    from tasks.common.cell.run import run_cell

    request = in_small(request)
    folder = planned_folder(request)
    folder.mkdir(parents=True, exist_ok=True)
    return run_cell(request, _Listener(request, folder / _EVENTS, on_progress))


class _Listener:
    """Writes each moment of a cell into a file, and kills the process in the first attempt.

    The kill comes when the second block of the longest stage begins, or at the evaluation where
    everything before was found done.
    """

    def __init__(self, request: CellRequest, path: Path, on_progress: OnProgress) -> None:
        recipe = request.recipe
        self._stage = "evaluate" if recipe is None else "calibrate"
        if recipe is not None and recipe.reconstruct_mlp:
            self._stage = "reconstruct MLPs"
        if recipe is not None and recipe.reconstruct:
            self._stage = "reconstruct"
        self._path, self._report, self._device = path, on_progress, request.device
        earlier = read_events(path.parent)
        self._attempt = 1 + max((event["attempt"] for event in earlier), default=0)
        # Of a stage with checkpoints, all blocks but the last that began are finished.
        begun = [event["block"] for event in earlier if event["stage"] == self._stage]
        self._finished = set(begun) - set(begun[-1:]) if self._stage != "calibrate" else set()
        self._first = ""

    def __call__(self, progress: Progress) -> None:
        from tasks.common.cell.environment import peak_memory, resolve_device

        memory = peak_memory(resolve_device(self._device))
        event = {"attempt": self._attempt, "time": self._now(), "memory": memory}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event | asdict(progress)) + "\n")
        if progress.stage == self._stage and not self._first:
            self._first = progress.block
            if self._first in self._finished:
                again = f"and the stage '{self._stage}' does it again"
                raise FimaqError(f"{self._first} was finished before the kill, {again}.")
        if self._attempt == 1 and self._is_due(progress):
            os.kill(os.getpid(), signal.SIGKILL)
        self._report(progress)

    def _now(self) -> float:
        if self._device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
        return time.monotonic()

    def _is_due(self, progress: Progress) -> bool:
        if progress.stage == self._stage and progress.block:
            return progress.block != self._first
        return progress.stage in ("evaluate", "embed classes")


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return what the cell in ``folder`` reported, in order; a line that was cut off is left out.

    Each event has the fields of :class:`~fimaq_core.progress.Progress`, the number of its attempt
    (from 1), its time in seconds and the peak of memory in bytes since its stage began.
    """
    path = folder / _EVENTS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
