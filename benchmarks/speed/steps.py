"""Seconds of an optimisation step by each engine, the work of a step, and its floors.

Floors are the times that a step cannot go below: its arithmetic at the machine's rate of matrix
products, and its bytes at the machine's rate of copies.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer, timer
from torch.utils.flop_counter import FlopCounterMode

from fimaq_core.chain import Segment
from fimaq_core.numerics import Arithmetic, arithmetic
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.engines import Engine
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.tape import Tape

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
    """Measured limits of the machine.

    Attributes:
        flops: floating-point operations per second of large matrix products.
        bytes: bytes per second of large copies; read and written bytes both count.
    """

    flops: float
    bytes: float

    def floors_ms(self, flops: int, moved: int) -> dict[str, float]:
        """Return the milliseconds of so many operations and bytes."""
        return {"arithmetic": 1000 * flops / self.flops, "bytes": 1000 * moved / self.bytes}


def measure_rates(
    device: torch.device,
    dtype: Arithmetic = "float32",
    size: int | None = None,
) -> Rates:
    """Measure the rates of matrix products and copies.

    Args:
        device: where.
        dtype: arithmetic of the products.
        size: rows and columns of the matrices; None takes what fills the device.
    """
    size = size or (8192 if device.type == "cuda" else 1536)
    left = torch.randn(size, size, device=device)
    right, out = torch.randn_like(left), torch.empty_like(left)
    source = torch.zeros(16 * size * size, device=device)
    target = torch.empty_like(source)

    def product() -> Tensor:
        return left @ right if dtype == "bfloat16" else torch.mm(left, right, out=out)

    with arithmetic(dtype, device):
        product_s = min(timed(product).blocked_autorange(min_run_time=0.5).times)
    copy_s = min(timed(lambda: target.copy_(source)).blocked_autorange(min_run_time=0.5).times)
    return Rates(2 * size**3 / product_s, 2 * FLOAT * source.numel() / copy_s)


def step_bytes(batch: int, quantized: int, weights: int) -> int:
    """Return the bytes that a step moves at least: each tensor once per pass that fusion keeps.

    Activations between quantizers (norms, GELU, softmax) could all be fused and do not count.

    Args:
        batch: floats of the batch: inputs (twice if two kinds are mixed) and target.
        quantized: floats of all quantized activations.
        weights: floats of all rounded weights.
    """
    return FLOAT * (batch + ACTIVATION_PASSES * quantized + WEIGHT_PASSES * weights)


class TimedObjective(BlockObjective):
    """Objective that several trainers of one block share: takes one Fisher pass and times it.

    Attributes:
        pass_s: seconds of the pass.
        own_s: seconds of it in the block's own forward.
    """

    pass_s = own_s = 0.0

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


@dataclass
class EngineRun:
    """Steps of a block by one engine.

    Attributes:
        trainer: of its own copy of the block.
        first_s: seconds of the first step; compilation counts, the Fisher pass does not.
        rounds: mean seconds per step, one number per round.
        number: steps done.
    """

    trainer: BlockTrainer
    first_s: float = 0.0
    rounds: list[float] = field(default_factory=list)
    number: int = 0

    def step(self) -> None:
        """Do the next step."""
        self.trainer.step(self.number)
        self.number += 1

    @property
    def step_s(self) -> float:
        """Median seconds per step: machines freeze now and then, and a mean would count that."""
        return statistics.median(self.rounds)


def time_steps(
    segment: Segment,
    tape: Tape,
    objective: TimedObjective,
    recipe: Recipe,
    engines: Sequence[Engine],
    steps: int,
    deadline: float,
) -> dict[Engine, EngineRun]:
    """Time a block's steps by each engine, in turns of :data:`ROUND` steps.

    Machines change their speed; in turns they change it for all engines.

    Args:
        segment: the block; it stays unchanged.
        tape: at that block, target computed.
        objective: of the block.
        recipe: of the steps.
        engines: in order of their turns.
        steps: counted steps of each; after ``deadline`` fewer, but at least one round.
        deadline: on the clock of ``time.monotonic``.
    """
    runs = {}
    for engine in engines:  # a copy of the block without what the tape has done before it
        own = Segment(segment.label, segment.kind, copy.deepcopy(segment.block), pairs=())
        trainer = BlockTrainer(own, tape, objective, recipe, recipe.seed, engine)
        runs[engine] = run = EngineRun(trainer)
        before, start = objective.pass_s, timer()
        run.step()
        run.first_s = timer() - start - (objective.pass_s - before)
        for _ in range(WARM_UP[tape.storage.device.type]):
            run.step()
    done = 0
    while done < steps and (done == 0 or time.monotonic() < deadline):
        count = min(ROUND, steps - done)
        for run in runs.values():
            run.rounds.append(timed(run.step).timeit(count).mean)
        done += count
    return runs


def step_work(run: EngineRun, recipe: Recipe) -> tuple[int, int, int]:
    """Do one more step, and return its operations, bytes (:func:`step_bytes`) and operator calls.

    Args:
        run: by an engine without a compiler.
        recipe: of the steps.
    """
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


def kernels(run: EngineRun) -> int:
    """Do one more step, and return its CUDA kernels, copies and fills included."""
    from torch._C._autograd import DeviceType
    from torch.profiler import profile

    torch.cuda.synchronize()
    with profile() as profiler:
        run.step()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or ())
