"""Divergences between the full-precision and the quantized model's outputs."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.samples import Samples

#: Maps outputs (B, ...) and their reference (B, ...) to a scalar, the mean over the batch.
Measure = Callable[[Tensor, Tensor], Tensor]


class Divergence:
    """Distance between a model's outputs and its full-precision outputs, as a task measures it.

    Example::

        class SquaredDistance(Divergence):
            def __call__(self, outputs, reference):
                return (outputs - reference).square().sum(1).mean()
    """

    #: number of consecutive samples that are compared with each other; None if each sample is
    #: measured alone, so batches do not matter
    batch: int | None = None

    def reference(self, outputs: Samples) -> Samples:
        """Return reference rows for the full-precision outputs (n, ...)."""
        return outputs

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Return the mean divergence over a batch of outputs (B, ...) and reference rows."""
        raise NotImplementedError

    def sharp(self) -> "Divergence":
        """Return a form whose values can be compared: no softening temperature, no division."""
        return self

    def terms(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Return the parts (k,) of the divergence that finishing divides by their starts."""
        return self(outputs, reference)[None]


def kl_divergence(logits: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``KL(softmax(reference / T) || softmax(logits / T))`` in nats, batch mean."""
    target = F.log_softmax(reference / temperature, dim=-1)
    found = F.log_softmax(logits / temperature, dim=-1)
    return F.kl_div(found, target, reduction="batchmean", log_target=True)


class ClassifierDivergence(Divergence):
    """KL divergence of a classifier at a temperature (20 in FIMA-Q's code), at least in float32."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        outputs, reference = at_least_float32(outputs), at_least_float32(reference)
        return kl_divergence(outputs, reference, self.temperature)

    def sharp(self) -> Divergence:
        return ClassifierDivergence(1.0)


class CosineDivergence(Divergence):
    """Mean of ``1 - cos(q, f)`` over features q (B, d) and their full-precision form f.

    Like the divergence of a classifier it is 0 at ``q = f``, with gradient 0 there. The length of a
    feature does not count, as in nearest-neighbour search.
    """

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        outputs, reference = at_least_float32(outputs), at_least_float32(reference)
        return (1 - F.cosine_similarity(outputs, reference, dim=-1)).mean()


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` as it is if it is float64, else in float32."""
    return x if x.dtype == torch.float64 else x.float()
