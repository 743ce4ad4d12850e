"""Seconds of calibration, tape, Fisher passes and steps by segment, and of the full protocol."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from benchmarks.speed.steps import PLAIN, StepTimes, TimedObjective, time_steps, timed
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


@dataclass
class WalkTimes:
    """Times of a walk over a subject's chain, by segment or by make."""

    tail: list[float]  #: per image of a segment, forward and backward inside a Fisher pass
    tape: list[float] = field(default_factory=list)  #: per image of a segment, two forwards
    own: dict[int, float] = field(default_factory=dict)  #: per image, own forward in the pass
    passes: dict[int, float] = field(default_factory=dict)  #: Fisher pass of a make that has one
    makes: dict[int, StepTimes] = field(default_factory=dict)
    wall: dict[str, float] = field(default_factory=dict)  #: of whole stages
    notes: list[str] = field(default_factory=list)  #: warnings of the objectives

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

    def on_progress(_: Progress) -> None:
        marks.append(timer())

    calibrate(chain, images, recipe, on_progress=on_progress)
    return [end - start for start, end in itertools.pairwise(marks)]


def _tail_seconds(chain: BlockChain, images: Tensor, recipe: Recipe) -> list[float]:
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
    subject: Subject, recipe: Recipe, engines: Sequence[Engine], steps: int, deadline: float
) -> WalkTimes:
    """Walk over a calibrated chain as a reconstruction does; time steps of one block per make.

    Engines that compile have their turn on the most frequent make only. Each block is rounded to
    nearest before the next one's turn. Other arguments are those of :func:`time_steps`.
    """
    chain, images = subject.chain, subject.images
    if recipe.per_token:
        expand_per_token(chain, images[:1])
    times = WalkTimes(_tail_seconds(chain, images[: recipe.batch_size], recipe))
    set_quantized(chain, False)
    with torch.no_grad():
        reference = torch.cat([chain(part).float() for part in torch.split(images, 32)])
    divergence = ClassifierDivergence(recipe.temperature)
    storage = Storage("device", images.device)
    mixed, dtype = recipe.prefix_prob > 0, recipe.frozen_dtype
    times.wall = {"tape": 0.0, "fisher": 0.0, "steps": 0.0}
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
            times.makes[number] = time_steps(segment, objective, recipe, chosen, steps, deadline)
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


def line(small: tuple[int, float], large: tuple[int, float], at: int) -> float:
    """Return the seconds at ``at`` images, by the line through two measurements (images, seconds).

    The line never falls; through two of the same number of images it goes through zero.
    """
    (few, few_s), (many, many_s) = small, large
    if few == many:
        return many_s * at / many
    slope = max((many_s - few_s) / (many - few), 0.0)
    return max(many_s + slope * (at - many), 0.0)


def protocol_seconds(
    order: Sequence[int],
    recipe: Recipe,
    *,
    calibration: Sequence[float],
    tape: Sequence[float],
    own: Sequence[float | None],
    tail: Sequence[float],
    step: Sequence[float],
    compile_s: float = 0.0,
) -> dict[str, float]:
    """Return the seconds of the full protocol by stage, from those of each measured segment.

    Args:
        order: for each segment of the model, the index of the measured segment like it.
        recipe: steps, images and Fisher passes.
        calibration: with the protocol's images.
        tape: per image.
        own: per image, the block's own forward in its Fisher pass; None without passes.
        tail: per image, forward and backward as a part of another block's Fisher pass.
        step: per step.
        compile_s: to compile all makes.
    """
    images, behind, fisher = recipe.calibration_images, 0.0, 0.0
    for index in reversed(order):
        mine = own[index]
        if mine is not None:
            fisher += recipe.fisher_k * images * (mine + behind)
        behind += tail[index]
    return {
        "calibration": sum(calibration[index] for index in order),
        "tape": images * sum(tape[index] for index in order),
        "fisher": fisher,
        "steps": recipe.steps * sum(step[index] for index in order),
        "compile": compile_s,
    }
