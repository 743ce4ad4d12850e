"""The optimisation step as two functions of tensors: a batch's loss, and the update by gradients.

Everything that changes from step to step is a tensor on the device. Therefore both functions can
run plain, compiled or captured in a CUDA graph, and blocks of equal layout share compiled code.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fimaq_core.chain import Segment
from fimaq_core.numerics import Arithmetic, autocast
from fimaq_core.quantizers.activation import Form
from fimaq_core.quantizers.dropping import eager_mask, threshold_of, traced_mask
from fimaq_core.quantizers.rounding import RoundingVectors
from fimaq_core.quantizers.straight_through import LatentWeights
from fimaq_core.reconstruction.loss import Batch, Loss, LossState, block_loss
from fimaq_core.reconstruction.objective import Objective
from fimaq_core.reconstruction.schedule import BETA1, BETA2, EPSILON, Schedule
from fimaq_core.reconstruction.state import BlockState, Layout


class StepEngine:
    """Runner of a block's steps. The state must be attached and the target computed before."""

    form: ClassVar[Form] = "fused"  # how activation quantizers compute

    def __init__(
        self, segment: Segment, state: BlockState, objective: Objective, schedule: Schedule
    ) -> None:
        self.segment, self.state, self.schedule = segment, state, schedule
        self.objective, self.tape, self.recipe = objective, objective.tape, objective.recipe
        mixes = self.tape.prefix is not None and self.tape.prefix is not self.tape.full
        #: share of the block's input from the quantized prefix, in 1/256
        self.mix = threshold_of(self.recipe.prefix_prob) if mixes else 0
        #: True if the step reads inputs behind the quantized prefix
        self.reads_prefix = self.mix > 0 or (mixes and objective.kind == "prediction_pdquant")

    def run(self, number: int) -> Tensor:
        """Do step ``number`` (from 0); return the loss, which the next step may overwrite."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write all variables back to the state."""


@dataclass(frozen=True)
class StepPlan:
    """Constants of a step, equal for all blocks of the same structure."""

    layout: Layout  # of the variables
    kind: str  # of the loss, see :func:`fimaq_core.reconstruction.loss.block_loss`
    part_weights: tuple[float, ...]  # weight of each part of the loss
    mix: int  # see :class:`StepEngine`
    traced: bool  # True if the step is compiled
    arithmetic: Arithmetic = "float32"  # of the matrix products


class StepInputs(NamedTuple):
    """Tensors that a step reads."""

    soft: Tensor  # (n,) soft weights, requiring gradients
    scales: Tensor  # (m,) activation scales, requiring gradients if they are learned
    counter: Tensor  # (1,) int64, number of the step
    keys: Tensor  # (steps, streams, 2), keys of the masks
    #: (steps, B) numbers of each batch's samples; None if ``data`` is the batch
    samples: Tensor | None
    data: Batch  # all samples, or the batch


class Variables(NamedTuple):
    """Tensors that the update changes in place, and the tables and bounds that it reads."""

    counter: Tensor  # (1,) int64, number of the step
    rates: Tensor  # (steps, 5), see :class:`fimaq_core.reconstruction.schedule.Schedule`
    starts: Tensor  # (parts,) start values of the loss
    #: (n,) vectors of the weights, the first one learned; None if no weight is quantized
    vectors: RoundingVectors | LatentWeights | None
    soft: Tensor  # (n,) soft weights
    scales: Tensor  # (m,) activation scales
    floor: Tensor  # (m,) their lower bounds, from SCALE_FLOOR in state.py
    #: Adam's first and second moments of the learned vector, then of the scales
    moments: list[Tensor]


def batch_output(block: nn.Module, plan: StepPlan, inputs: StepInputs) -> tuple[Tensor, Batch]:
    """Return the output of the attached block for the step's batch, and the batch.

    For ``prediction_pdquant`` the outputs for the unmixed inputs follow, each with its own draws
    of random dropping.
    """
    # index_select, since indexing with a one-element tensor would wait for the device.
    row, data = inputs.keys.index_select(0, inputs.counter)[0], inputs.data
    if inputs.samples is not None:
        chosen = inputs.samples.index_select(0, inputs.counter)[0]
        data = data.map(lambda part: part[chosen])
    x = data.full
    if data.prefix is not None:
        x = mixed(x, data.prefix, row[0], plan.mix, plan.traced)
    if plan.kind == "prediction_pdquant":
        x = torch.cat([x, data.full if data.prefix is None else data.prefix])
    tensors = plan.layout.tensors(inputs.soft, inputs.scales, row)
    with autocast(plan.arithmetic, x.device):
        output = functional_call(block, tensors, (x,))
    return output.float(), data


def batch_loss(block: nn.Module, plan: StepPlan, inputs: StepInputs, state: LossState) -> Loss:
    """Return the loss of the step's batch, and the start values, as :func:`block_loss` does."""
    output, batch = batch_output(block, plan, inputs)
    return block_loss(plan.kind, plan.part_weights, output, batch, state)


def mixed(full: Tensor, prefix: Tensor, key: Tensor, threshold: int, traced: bool) -> Tensor:
    """Take each element from ``prefix`` with probability ``threshold / 256``, else from ``full``.

    This is QDrop's input (Wei et al., ICLR 2022, arXiv:2203.05740).
    """
    if threshold >= 256:
        return prefix
    if traced:
        return torch.where(traced_mask(full, key, threshold), prefix, full)
    return torch.lerp(full, prefix, eager_mask(full, key, threshold))


def update(
    own: Variables, new_starts: Tensor, grad_soft: Tensor | None, grad_scales: Tensor | None
) -> None:
    """Do Adam's step of weights' variables and scales in place, then set soft weights and counter.

    Scales are clamped to their lower bounds, so they stay positive. All layers are updated
    together, and every vector passes through memory once.

    Args:
        own: the variables.
        new_starts: (parts,) start values of the loss from now on.
        grad_soft: (n,) gradient of the loss; None if no weight is quantized.
        grad_scales: (m,) gradient of the loss; None if no scale is learned.
    """
    row = own.rates.index_select(0, own.counter)[0]
    weight, beta, size_weight, size_scale, inverse = row.unbind()
    if grad_soft is not None:
        assert own.vectors is not None
        grad = own.vectors.gradient(grad_soft, weight, beta)
        _adam(own.vectors[0], grad, own.moments[:2], size_weight, inverse)
        own.soft.copy_(own.vectors.soft())
    if grad_scales is not None:
        _adam(own.scales, grad_scales, own.moments[2:], size_scale, inverse)
        own.scales.clamp_(min=own.floor)
    own.starts.copy_(new_starts)
    own.counter.add_(1)


def _adam(
    variable: Tensor, grad: Tensor, moments: list[Tensor], size: Tensor, inverse: Tensor
) -> None:
    """Do a step of PyTorch's Adam; its bias corrections are tensors, so the step can be fused."""
    first, second = moments
    first.lerp_(grad, 1 - BETA1)
    second.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    variable.sub_(size * first / (second.sqrt() * inverse + EPSILON))
