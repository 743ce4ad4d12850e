"""From the measured times of a rehearsed cell to seconds and memory of the real one.

Each time is taken to be proportional to what it is spent on:

load         constant
calibrate    range images x range candidates x (1 + rounds)
MLPs         steps x images per step; the rest: calibration images
reconstruct  steps x images per step; Fisher passes x calibration images; the rest: calibration images
evaluate     images; texts of class names
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fimaq_core.recipe import Recipe
from tasks.common.record import ResultRecord

#: Texts that stand for ImageNet's classes in zero-shot classification: 1000 classes x 80 templates.
_TEXTS = 80_000
#: (C, H, W) of a photograph that is resized and padded for a detector.
_DETECTOR_INPUT = (3, 800, 1344)
_MANY_PASSES = ("fisher_diag", "fisher_lr", "fisher_dplr")


@dataclass(frozen=True)
class Spent:
    """Seconds of a rehearsed cell, each the sum over all blocks.

    Attributes:
        calibrate: calibration.
        passed: one Fisher pass per block.
        step, mlp_step: one optimisation step per block, and per MLP.
        rest, mlp_rest: all else in the stages of these steps.
        text: embedding of one text.
        texts: number of texts that were embedded.
        total: all of it, attempts that were killed included.
        tape_bytes: largest bytes of the tape.
        peak_memory_bytes: largest memory.
    """

    calibrate: float
    passed: float
    step: float
    mlp_step: float
    rest: float
    mlp_rest: float
    text: float
    texts: int
    total: float
    tape_bytes: int
    peak_memory_bytes: int


def spent(events: Sequence[dict[str, Any]]) -> Spent:
    """Sum up the events of a cell; see :func:`benchmarks.rehearsal.cell.read_events`.

    What an attempt did again replaces what earlier ones had measured of the same block.
    """
    by_block: dict[tuple[str, str], list[float]] = {}
    total = 0.0
    texts = [event for event in events if event["stage"] == "embed classes"]
    for attempt in sorted({event["attempt"] for event in events}):
        own = defaultdict(list)
        for before, after in pairwise(event for event in events if event["attempt"] == attempt):
            kind = _kind(before, after)
            own[kind, before["block"]].append(after["time"] - before["time"])
            total += after["time"] - before["time"]
        by_block.update(own)
    sums: dict[str, float] = defaultdict(float)
    for (kind, _), seconds in by_block.items():
        if kind in ("passed", "step", "mlp_step"):
            sums[kind] += seconds[-1]  # earlier ones warm up, and make what the block needs
            sums["mlp_rest" if kind == "mlp_step" else "rest"] += max(sum(seconds) - len(seconds) * seconds[-1], 0.0)
        else:
            sums[kind] += sum(seconds)
    counted = texts[-1]["done"] - texts[0]["done"] if texts else 0
    names = ("calibrate", "passed", "step", "mlp_step", "rest", "mlp_rest")
    return Spent(
        **{name: sums[name] for name in names},
        text=sums["text"] / counted if counted else 0.0,
        texts=texts[-1]["done"] if texts else 0,
        total=total,
        tape_bytes=max((event["tape_bytes"] or 0 for event in events), default=0),
        peak_memory_bytes=max((event["memory"] for event in events), default=0),
    )


def _kind(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return the field of :class:`Spent` that the time between two events belongs to."""
    stages = before["stage"], after["stage"]
    if stages[0] == "Fisher pass":
        return "passed"
    if after["loss"] is not None:
        return "mlp_step" if stages[1] == "reconstruct MLPs" else "step"
    if stages[0] == "reconstruct MLPs":
        return "mlp_rest"
    if stages[0] == "calibrate" and before["block"]:
        return "calibrate"
    if stages == ("embed classes", "embed classes"):
        return "text"
    # Outputs of all images are made between calibration and the first block.
    return "rest" if stages[1] in ("reconstruct", "Fisher pass") else "other"


def real_seconds(record: ResultRecord, found: Spent, real: Recipe | None, images: int) -> float:
    """Estimate the seconds of a real cell.

    Args:
        record: of the rehearsed cell.
        found: its times.
        real: the real cell's recipe; None for full precision.
        images: of its evaluation.
    """
    evaluated = record.seconds.get("evaluate", 0.0) - found.texts * found.text
    total = record.seconds.get("load", 0.0) + images * max(evaluated, 0.0) / record.n
    total += _TEXTS * found.text
    if real is None or record.recipe is None:
        return total
    small = Recipe.model_validate(record.recipe)
    more = real.calibration_images / small.calibration_images
    search = real.range_images / small.range_images
    if real.range_search != "minmax":
        search *= real.range_candidates / small.range_candidates
        search *= (1 + real.range_rounds) / (1 + small.range_rounds)
    passes = real.fisher_k if real.loss in _MANY_PASSES else 1
    total += search * found.calibrate + more * (found.rest + found.mlp_rest + passes * found.passed)
    total += real.steps * real.batch_size / small.batch_size * found.step
    total += real.mlp_steps * real.mlp_batch / small.mlp_batch * found.mlp_step
    return total


def real_memory(record: ResultRecord, found: Spent, real: Recipe | None, eval_batch: int, on_disk: bool) -> tuple[int, int]:
    """Estimate the largest memory and the bytes of the tape of a real cell.

    What grows with the images of a batch is at most all that is there beyond the loaded model, so
    the estimate is an upper bound where batches are smaller than the real ones. Calibration images
    are added, and the tape where it is in memory.

    Args:
        record, found, real: as for :func:`real_seconds`.
        eval_batch: images of a forward pass.
        on_disk: whether the tape lies on disk.
    """
    loaded = record.stage_memory_bytes.get("load", 0)
    grown = max(record.peak_memory_bytes, found.peak_memory_bytes) - loaded
    if real is None or record.recipe is None:
        return loaded + grown * -(-eval_batch // record.n), 0
    small = Recipe.model_validate(record.recipe)
    tape = found.tape_bytes * real.calibration_images // small.calibration_images
    batch = max(real.batch_size / small.batch_size, real.mlp_batch / small.mlp_batch)
    batch = max(batch, min(eval_batch, real.calibration_images) / min(eval_batch, small.calibration_images))
    kept = real.calibration_images * _image_bytes(record) + (0 if on_disk else tape)
    return int(loaded + max(grown - found.tape_bytes, 0) * batch + kept), tape


def _image_bytes(record: ResultRecord) -> int:
    """Return the bytes of one calibration image in float32."""
    made = record.preprocessing
    return 4 * math.prod(_DETECTOR_INPUT if made is None else made.input_size)
