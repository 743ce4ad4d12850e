"""Learned rounding (AdaRound: Nagel et al., ICML 2020, arXiv:2004.10568) over all weights of a block at once.

``ŵ = s * (clamp(floor(w / s) + h(α) + z, 0, L - 1) - z)`` with ``h(α) = clip(1.2 σ(α) - 0.1, 0, 1)``.
Since ``floor(w / s) + z`` is an integer, the clamp acts on whole elements: ``ŵ`` is linear in ``h`` where
``0 <= floor(w / s) + z <= L - 2`` and constant elsewhere. So one flat vector α serves the whole block, and a
step costs a few passes over it whatever the number of layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_STRETCH, _SHIFT = 1.2, 0.1


def soft_rounding(alpha: Tensor) -> Tensor:
    """``h(α) = clip(1.2 σ(α) - 0.1, 0, 1)``, any shape."""
    return torch.sigmoid(alpha).mul_(_STRETCH).sub_(_SHIFT).clamp_(0, 1)


def initial_alpha(fraction: Tensor) -> Tensor:
    """Inverse of :func:`soft_rounding` for ``fraction`` in [0, 1)."""
    return -torch.log(_STRETCH / (fraction + _SHIFT) - 1)


class _SoftWeight(torch.autograd.Function):
    """``offset + gain * h(α)`` and, in the same backward pass, its gradient in α."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, offset: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        sigmoid = torch.sigmoid(alpha)
        stretched = sigmoid * _STRETCH - _SHIFT
        h = stretched.clamp(0, 1)
        # h is constant where it is clipped
        slope = (sigmoid * (1 - sigmoid)).mul_(_STRETCH).mul_(stretched == h)
        ctx.save_for_backward(slope, gain)
        return torch.addcmul(offset, gain, h), h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_weight, grad_h = grads
        slope, gain = ctx.saved_tensors
        return torch.addcmul(grad_h, grad_weight, gain).mul_(slope), None, None


@dataclass
class RoundingProblem:
    """The rounding variables of several weight matrices as one flat vector.

    Attributes:
        alpha: float32 parameter, all elements of all matrices one after another.
        offset, gain: float32, ``ŵ = offset + gain * h(α)``.
        base: float32 integers, ``floor(w / s) + z`` before clamping.
        shapes: shape of each weight, in order.
        levels: number of grid points of each weight.
    """

    alpha: Tensor
    offset: Tensor
    gain: Tensor
    base: Tensor
    shapes: list[torch.Size]
    levels: list[int]

    @classmethod
    def build(cls, weights: list[Tensor], scales: list[Tensor], zeros: list[Tensor], levels: list[int]) -> "RoundingProblem":
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
        flat["alpha"].requires_grad_(True)
        return cls(**flat, shapes=[weight.shape for weight in weights], levels=list(levels))

    def soft(self) -> tuple[list[Tensor], Tensor]:
        """Return the soft weights, in their own shapes, and the flat ``h`` for the regulariser."""
        flat, h = _SoftWeight.apply(self.alpha, self.offset, self.gain)  # type: ignore[no-untyped-call]
        return self.split(flat), h

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector in the shapes of the weights."""
        pieces = torch.split(flat, [shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def codes(self) -> list[Tensor]:
        """Decided codes ``clamp(floor(w / s) + 1[α >= 0] + z, 0, L - 1)``, each rows x columns, float."""
        decided = self.split(self.base + (self.alpha.detach() >= 0))
        return [part.flatten(1).clamp(0, count - 1) for part, count in zip(decided, self.levels, strict=True)]


class _Penalty(torch.autograd.Function):
    """``Σ (1 - |2h - 1| ** β)`` with one power for value and gradient together."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, beta: float) -> Tensor:
        centred = h * 2 - 1
        distance = centred.abs()
        power = distance.pow(beta - 1)
        ctx.save_for_backward(centred.sign_().mul_(power).mul_(-2 * beta))
        return h.numel() - torch.dot(power, distance)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0], None


def rounding_penalty(h: Tensor, beta: float) -> Tensor:
    """Regulariser ``Σ (1 - |2h - 1| ** β)``, a scalar: 0 where every h is 0 or 1.

    Args:
        h: (n,) soft roundings in [0, 1].
        beta: β, at least 1.
    """
    penalty: Tensor = _Penalty.apply(h, beta)  # type: ignore[no-untyped-call]
    return penalty
