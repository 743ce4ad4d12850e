"""Learned rounding (AdaRound: Nagel et al., ICML 2020, arXiv:2004.10568), a block's weights at once.

``ŵ = s * (clamp(floor(w / s) + h(α) + z, 0, L - 1) - z)``, ``h(α) = clip(1.2 σ(α) - 0.1, 0, 1)``.
Since ``floor(w / s) + z`` is an integer, the clamp acts on whole elements: ``ŵ`` is linear in ``h``
where ``0 <= floor(w / s) + z <= L - 2`` and constant elsewhere. So one flat vector α serves the whole
block, and a step costs a few passes over it whatever the number of layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_STRETCH, _SHIFT = 1.2, 0.1


def split_as(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of a flat vector in some shapes, one after another."""
    pieces = torch.split(flat, [torch.Size(shape).numel() for shape in shapes]) if shapes else ()
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def soft_rounding(alpha: Tensor) -> Tensor:
    """``h(α) = clip(1.2 σ(α) - 0.1, 0, 1)``, any shape."""
    return torch.sigmoid(alpha).mul_(_STRETCH).sub_(_SHIFT).clamp_(0, 1)


def initial_alpha(fraction: Tensor) -> Tensor:
    """Inverse of :func:`soft_rounding` for ``fraction`` in [0, 1)."""
    return -torch.log(_STRETCH / (fraction + _SHIFT) - 1)


def alpha_gradient(
    alpha: Tensor, gain: Tensor, grad_weight: Tensor, penalty_weight: Tensor, beta: Tensor
) -> Tensor:
    """Gradient in α (n,) of a loss plus ``penalty_weight`` times the regulariser.

    One formula instead of a backward pass, so that it fuses with the optimizer's update.
    ``grad_weight`` (n,) is the loss's gradient in the flat soft weights.
    """
    sigmoid = torch.sigmoid(alpha)
    stretched = sigmoid * _STRETCH - _SHIFT
    h = stretched.clamp(0, 1)
    grad = torch.addcmul(penalty_weight * penalty_slope(h, beta), grad_weight, gain)
    # h is constant where it is clipped. (A float mask: boolean tensors are slow on CPUs.)
    free = 1 - ((stretched - h).abs() * 1e30).clamp(max=1)
    return grad * (sigmoid * (1 - sigmoid) * _STRETCH) * free


@dataclass
class RoundingProblem:
    """The rounding variables of several weight matrices as one flat vector."""

    alpha: Tensor  # float32, all elements of all matrices one after another
    #: float32, ``ŵ = offset + gain * h(α)``
    offset: Tensor
    gain: Tensor
    base: Tensor  # float32 integers, ``floor(w / s) + z`` before clamping
    shapes: list[torch.Size]  # shape of each weight, in order
    levels: list[int]  # number of grid points of each weight

    @classmethod
    def build(
        cls, weights: list[Tensor], scales: list[Tensor], zeros: list[Tensor], levels: list[int]
    ) -> "RoundingProblem":
        """Start from weights (any shape, rows = output channels), scales and zero points (rows x 1)."""
        parts: dict[str, list[Tensor]] = {"alpha": [], "offset": [], "gain": [], "base": []}
        for weight, scale, zero, count in zip(weights, scales, zeros, levels, strict=True):
            ratio = weight.detach().flatten(1) / scale
            floor = torch.floor(ratio)
            base = floor + zero
            free = (base >= 0) & (base <= count - 2)
            parts["alpha"].append(initial_alpha(ratio - floor).flatten())
            parts["offset"].append(((base.clamp(0, count - 1) - zero) * scale).flatten())
            parts["gain"].append((free * scale).flatten())
            parts["base"].append(base.flatten())
        flat = {name: torch.cat(tensors) for name, tensors in parts.items()}
        return cls(**flat, shapes=[weight.shape for weight in weights], levels=list(levels))

    def soft(self) -> Tensor:
        """The soft weights ``offset + gain * h(α)``, flat."""
        return torch.addcmul(self.offset, self.gain, soft_rounding(self.alpha))

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector in the shapes of the weights."""
        return split_as(flat, self.shapes)

    def codes(self) -> list[Tensor]:
        """Decided codes ``clamp(floor(w / s) + 1[α >= 0] + z, 0, L - 1)``, float, rows x
        columns.
        """
        decided = self.split(self.base + (self.alpha >= 0))
        return [
            part.flatten(1).clamp(0, count - 1)
            for part, count in zip(decided, self.levels, strict=True)
        ]


def rounding_penalty(h: Tensor, beta: float) -> Tensor:
    """Regulariser ``Σ (1 - |2h - 1| ** β)``, β >= 1: 0 where every h in [0, 1] is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def penalty_slope(h: Tensor, beta: Tensor) -> Tensor:
    """Derivative in ``h`` of :func:`rounding_penalty`; ``beta`` is a scalar tensor."""
    centred = h * 2 - 1
    # The power by exp and log: both are vectorised on CPUs, pow is not. At distance 0 the sign makes the slope 0.
    power = torch.exp((beta - 1) * torch.log(centred.abs().clamp(min=1e-30)))
    return -2 * beta * power * torch.sign(centred)
