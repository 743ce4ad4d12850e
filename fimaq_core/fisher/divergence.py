"""Divergences between the full-precision and the quantized model's outputs."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Divergence(Protocol):
    """A task's measure of how far outputs are from the full-precision ones."""

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Return the divergence, a scalar: the mean over the batch.

        Args:
            outputs: (B, ...) what the model gives.
            reference: (B, ...) what the full-precision model gives for the same samples.
        """
        ...


def kl_divergence(logits: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(reference / T) || softmax(logits / T))``, mean over the batch, in nats.

    Args:
        logits, reference: (B, classes).
        temperature: T.
    """
    target = F.log_softmax(reference / temperature, dim=-1)
    return F.kl_div(F.log_softmax(logits / temperature, dim=-1), target, reduction="batchmean", log_target=True)


class ClassifierDivergence:
    """The divergence of a classifier: KL at a temperature (FIMA-Q's released code: 20), at least in float32."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return kl_divergence(_wide(outputs), _wide(reference), self.temperature)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
