"""Estimates of the real seconds and memory of a cell from the times of its rehearsal.

The time of each part is proportional to the numbers behind its name:

load         (constant)
calibrate    range images x range candidates x (1 + range rounds)
MLPs         steps x images per step; other work of the stage: calibration images
reconstruct  steps x images per step; Fisher passes x calibration images; other work: as of MLPs
evaluate     images; texts of class names
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

#: Texts of zero-shot classification on ImageNet: 1000 classes x 80 templates.
_TEXTS = 80_000
#: (C, H, W) of a photograph that is resized and padded for a detector.
_DETECTOR_INPUT = (3, 800, 1344)


@dataclass(frozen=True)
class Spent:
    """Seconds of a rehearsed cell, summed over its blocks, and its memory."""

    calibrate: float
    passed: float  #: one Fisher pass per block
    step: float  #: one optimisation step per block
    mlp_step: float  #: one optimisation step per MLP
    rest: float  #: other work of the reconstruction of blocks and MLPs
    text: float  #: embedding of one text
    texts: int  #: number of texts that were embedded
    total: float  #: all, with the killed attempt
    tape_bytes: int  #: largest tape
    peak_memory_bytes: int  #: largest peak


def spent(events: Sequence[dict[str, Any]]) -> Spent:
    """Sum up the events of a cell; see `benchmarks.rehearsal.cell.read_events`.

    If a later attempt computes a block again, its times replace the earlier ones.
    """
    by_block: dict[tuple[str, str], list[float]] = {}
    total = 0.0
    for attempt in sorted({event["attempt"] for event in events}):
        own = defaultdict(list)
        for before, after in pairwise(event for event in events if event["attempt"] == attempt):
            seconds = after["time"] - before["time"]
            own[_kind(before, after), before["block"]].append(seconds)
            total += seconds
        by_block.update(own)
    sums: dict[str, float] = defaultdict(float)
    for (kind, _), times in by_block.items():
        if kind in ("passed", "step", "mlp_step"):
            sums[kind] += times[-1]  # earlier ones include work that is done once per block
            sums["rest"] += max(sum(times) - len(times) * times[-1], 0.0)
        else:
            sums[kind] += sum(times)
    texts = [event["done"] for event in events if event["stage"] == "embed classes"] or [0]
    return Spent(
        **{name: sums[name] for name in ("calibrate", "passed", "step", "mlp_step", "rest")},
        text=sums["text"] / max(texts[-1] - texts[0], 1),
        texts=texts[-1],
        total=total,
        tape_bytes=max((event["tape_bytes"] or 0 for event in events), default=0),
        peak_memory_bytes=max((event["memory"] for event in events), default=0),
    )


def _kind(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return the field of `Spent` for the time between two events."""
    stages = before["stage"], after["stage"]
    if stages[0] == "Fisher pass":
        return "passed"
    if after["loss"] is not None:
        return "mlp_step" if stages[1] == "reconstruct MLPs" else "step"
    if stages[0] == "calibrate" and before["block"]:
        return "calibrate"
    if stages == ("embed classes", "embed classes"):
        return "text"
    # Between calibration and the first block, the outputs of all images are computed.
    is_rest = stages[0] == "reconstruct MLPs" or stages[1] in ("reconstruct", "Fisher pass")
    return "rest" if is_rest else "other"


def real_seconds(record: ResultRecord, found: Spent, real: Recipe | None, images: int) -> float:
    """Return the estimated seconds of a real cell.

    Args:
        record, found: record and times of the rehearsed cell.
        real: recipe of the real cell; None for full precision.
        images: number of images that the real cell is evaluated on.
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
    total += search * found.calibrate
    total += more * (found.rest + passes(real) * found.passed)
    total += real.steps * real.batch_size / small.batch_size * found.step
    total += real.mlp_steps * real.mlp_batch / small.mlp_batch * found.mlp_step
    return total


def real_memory(
    record: ResultRecord, found: Spent, real: Recipe | None, eval_batch: int, on_disk: bool
) -> tuple[int, int]:
    """Return the estimated peak of memory of a real cell and the size of its tape, in bytes.

    All memory beyond the loaded model is taken to grow with the batch, so the estimate is an upper
    bound where the batches of the rehearsal are smaller. The calibration images are added.

    Args:
        record, found, real: see `real_seconds`.
        eval_batch: images per forward pass.
        on_disk: True if the tape is not kept in memory.
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
    made = record.preprocessing
    image_bytes = 4 * math.prod(_DETECTOR_INPUT if made is None else made.input_size)
    kept = images * image_bytes + (0 if on_disk else tape)
    return int(loaded + max(grown - found.tape_bytes, 0) * batch + kept), tape
