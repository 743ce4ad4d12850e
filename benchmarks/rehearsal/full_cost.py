"""Estimates of the seconds and memory of a real cell from its rehearsal.

The estimated time of each part is proportional to a product:

load                        constant
calibrate                   range images x range candidates x (1 + range rounds)
steps of blocks and MLPs    steps x images per step
Fisher passes               passes x calibration images
other work of these stages  calibration images
evaluate                    images, and texts of class names
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.costs.estimate import passes
from fimaq_core.recipe import Recipe
from tasks.common.record import ResultRecord

#: Number of texts of zero-shot classification on ImageNet: 1000 classes x 80 templates.
_TEXTS = 80_000
#: Shape (C, H, W) of a photograph after it is resized and padded for a detector.
_DETECTOR_INPUT = (3, 800, 1344)


@dataclass(frozen=True)
class Spent:
    """Seconds of the parts of a rehearsed cell, and its memory in bytes."""

    calibrate: float
    fisher_pass: float  #: one Fisher pass of each block
    step: float  #: one optimisation step of each block
    mlp_step: float  #: one optimisation step of each MLP
    rest: float  #: other work of the reconstruction of blocks and MLPs
    text: float  #: embedding of one text
    texts: int  #: number of texts that were embedded
    total: float  #: everything, including the killed attempt
    tape_bytes: int  #: largest tape
    peak_memory_bytes: int  #: largest peak


def spent(events: Sequence[dict[str, Any]]) -> Spent:
    """Sum the times between the events of a cell; see `benchmarks.rehearsal.cell.read_events`.

    If an attempt computes a block again, the times of this attempt replace the earlier ones.
    """
    by_block: dict[tuple[str, str], list[float]] = {}
    total = 0.0
    for attempt in sorted({event["attempt"] for event in events}):
        of_attempt = defaultdict(list)
        for before, after in pairwise(event for event in events if event["attempt"] == attempt):
            seconds = after["time"] - before["time"]
            of_attempt[_part(before, after), before["block"]].append(seconds)
            total += seconds
        by_block.update(of_attempt)
    sums: dict[str, float] = defaultdict(float)
    for (part, _), times in by_block.items():
        if part in ("fisher_pass", "step", "mlp_step"):
            sums[part] += times[-1]  # earlier times include work that is done once per block
            sums["rest"] += max(sum(times) - len(times) * times[-1], 0.0)
        else:
            sums[part] += sum(times)
    texts = [event["done"] for event in events if event["stage"] == "embed classes"] or [0]
    return Spent(
        **{name: sums[name] for name in ("calibrate", "fisher_pass", "step", "mlp_step", "rest")},
        text=sums["text"] / max(texts[-1] - texts[0], 1),
        texts=texts[-1],
        total=total,
        tape_bytes=max((event["tape_bytes"] or 0 for event in events), default=0),
        peak_memory_bytes=max((event["memory"] for event in events), default=0),
    )


def _part(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return the field of `Spent` for the time between two events; ``other`` for no field."""
    stages = before["stage"], after["stage"]
    if stages[0] == "Fisher pass":
        return "fisher_pass"
    if after["loss"] is not None:
        return "mlp_step" if stages[1] == "reconstruct MLPs" else "step"
    if stages[0] == "calibrate" and before["block"]:
        return "calibrate"
    if stages == ("embed classes", "embed classes"):
        return "text"
    # Before the first block, the outputs of all calibration images are computed.
    is_rest = stages[0] == "reconstruct MLPs" or stages[1] in ("reconstruct", "Fisher pass")
    return "rest" if is_rest else "other"


def real_seconds(record: ResultRecord, found: Spent, real: Recipe | None, images: int) -> float:
    """Return the estimated seconds of a real cell.

    Args:
        record: record of the rehearsed cell.
        found: result of `spent` for the rehearsed cell.
        real: recipe of the real cell; None for full precision.
        images: number of images in the evaluation of the real cell.
    """
    evaluated = record.seconds.get("evaluate", 0.0) - found.texts * found.text
    total = record.seconds.get("load", 0.0) + images * max(evaluated, 0.0) / record.n
    total += _TEXTS * found.text
    if real is None or record.recipe is None:
        return total
    small = Recipe.model_validate(record.recipe)
    images_ratio = real.calibration_images / small.calibration_images
    search = real.range_images / small.range_images
    if real.range_search != "minmax":
        search *= real.range_candidates / small.range_candidates
        search *= (1 + real.range_rounds) / (1 + small.range_rounds)
    total += search * found.calibrate
    total += images_ratio * (found.rest + passes(real) * found.fisher_pass)
    total += real.steps * real.batch_size / small.batch_size * found.step
    total += real.mlp_steps * real.mlp_batch / small.mlp_batch * found.mlp_step
    return total


def real_memory(
    record: ResultRecord, found: Spent, real: Recipe | None, eval_batch: int, on_disk: bool
) -> tuple[int, int]:
    """Return the estimated peak of memory of a real cell and the size of its tape, in bytes.

    The estimate assumes that all memory beyond the loaded model grows with the batch. It is an
    upper bound if the batches of the rehearsal are smaller than the real ones. The memory of the
    calibration images is added.

    Args:
        record, found, real: see `real_seconds`.
        eval_batch: images per forward pass.
        on_disk: True if the tape is on disk instead of in memory.
    """
    loaded = record.stage_memory_bytes.get("load", 0)
    grown = max(record.peak_memory_bytes, found.peak_memory_bytes) - loaded
    if real is None or record.recipe is None:
        return loaded + grown * -(-eval_batch // record.n), 0
    small, images = Recipe.model_validate(record.recipe), real.calibration_images
    tape = found.tape_bytes * images // small.calibration_images
    batch = max(
        real.batch_size / small.batch_size,
        real.mlp_batch / small.mlp_batch,
        min(eval_batch, images) / min(eval_batch, small.calibration_images),
    )
    made = record.preprocessing  # None for detectors
    image_bytes = 4 * math.prod(_DETECTOR_INPUT if made is None else made.input_size)
    kept = images * image_bytes + (0 if on_disk else tape)
    return int(loaded + max(grown - found.tape_bytes, 0) * batch + kept), tape
