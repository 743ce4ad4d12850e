"""Seconds of an optimisation step by each engine, the work of a step, and its floors.

Floors are the times that a step cannot go below: its arithmetic at the machine's rate of matrix
products, and its bytes at the machine's rate of copies.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
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
#: Steps of one engine before the next one has its turn.
ROUND = 10
#: Steps after the first that are not counted: they compile, capture and fill caches.
WARM_UP = {"cpu": 1, "cuda": 6}
#: Bytes of a float32.
FLOAT = 4
#: Passes of a step over all rounded weights: soft weights read forward and backward and written;
#: their gradient written and read; α and two moments read and written; offset and gain read.
WEIGHT_PASSES = 13
#: Passes over a quantized activation: read and written forward, its gradient read and written.
ACTIVATION_PASSES = 4


def timed(work: Callable[[], object]) -> Timer:
    """Return a timer of ``work`` with the present number of threads."""
    return Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())


@dataclass(frozen=True)
class Rates:
    """Measured limits of the machine, per second."""

    flops: float  #: operations of large matrix products
    bytes: float  #: bytes of large copies; read and written bytes both count

    def floors_ms(self, flops: int, moved: int) -> dict[str, float]:
        """Return the milliseconds of so many operations and bytes."""
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
    """Return the bytes that a step moves at least: each tensor once per pass that fusion keeps.

    Activations between quantizers (norms, GELU, softmax) could all be fused and do not count.
    Given are the floats of the batch (inputs, twice if two kinds are mixed, and target), of all
    quantized activations, and of all rounded weights.
    """
    return FLOAT * (batch + ACTIVATION_PASSES * quantized + WEIGHT_PASSES * weights)


class TimedObjective(BlockObjective):
    """Objective that several trainers of one block share: takes one Fisher pass and times it."""

    pass_s = 0.0  #: seconds of the pass
    own_s = 0.0  #: seconds of it in the block's own forward

    def update(self, forward: Callable[[Tensor], Tensor]) -> None:
        """See :class:`BlockObjective`; only the first call has an effect."""
        if self.passes:
            return

        def own(x: Tensor) -> Tensor:
            start = timer()
            out = forward(x)
            self.own_s += timer() - start
            return out

        start = timer()
        super().update(own)
        self.pass_s = timer() - start


@dataclass(frozen=True)
class StepTimes:
    """Steps of one make of blocks."""

    step_s: dict[Engine, float]  #: by engine
    compile_s: dict[Engine, float]  #: in the first step, of engines that compile
    flops: int  #: operations of a step
    bytes: int  #: of a step, see :func:`step_bytes`
    calls: dict[Engine, int]  #: operators of a step; kernels on CUDA

    @property
    def step_ms(self) -> dict[str, float]:
        """Milliseconds per step by engine."""
        return {name: 1000 * seconds for name, seconds in self.step_s.items()}


class _Run:
    """Steps of one engine on its own copy of a block."""

    def __init__(self, segment: Segment, objective: BlockObjective, engine: Engine):
        # A copy without what the tape has done before the block.
        own = Segment(segment.label, segment.kind, copy.deepcopy(segment.block), pairs=())
        self.trainer = BlockTrainer(own, objective, engine)
        self._numbers = itertools.count()
        self.rounds: list[float] = []

    def step(self) -> None:
        self.trainer.step(next(self._numbers))


def time_steps(
    segment: Segment,
    objective: TimedObjective,
    recipe: Recipe,
    engines: Sequence[Engine],
    steps: int,
    deadline: float,
) -> StepTimes:
    """Time a block's steps by each engine, in turns of :data:`ROUND` steps, and count their work.

    Machines change their speed; in turns they change it for all engines. The median of the turns
    counts: machines freeze now and then, and a mean would count that.

    Args:
        segment, objective: the block, which stays unchanged; the target of its tape is computed.
        engines: in order of their turns; ``fused`` is one of them.
        steps: counted steps of each; after ``deadline`` (``time.monotonic``) at least one turn.
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
    compiling = (engine for engine in engines if engine not in PLAIN)
    work = {engine: _work(runs[engine], recipe) for engine in engines if engine in PLAIN}
    calls = {engine: count for engine, (_, _, count) in work.items()}
    if device == "cuda":
        calls = {engine: _kernels(run) for engine, run in runs.items()}
    flops, moved, _ = work["fused"]
    compile_s = {engine: max(first_s[engine] - step_s[engine], 0.0) for engine in compiling}
    return StepTimes(step_s, compile_s, flops, moved, calls)


def _work(run: _Run, recipe: Recipe) -> tuple[int, int, int]:
    """Do one more step, and return its operations, bytes and operator calls."""
    trainer, sizes = run.trainer, []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes.append(args[0].numel())

    handles = [one.register_forward_pre_hook(keep) for one in trainer.state.quantizers]
    calls = _CallCounter()  # type: ignore[no-untyped-call]
    with FlopCounterMode(display=False) as flops, calls:
        run.step()
    for handle in handles:
        handle.remove()
    tape = trainer.objective.tape
    assert tape.target is not None
    inputs = 1 if tape.prefix is None or tape.prefix is tape.full else 2
    images = min(recipe.batch_size, len(tape.full))
    floats = images * (inputs * tape.full[0].numel() + tape.target[0].numel())
    moved = step_bytes(floats, sum(sizes), trainer.state.soft.numel())
    return int(flops.get_total_flops()), moved, calls.count


class _CallCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts calls of operators, those of backward passes too."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def _kernels(run: _Run) -> int:
    """Do one more step, and return its CUDA kernels, copies and fills included."""
    from torch._C._autograd import DeviceType
    from torch.profiler import profile

    torch.cuda.synchronize()
    with profile() as profiler:
        run.step()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or ())
