"""The step on flat vectors: as it is, compiled, or captured in a CUDA graph."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from fimaq_core.chain import Segment
from fimaq_core.errors import EngineError
from fimaq_core.quantizers.dropping import threshold_of
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.feeder import Feeder
from fimaq_core.reconstruction.loss import Batch, LossState, prediction_loss, unpacked
from fimaq_core.reconstruction.objective import BlockObjective, Objective
from fimaq_core.reconstruction.sample_objective import SampleObjective
from fimaq_core.reconstruction.schedule import Schedule
from fimaq_core.reconstruction.state import BlockState
from fimaq_core.reconstruction.step import StepPlan, batch_loss, batch_output, update
from fimaq_core.reconstruction.tape import Tape

#: Steps that run one by one before a graph is captured (compilation, libraries' workspaces).
WARM_UP = 3

#: Makes of blocks (with loss and dropping) that one process can compile.
MAKES = 128

#: Captures a step and returns what replays it and the tensor that holds its result.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class FlatStep:
    """The step on flat vectors, run as it is (``fused``).

    Args:
        segment: whose block is optimised.
        state: its variables, attached.
        tape: at that block, target computed.
        objective: of the block.
        recipe: rates and probabilities.
        schedule: tables of the steps.
    """

    traced = False

    def __init__(
        self,
        segment: Segment,
        state: BlockState,
        tape: Tape,
        objective: Objective,
        recipe: Recipe,
        schedule: Schedule,
    ) -> None:
        self.segment, self.state, self.objective, self.schedule = segment, state, objective, schedule
        self.counter = torch.zeros(1, dtype=torch.int64, device=state.soft.device)
        self.plan = StepPlan(
            state.layout,
            objective.kind,
            objective.part_weights(),
            threshold_of(recipe.prefix_prob) if tape.prefix is not None and tape.prefix is not tape.full else 0,
            self.traced,
            recipe.step_dtype,
        )
        self.present = self._source(tape)
        # Leaves that share memory with the state: the update writes there, so the next step's leaves are these again.
        self.soft = state.soft.detach().requires_grad_(state.rounding is not None)
        self.scales = state.scales.detach().requires_grad_(state.learn_scales)
        self.wanted = [leaf for leaf in (self.soft, self.scales) if leaf.requires_grad]

    def _source(self, tape: Tape) -> "AllSamples | FedSamples | OneSample":
        mixed = self.plan.mix > 0
        if isinstance(self.objective, SampleObjective):
            return OneSample(self.objective, self.schedule.samples[:, 0].tolist(), mixed, self.traced)
        assert isinstance(self.objective, BlockObjective)
        assert isinstance(tape.full, Tensor)
        data, state = self.objective.batch(mixed), self.objective.state
        if tape.full.device == self.state.soft.device:
            return AllSamples(self.schedule.samples, data, state)
        return FedSamples(data, self.schedule.samples.cpu(), tape.full.device, self.state.soft.device, state)

    def run(self, number: int) -> Tensor:
        """See :class:`fimaq_core.reconstruction.engines.StepEngine`."""
        self.present.load(number)
        return self.once()

    def once(self) -> Tensor:
        """The step that the counter stands at; no Python number is read from the device or changes with it."""
        loss, starts = self._loss()
        grads = iter(torch.autograd.grad(loss, self.wanted) if self.wanted else ())
        state, rounding = self.state, self.state.rounding
        with torch.no_grad():
            self._call(
                update,
                (
                    self.counter,
                    self.schedule.rates,
                    self.objective.state.starts,
                    starts,
                    next(grads) if rounding is not None else None,
                    None if rounding is None else rounding.alpha,
                    None if rounding is None else rounding.offset,
                    None if rounding is None else rounding.gain,
                    state.soft,
                    next(grads) if state.learn_scales else None,
                    state.scales,
                    state.floor,
                    state.moments,
                ),
            )
        return loss.detach()

    def _loss(self) -> tuple[Tensor, Tensor]:
        objective, rest = self.objective, self.objective.rest
        present = self.present
        args: tuple[Any, ...] = (self.segment.block, self.plan, self.soft, self.scales, self.counter, self.schedule.keys)
        args = (*args, present.samples, present.data)
        if rest is None:
            found: tuple[Tensor, Tensor] = self._call(batch_loss, (*args, present.state))
            return found
        # The rest of the model differs from block to block, so it is not part of what is compiled.
        output, batch = self._call(batch_output, args)
        return prediction_loss(self.plan.part_weights, output, batch, objective.state.starts, rest, objective.divergence)

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return function(*args)

    def finish(self) -> None:
        """See :class:`fimaq_core.reconstruction.engines.StepEngine`; here the state is never behind."""


class AllSamples:
    """The samples lie on the device: a step picks its own.

    Attributes:
        samples: (steps, B) numbers of each step's samples; None where ``data`` holds the step's alone.
        data: what a step reads.
        state: what the loss rests on beside it.
    """

    def __init__(self, samples: Tensor, data: Batch, state: LossState) -> None:
        self.samples: Tensor | None = samples
        self.data, self.state = data, state

    def load(self, number: int) -> None:
        """Make ready for step ``number``."""


class FedSamples:
    """The samples lie in host memory: each step's are brought to the device. Attributes as of :class:`AllSamples`."""

    samples = None

    def __init__(self, data: Batch, samples: Tensor, home: torch.device, device: torch.device, state: LossState) -> None:
        sources = [None if part is None else part.to(home) for part in (*data[:6], *data.kept)]
        self._feeder, self.state = Feeder(sources, samples, device), state
        self.data = unpacked(self._feeder.batch)

    def load(self, number: int) -> None:
        """See :class:`AllSamples`."""
        self._feeder.load(number)


class OneSample:
    """The samples have varying shapes: a step reads one. Attributes as of :class:`AllSamples`.

    For a compiled step what varies is marked, so that it is compiled once and not once a shape.
    """

    samples = None

    def __init__(self, objective: SampleObjective, order: list[int], mixed: bool, traced: bool) -> None:
        self._objective, self._order, self._mixed = objective, order, mixed
        self.data, self.state = objective.sample(order[0], mixed)
        self._varying: list[list[int]] = []
        if traced:
            shapes = {tuple(objective.tape.full[number].shape): number for number in order}  # one sample of each shape
            self._varying = _varying_dims(objective.sample(number, mixed) for number in shapes.values())

    def load(self, number: int) -> None:
        """See :class:`AllSamples`."""
        self.data, self.state = self._objective.sample(self._order[number], self._mixed)
        if not self._varying:
            return
        for tensor, dims in zip(_tensors_of(self.data, self.state), self._varying, strict=True):
            for dim in dims:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _tensors_of(data: Batch, state: LossState) -> list[Tensor]:
    return [part for part in (*data[:6], *data.kept, *state) if part is not None]


def _varying_dims(samples: Iterable[tuple[Batch, LossState]]) -> list[list[int]]:
    """For each tensor of a sample, its dimensions that differ between samples."""
    shapes = [[tuple(tensor.shape) for tensor in _tensors_of(*sample)] for sample in samples]
    return [[dim for dim, sizes in enumerate(zip(*own, strict=True)) if len(set(sizes)) > 1] for own in zip(*shapes, strict=True)]


class CompiledStep(FlatStep):
    """The step through ``torch.compile``: one compilation for all blocks of a make."""

    traced = True

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        try:
            return _compiled(function, self.counter.device.type, torch.get_num_threads())(*args)
        except TorchDynamoException as error:
            first = str(error).strip().splitlines()[0]
            raise EngineError(
                f"{self.segment.label}: the step cannot be compiled ({first}): use the engine 'fused', which compiles nothing."
            ) from error


class GraphStep(CompiledStep):
    """The compiled step as one CUDA graph: a replay a step, whatever the number of kernels.

    The first :data:`WARM_UP` steps run one by one. Everything a step reads or writes keeps its address; Fisher passes
    between replays change the objective's tensors in place.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.capture: Capture = capture_cuda_graph
        self._warm = 0
        self._replay: Callable[[], None] | None = None
        self._result: Tensor | None = None

    def once(self) -> Tensor:
        """See :class:`FlatStep`; after the warm-up, a replay."""
        if self._replay is None:
            if self._warm < WARM_UP:
                self._warm += 1
                return super().once()
            self._replay, self._result = self.capture(super().once)
        self._replay()
        assert self._result is not None
        return self._result


def capture_cuda_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture ``step`` (without running it); return what replays it, and the tensor that holds its result."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


class SaveAsWritten(CustomPartitionerFn):
    """Keep for the backward pass what the operations themselves save.

    PyTorch's default saves the fewest bytes: boolean masks (slow on CPUs) and inputs from which costly functions
    (GELU) are then computed again.
    """

    def __call__(self, gm: Any, joint_inputs: Any, **kwargs: Any) -> Any:
        from torch._functorch.partitioners import default_partition  # imports networkx: only to compile

        kwargs.pop("compiler", None)
        return default_partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> str:
        """Key of the cache on disk."""
        return "fimaq-save-as-written"


@functools.cache
def _compiled(function: Callable[..., Any], device_type: str, threads: int) -> Callable[..., Any]:
    """``function`` compiled for a kind of device; on CPUs the code is made for a number of threads."""
    options: dict[str, Any] = {}
    if device_type == "cpu":
        # The number of threads is compiled in; as an option it is part of the key of the cache on disk.
        # Masks of many cheap integer operations shall fuse into what uses them, not be stored.
        options = {
            "cpp.threads": threads,
            "realize_opcount_threshold": 200,
            "realize_reads_threshold": 12,
            "custom_partitioner_fn": SaveAsWritten(),
        }
    # A Swin has a dozen makes of blocks, more than PyTorch's limit, beyond which compiling is an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAKES)
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)
