"""Measurement of one model, from its sizes to its record."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import torch
from torch._inductor.utils import fresh_cache

from benchmarks.costs.sources import published_minutes
from benchmarks.speed.memory import measure_peak
from benchmarks.speed.results import SpeedRecord
from benchmarks.speed.steps import Rates
from benchmarks.speed.walk import calibration_seconds, extrapolate, protocol_seconds, walk
from benchmarks.speed.workload import load_workload
from fimaq_core.recipe import make_recipe
from fimaq_core.reconstruction.engines import Engine, choose_engine, cpp_compiler
from tasks.classification.tags import DEMO_NAMES
from tasks.common.cell.environment import describe

#: Seconds from the start of the memory measurement's process to its first step.
MEMORY_START = 15.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of one model's measurement."""

    engines: tuple[Engine, ...]  #: in order of their turns
    steps: int  #: timed steps per engine, on one block of every structure
    images: int  #: on the tape
    range_images: int  #: for calibration, which is also timed on a quarter of them
    memory_images: int  #: on the tape of the memory measurement; 0: no such measurement


def default_sizes(model: str, device: torch.device) -> Sizes:
    """Return sizes with which the default models take no longer than the command's help says."""
    if device.type == "cuda":
        return Sizes(("eager", "fused", "compiled", "graph"), 300, 128, 128, 64)
    if model in DEMO_NAMES:
        compiled: tuple[Engine, ...] = ("compiled",) if cpp_compiler() else ()
        return Sizes(("eager", "fused", *compiled), 200, 256, 128, 256)
    return Sizes(("eager", "fused"), 5, 32, 8, 64)


def measure(
    model: str,
    sizes: Sizes,
    rates: Rates,
    device: torch.device,
    deadline: float,
    say: Callable[[str], None],
) -> SpeedRecord:
    """Measure one model.

    The first steps are timed, so the rounding regulariser is on from the first step. In the full
    protocol it is on in the last four fifths of the steps. A measurement that would end after
    ``deadline`` (of ``time.monotonic``) is left out, with a note in the record. ``say`` prints one
    line per stage.
    """
    full = make_recipe("fimaq", {"w_bits": 3, "a_bits": 3})
    changes = {"calibration_images": sizes.images, "range_images": sizes.range_images}
    changes |= {"batch_size": min(32, sizes.images), "round_warmup": 0.0}
    recipe = full.model_copy(update=changes)
    few = recipe.model_copy(update={"range_images": max(sizes.range_images // 4, 1)})
    say(f"{model}: calibration on {few.range_images} and {recipe.range_images} images")
    small = calibration_seconds(load_workload(model, recipe, device), few)
    workload = load_workload(model, recipe, device)
    large = calibration_seconds(workload, recipe)
    structures = workload.structures
    say(f"{model}: {len(structures)} different segments, {sizes.steps} steps by each engine")
    with fresh_cache():  # an empty cache of compiled kernels
        times = walk(workload, recipe, sizes.engines, sizes.steps, deadline)
    notes, peak = list(times.notes), None
    images = sizes.memory_images
    # Most of the memory measurement's time is a Fisher pass through the whole model.
    pass_s = images * sum(times.segments[index].tail for index in workload.order)
    if images and deadline - time.monotonic() < MEMORY_START + 3 * pass_s:
        notes.append("no time left to measure peak memory")
    elif images:
        say(f"{model}: peak memory with {images} images")
        update = {"calibration_images": images, "batch_size": min(32, images)}
        peak = measure_peak(model, recipe.model_copy(update=update), device)
    main = times.steps[workload.main]
    choice = choose_engine("auto", device, full.steps)
    engine = choice if choice in main.step_s else min(main.step_s, key=main.step_s.__getitem__)
    # Engines that compile were timed on the main structure only; elsewhere their ratio to `fused`
    # is assumed to be the same.
    ratio = main.step_s[engine] / main.step_s["fused"]
    for index, segment in enumerate(times.segments):
        ends = (few.range_images, small[index]), (recipe.range_images, large[index])
        segment.calibration = extrapolate(*ends, full.range_images)
        step_s = times.steps[workload.structure_of[index]].step_s
        segment.step = step_s[engine] if engine in step_s else step_s["fused"] * ratio
    compile_s = len(structures) * main.compile_s.get(engine, 0.0)
    stages = protocol_seconds(workload.order, times.segments, full, compile_s)
    floors = rates.floors_ms(main.flops, main.bytes)
    published = (one.minutes for one in published_minutes().get(model, ()) if one.method == "fimaq")
    environment, cuda = describe(device), device.type == "cuda"
    return SpeedRecord(
        device=environment.device + ("" if cuda else f", {torch.get_num_threads()} threads"),
        model=model,
        step_ms=main.step_ms,
        floor_ms=max(floors.values()),
        stages_s={"calibration": sum(large), **times.wall},
        peak_bytes=peak,
        full_protocol_min=sum(stages.values()) / 60,
        published_min=next(published, None),
        versions=environment.versions,
        date=datetime.now(UTC).date().isoformat(),
        extrapolated=True,
        full_protocol_s=stages,
        full_protocol_engine=engine,
        measured={
            "steps": sizes.steps,
            "images": len(workload.images),
            "range_images": recipe.range_images,
            "memory_images": sizes.memory_images,
            "whole_model": len(workload.chain) == len(workload.order),
            "step_dtype": recipe.step_dtype,
            "frozen_dtype": recipe.frozen_dtype,
        },
        rates=asdict(rates),
        floors_ms=floors,
        calibration_s={str(few.range_images): sum(small), str(recipe.range_images): sum(large)},
        step_ms_by_make=[
            {
                "label": structure.label,
                "kind": structure.kind,
                "blocks": structure.count,
                "input": list(structure.shape),
                "step_ms": one.step_ms,
                "compile_s": one.compile_s,
                "floors_ms": rates.floors_ms(one.flops, one.bytes),
                "flops": one.flops,
                "bytes": one.bytes,
            }
            for structure, one in zip(structures, times.steps, strict=True)
        ],
        notes=notes,
        revision=environment.git_revision,
    )
