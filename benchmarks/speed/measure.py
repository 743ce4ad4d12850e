"""One model's measurement, from its settings to its record."""

from collections.abc import Callable
from datetime import UTC, datetime

import torch

from benchmarks.published.minutes import published_minutes
from benchmarks.speed.extrapolate import SegmentCost, depth_scaling, line, protocol_seconds
from benchmarks.speed.floors import Rates, floors_ms
from benchmarks.speed.memory import Peak, measure_peak
from benchmarks.speed.record import SpeedRecord
from benchmarks.speed.search import compare_searches
from benchmarks.speed.settings import Settings, protocol
from benchmarks.speed.stages import MakeTimes, WalkTimes, calibration_seconds, walk
from benchmarks.speed.steps import fresh_compiler
from benchmarks.speed.subjects import Subject, load_subject
from benchmarks.speed.timing import Budget
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.engines import Engine, choose_engine
from tasks.common.environment import describe

#: A direct calibration takes about so many times the fast one. Seconds that the memory measurement takes to start.
DIRECT_GUESS, MEMORY_GUESS = 10.0, 15.0

Say = Callable[[str], None]


def measure(model: str, settings: Settings, rates: Rates, device: torch.device, budget: Budget, say: Say) -> SpeedRecord:
    """Measure one model.

    Args:
        model: its short name.
        settings: sizes.
        rates: of the machine.
        device: where.
        budget: what does not fit into it is left out, and the record says so.
        say: receives a line for people at every stage.
    """
    recipe, full = settings.recipe(), protocol()
    notes: list[str] = []

    def load() -> Subject:
        return load_subject(model, recipe, device)

    few = recipe.model_copy(update={"range_images": max(recipe.range_images // 4, 1)})
    say(f"{model}: calibration on {few.range_images} and {recipe.range_images} images")
    subject = load()
    small = calibration_seconds(subject.chain, subject.images, few)
    subject = load()
    large = calibration_seconds(subject.chain, subject.images, recipe)
    say(f"{model}: {len(subject.makes)} makes of blocks, {settings.steps} steps by {', '.join(settings.engines)}")
    with fresh_compiler():
        times = walk(subject, recipe, settings.engines, settings.steps, budget)
    notes += times.notes
    # The Fisher pass through the whole model is most of that measurement.
    sweep = settings.memory_images * sum(times.tail[index] for index in subject.order)
    peak = None
    if settings.memory_images and budget.left() < MEMORY_GUESS + 3 * sweep:
        notes.append("no time left to measure peak memory")
    elif settings.memory_images:
        say(f"{model}: peak memory with {settings.memory_images} images")
        peak = _peak(model, settings.memory_images, recipe, device)
    search = None
    if settings.direct and budget.left() < DIRECT_GUESS * sum(large):
        notes.append("no time left for direct candidate search")
    elif settings.direct:
        say(f"{model}: direct candidate search on {recipe.range_images} images")
        search = compare_searches(load, recipe, sum(large))
    sizes = (few.range_images, recipe.range_images)
    calibration = [line((sizes[0], a), (sizes[1], b), full.range_images) for a, b in zip(small, large, strict=True)]
    engine = protocol_engine(times.makes[subject.main], device, full.steps)
    costs = segment_costs(subject, times, calibration, engine)
    makes, main = times.makes, times.makes[subject.main]
    compiling = sum(seconds_to_compile(make, main, engine) for make in makes.values())
    stages = protocol_seconds(costs, subject.order, full, compiling)
    floors = floors_ms(main.work, rates)
    published = (time.minutes for time in published_minutes().get(model, ()) if time.method == "fimaq")
    environment = describe(device)
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return SpeedRecord(
        device=f"{environment.device}{threads}",
        model=model,
        step_ms={name: 1000 * value for name, value in main.step_s.items()},
        floor_ms=max(floors.values()),
        stages_s={"calibration": sum(large), **times.wall},
        peak_bytes=None if peak is None else peak.peak_bytes,
        full_protocol_min=stages.total / 60,
        published_min=next(published, None),
        versions=environment.versions,
        date=datetime.now(UTC).date().isoformat(),
        extrapolated=True,
        full_protocol_s=stages.as_dict(),
        full_protocol_engine=engine,
        fisher_share=stages.fisher / stages.total,
        measured={
            "steps": main.counted,
            "images": len(subject.images),
            "range_images": recipe.range_images,
            "whole_model": len(subject.chain) == len(subject.order),
            "step_dtype": recipe.step_dtype,
            "frozen_dtype": recipe.frozen_dtype,
        },
        rates={"flops": rates.flops, "bytes": rates.bytes},
        floors_ms=floors,
        calls_a_step={str(name): count for name, count in main.calls.items()},
        calls_are="kernels" if device.type == "cuda" else "operator calls",
        calibration_s={str(sizes[0]): sum(small), str(sizes[1]): sum(large)},
        fisher_check=fisher_check(subject, times),
        step_ms_by_make=[
            {
                "label": make.label,
                "kind": make.kind,
                "blocks": make.count,
                "input": list(make.shape),
                "step_ms": {name: 1000 * value for name, value in makes[number].step_s.items()},
                "compile_s": dict(makes[number].compile_s),
                "floors_ms": floors_ms(makes[number].work, rates),
                "flops": makes[number].work.flops,
                "bytes": makes[number].work.bytes,
            }
            for number, make in enumerate(subject.makes)
        ],
        memory=None if peak is None else _memory(peak),
        search=None if search is None else search.as_dict(),
        scaling=scaling(subject, costs, full),
        notes=notes,
        revision=environment.git_revision,
    )


def _peak(model: str, images: int, recipe: Recipe, device: torch.device) -> Peak:
    changes = {"calibration_images": images, "batch_size": min(32, images)}
    return measure_peak(model, recipe.model_copy(update=changes), str(device), torch.get_num_threads())


def _memory(peak: Peak) -> dict[str, float]:
    return {
        "images": peak.images,
        "peak_bytes": peak.peak_bytes,
        "formula_bytes": peak.formula_bytes,
        "ratio": peak.peak_bytes / peak.formula_bytes,
        **{f"{name}_bytes": value for name, value in vars(peak.footprint).items()},
    }


def protocol_engine(main: MakeTimes, device: torch.device, steps: int) -> Engine:
    """The engine that the full protocol would run by here; the fastest that was measured, where that one was not."""
    choice = choose_engine("auto", device, steps)
    return choice if choice in main.step_s else min(main.step_s, key=lambda engine: main.step_s[engine])


def step_seconds(make: MakeTimes, main: MakeTimes, engine: Engine) -> float:
    """Seconds of a make's step by ``engine``; where it was not timed, by another engine times what the main make gains."""
    if engine in make.step_s:
        return make.step_s[engine]
    other = next(iter(make.step_s))
    return make.step_s[other] * main.step_s[engine] / main.step_s.get(other, main.step_s[engine])


def seconds_to_compile(make: MakeTimes, main: MakeTimes, engine: Engine) -> float:
    """Seconds that compiling a make takes; the main make's where that was not measured."""
    return make.compile_s.get(engine, main.compile_s.get(engine, 0.0))


def segment_costs(subject: Subject, times: WalkTimes, calibration: list[float], engine: Engine) -> list[SegmentCost]:
    """What each measured segment costs in the full protocol (calibration: seconds at its images)."""
    main = times.makes[subject.main]
    return [
        SegmentCost(
            calibration[index],
            times.tape[index],
            times.own[number],
            times.tail[index],
            step_seconds(times.makes[number], main, engine),
            number in times.passes,
        )
        for index, number in enumerate(subject.make_of)
    ]


def fisher_check(subject: Subject, times: WalkTimes) -> float | None:
    """Seconds of all measured Fisher passes over what their parts add up to; near 1 where the extrapolation holds."""
    predicted = 0.0
    for number in times.passes:
        index = subject.make_of.index(number)
        predicted += len(subject.images) * (times.own[number] + sum(times.tail[index + 1 :]))
    return sum(times.passes.values()) / predicted if predicted else None


def scaling(subject: Subject, costs: list[SegmentCost], full: Recipe) -> dict[str, float] | None:
    """What twice the depth costs, from the measured parts; None for models with several makes of blocks."""
    repeated = [index for index, number in enumerate(subject.make_of) if number == subject.main]
    if sum(make.kind in ("block", "merge") for make in subject.makes) != 1:
        return None
    # Where all blocks were measured, the first of them stands for all.
    order = [repeated[0] if index in repeated else index for index in subject.order]
    return depth_scaling(costs, order, repeated[0], full)
