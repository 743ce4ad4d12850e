"""Seconds of an optimisation step by every engine, in turns, and what one step consists of."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.floors import Work, step_bytes
from benchmarks.speed.timing import Budget, Laps, median, now
from fimaq_core.chain import Segment
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.engines import Engine
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.tape import Tape

#: Steps of one engine before the next one has its turn.
ROUND = 10
#: Steps after the first that are not counted: they compile, capture and fill caches.
WARM_UP = {"cpu": 1, "cuda": 6}


class TimedObjective(BlockObjective):
    """An objective that several trainers of one block share: it takes one Fisher pass, and says how long that took.

    Attributes:
        pass_s: seconds of the pass.
        own_s: seconds of it in the block's own forward.
    """

    pass_s = own_s = 0.0

    def update(self, forward: Callable[[Tensor], Tensor]) -> None:
        """See :class:`BlockObjective`; only the first call does something."""
        if self.passes:
            return
        device = self.tape.storage.device

        def timed(x: Tensor) -> Tensor:
            start = now(device)
            out = forward(x)
            self.own_s += now(device) - start
            return out

        start = now(device)
        super().update(timed)
        self.pass_s = now(device) - start


@dataclass
class PathRun:
    """One engine's steps of a block.

    Attributes:
        trainer: of its own copy of the block.
        first_s: seconds of the first step, compilation included, the Fisher pass not.
        laps: seconds of every counted step.
        number: steps done.
    """

    trainer: BlockTrainer
    first_s: float = 0.0
    laps: list[float] = field(default_factory=list)
    number: int = 0

    def run(self, count: int) -> None:
        """Do ``count`` steps."""
        for _ in range(count):
            self.trainer.step(self.number)
            self.number += 1

    def timed(self, count: int, device: torch.device) -> None:
        """Do ``count`` steps that count."""
        laps = Laps(device)
        laps.mark()
        for _ in range(count):
            self.run(1)
            laps.mark()
        self.laps += laps.seconds()

    @property
    def step_s(self) -> float:
        """Median seconds of a step."""
        return median(self.laps)


def own_copy(segment: Segment) -> Segment:
    """The segment with a copy of its block (without what comes before it, which the tape has done)."""
    return Segment(segment.label, segment.kind, copy.deepcopy(segment.block), pairs=())


def time_steps(
    segment: Segment, tape: Tape, objective: TimedObjective, recipe: Recipe, engines: Sequence[Engine], steps: int, budget: Budget
) -> dict[Engine, PathRun]:
    """Time a block's steps by each engine: :data:`ROUND` steps each in turn, since machines change their speed.

    Args:
        segment: whose block; it stays as it is.
        tape: at that block, target computed.
        objective: of the block.
        recipe: of the steps.
        engines: in order of their turns.
        steps: counted steps of each, fewer where the budget ends (but one round).
        budget: of the time.
    """
    device = tape.storage.device
    runs = {engine: PathRun(BlockTrainer(own_copy(segment), tape, objective, recipe, recipe.seed, engine)) for engine in engines}
    for run in runs.values():
        before = objective.pass_s
        start = now(device)
        run.run(1)
        run.first_s = now(device) - start - (objective.pass_s - before)
        run.run(WARM_UP[device.type])
    done = 0
    while done < steps and (done == 0 or budget.left() > 0):
        count = min(ROUND, steps - done)
        for run in runs.values():
            run.timed(count, device)
        done += count
    return runs


def step_work(run: PathRun, recipe: Recipe) -> tuple[Work, int]:
    """What a step does (counted while one more is run, by an engine without compiler), and its number of operator calls."""
    trainer, sizes = run.trainer, []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes.append(args[0].numel())

    handles = [quantizer.register_forward_pre_hook(keep) for quantizer in trainer.state.quantizers]
    with FlopCounterMode(display=False) as flops, _CallCounter() as calls:
        run.run(1)
    for handle in handles:
        handle.remove()
    tape = trainer.objective.tape
    assert tape.target is not None
    inputs = 1 if tape.prefix is None or tape.prefix is tape.full else 2
    floats = min(recipe.batch_size, len(tape.full)) * (inputs * tape.full[0].numel() + tape.target[0].numel())
    moved = step_bytes(floats, sum(sizes), trainer.state.soft.numel())
    return Work(int(flops.get_total_flops()), moved), calls.count


class _CallCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts calls of operators, those of backward passes too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def kernels(run: PathRun) -> int:
    """CUDA kernels of a step (copies and fills among them), by PyTorch's profiler."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run.run(1)
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or ())


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """An empty compilation cache, so that compilation takes what it takes a first time."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield
