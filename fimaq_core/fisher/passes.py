"""Passes for the Fisher information: sweeps over the calibration images from the present block to the end of the model."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fimaq_core.chain import Beside, BlockChain
from fimaq_core.fisher.divergence import Measure
from fimaq_core.numerics import Arithmetic, arithmetic
from fimaq_core.samples import Samples, slices


def output_gradients(
    chain: BlockChain,
    index: int,
    inputs: Samples,
    reference: Samples,
    divergence: Measure,
    batch_size: int,
    device: torch.device,
    dtype: Arithmetic = "float32",
    forward: Callable[[Tensor], Tensor] | None = None,
    beside: Beside = Beside(),
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (samples, output, gradient) of block ``index`` batch by batch.

    The segments behind the block run as they are set up. The gradient is that of the divergence at the block's output. Where
    the divergence compares samples with each other, ``batch_size`` must be its own.

    Args:
        chain: the model.
        index: number of the block.
        inputs: (n, ...) inputs of the block, on any device; samples of varying shapes are taken one by one.
        reference: (n, ...) full-precision outputs of the whole model.
        divergence: mean over its batch.
        batch_size: samples a pass.
        device: where to compute.
        dtype: arithmetic of the tail, see :mod:`fimaq_core.numerics`.
        forward: runs the block on a batch; None runs it as it is set up just now.
        beside: what travels beside the inputs of all samples.
    """
    block = chain.segment(index).block if forward is None else forward
    for part in slices(inputs, batch_size):
        with torch.no_grad():
            output = block(_batch(inputs, part, device)).detach()
        rest = rest_of(chain, index, beside.rows(part, device))
        yield part, output, divergence_gradient(rest, output, _batch(reference, part, device), divergence, dtype)


def _batch(samples: Samples, part: slice, device: torch.device) -> Tensor:
    found = samples[part].to(device, non_blocking=True)
    assert isinstance(found, Tensor)
    return found


def divergence_gradient(
    rest: Callable[[Tensor], Tensor], output: Tensor, reference: Tensor, divergence: Measure, dtype: Arithmetic = "float32"
) -> Tensor:
    """Gradient at ``output`` (B, ...) of every sample's own divergence of ``rest(output)`` from ``reference`` (B, ...)."""
    leaf = output.detach().requires_grad_(True)
    with torch.enable_grad(), arithmetic(dtype, output.device):
        loss = divergence(rest(leaf), reference)
    # The mean over the batch makes every sample's gradient 1/B of its own; undone so that batches do not matter.
    (gradient,) = torch.autograd.grad(loss * output.shape[0], leaf)
    return gradient


def rest_of(chain: BlockChain, index: int, beside: Beside) -> Callable[[Tensor], Tensor]:
    """From the output of block ``index`` to the model's, with what travels beside that batch."""
    return lambda output: chain.rest(index, output, *beside.tensors)


def mean_gradient_and_error(
    chain: BlockChain,
    index: int,
    inputs: Tensor,
    targets: Tensor,
    reference: Tensor,
    divergence: Measure,
    batch_size: int,
    device: torch.device,
    dtype: Arithmetic = "float32",
    forward: Callable[[Tensor], Tensor] | None = None,
    beside: Beside = Beside(),
) -> tuple[Tensor, Tensor]:
    """One FIMA-Q pass: ``g = mean |∂D/∂z|`` and ``d = mean |Δ|`` over the images, each (N,).

    Args:
        targets: (n, ...) full-precision outputs of the block.
        chain, index, inputs, reference, divergence, batch_size, device, dtype, forward, beside: as in :func:`output_gradients`.
    """
    gradient = error = None
    sweep = output_gradients(chain, index, inputs, reference, divergence, batch_size, device, dtype, forward, beside)
    for part, output, grad in sweep:
        g = grad.abs().sum(0)
        d = (output - targets[part].to(device)).abs().sum(0)
        gradient = g if gradient is None else gradient + g
        error = d if error is None else error + d
    assert gradient is not None
    assert error is not None
    count = inputs.shape[0]
    return gradient.flatten() / count, error.flatten() / count


def perturbation_hessian(
    rest: Callable[[Tensor], Tensor],
    output: Tensor,
    reference: Tensor,
    divergence: Measure,
    epsilon: float,
    dtype: Arithmetic = "float32",
) -> Tensor:
    """``|g(z + ε) - g(z - ε)|`` of each sample, g the divergence's gradient at the output z, ε added to all of it.

    APHQ-ViT (Wu et al., CVPR 2025, arXiv:2504.02508). For a quadratic divergence that is ``2 ε |H 1|``.

    In a transformer with pre-norm blocks a shift common to all channels of a token is taken away by every LayerNorm behind
    it, so ``H 1`` is zero there, and what is left is rounding: the noise of the logits' gradient, carried back to z. Its
    mean size over images still says how sensitive each output is, whatever ε (estimates with ε from 1e-6 to 1e-2
    correlate by more than 0.9 in all blocks of the demo's ViT), but its scale is that of the arithmetic, and a sample's own
    values are noise. It is computed in the model's own precision, as released.

    Args:
        rest: from the output to the model's end.
        output: z, (B, ...).
        reference: (B, ...) full-precision outputs of the model.
        divergence: of the task.
        epsilon: ε.
        dtype: arithmetic of ``rest``, see :mod:`fimaq_core.numerics`.

    Returns:
        (B, ...).
    """
    above = divergence_gradient(rest, output + epsilon, reference, divergence, dtype)
    return above.sub_(divergence_gradient(rest, output - epsilon, reference, divergence, dtype)).abs_()


def least_squares_hessian(
    chain: BlockChain,
    index: int,
    inputs: Tensor,
    targets: Tensor,
    reference: Tensor,
    divergence: Measure,
    batch_size: int,
    device: torch.device,
    dtype: Arithmetic = "float32",
    forward: Callable[[Tensor], Tensor] | None = None,
    beside: Beside = Beside(),
) -> tuple[Tensor, Tensor]:
    """LS-ViT's fit (CVPR 2026) to the pairs (g, Δ) of all images: diagonal h and direction u, each (N,).

    ``h = Σ g Δ / Σ Δ²`` and ``u = Σ g √(Δᵀg) / Σ Δᵀg``, sums over images, g and Δ with their signs; images with Δᵀg <= 0
    contribute nothing to u. Where the fit of h is negative it is set to 0: a Fisher information is not negative, and the loss
    would have no minimum.

    Args:
        chain, index, inputs, targets, reference, divergence, batch_size, device, dtype, forward, beside: as in
            :func:`mean_gradient_and_error`.
    """
    size = targets[0].numel()
    above, below, direction = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(3))
    weight = torch.zeros((), dtype=torch.float64, device=device)
    sweep = output_gradients(chain, index, inputs, reference, divergence, batch_size, device, dtype, forward, beside)
    for part, output, grad in sweep:
        g, delta = grad.flatten(1).double(), (output - targets[part].to(device)).flatten(1).double()
        above += (g * delta).sum(0)
        below += delta.square().sum(0)
        inner = (g * delta).sum(1).clamp(min=0)
        direction += inner.sqrt() @ g
        weight += inner.sum()
    tiny = torch.finfo(torch.float64).tiny
    return (above / below.clamp(min=tiny)).clamp(min=0).float(), (direction / weight.clamp(min=tiny)).float()
