"""Divergence of a CLIP model: the change of similarities when one tower is quantized."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.fisher.divergence import Divergence, at_least_float32
from fimaq_core.samples import Samples


class ContrastiveDivergence(Divergence):
    """Symmetric KL divergence of the matching probabilities in a batch of image-caption pairs.

    It compares full precision (p) with the quantized tower (q).

    Softmax (CLIP: Radford et al., ICML 2021, arXiv:2103.00020): probabilities of image to text
    (rows of the similarities) and of text to image (columns). The divergence is the mean of both,
    each ``(KL(p || q) + KL(q || p)) / 2`` averaged over the batch.

    Sigmoid, for models with a ``bias`` (SigLIP: Zhai et al., ICCV 2023, arXiv:2303.15343): each
    pair of an image and a caption in the batch is a Bernoulli variable. The divergence is the sum
    over all such pairs, divided by the batch size.

    Args:
        other: (n, d) full-precision embeddings of the calibration samples by the other tower.
        scale: factor of the cosine similarities.
        bias: bias of the logits; None for softmax.
        batch: number of consecutive pairs in a batch.
    """

    def __init__(self, other: Tensor, scale: float, bias: float | None, batch: int) -> None:
        self.other = F.normalize(other, dim=-1)
        self.scale, self.bias, self.batch = scale, bias, batch

    def reference(self, outputs: Samples) -> Samples:
        """Return normalised embeddings of this tower and of the other, side by side, (n, 2 d)."""
        own = F.normalize(outputs.whole, dim=-1)
        return Samples(torch.cat([own, self.other.to(own)], dim=-1))

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        # Similarities are large compared with their changes, so these products need float32.
        with torch.autocast(outputs.device.type, enabled=False):
            full, other = at_least_float32(reference).chunk(2, dim=-1)
            before = self.scale * full @ other.T
            gap = self.scale * (full - F.normalize(at_least_float32(outputs), dim=-1)) @ other.T
        # For p and q with logits a and b, KL(p || q) + KL(q || p) is the sum of (p - q)(a - b).
        # Normalisers and biases cancel, so no large numbers are subtracted.
        after = before - gap
        if self.bias is not None:
            change = (before + self.bias).sigmoid() - (after + self.bias).sigmoid()
            return change.mul(gap).sum() / (2 * len(outputs))
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
    """Return the contrastive divergence of one tower.

    ``encode`` is the other tower of ``model``, in full precision. It embeds ``inputs`` (n, ...),
    one per calibration sample, ``size`` at a time, on the device of the model.
    """
    place = next(model.parameters()).device
    other = inputs.map(lambda part: encode(part.to(place)).float(), size).whole
    bias = getattr(model, "logit_bias", None)
    bias = None if bias is None else float(bias)
    return ContrastiveDivergence(other, float(model.logit_scale.exp()), bias, batch)
