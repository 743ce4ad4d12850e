"""Seconds of calibration, tape, Fisher passes and steps per segment, and of the full protocol."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from benchmarks.speed.steps import PLAIN, StepTimes, TimedObjective, time_steps, timed
from benchmarks.speed.workload import Workload
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import decide_roundings, set_quantized
from fimaq_core.numerics import arithmetic
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.engines import Engine
from fimaq_core.reconstruction.reconstruct import expand_per_token
from fimaq_core.reconstruction.tape import Storage, Tape


@dataclass
class SegmentTimes:
    """Seconds of one measured segment."""

    calibration: float = 0.0  #: with the protocol's number of images
    tape: float = 0.0  #: per image: two forwards
    #: Per image: the segment's part of its Fisher pass, without later segments' ``tail``.
    own: float | None = None  # None without Fisher passes
    tail: float = 0.0  #: per image: forward and backward, in the Fisher pass of an earlier block
    step: float = 0.0  #: per step


@dataclass
class WalkTimes:
    """Times of a walk over the chain of a workload."""

    segments: list[SegmentTimes]
    steps: list[StepTimes] = field(default_factory=list)  #: one per structure
    wall: dict[str, float] = field(default_factory=dict)  #: seconds by stage
    notes: list[str] = field(default_factory=list)  #: warnings of the objectives


def calibration_seconds(workload: Workload, recipe: Recipe) -> list[float]:
    """Calibrate a workload on ``recipe.range_images`` images; return the seconds per segment."""
    marks: list[float] = []
    chain, images = workload.chain, workload.images
    calibrate(chain, images, recipe, on_progress=lambda _: marks.append(timer()))
    return [end - start for start, end in itertools.pairwise(marks)]


def _tail_seconds(chain: BlockChain, images: Tensor, recipe: Recipe) -> list[float]:
    """Return the seconds per image of each segment's full-precision forward and backward."""
    x, found = images, []

    def work(segment: Segment) -> Tensor:
        entry = x.detach().requires_grad_(True)
        with torch.enable_grad():
            out: Tensor = segment(entry)
        torch.autograd.grad(out, entry, torch.ones_like(out))
        return out.detach().float()

    for segment in chain:
        with arithmetic(recipe.frozen_dtype, images.device):
            found.append(timed(lambda one=segment: work(one)).timeit(3).mean / len(x))
            x = work(segment)
    return found


def start_tape(chain: BlockChain, images: Tensor, recipe: Recipe) -> tuple[Tape, Tensor]:
    """Return a tape at the first block of a calibrated chain, and the full-precision outputs."""
    if recipe.per_token:
        expand_per_token(chain, images[:1])
    set_quantized(chain, False)
    with torch.no_grad():
        reference = torch.cat([chain(part).float() for part in torch.split(images, 32)])
    storage, mixed = Storage("device", images.device), recipe.prefix_prob > 0
    tape = Tape(chain, images, storage, with_prefix=mixed, frozen_dtype=recipe.frozen_dtype)
    return tape, reference


def walk(
    workload: Workload, recipe: Recipe, engines: Sequence[Engine], steps: int, deadline: float
) -> WalkTimes:
    """Walk over a calibrated chain as a reconstruction does; time steps of one block per structure.

    Engines that compile are timed on the most frequent structure only. The weights of each block
    are rounded to nearest before the walk reaches the next block. For ``engines``, ``steps`` and
    ``deadline`` see :func:`time_steps`.
    """
    chain, images = workload.chain, workload.images
    tape, reference = start_tape(chain, images, recipe)
    tails = _tail_seconds(chain, images[: recipe.batch_size], recipe)
    times = WalkTimes([SegmentTimes(tail=seconds) for seconds in tails])
    times.wall = {"tape": 0.0, "fisher": 0.0, "steps": 0.0}
    divergence = ClassifierDivergence(recipe.temperature)
    start = timer()
    for index, segment in enumerate(chain):
        tape.compute_target()
        spent = timer() - start
        number = workload.structure_of[index]
        if number == len(times.steps):  # the first segment of this structure
            start = timer()
            objective = TimedObjective(chain, tape, recipe, reference, divergence, times.notes)
            chosen = [one for one in engines if one in PLAIN or number == workload.main]
            timed_steps = time_steps(segment, objective, recipe, chosen, steps, deadline)
            times.wall["steps"] += timer() - start - timed_steps.pass_s
            times.wall["fisher"] += timed_steps.pass_s
            times.steps.append(timed_steps)
        if index + 1 < len(chain):
            decide_roundings(segment.block)
            start = timer()
            tape.advance()
            spent += timer() - start
        start = timer()
        times.wall["tape"] += spent
        times.segments[index].tape = spent / len(images)
        if pass_s := times.steps[number].pass_s:
            behind = sum(tails[workload.structure_of.index(number) + 1 :])
            times.segments[index].own = max(pass_s / len(images) - behind, 0.0)
    return times


def extrapolate(small: tuple[int, float], large: tuple[int, float], at: int) -> float:
    """Return the seconds for ``at`` images, by the line through two points (images, seconds).

    The line never falls. If both points have the same number of images, it starts at zero.
    """
    (few, few_s), (many, many_s) = small, large
    if few == many:
        return many_s * at / many
    slope = max((many_s - few_s) / (many - few), 0.0)
    return max(many_s + slope * (at - many), 0.0)


def protocol_seconds(
    order: Sequence[int], segments: Sequence[SegmentTimes], recipe: Recipe, compile_s: float = 0.0
) -> dict[str, float]:
    """Return the seconds of the full protocol by stage, from the measured segments.

    Args:
        order: for each segment of the model, the index of the measured segment equal to it.
        segments: the measured segments.
        recipe: steps, images and Fisher passes of the protocol.
        compile_s: seconds to compile the steps of all structures.
    """
    images, behind, fisher = recipe.calibration_images, 0.0, 0.0
    model = [segments[index] for index in order]
    for one in reversed(model):
        if one.own is not None:
            fisher += recipe.fisher_k * images * (one.own + behind)
        behind += one.tail
    return {
        "calibration": sum(one.calibration for one in model),
        "tape": images * sum(one.tape for one in model),
        "fisher": fisher,
        "steps": recipe.steps * sum(one.step for one in model),
        "compile": compile_s,
    }
