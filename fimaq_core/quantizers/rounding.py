"""Learned rounding (AdaRound: Nagel et al., ICML 2020, arXiv:2004.10568) of a block's weights.

``ŵ = s * (clamp(floor(w / s) + h(α) + z, 0, L - 1) - z)``, ``h(α) = clip(1.2 σ(α) - 0.1, 0, 1)``.
``floor(w / s) + z`` is an integer, so the clamp acts on whole elements: ``ŵ`` is linear in ``h``
where ``0 <= floor(w / s) + z <= L - 2``, and constant elsewhere. One flat vector α therefore serves
a whole block, and the cost of a step does not depend on the number of layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_STRETCH, _SHIFT = 1.2, 0.1
#: Start of ``h(α)`` where a closed form chose the upper of two codes.
DECIDED = 0.9


def split_as(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Split a flat vector into views with these shapes."""
    pieces = torch.split(flat, [torch.Size(shape).numel() for shape in shapes]) if shapes else ()
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def soft_rounding(alpha: Tensor) -> Tensor:
    """Compute ``h(α) = clip(1.2 σ(α) - 0.1, 0, 1)`` of any shape."""
    return torch.sigmoid(alpha).mul_(_STRETCH).sub_(_SHIFT).clamp_(0, 1)


def initial_alpha(fraction: Tensor) -> Tensor:
    """Compute the inverse of :func:`soft_rounding` for ``fraction`` in [0, 1)."""
    return -torch.log(_STRETCH / (fraction + _SHIFT) - 1)


def alpha_gradient(
    alpha: Tensor, gain: Tensor, grad_weight: Tensor, penalty_weight: Tensor, beta: Tensor
) -> Tensor:
    """Compute the gradient (n,) in α of a loss plus weighted :func:`rounding_penalty`.

    ``grad_weight`` (n,) is the gradient of the loss in the flat soft weights. One formula replaces
    the backward pass, so that it fuses with the optimizer's update.
    """
    sigmoid = torch.sigmoid(alpha)
    stretched = sigmoid * _STRETCH - _SHIFT
    h = stretched.clamp(0, 1)
    grad = torch.addcmul(penalty_weight * penalty_slope(h, beta), grad_weight, gain)
    # h is constant where it is clipped. The mask is float: boolean tensors are slow on CPUs.
    free = 1 - ((stretched - h).abs() * 1e30).clamp(max=1)
    return grad * (sigmoid * (1 - sigmoid) * _STRETCH) * free


class RoundingVectors(NamedTuple):
    """Vectors (n,) of a :class:`RoundingProblem` that a step reads; the first one is learned."""

    alpha: Tensor
    offset: Tensor
    gain: Tensor

    def soft(self) -> Tensor:
        """Compute the flat soft weights ``offset + gain * h(α)``."""
        return torch.addcmul(self.offset, self.gain, soft_rounding(self.alpha))

    def gradient(self, grad_weight: Tensor, penalty_weight: Tensor, beta: Tensor) -> Tensor:
        """Compute :func:`alpha_gradient`."""
        return alpha_gradient(self.alpha, self.gain, grad_weight, penalty_weight, beta)


@dataclass
class RoundingProblem:
    """Rounding variables of several weights as one flat vector: ``ŵ = offset + gain * h(α)``.

    Tensors are float32 (n,), with the elements of all weights one after another.
    """

    alpha: Tensor
    offset: Tensor
    gain: Tensor
    base: Tensor  # integers ``floor(w / s) + z``, not clamped
    shapes: list[torch.Size]  # shape of each weight
    levels: list[int]  # number of grid points of each weight

    @classmethod
    def build(
        cls,
        weights: list[Tensor],
        scales: list[Tensor],
        zeros: list[Tensor],
        levels: list[int],
        *,
        codes: list[Tensor] | None = None,
    ) -> "RoundingProblem":
        """Start from weights (rows, ...), scales and zero points (rows, 1), and levels.

        ``h(α)`` starts at the fractional part of ``w / s``. If ``codes`` (rows, columns) of the
        weights are given, it starts at :data:`DECIDED` or its mirror image, on the codes' side.
        """
        parts: dict[str, list[Tensor]] = {"alpha": [], "offset": [], "gain": [], "base": []}
        given = [None] * len(weights) if codes is None else codes
        for weight, scale, zero, count, code in zip(
            weights, scales, zeros, levels, given, strict=True
        ):
            ratio = weight.detach().flatten(1) / scale
            floor = torch.floor(ratio)
            base = floor + zero
            free = (base >= 0) & (base <= count - 2)
            start = ratio - floor
            if code is not None:
                start = torch.where(code > base, DECIDED, 1 - DECIDED)
            parts["alpha"].append(initial_alpha(start).flatten())
            parts["offset"].append(((base.clamp(0, count - 1) - zero) * scale).flatten())
            parts["gain"].append((free * scale).flatten())
            parts["base"].append(base.flatten())
        flat = {name: torch.cat(tensors) for name, tensors in parts.items()}
        return cls(**flat, shapes=[weight.shape for weight in weights], levels=list(levels))

    @property
    def vectors(self) -> RoundingVectors:
        """The vectors that a step reads; they share memory with these."""
        return RoundingVectors(self.alpha, self.offset, self.gain)

    def soft(self) -> Tensor:
        """Compute the flat soft weights."""
        return self.vectors.soft()

    def split(self, flat: Tensor) -> list[Tensor]:
        """Split a flat vector into views with the shapes of the weights."""
        return split_as(flat, self.shapes)

    def codes(self) -> list[Tensor]:
        """Decide the codes (rows, columns): ``clamp(floor(w / s) + 1[α >= 0] + z, 0, L - 1)``."""
        decided = self.split(self.base + (self.alpha >= 0))
        return [
            part.flatten(1).clamp(0, count - 1)
            for part, count in zip(decided, self.levels, strict=True)
        ]


def rounding_penalty(h: Tensor, beta: float) -> Tensor:
    """Regularizer ``Σ (1 - |2h - 1| ** β)`` with β >= 1; it is 0 if each h is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def penalty_slope(h: Tensor, beta: Tensor) -> Tensor:
    """Derivative in ``h`` of :func:`rounding_penalty`; ``beta`` is a scalar tensor."""
    centred = h * 2 - 1
    # exp and log are vectorised on CPUs, pow is not. At distance 0 the sign makes the slope 0.
    power = torch.exp((beta - 1) * torch.log(centred.abs().clamp(min=1e-30)))
    return -2 * beta * power * torch.sign(centred)
