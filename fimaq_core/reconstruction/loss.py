"""The loss of a block over a step's batch, each part over its start value. Pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fimaq_core.chain import Kept
from fimaq_core.fisher import losses
from fimaq_core.fisher.divergence import Measure, kl_divergence

#: The loss (a scalar), and the start values of its parts from now on (parts,).
Loss = tuple[Tensor, Tensor]


class Batch(NamedTuple):
    """Tensors that the steps read: of all samples, (n, ...), or of one batch, (B, ...)."""

    full: Tensor  # the block's inputs in the full-precision model
    #: the block's inputs behind the quantized prefix; None where inputs are not mixed
    prefix: Tensor | None
    target: Tensor  # the block's full-precision outputs
    weights: Tensor | None = None  # (n, N) weights of each sample's errors, if the loss has some
    #: full-precision outputs of the whole model, for losses that compare predictions
    reference: Tensor | None = None
    side: Tensor | None = None  # the chain's side, for these losses
    kept: Kept = ()  # what earlier segments keep, for these losses

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply ``function`` to every tensor."""
        single = [None if part is None else function(part) for part in self[:6]]
        kept = tuple(function(part) for part in self.kept)
        return Batch(*single, kept)  # type: ignore[arg-type, call-arg]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in order."""
        return [part for part in (*self[:6], *self.kept) if part is not None]


class LossState(NamedTuple):
    """Tensors that a loss needs beside the batch. Passes change them in place."""

    starts: Tensor  # (parts,) start values, which the parts are divided by; 0 if not known yet
    #: (k, N) mean absolute gradients, zero for passes to come; ``least_squares``: (1, N), u
    gradients: Tensor | None = None
    #: (N,) mean of the passes done; ``least_squares``: h, ``perturb_mean``: the Hessian
    diagonal: Tensor | None = None
    root: Tensor | None = None  # (k, k) root of (D Dᵀ)⁻¹, zero for passes to come


def block_loss(
    kind: str, weights: tuple[float, ...], output: Tensor, batch: Batch, state: LossState
) -> Loss:
    """Return the loss of a batch (a scalar), and the start values from now on (parts,).

    ``kind`` is a loss, ``head`` (KL of the classes, not divided by its start) or ``head_relative``;
    ``weights`` are those of its parts; ``output`` (B, ...) is the quantized block's.
    """
    if kind == "head":
        return kl_divergence(output, batch.target), state.starts
    if kind == "head_relative":
        return _over_starts([kl_divergence(output, batch.target)], weights, state.starts)
    delta = (output - batch.target).flatten(1)
    return _over_starts(_parts(kind, delta, batch, state), weights, state.starts)


def prediction_loss(
    weights: tuple[float, ...],
    output: Tensor,
    batch: Batch,
    starts: Tensor,
    rest: Callable[[Tensor, Tensor | None, Kept], Tensor],
    divergence: Measure,
) -> Loss:
    """Return the block's squared error plus the divergence of the prediction, and the start values.

    PD-Quant (Liu et al., CVPR 2023, arXiv:2212.07048). Its code adds the two as they are, with
    weights for their sizes in convolutional networks. Here each is divided by its start value, so
    that both count. ``rest`` runs the model behind the block in full precision.
    """
    assert batch.reference is not None
    delta = (output - batch.target).flatten(1)
    prediction = rest(output, batch.side, batch.kept)
    # In float64: at 8 bits it is about 1e-8, and with float32's logarithms it could be negative.
    far = divergence(prediction.double(), batch.reference.double()).float()
    return _over_starts([losses.squared_error(delta), far], weights, starts)


def _parts(kind: str, delta: Tensor, batch: Batch, state: LossState) -> list[Tensor]:
    if kind in losses.PLAIN:
        return [losses.PLAIN[kind](delta)]
    # The objective has made the tensors of its kind of loss.
    weights: Any = batch.weights
    diagonal: Any = state.diagonal
    gradients: Any = state.gradients
    root: Any = state.root
    if kind == "fisher_brecq":
        return [losses.squared_gradient_loss(delta, weights)]
    if kind in ("perturb", "perturb_mean", "fisher_diag"):
        return [losses.diagonal_loss(delta, weights if kind == "perturb" else diagonal)]
    if kind == "fisher_lr":
        return [losses.rank_one_loss(delta, diagonal)]
    if kind == "least_squares":
        return [losses.least_squares_loss(delta, diagonal, gradients[0])]
    assert kind == "fisher_dplr"
    return [losses.low_rank_loss(delta, gradients, root), losses.diagonal_loss(delta, diagonal)]


def _over_starts(parts: list[Tensor], weights: tuple[float, ...], starts: Tensor) -> Loss:
    """Return the weighted sum of parts over start values, and these; they default to the parts."""
    values = torch.stack(parts)
    now = values.detach()
    # A start of exactly zero (a block where nothing is quantized) must not turn into NaN.
    new = torch.where(starts > 0, starts, torch.where(now > 0, now, torch.ones_like(now)))
    ratios = values / new
    total = ratios[0] * weights[0]
    for number in range(1, len(weights)):
        total = total + ratios[number] * weights[number]
    return total, new
