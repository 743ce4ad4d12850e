"""Seconds of calibration, tape, Fisher passes and steps, segment by segment."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from benchmarks.speed.steps import TimedObjective, kernels, step_work, time_steps, timed
from benchmarks.speed.subjects import Subject
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

#: Engines that need no compiler.
PLAIN: tuple[Engine, ...] = ("fused", "eager")


@dataclass(frozen=True)
class MakeTimes:
    """Steps of one make.

    Attributes:
        step_s: median seconds per step by engine.
        compile_s: seconds of the first step by engine, for engines that compile.
        flops: operations of a step.
        bytes: bytes of a step, see :func:`~benchmarks.speed.steps.step_bytes`.
        calls: operator calls of a step by engine (kernels on CUDA).
    """

    step_s: dict[Engine, float]
    compile_s: dict[Engine, float]
    flops: int
    bytes: int
    calls: dict[Engine, int]


@dataclass
class WalkTimes:
    """Times of a walk over a subject's chain.

    Attributes:
        tail: seconds per image of each segment, forward and backward inside a Fisher pass.
        tape: seconds per image of each segment: one full-precision and one quantized forward.
        own: seconds per image of each make's own forward in its Fisher pass.
        passes: seconds of the Fisher pass of each make that has one.
        makes: steps of each make.
        wall: seconds of the whole stages ``tape``, ``fisher`` and ``steps``.
        notes: warnings of the objectives.
    """

    tail: list[float]
    tape: list[float] = field(default_factory=list)
    own: dict[int, float] = field(default_factory=dict)
    passes: dict[int, float] = field(default_factory=dict)
    makes: dict[int, MakeTimes] = field(default_factory=dict)
    wall: dict[str, float] = field(default_factory=lambda: {"tape": 0.0, "fisher": 0.0, "steps": 0.0})
    notes: list[str] = field(default_factory=list)

    def fisher_check(self, subject: Subject) -> float | None:
        """Return the seconds of all Fisher passes over the sum of their parts; None without passes.

        It is near 1 where the extrapolation holds.
        """
        expected = 0.0
        for number in self.passes:
            index = subject.make_of.index(number)
            expected += self.own[number] + sum(self.tail[index + 1 :])
        expected *= len(subject.images)
        return sum(self.passes.values()) / expected if expected else None


def calibration_seconds(chain: BlockChain, images: Tensor, recipe: Recipe) -> list[float]:
    """Calibrate ``chain`` on the first ``recipe.range_images``; return the seconds per segment."""
    marks: list[float] = []

    def report(_: Progress) -> None:
        marks.append(timer())

    calibrate(chain, images, recipe, report=report)
    return [end - start for start, end in itertools.pairwise(marks)]


def tail_seconds(chain: BlockChain, images: Tensor, recipe: Recipe) -> list[float]:
    """Return the seconds per image of each segment's full-precision forward and backward."""
    set_quantized(chain, False)
    x, found = images, []
    for segment in chain:
        with arithmetic(recipe.frozen_dtype, images.device):
            work = partial(_forward_backward, segment, x)
            found.append(timed(work).timeit(3).mean / len(x))
            x = work()
    return found


def _forward_backward(segment: Segment, x: Tensor) -> Tensor:
    """Run forward and backward, and return the output."""
    entry = x.detach().requires_grad_(True)
    with torch.enable_grad():
        out: Tensor = segment(entry)
    torch.autograd.grad(out, entry, torch.ones_like(out))
    return out.detach().float()


def walk(
    subject: Subject,
    recipe: Recipe,
    engines: Sequence[Engine],
    steps: int,
    deadline: float,
) -> WalkTimes:
    """Walk over a calibrated chain as a reconstruction does; time steps of one block per make.

    Engines that compile have their turn on the most frequent make only.

    Args:
        subject: calibrated; each block is rounded to nearest before the next one's turn.
        recipe: of the steps.
        engines: to time; ``fused`` is one of them.
        steps: counted steps per engine and make; fewer after ``deadline``.
        deadline: on the clock of ``time.monotonic``.
    """
    chain, images = subject.chain, subject.images
    if recipe.per_token:
        expand_per_token(chain, images[:1])
    times = WalkTimes(tail_seconds(chain, images[: recipe.batch_size], recipe))
    set_quantized(chain, False)
    with torch.no_grad():
        reference = torch.cat([chain(part).float() for part in torch.split(images, 32)])
    divergence = ClassifierDivergence(recipe.temperature)
    storage = Storage("device", images.device)
    mixed, dtype = recipe.prefix_prob > 0, recipe.frozen_dtype
    start = timer()
    tape = Tape(chain, images, storage, with_prefix=mixed, frozen_dtype=dtype)
    for index, segment in enumerate(chain):
        tape.compute_target()
        spent = timer() - start
        number = subject.make_of[index]
        if number not in times.makes:
            start = timer()
            objective = TimedObjective(chain, tape, recipe, reference, divergence, times.notes)
            chosen = [one for one in engines if one in PLAIN or number == subject.main]
            times.makes[number] = _steps_of(segment, objective, recipe, chosen, steps, deadline)
            times.wall["steps"] += timer() - start - objective.pass_s
            times.wall["fisher"] += objective.pass_s
            times.own[number] = objective.own_s / len(images)
            if objective.update_steps:
                times.passes[number] = objective.pass_s
        if index + 1 < len(chain):
            decide_roundings(segment.block)
            start = timer()
            tape.advance()
            spent += timer() - start
        start = timer()
        times.tape.append(spent / len(images))
        times.wall["tape"] += spent
    return times


def _steps_of(
    segment: Segment,
    objective: TimedObjective,
    recipe: Recipe,
    engines: Sequence[Engine],
    steps: int,
    deadline: float,
) -> MakeTimes:
    runs = time_steps(segment, objective.tape, objective, recipe, engines, steps, deadline)
    works = {engine: step_work(runs[engine], recipe) for engine in engines if engine in PLAIN}
    calls = {engine: count for engine, (_, _, count) in works.items()}
    if objective.tape.storage.device.type == "cuda":
        calls = {engine: kernels(run) for engine, run in runs.items()}
    flops, moved, _ = works["fused"]
    compiled = {engine: run for engine, run in runs.items() if engine not in PLAIN}
    return MakeTimes(
        step_s={engine: run.step_s for engine, run in runs.items()},
        compile_s={engine: max(run.first_s - run.step_s, 0.0) for engine, run in compiled.items()},
        flops=flops,
        bytes=moved,
        calls=calls,
    )
