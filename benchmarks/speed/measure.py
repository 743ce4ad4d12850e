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
from benchmarks.speed.subjects import load_subject
from benchmarks.speed.walk import calibration_seconds, line, protocol_seconds, walk
from fimaq_core.recipe import make_recipe
from fimaq_core.reconstruction.engines import Engine, choose_engine, cpp_compiler
from tasks.classification.tags import DEMO_NAMES
from tasks.common.cell.environment import describe

#: Seconds that the memory measurement takes to start.
MEMORY_START = 15.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of one model's measurement."""

    engines: tuple[Engine, ...]  #: in order of their turns
    steps: int  #: counted steps per engine, on one block of every make
    images: int  #: on the tape
    range_images: int  #: for calibration; a quarter of them is measured too
    memory_images: int  #: on the tape of the memory measurement; 0 leaves that out


def default_sizes(model: str, device: torch.device) -> Sizes:
    """Return sizes with which the default models end in time, see the command's help."""
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

    The rounding regulariser is on from the first step, since the first steps are timed; the
    protocol has it on in the last four fifths. Measurements that do not fit before ``deadline``
    (``time.monotonic``) are left out, with a note. ``say`` receives a line at every stage.
    """
    full = make_recipe("fimaq", {"w_bits": 3, "a_bits": 3})
    changes = {"calibration_images": sizes.images, "range_images": sizes.range_images}
    changes |= {"batch_size": min(32, sizes.images), "round_warmup": 0.0}
    recipe = full.model_copy(update=changes)
    few = recipe.model_copy(update={"range_images": max(sizes.range_images // 4, 1)})
    say(f"{model}: calibration on {few.range_images} and {recipe.range_images} images")
    subject = load_subject(model, recipe, device)
    small = calibration_seconds(subject.chain, subject.images, few)
    subject = load_subject(model, recipe, device)
    large = calibration_seconds(subject.chain, subject.images, recipe)
    say(f"{model}: {len(subject.makes)} makes of blocks, {sizes.steps} steps by each engine")
    with fresh_cache():  # an empty cache of compiled kernels
        times = walk(subject, recipe, sizes.engines, sizes.steps, deadline)
    notes, peak = list(times.notes), None
    # Most of the memory measurement is a Fisher pass through the whole model.
    sweep = sizes.memory_images * sum(times.segments[index].tail for index in subject.order)
    if sizes.memory_images and deadline - time.monotonic() < MEMORY_START + 3 * sweep:
        notes.append("no time left to measure peak memory")
    elif sizes.memory_images:
        say(f"{model}: peak memory with {sizes.memory_images} images")
        images = sizes.memory_images
        update = {"calibration_images": images, "batch_size": min(32, images)}
        peak = measure_peak(model, recipe.model_copy(update=update), device)
    main = times.makes[subject.main]
    choice = choose_engine("auto", device, full.steps)
    engine = choice if choice in main.step_s else min(main.step_s, key=main.step_s.__getitem__)
    # Where only the main make was timed with the engine, other makes get the same ratio to `fused`.
    ratio = main.step_s[engine] / main.step_s["fused"]
    for index, segment in enumerate(times.segments):
        ends = (few.range_images, small[index]), (recipe.range_images, large[index])
        segment.calibration = line(*ends, full.range_images)
        step_s = times.makes[subject.make_of[index]].step_s
        segment.step = step_s[engine] if engine in step_s else step_s["fused"] * ratio
    compile_s = len(subject.makes) * main.compile_s.get(engine, 0.0)
    stages = protocol_seconds(subject.order, times.segments, full, compile_s)
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
            "images": len(subject.images),
            "range_images": recipe.range_images,
            "memory_images": sizes.memory_images,
            "whole_model": len(subject.chain) == len(subject.order),
            "step_dtype": recipe.step_dtype,
            "frozen_dtype": recipe.frozen_dtype,
        },
        rates=asdict(rates),
        floors_ms=floors,
        calibration_s={str(few.range_images): sum(small), str(recipe.range_images): sum(large)},
        step_ms_by_make=[
            {
                "label": make.label,
                "kind": make.kind,
                "blocks": make.count,
                "input": list(make.shape),
                "step_ms": one.step_ms,
                "compile_s": one.compile_s,
                "floors_ms": rates.floors_ms(one.flops, one.bytes),
                "flops": one.flops,
                "bytes": one.bytes,
            }
            for make, one in zip(subject.makes, times.makes.values(), strict=True)
        ],
        notes=notes,
        revision=environment.git_revision,
    )
