"""Divergence of a two-tower model: change of a batch's similarities by one tower."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.fisher.divergence import Divergence, at_least_float32
from fimaq_core.samples import Samples


class ContrastiveDivergence(Divergence):
    """Symmetric KL between full-precision and quantized matching probabilities of a batch's pairs.

    With softmax (CLIP: Radford et al., ICML 2021, arXiv:2103.00020): of image to text (rows of the
    similarities) and text to image (columns), the mean of both, each ``(KL(p || q) + KL(q || p)) /
    2`` averaged over the batch. With sigmoid, where there is a ``bias`` (SigLIP: Zhai et al., ICCV
    2023, arXiv:2303.15343): every pair of the batch is a Bernoulli variable; their sum over the
    batch's size.

    ``other`` (n, d) are embeddings of the other tower in full precision, by calibration sample;
    ``scale`` is the factor of the cosines; ``batch`` pairs in a row share a batch.
    """

    def __init__(self, other: Tensor, scale: float, bias: float | None, batch: int) -> None:
        self.other, self.scale, self.bias, self.batch = (
            F.normalize(other, dim=-1),
            scale,
            bias,
            batch,
        )

    def reference(self, outputs: Samples) -> Samples:
        """This tower's normalised embeddings and the other's, side by side, (n, 2 d)."""
        own = F.normalize(outputs.whole, dim=-1)
        return Samples(torch.cat([own, self.other.to(own)], dim=-1))

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        # Its own products keep float32 whatever the model's have: similarities are large beside their changes.
        with torch.autocast(outputs.device.type, enabled=False):
            full, other = at_least_float32(reference).chunk(2, dim=-1)
            before = self.scale * full @ other.T
            gap = self.scale * (full - F.normalize(at_least_float32(outputs), dim=-1)) @ other.T
        # For p and q with logits a and b, KL(p || q) + KL(q || p) = sum of (p - q)(a - b): normalisers and biases cancel, and
        # nothing large is subtracted.
        after = before - gap
        if self.bias is not None:
            return ((before + self.bias).sigmoid() - (after + self.bias).sigmoid()).mul(
                gap
            ).sum() / (2 * len(outputs))
        rows, columns = (
            (before.softmax(dim) - after.softmax(dim)).mul(gap).sum() for dim in (1, 0)
        )
        return (rows + columns) / (4 * len(outputs))


@torch.no_grad()
def contrastive(
    model: nn.Module,
    encode: Callable[[Tensor], Tensor],
    inputs: Samples,
    *,
    batch: int,
    size: int = 32,
) -> ContrastiveDivergence:
    """The contrastive divergence of one tower, from embeddings of the other one.

    ``encode`` is the other tower of ``model``, in full precision. It embeds its ``inputs`` (n, ...),
    one per calibration sample, ``size`` at a time, where the model is.
    """
    place = next(model.parameters()).device
    other = inputs.map(lambda part: encode(part.to(place)).float(), size).whole
    bias = getattr(model, "logit_bias", None)
    return ContrastiveDivergence(
        other, float(model.logit_scale.exp()), None if bias is None else float(bias), batch
    )
