"""The loss of a block on a step's batch: a weighted sum of parts over divisors. Pure functions."""

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
    """Tensors that the steps read, of all samples (n, ...) or of one batch (B, ...)."""

    full: Tensor  # the block's inputs in the full-precision model
    #: the block's inputs behind the quantized prefix; None if inputs are not mixed
    prefix: Tensor | None
    target: Tensor  # the block's full-precision outputs
    weights: Tensor | None = None  # (n, N) weights of each sample's errors, if the loss has some
    #: rows with which predictions or features are compared; the rest only for the same losses
    reference: Tensor | None = None
    side: Tensor | None = None  # the chain's side
    kept: Kept = ()  # tensors that earlier segments keep

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
    """Tensors that a loss needs in addition to the batch. Passes change them in place."""

    #: (parts,) divisors of the parts; 0 if not known yet, 1 if the loss is not divided
    starts: Tensor
    #: (k, N) mean absolute gradients, zero for future passes; u (1, N) for ``least_squares``
    gradients: Tensor | None = None
    #: (N,) mean of the gradients; h for ``least_squares``, the Hessian for ``perturb_mean``
    diagonal: Tensor | None = None
    root: Tensor | None = None  # (k, k) root of (D Dᵀ)⁻¹, zero for future passes


def block_loss(
    kind: str, weights: tuple[float, ...], output: Tensor, batch: Batch, state: LossState
) -> Loss:
    """Return the loss of a batch (a scalar), and the new start values (parts,).

    ``kind`` is the name of a loss, ``head`` (KL of the classes, not divided by its start) or
    ``head_relative``. ``weights`` has one weight per part. ``output`` (B, ...) is the quantized
    block's.
    """
    if kind == "head":
        return kl_divergence(output, batch.target), state.starts
    if kind == "head_relative":
        return _over_starts([kl_divergence(output, batch.target)], weights, state.starts)
    delta = output - batch.target
    if kind == "mse_adalog":
        return _over_starts([losses.axis_error(delta)], weights, state.starts)
    return _over_starts(_parts(kind, delta.flatten(1), batch, state), weights, state.starts)


def prediction_loss(
    kind: str,
    weights: tuple[float, ...],
    output: Tensor,
    batch: Batch,
    starts: Tensor,
    rest: Callable[[Tensor, Tensor | None, Kept], Tensor],
    divergence: Measure,
) -> Loss:
    """Return the block's squared error plus an error at the model's end, and the start values.

    Sources: PD-Quant (Liu et al., CVPR 2023, arXiv:2212.07048) for the prediction's divergence,
    GLF-Q (2026) for the penultimate feature's squared error. ``rest`` runs the model behind the
    block in full precision. ``kind`` is one of these losses:

    * ``prediction_pdquant``: as released. ``output`` (2B, ...) has the outputs for mixed inputs,
      which the squared error compares, and then those for unmixed inputs, which give the
      prediction. The start values are 1, so nothing is divided.
    * ``prediction``: a variant. ``output`` (B, ...) is used for both, and each part is divided by
      its start value.
    * ``glf``: the squared error of the feature instead of the divergence; each part is divided by
      its start value.
    """
    assert batch.reference is not None
    if kind == "prediction_pdquant":
        output, unmixed = output.chunk(2)
        error = losses.axis_error(output - batch.target)
    else:
        unmixed = output
        error = losses.squared_error((output - batch.target).flatten(1))
    prediction = rest(unmixed, batch.side, batch.kept)
    if kind == "glf":
        far = losses.squared_error((prediction - batch.reference).flatten(1))
        return _over_starts([error, far], weights, starts)
    # At 8 bits the divergence is about 1e-8; in float32 it could be negative.
    far = divergence(prediction.double(), batch.reference.double()).float()
    return _over_starts([error, far], weights, starts)


def _parts(kind: str, delta: Tensor, batch: Batch, state: LossState) -> list[Tensor]:
    if kind in losses.PLAIN:
        return [losses.PLAIN[kind](delta)]
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
    """Return the weighted sum of parts over start values, and the start values.

    The parts themselves replace start values of 0.
    """
    values = torch.stack(parts)
    now = values.detach()
    # A part of exactly zero (a block where nothing is quantized) must not give NaN.
    new = torch.where(starts > 0, starts, torch.where(now > 0, now, torch.ones_like(now)))
    ratios = values / new
    total = ratios[0] * weights[0]
    for number in range(1, len(weights)):
        total = total + ratios[number] * weights[number]
    return total, new
