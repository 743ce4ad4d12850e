"""Weights learned by straight-through gradients (Bengio et al., arXiv:1308.3432; GLF-Q, 2026).

``ŵ = s * (clamp(round(w / s) + z, 0, L - 1) - z)`` with latent weights w, fixed scales s and zero
points z. In the backward pass ``round`` counts as the identity, so the gradient in w is that in ŵ
where the code is not clamped, and 0 elsewhere. As in :mod:`.rounding`, one flat vector serves a
whole block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fimaq_core.quantizers.rounding import split_as


class LatentWeights(NamedTuple):
    """Vectors (n,), float32, of a :class:`StraightThrough`; the first one is learned."""

    weight: Tensor  # latent weights
    scale: Tensor
    low: Tensor  # least integer ``round(w / s)`` that is not clamped, -z
    high: Tensor  # greatest one, L - 1 - z

    def soft(self) -> Tensor:
        """Compute the quantized weights (n,)."""
        return self.scale * self.integers()

    def integers(self) -> Tensor:
        """Compute ``clamp(round(w / s), -z, L - 1 - z)``, (n,)."""
        ratio = torch.round(self.weight / self.scale)
        return torch.minimum(torch.maximum(ratio, self.low), self.high)

    def gradient(self, grad_weight: Tensor, penalty_weight: Tensor, beta: Tensor) -> Tensor:
        """Compute the gradient (n,) in the latent weights from that in the quantized ones.

        The other arguments belong to learned rounding.
        """
        ratio = torch.round(self.weight / self.scale)
        # The distance from the nearest code is an integer; boolean tensors are slow on CPUs.
        outside = torch.maximum(self.low - ratio, ratio - self.high).clamp(0, 1)
        return grad_weight * (1 - outside)


@dataclass
class StraightThrough:
    """Latent weights of several layers as one flat vector.

    Example::

        problem = StraightThrough.build([weight], [scale], [zero_point], [16])
        problem.codes()  # at the start the weights rounded to nearest
    """

    vectors: LatentWeights
    shapes: list[torch.Size]  # shape of each weight

    @classmethod
    def build(
        cls, weights: list[Tensor], scales: list[Tensor], zeros: list[Tensor], levels: list[int]
    ) -> "StraightThrough":
        """Start from weights (rows, ...), scales and zero points (rows, 1), and levels."""
        parts: list[tuple[Tensor, ...]] = []
        for weight, scale, zero, count in zip(weights, scales, zeros, levels, strict=True):
            matrix = weight.detach().flatten(1)
            rows = matrix, scale, -zero, count - 1 - zero
            parts.append(tuple(row.expand_as(matrix).flatten() for row in rows))
        vectors = (torch.cat(one) for one in zip(*parts, strict=True))
        return cls(LatentWeights(*vectors), [weight.shape for weight in weights])

    def soft(self) -> Tensor:
        """Compute the flat quantized weights."""
        return self.vectors.soft()

    def split(self, flat: Tensor) -> list[Tensor]:
        """Split a flat vector into views with the shapes of the weights."""
        return split_as(flat, self.shapes)

    def codes(self) -> list[Tensor]:
        """Return the codes (rows, columns), integers in [0, L - 1]."""
        codes = self.vectors.integers() - self.vectors.low
        return [part.flatten(1) for part in self.split(codes)]
