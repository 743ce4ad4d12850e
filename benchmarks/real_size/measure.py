"""Quantizing a subject, and what it took."""

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_size.subjects import Subject
from fimaq_core.progress import Report
from fimaq_core.quantize import Resources, calibrate_or_load, finish, reconstruct_with_checkpoints
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Ragged
from tasks.common.environment import describe, peak_memory
from tasks.common.prepare import make_parts
from tasks.common.registry import get_task
from tasks.common.request import ModelRequest


@torch.no_grad()
def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of outputs (n, ...), over the root mean square of the expected ones."""
    return float((found - expected).abs().max() / expected.square().mean().sqrt())


def measure(name: str, subject: Subject, recipe: Recipe, device: torch.device, report: Report) -> dict[str, Any]:
    """Quantize the model ``name`` and return what it took, and how far it is from the float model before and after."""
    task = get_task(subject.task)
    begun = time.monotonic()
    loaded, images = subject.make(name, recipe.calibration_images)
    loaded.model.to(device)
    inputs = task.inputs(loaded, images, recipe, device)
    sample = {part: (own[0] if isinstance(own, Ragged) else own[:4]).to(device) for part, own in inputs.items()}
    with torch.no_grad():
        expected = subject.expected(loaded.model, sample)
    resources = Resources(report=report)
    parts = make_parts(task, ModelRequest(name), loaded, images, recipe, device, resources.batch_size)
    figures: dict[str, Any] = {
        "model": loaded.tag, "method": recipe.method, "bits": recipe.bits_name, "steps": recipe.steps,
        "images": recipe.calibration_images, "batch": recipe.batch_size, "candidates": recipe.range_candidates,
        "shapes": {part: list(own.shape) for part, own in sample.items()},
        "environment": describe(device).model_dump(mode="json"), "seconds": {"load": round(time.monotonic() - begun, 1)},
        "largest_difference": {}, "cosine": {}, "blocks": {},
    }  # fmt: skip
    for part in parts:
        with torch.no_grad():
            figures["largest_difference"][part.name] = largest_difference(part.chain(sample[part.name]), expected[part.name])
        figures["blocks"][part.name] = len(part.chain)
        start = time.monotonic()
        calibrate_or_load(part.chain, part.inputs, part.recipe, resources)
        figures["seconds"][part.stage("calibrate")] = round(time.monotonic() - start, 1)
        start = time.monotonic()
        if part.recipe.reconstruct:
            log = reconstruct_with_checkpoints(part.chain, part.inputs, part.recipe, part.divergence, resources)
            figures.setdefault("engine", log.engine)
        finish(part.chain)
        figures["seconds"][part.stage("reconstruct")] = round(time.monotonic() - start, 1)
        with torch.no_grad():
            close = torch.cosine_similarity(part.chain(sample[part.name]).flatten(1), expected[part.name].flatten(1)).mean()
        figures["cosine"][part.name] = float(close)
    figures["seconds"]["all"] = round(time.monotonic() - begun, 1)
    figures["peak_memory_bytes"] = peak_memory(device)
    return figures
