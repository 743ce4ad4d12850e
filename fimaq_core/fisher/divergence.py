"""Divergences between the full-precision and the quantized model's outputs."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.samples import Samples

#: Outputs (B, ...) and the reference of the same samples (B, ...) to a scalar, the mean over the batch.
Measure = Callable[[Tensor, Tensor], Tensor]


class Divergence:
    """A task's measure of how far outputs are from the full-precision ones."""

    #: how many samples in a row are compared with each other; None where each sample's part is its
    #: own, so that batches do not matter
    batch: int | None = None

    def reference(self, outputs: Samples) -> Samples:
        """Reference rows for outputs (n, ...), made from the full-precision outputs."""
        return outputs

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """The mean divergence over a batch of outputs (B, ...) and rows of the reference."""
        raise NotImplementedError


def kl_divergence(logits: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(reference / T) || softmax(logits / T))`` in nats, mean over the batch."""
    target = F.log_softmax(reference / temperature, dim=-1)
    return F.kl_div(
        F.log_softmax(logits / temperature, dim=-1), target, reduction="batchmean", log_target=True
    )


class ClassifierDivergence(Divergence):
    """A classifier's KL at a temperature (FIMA-Q's released code: 20), at least in float32."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return kl_divergence(
            at_least_float32(outputs), at_least_float32(reference), self.temperature
        )


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, or its float32 form if it has fewer digits."""
    return x if x.dtype == torch.float64 else x.float()
