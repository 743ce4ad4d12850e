"""Seconds of calibration, tape, Fisher passes and steps, segment by segment."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.speed.floors import Work
from benchmarks.speed.steps import PathRun, TimedObjective, kernels, step_work, time_steps
from benchmarks.speed.subjects import Subject
from benchmarks.speed.timing import Budget, best_seconds, now, seconds
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import decide_roundings, set_quantized
from fimaq_core.numerics import arithmetic
from fimaq_core.progress import Progress
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.engines import Engine
from fimaq_core.reconstruction.reconstruct import expand_per_token
from fimaq_core.reconstruction.tape import Storage, Tape

#: Engines that need no compiler; steps are counted with them.
PLAIN: tuple[Engine, ...] = ("fused", "eager")
#: Seconds a compilation is expected to take before one has been seen.
COMPILE_GUESS = 60.0


@dataclass
class MakeTimes:
    """Steps of one make.

    Attributes:
        step_s: median seconds of a step by engine.
        compile_s: seconds of the first step by engine, where that compiles.
        work: what a step does.
        calls: operator calls of a step by engine (kernels on CUDA).
        counted: steps behind each median.
    """

    step_s: dict[Engine, float]
    compile_s: dict[Engine, float]
    work: Work
    calls: dict[Engine, int]
    counted: int


@dataclass
class WalkTimes:
    """What a walk over a subject's chain measured.

    Attributes:
        tape: seconds an image of each segment: one full-precision and one quantized forward.
        tail: seconds an image of each segment, forward and backward inside a Fisher pass.
        own: seconds an image of each make's own forward in its Fisher pass; 0 where there is none.
        passes: seconds of the Fisher pass of each make that has one.
        makes: steps of each make.
        wall: seconds of the whole stages ``tape``, ``fisher`` and ``steps``.
        notes: what was left out.
    """

    tape: list[float]
    tail: list[float]
    own: dict[int, float] = field(default_factory=dict)
    passes: dict[int, float] = field(default_factory=dict)
    makes: dict[int, MakeTimes] = field(default_factory=dict)
    wall: dict[str, float] = field(default_factory=lambda: {"tape": 0.0, "fisher": 0.0, "steps": 0.0})
    notes: list[str] = field(default_factory=list)


def calibration_seconds(chain: BlockChain, images: Tensor, recipe: Recipe) -> list[float]:
    """Calibrate ``chain`` on the first ``recipe.range_images`` and return the seconds of each segment."""
    device = images.device
    marks: list[float] = []

    def report(_: Progress) -> None:
        marks.append(now(device))

    calibrate(chain, images, recipe, report=report)
    return [end - start for start, end in itertools.pairwise(marks)]


def tail_seconds(chain: BlockChain, images: Tensor, recipe: Recipe, repeats: int = 3) -> list[float]:
    """Seconds an image of each segment's forward and backward in full precision, as behind a Fisher pass."""
    set_quantized(chain, False)
    x, device, out = images, images.device, []
    for segment in chain:
        with arithmetic(recipe.frozen_dtype, device):
            after = _forward_backward(segment, x)
            out.append(best_seconds(functools.partial(_forward_backward, segment, x), device, repeats) / len(x))
        x = after
    return out


def _forward_backward(segment: Segment, x: Tensor) -> Tensor:
    """Forward and backward; returns the output."""
    entry = x.detach().requires_grad_(True)
    with torch.enable_grad():
        out: Tensor = segment(entry)
    torch.autograd.grad(out, entry, torch.ones_like(out))
    return out.detach().float()


def walk(subject: Subject, recipe: Recipe, engines: Sequence[Engine], steps: int, budget: Budget) -> WalkTimes:
    """Walk over a calibrated chain as a reconstruction does; time the steps of the first block of each make.

    Args:
        subject: calibrated; its blocks stay unoptimised (each is rounded to nearest before the next one's turn).
        recipe: of the steps.
        engines: to time. Where time runs out, makes other than the main one go without those that compile.
        steps: counted steps of each engine and make.
        budget: of the time.
    """
    chain, images, device = subject.chain, subject.images, subject.images.device
    if recipe.per_token:
        expand_per_token(chain, images[:1])
    times = WalkTimes([], tail_seconds(chain, images[: recipe.batch_size], recipe))
    set_quantized(chain, False)
    with torch.no_grad():
        reference = torch.cat([chain(part).float() for part in torch.split(images, 32)])
    start = now(device)
    tape = Tape(chain, images, Storage("device", device), with_prefix=recipe.prefix_prob > 0, frozen_dtype=recipe.frozen_dtype)
    entry = now(device) - start
    for index, segment in enumerate(chain):
        spent = entry + seconds(tape.compute_target, device)
        entry = 0.0
        number = subject.make_of[index]
        if number not in times.makes:
            chosen = list(engines)
            if number != subject.main and budget.left() < _reserve(times, subject.main):
                chosen = _without_compiler(chosen, segment, times)
            begin = now(device)
            objective = TimedObjective(chain, tape, recipe, reference, ClassifierDivergence(recipe.temperature), times.notes)
            runs = time_steps(segment, tape, objective, recipe, chosen, steps, budget)
            times.makes[number] = _make_times(runs, segment, tape, objective, recipe)
            times.wall["steps"] += now(device) - begin - objective.pass_s
            times.wall["fisher"] += objective.pass_s
            times.own[number] = objective.own_s / len(images)
            if objective.update_steps:
                times.passes[number] = objective.pass_s
        if index + 1 < len(chain):
            decide_roundings(segment.block)
            spent += seconds(tape.advance, device)
        times.tape.append(spent / len(images))
        times.wall["tape"] += spent
    return times


def _without_compiler(engines: Sequence[Engine], segment: Segment, times: WalkTimes) -> list[Engine]:
    kept = [engine for engine in engines if engine in PLAIN]
    if len(kept) == len(engines):
        return kept
    times.notes.append(f"{segment.label}: no time left to compile; its step is estimated from the engine 'fused'")
    return kept if "fused" in kept else ["fused", *kept]


def _reserve(times: WalkTimes, main: int) -> float:
    """Seconds that must be left for another make to be compiled: its own, and the main one's where that is still to come."""
    seen = [sum(make.compile_s.values()) for make in times.makes.values()]
    return max(seen, default=COMPILE_GUESS) * (1.5 if main in times.makes else 3.0)


def _make_times(
    runs: dict[Engine, PathRun], segment: Segment, tape: Tape, objective: TimedObjective, recipe: Recipe
) -> MakeTimes:
    device = tape.storage.device
    step_s = {engine: run.step_s for engine, run in runs.items()}
    compile_s = {engine: max(run.first_s - run.step_s, 0.0) for engine, run in runs.items() if engine not in PLAIN}
    counted = min(len(run.laps) for run in runs.values())
    calls: dict[Engine, int] = {}
    if device.type == "cuda":
        calls = {engine: kernels(run) for engine, run in runs.items()}
    plain = {engine: run for engine, run in runs.items() if engine in PLAIN}
    if not plain:
        plain = time_steps(segment, tape, objective, recipe, ["fused"], 1, Budget.of(0))
    for engine, run in plain.items():
        work, count = step_work(run, recipe)
        if device.type != "cuda":
            calls[engine] = count
    return MakeTimes(step_s, compile_s, work, calls, counted)
