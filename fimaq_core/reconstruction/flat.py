"""The step on flat vectors: plain, compiled, or captured in a CUDA graph."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from fimaq_core.compile_cache import use_own_cache
from fimaq_core.errors import EngineError
from fimaq_core.reconstruction import step
from fimaq_core.reconstruction.loss import Batch, Loss, LossState, prediction_loss
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.sample_objective import SampleObjective
from fimaq_core.reconstruction.step import StepEngine, StepInputs, StepPlan, Variables, update

#: Steps before a graph is captured, for compilation and the workspaces of libraries.
WARM_UP = 3

#: Number of block structures (with loss and dropping) that one process can compile.
STRUCTURES = 128


class FlatStep(StepEngine):
    """The step on flat vectors without compilation (``fused``)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        state, objective, arithmetic = self.state, self.objective, self.recipe.step_dtype
        self.counter = torch.zeros(1, dtype=torch.int64, device=state.soft.device)
        traced, weights = self.form == "traced", objective.part_weights()
        self.plan = StepPlan(state.layout, objective.kind, weights, self.mix, traced, arithmetic)
        self.present = self._source()
        # Leaves for autograd; they share memory with the state, which the update changes.
        self.soft = state.soft.detach().requires_grad_(state.rounding is not None)
        self.scales = state.scales.detach().requires_grad_(state.learn_scales)
        self.wanted = [leaf for leaf in (self.soft, self.scales) if leaf.requires_grad]

    def _source(self) -> "AllSamples | FedSamples | OneSample":
        objective, samples, mixed = self.objective, self.schedule.samples, self.reads_prefix
        if isinstance(objective, SampleObjective):
            return OneSample(objective, samples[:, 0].tolist(), mixed, self.plan.traced)
        assert isinstance(objective, BlockObjective)
        data, home, device = objective.batch(mixed), self.tape.full.device, self.state.soft.device
        if home == device:
            return AllSamples(samples, data, objective.state)
        data = data.map(lambda part: part.to(home))
        return FedSamples(data, samples.cpu(), device, objective.state)

    def run(self, number: int) -> Tensor:
        self.present.load(number)
        return self.once()

    def once(self) -> Tensor:
        """Do the step of the counter's number; nothing is read from the device."""
        loss, new_starts = self._loss()
        grads = iter(torch.autograd.grad(loss, self.wanted) if self.wanted else ())
        state, r = self.state, self.state.rounding
        grad_soft = None if r is None else next(grads)
        grad_scales = next(grads) if state.learn_scales else None
        now = self.counter, self.schedule.rates, self.objective.state.starts
        vectors = None if r is None else r.vectors
        own = Variables(*now, vectors, state.soft, state.scales, state.floor, state.moments)
        with torch.no_grad():
            self._call(update, own, new_starts, grad_soft, grad_scales)
        return loss.detach()

    def _loss(self) -> Loss:
        block, plan, objective = self.segment.block, self.plan, self.objective
        keys, present = self.schedule.keys, self.present
        now = StepInputs(self.soft, self.scales, self.counter, keys, present.samples, present.data)
        if objective.rest is None:
            found: Loss = self._call(step.batch_loss, block, plan, now, present.state)
            return found
        # The rest of the model differs from block to block, so it is never compiled.
        output, batch = self._call(step.batch_output, block, plan, now)
        starts, divergence = objective.state.starts, objective.divergence
        losses = plan.kind, plan.part_weights
        return prediction_loss(*losses, output, batch, starts, objective.rest, divergence)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class AllSamples:
    """Source of batches if all samples lie on the device: a step selects its own samples.

    ``samples`` (steps, B) are the numbers of each step's samples in ``data``; None if ``data`` is
    the step's batch. ``state`` is the state of the loss.
    """

    def __init__(self, samples: Tensor | None, data: Batch, state: LossState) -> None:
        self.samples, self.data, self.state = samples, data, state

    def load(self, number: int) -> None:
        """Prepare step ``number``."""


class FedSamples(AllSamples):
    """Source of batches if samples lie in host memory: batches are copied to buffers on the device.

    Two pinned staging areas take turns, so the host gathers the next batch while the device still
    works. ``order`` (steps, B) holds the numbers of each batch's samples, in host memory.
    """

    def __init__(
        self, sources: Batch, order: Tensor, device: torch.device, state: LossState
    ) -> None:
        self._sources, self._order, self._cuda = sources.tensors, order, device.type == "cuda"

        def rows(source: Tensor, **where: Any) -> Tensor:
            return torch.empty((order.shape[1], *source.shape[1:]), dtype=source.dtype, **where)

        super().__init__(None, sources.map(lambda source: rows(source, device=device)), state)
        pinned = {"pin_memory": self._cuda}
        self._staging = [[rows(one, **pinned) for one in self._sources] for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]

    def load(self, number: int) -> None:
        """See :class:`AllSamples`; on CUDA the copies are queued behind earlier work."""
        slot = number % 2
        event = self._copied[slot]
        if event is not None:
            event.synchronize()
        places = zip(self._sources, self._staging[slot], self.data.tensors, strict=True)
        for source, staging, buffer in places:
            torch.index_select(source, 0, self._order[number], out=staging)
            buffer.copy_(staging, non_blocking=True)
        if self._cuda:
            self._copied[slot] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied[slot].record()  # type: ignore[union-attr]


class OneSample(AllSamples):
    """Source of batches of one sample, for samples of varying shapes.

    For a compiled step the varying dimensions are marked, so the step is compiled only once.
    """

    def __init__(
        self, objective: SampleObjective, order: list[int], mixed: bool, traced: bool
    ) -> None:
        self._objective, self._order, self._mixed = objective, order, mixed
        super().__init__(None, *objective.sample(order[0], mixed))
        self._varying: list[list[int]] = []
        if traced:
            every = {tuple(objective.tape.full[number].shape): number for number in order}.values()
            self._varying = _varying_dims(objective.sample(number, mixed) for number in every)

    def load(self, number: int) -> None:
        self.data, self.state = self._objective.sample(self._order[number], self._mixed)
        if not self._varying:
            return
        for tensor, dims in zip(_tensors_of(self.data, self.state), self._varying, strict=True):
            for dim in dims:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _tensors_of(data: Batch, state: LossState) -> list[Tensor]:
    return [*data.tensors, *(part for part in state if part is not None)]


def _varying_dims(samples: Iterable[tuple[Batch, LossState]]) -> list[list[int]]:
    """Return, for each tensor of a sample, the dimensions that differ between samples."""
    shapes = [[tuple(tensor.shape) for tensor in _tensors_of(*sample)] for sample in samples]
    return [
        [dim for dim, sizes in enumerate(zip(*own, strict=True)) if len(set(sizes)) > 1]
        for own in zip(*shapes, strict=True)
    ]


class CompiledStep(FlatStep):
    """The step through ``torch.compile``, compiled once for all blocks of the same structure."""

    form = "traced"

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return _compiled(function, self.counter.device.type, torch.get_num_threads())(*args)
        except TorchDynamoException as error:
            first = str(error).strip().splitlines()[0]
            raise EngineError(
                f"{self.segment.label}: the step cannot be compiled ({first}): "
                "use the step engine 'fused', which compiles nothing."
            ) from error


class GraphStep(CompiledStep):
    """The compiled step as one CUDA graph, which is replayed once per step.

    The first :data:`WARM_UP` steps run without the graph. Every tensor that a step reads or writes
    keeps its address; Fisher passes between replays change the objective's tensors in place.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.capture = capture_cuda_graph
        self._warm = 0
        self._replay: Callable[[], None] | None = None
        self._result: Tensor | None = None

    def once(self) -> Tensor:
        """Do the step as in :class:`FlatStep`, after the warm-up by a replay."""
        if self._replay is None:
            if self._warm < WARM_UP:
                self._warm += 1
                return super().once()
            self._replay, self._result = self.capture(super().once)
        self._replay()
        assert self._result is not None
        return self._result


def capture_cuda_graph(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture ``function`` without running it; return its replay and its result tensor."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


class SaveAsWritten(CustomPartitionerFn):
    """Partitioner that saves for the backward pass the same tensors as eager operations do.

    PyTorch's default saves the fewest bytes. On CPUs that is slow: it saves boolean masks, and
    computes costly functions such as GELU again.
    """

    def __call__(self, gm: Any, joint_inputs: Any, **kwargs: Any) -> Any:
        # Imported here, since it imports networkx, and only compiling needs it.
        from torch._functorch.partitioners import default_partition

        kwargs.pop("compiler", None)
        return default_partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> str:
        """Return the key of the cache on disk."""
        return "fimaq-save-as-written"


@functools.cache
def _compiled(function: Callable[..., Any], device_type: str, threads: int) -> Callable[..., Any]:
    """Compile ``function`` for a type of device; CPU code is for a fixed number of threads."""
    options: dict[str, Any] = {}
    if device_type == "cpu":
        # The number of threads is part of the code; as an option it enters the disk cache's key.
        # The thresholds allow to fuse masks, which are many cheap integer operations.
        options = {
            "cpp.threads": threads,
            "realize_opcount_threshold": 200,
            "realize_reads_threshold": 12,
            "custom_partitioner_fn": SaveAsWritten(),
            # They would lie in a folder of $TMPDIR whose name others can guess.
            "cpp_cache_precompile_headers": False,
        }
    use_own_cache()
    # A Swin has a dozen structures of blocks; beyond PyTorch's default of 8, compiling fails.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, STRUCTURES)
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)
