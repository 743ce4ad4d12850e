"""Fisher passes: one sweep over the calibration images from the present block to the end of the model."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fimaq_core.chain import BlockChain
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.numerics import Arithmetic, arithmetic


def output_gradients(
    chain: BlockChain,
    index: int,
    inputs: Tensor,
    reference: Tensor,
    divergence: Divergence,
    batch_size: int,
    device: torch.device,
    dtype: Arithmetic = "float32",
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (samples, output, gradient) of block ``index`` batch by batch.

    The segments behind the block run as they are set up. The gradient is that of the divergence at the block's output.

    Args:
        chain: the model.
        index: number of the block.
        inputs: (n, ...) inputs of the block, on any device.
        reference: (n, ...) full-precision outputs of the whole model.
        divergence: mean over its batch.
        batch_size: samples a pass.
        device: where to compute.
        dtype: arithmetic of the tail, see :mod:`fimaq_core.numerics`.
        forward: runs the block on a batch; None runs it as it is set up just now.
    """
    block = chain.segment(index).block if forward is None else forward
    for start in range(0, inputs.shape[0], batch_size):
        part = slice(start, min(start + batch_size, inputs.shape[0]))
        with torch.no_grad():
            output = block(inputs[part].to(device, non_blocking=True))
        output = output.detach().requires_grad_(True)
        with torch.enable_grad(), arithmetic(dtype, device):
            loss = divergence(chain.tail(index + 1, output), reference[part].to(device))
        # The mean over the batch makes every sample's gradient 1/B of its own; undone so that batches do not matter.
        (gradient,) = torch.autograd.grad(loss * (part.stop - part.start), output)
        yield part, output.detach(), gradient


def mean_gradient_and_error(
    chain: BlockChain,
    index: int,
    inputs: Tensor,
    targets: Tensor,
    reference: Tensor,
    divergence: Divergence,
    batch_size: int,
    device: torch.device,
    dtype: Arithmetic = "float32",
    forward: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One FIMA-Q pass: ``g = mean |∂D/∂z|`` and ``d = mean |Δ|`` over the images, each (N,).

    Args:
        targets: (n, ...) full-precision outputs of the block.
        chain, index, inputs, reference, divergence, batch_size, device, dtype, forward: as in :func:`output_gradients`.
    """
    gradient = error = None
    sweep = output_gradients(chain, index, inputs, reference, divergence, batch_size, device, dtype, forward)
    for part, output, grad in sweep:
        g = grad.abs().sum(0)
        d = (output - targets[part].to(device)).abs().sum(0)
        gradient = g if gradient is None else gradient + g
        error = d if error is None else error + d
    assert gradient is not None
    assert error is not None
    count = inputs.shape[0]
    return gradient.flatten() / count, error.flatten() / count
