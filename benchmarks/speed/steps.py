"""Seconds of an optimisation step by each engine, the work of a step, and its floors.

A floor is a lower limit of a step's time: its arithmetic at the machine's rate of matrix products,
or its bytes at the machine's rate of copies.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer, timer
from torch.utils.flop_counter import FlopCounterMode

from fimaq_core.chain import Segment
from fimaq_core.numerics import arithmetic
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.engines import Engine
from fimaq_core.reconstruction.objective import BlockObjective

#: Engines that need no compiler.
PLAIN: tuple[Engine, ...] = ("fused", "eager")
#: Steps of one engine in each turn.
ROUND = 10
#: Untimed steps after the first step, by type of device: they compile, capture and fill caches.
WARM_UP = {"cpu": 1, "cuda": 6}
#: Bytes of a float32, and passes of a step over rounded weights and over quantized activations;
#: README.md lists the passes.
FLOAT, WEIGHT_PASSES, ACTIVATION_PASSES = 4, 13, 4


def timed(work: Callable[[], object]) -> Timer:
    """Return a timer of ``work`` that keeps the number of threads."""
    return Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())


@dataclass(frozen=True)
class Rates:
    """Measured limits of the machine, per second."""

    flops: float  #: operations of large matrix products
    bytes: float  #: bytes read and bytes written by large copies

    def floors_ms(self, flops: int, moved: int) -> dict[str, float]:
        """Return the milliseconds that the operations and the bytes take at these rates."""
        return {"arithmetic": 1000 * flops / self.flops, "bytes": 1000 * moved / self.bytes}


def measure_rates(device: torch.device, size: int | None = None) -> Rates:
    """Measure the rates of float32 matrix products (size x size) and of copies."""
    size = size or (8192 if device.type == "cuda" else 1536)
    left = torch.randn(size, size, device=device)
    right, out = torch.randn_like(left), torch.empty_like(left)
    source = torch.zeros(16 * size * size, device=device)
    target = torch.empty_like(source)
    with arithmetic("float32", device):
        product = timed(lambda: torch.mm(left, right, out=out))
        product_s = min(product.blocked_autorange(min_run_time=0.5).times)
    copy_s = min(timed(lambda: target.copy_(source)).blocked_autorange(min_run_time=0.5).times)
    return Rates(2 * size**3 / product_s, 2 * FLOAT * source.numel() / copy_s)


def step_bytes(batch: int, quantized: int, weights: int) -> int:
    """Return the smallest number of bytes that a step reads and writes with all operations fused.

    Args:
        batch: number of floats of the inputs (twice if two kinds are mixed) and of the target.
        quantized: number of floats of all quantized activations.
        weights: number of rounded weights.
    """
    return FLOAT * (batch + ACTIVATION_PASSES * quantized + WEIGHT_PASSES * weights)


class TimedObjective(BlockObjective):
    """Objective shared by the trainers of all engines: one timed Fisher pass for all of them."""

    pass_s = 0.0  #: seconds of the Fisher pass

    def update(self, forward: Callable[[Tensor], Tensor]) -> None:
        """See :class:`BlockObjective`; only the first call has an effect."""
        if not self.passes:
            start = timer()
            super().update(forward)
            self.pass_s = timer() - start


@dataclass(frozen=True)
class StepTimes:
    """Times and work of a block's steps, and the time of its Fisher pass."""

    step_s: dict[Engine, float]  #: seconds per step by engine
    compile_s: dict[Engine, float]  #: extra seconds of the first step, of engines that compile
    flops: int  #: operations per step
    bytes: int  #: bytes per step, see :func:`step_bytes`
    pass_s: float  #: seconds of a Fisher pass; 0 for a block without passes

    @property
    def step_ms(self) -> dict[str, float]:
        """Milliseconds per step by engine."""
        return {name: 1000 * seconds for name, seconds in self.step_s.items()}


class _Run:
    """One engine's steps on its own copy of a block."""

    def __init__(self, segment: Segment, objective: BlockObjective, engine: Engine):
        # A copy of the block alone: the tape has already run the parts before the block.
        own = Segment(segment.label, segment.kind, copy.deepcopy(segment.block), pairs=())
        self.trainer = BlockTrainer(own, objective, engine)
        self.numbers, self.rounds = itertools.count(), list[float]()

    def step(self) -> None:
        self.trainer.step(next(self.numbers))


def time_steps(
    segment: Segment,
    objective: TimedObjective,
    recipe: Recipe,
    engines: Sequence[Engine],
    steps: int,
    deadline: float,
) -> StepTimes:
    """Time a block's steps by each engine, in turns of :data:`ROUND` steps, and count their work.

    The engines take turns, so that a change of the machine's speed affects all of them. The result
    is the median over turns, because a mean would include moments when the machine was interrupted.

    Args:
        segment: the block, which stays unchanged.
        objective: its tape is at the block and has the target.
        engines: in the order of their turns; must contain ``fused``.
        steps: timed steps per engine.
        deadline: time (``time.monotonic``) after which no turn begins, except the first ones.
    """
    device, runs, first_s = objective.tape.storage.device.type, {}, {}
    for engine in engines:
        runs[engine] = run = _Run(segment, objective, engine)
        before, start = objective.pass_s, timer()
        run.step()
        first_s[engine] = timer() - start - (objective.pass_s - before)
        for _ in range(WARM_UP[device]):
            run.step()
    done = 0
    while done < steps and (done == 0 or time.monotonic() < deadline):
        count = min(ROUND, steps - done)
        for run in runs.values():
            run.rounds.append(timed(run.step).timeit(count).mean)
        done += count
    step_s = {engine: statistics.median(run.rounds) for engine, run in runs.items()}
    compile_s = {e: max(first_s[e] - step_s[e], 0.0) for e in engines if e not in PLAIN}
    flops, moved = _work(runs["fused"], recipe)
    return StepTimes(step_s, compile_s, flops, moved, objective.pass_s)


def _work(run: _Run, recipe: Recipe) -> tuple[int, int]:
    """Take one more step; return its numbers of operations and bytes."""
    trainer, sizes = run.trainer, []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes.append(args[0].numel())

    handles = [one.register_forward_pre_hook(keep) for one in trainer.state.quantizers]
    with FlopCounterMode(display=False) as flops:
        run.step()
    for handle in handles:
        handle.remove()
    tape = trainer.objective.tape
    assert tape.target is not None
    inputs = 1 if tape.prefix is None or tape.prefix is tape.full else 2
    images = min(recipe.batch_size, len(tape.full))
    floats = images * (inputs * tape.full[0].numel() + tape.target[0].numel())
    moved = step_bytes(floats, sum(sizes), trainer.state.soft.numel())
    return int(flops.get_total_flops()), moved
