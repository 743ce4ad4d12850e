"""From the measured times of a rehearsed cell to seconds and memory of the real one.

Each time is taken to be proportional to what it is spent on:

load         constant
calibrate    range images x range candidates x (1 + rounds)
MLPs         steps x images per step; the rest: calibration images
reconstruct  steps x images per step; Fisher passes x calibration images; the rest: as of MLPs
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

#: Texts that stand for ImageNet's classes in zero-shot classification: 1000 classes x 80 templates.
_TEXTS = 80_000
#: (C, H, W) of a photograph that is resized and padded for a detector.
_DETECTOR_INPUT = (3, 800, 1344)


@dataclass(frozen=True)
class Spent:
    """Seconds of a rehearsed cell, each the sum over all blocks."""

    calibrate: float
    passed: float  #: one Fisher pass per block
    step: float  #: one optimisation step per block
    mlp_step: float  #: one per MLP
    rest: float  #: all else in the stage of the steps
    mlp_rest: float
    text: float  #: embedding of one text
    texts: int  #: number of texts that were embedded
    total: float  #: all of it, attempts that were killed included
    tape_bytes: int  #: largest
    peak_memory_bytes: int  #: largest


def spent(events: Sequence[dict[str, Any]]) -> Spent:
    """Sum up the events of a cell; see :func:`benchmarks.rehearsal.cell.read_events`.

    What an attempt did again replaces what earlier ones had measured of the same block.
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
            sums[kind] += times[-1]  # earlier ones warm up, and make what the block needs
            rest = "mlp_rest" if kind == "mlp_step" else "rest"
            sums[rest] += max(sum(times) - len(times) * times[-1], 0.0)
        else:
            sums[kind] += sum(times)
    texts = [event["done"] for event in events if event["stage"] == "embed classes"] or [0]
    names = ("calibrate", "passed", "step", "mlp_step", "rest", "mlp_rest")
    return Spent(
        **{name: sums[name] for name in names},
        text=sums["text"] / max(texts[-1] - texts[0], 1),
        texts=texts[-1],
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
    """Return the estimated seconds of a real cell (``real``: its recipe, ``images``: evaluated)."""
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
    total += more * (found.rest + found.mlp_rest + passes(real) * found.passed)
    total += real.steps * real.batch_size / small.batch_size * found.step
    total += real.mlp_steps * real.mlp_batch / small.mlp_batch * found.mlp_step
    return total


def real_memory(
    record: ResultRecord, found: Spent, real: Recipe | None, eval_batch: int, on_disk: bool
) -> tuple[int, int]:
    """Return the estimated largest memory of a real cell, and the bytes of its tape.

    What grows with the images of a batch is at most all that is there beyond the loaded model, so
    the estimate is an upper bound where batches are smaller than the real ones. Calibration images
    are added, and the tape unless it lies ``on_disk``. ``eval_batch``: images of a forward pass.
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
