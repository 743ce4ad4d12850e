"""The optimisation step as two functions of tensors: a batch's loss, and the update by its gradients.

All that changes from step to step is a tensor on the device, so both can run as they are, compiled,
or captured in a CUDA graph. Blocks of equal layout share what was compiled.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fimaq_core.chain import Segment
from fimaq_core.numerics import Arithmetic, autocast
from fimaq_core.quantizers.activation import Form
from fimaq_core.quantizers.dropping import eager_mask, threshold_of, traced_mask
from fimaq_core.quantizers.rounding import alpha_gradient, soft_rounding
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.loss import Batch, LossState, block_loss
from fimaq_core.reconstruction.objective import Objective
from fimaq_core.reconstruction.schedule import BETA1, BETA2, EPSILON, Schedule
from fimaq_core.reconstruction.state import BlockState, Layout, run_block
from fimaq_core.reconstruction.tape import Tape


class StepEngine:
    """Runs the steps of one block, whose state is attached and whose target is computed."""

    form: ClassVar[Form] = "fused"  # how activation quantizers compute

    def __init__(
        self,
        segment: Segment,
        state: BlockState,
        tape: Tape,
        objective: Objective,
        recipe: Recipe,
        schedule: Schedule,
    ) -> None:
        self.segment, self.state, self.tape = segment, state, tape
        self.objective, self.recipe, self.schedule = objective, recipe, schedule
        mixes = tape.prefix is not None and tape.prefix is not tape.full
        #: how many of 256 elements of the block's input come from the quantized prefix
        self.mix = threshold_of(recipe.prefix_prob) if mixes else 0

    def run(self, number: int) -> Tensor:
        """Do step ``number`` (in order from 0); return its loss, a scalar the next step may change."""
        raise NotImplementedError

    def finish(self) -> None:
        """Bring the state up to date."""


@dataclass(frozen=True)
class StepPlan:
    """Constants of a step, equal for all blocks of the same structure."""

    layout: Layout  # of the variables
    kind: str  # of the loss, see :func:`fimaq_core.reconstruction.loss.block_loss`
    part_weights: tuple[float, ...]  # of the loss's parts
    mix: int  # as of :class:`StepEngine`
    traced: bool  # whether the step is compiled
    arithmetic: Arithmetic = "float32"  # of the matrix products


class StepInputs(NamedTuple):
    """Tensors that a step reads."""

    soft: Tensor  # (n,) soft weights, requiring gradients
    scales: Tensor  # (m,) activation scales, requiring gradients if they are learned
    counter: Tensor  # (1,) int64, the step's number
    keys: Tensor  # (steps, streams, 2) of the masks
    #: (steps, B) numbers of each batch's samples; None if ``data`` is the batch already
    samples: Tensor | None
    data: Batch  # of all samples, or of the batch


def batch_output(block: nn.Module, plan: StepPlan, inputs: StepInputs) -> tuple[Tensor, Batch]:
    """The block's output for the present step's batch, and the batch. The block is attached."""
    # index_select, since indexing with a tensor of one number would wait for that number.
    row, data = inputs.keys.index_select(0, inputs.counter)[0], inputs.data
    if inputs.samples is not None:
        chosen = inputs.samples.index_select(0, inputs.counter)[0]
        data = data.map(lambda part: part[chosen])
    x = data.full
    if data.prefix is not None:
        x = mixed(x, data.prefix, row[0], plan.mix, plan.traced)
    with autocast(plan.arithmetic, x.device):
        output = run_block(block, plan.layout, inputs.soft, inputs.scales, row, x)
    return output.float(), data


def batch_loss(
    block: nn.Module, plan: StepPlan, inputs: StepInputs, state: LossState
) -> tuple[Tensor, Tensor]:
    """Loss of the present step's batch, and the loss's starts."""
    output, batch = batch_output(block, plan, inputs)
    return block_loss(plan.kind, plan.part_weights, output, batch, state)


def mixed(full: Tensor, prefix: Tensor, key: Tensor, threshold: int, traced: bool) -> Tensor:
    """Elements of ``prefix`` with probability ``threshold / 256``, else of ``full`` (QDrop's input)."""
    if threshold >= 256:
        return prefix
    if traced:
        return torch.where(traced_mask(full, key, threshold), prefix, full)
    return torch.lerp(full, prefix, eager_mask(full, key, threshold))


def update(
    counter: Tensor,
    rates: Tensor,
    starts: Tensor,
    new_starts: Tensor,
    grad_soft: Tensor | None,
    alpha: Tensor | None,
    offset: Tensor | None,
    gain: Tensor | None,
    soft: Tensor,
    grad_scales: Tensor | None,
    scales: Tensor,
    floor: Tensor,
    moments: list[Tensor],
) -> None:
    """Adam's step of α and of the scales, in place, then the next soft weights; advances the counter.

    Scales are projected to their lower bounds, so they stay positive. α, its moments, the
    regulariser's gradient and the soft weights pass once through memory, all layers together.

    Args:
        counter: (1,) int64.
        rates: (steps, 5), see :class:`fimaq_core.reconstruction.schedule.Schedule`.
        starts, new_starts: (parts,) of the loss.
        grad_soft, grad_scales: gradients of the loss; None where nothing is learned.
        alpha, offset, gain, soft: (n,) of the rounding problem.
        scales, floor: (m,) and their lower bounds.
        moments: first and second moments of α, then of the scales.
    """
    weight, beta, size_alpha, size_scale, inverse = rates.index_select(0, counter)[0].unbind()
    if grad_soft is not None:
        assert alpha is not None
        assert offset is not None
        assert gain is not None
        grad = alpha_gradient(alpha, gain, grad_soft, weight, beta)
        _adam(alpha, grad, moments[0], moments[1], size_alpha, inverse)
        soft.copy_(torch.addcmul(offset, gain, soft_rounding(alpha)))
    if grad_scales is not None:
        _adam(scales, grad_scales, moments[2], moments[3], size_scale, inverse)
        scales.clamp_(min=floor)
    starts.copy_(new_starts)
    counter.add_(1)


def _adam(
    variable: Tensor, grad: Tensor, first: Tensor, second: Tensor, size: Tensor, inverse: Tensor
) -> None:
    """PyTorch's Adam with its bias corrections as tensors, so that it fuses with what is around it."""
    first.lerp_(grad, 1 - BETA1)
    second.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    variable.sub_(size * first / (second.sqrt() * inverse + EPSILON))
