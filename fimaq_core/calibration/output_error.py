"""Range search of operands by the squared error of the product they enter: fast exact forms.

An operand is a linear layer's input or either side of an attention product. With operand x, its
quantized form x + D and the other side's quantized form M, the error is ``|D M + R|²``, where R is
the error by M alone. If M has more columns than rows, the form ``Σ D∘(D MMᵀ + 2 R Mᵀ) + const`` is
cheaper.

The error is a sum over tokens, so a candidate is dropped once its partial sum exceeds the whole sum
of the best one. This saves time for linear layers, whose grids hold many bad candidates. The errors
of an attention operand's bounds differ by a few per cent only, so all of them are computed.
"""

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import block_elements


class Product:
    """Squared error of ``x̂ @ other`` against the full-precision product, by the range of ``x``.

    ``x`` (batch, rows, inner) is in full precision. ``other`` (batch or 1, inner, columns) is
    quantized. ``residual`` (batch, rows, columns) is ``x @ (other - other in full precision)``.
    """

    def __init__(self, x: Tensor, other: Tensor, residual: Tensor, levels: int) -> None:
        self.x, self.other, self.residual, self.levels = x, other, residual, levels
        self.gram = other.shape[2] > other.shape[1]
        if self.gram:
            self.matrix = other @ other.transpose(1, 2)
            self.term = 2 * (residual @ other.transpose(1, 2))
            self.constants = residual.double().square().sum((1, 2))
        else:
            self.matrix, self.term = other.contiguous(), residual

    def errors(
        self, scale: Tensor, zero_point: Tensor, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Return errors, float64 (entries, candidates), of batch entries ``start`` to ``stop``.

        Scale and zero point are (1 or entries, candidates).
        """
        stop, count = len(self.x) if stop is None else stop, scale.shape[1]
        size = self.x[0].numel() * max(self.matrix.shape[2] // self.x.shape[2], 1)
        limit = block_elements(self.x.device)
        candidates = max(min(limit // size, count), 1)
        entries = max(limit // (size * candidates), 1)
        out = torch.empty(stop - start, count, dtype=torch.float64, device=self.x.device)
        for first in range(start, stop, entries):
            part = slice(first, min(first + entries, stop))
            own = slice(part.start - start, part.stop - start)
            for left in range(0, count, candidates):
                some = slice(left, left + candidates)
                rows = own if len(scale) > 1 else slice(None)
                ranges = scale[rows, some, None, None], zero_point[rows, some, None, None]
                out[own, some] = self._block(part, *ranges)
        return out

    def _block(self, part: slice, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return errors (entries, candidates); ranges are (entries or 1, candidates, 1, 1)."""
        x = self.x[part, None]
        codes = torch.div(x, scale).round_().add_(zero_point).clamp_(0, self.levels - 1)
        delta = codes.sub_(zero_point).mul_(scale).sub_(x)  # entries, candidates, rows, inner
        # Candidates join the rows, so that the other operand is never copied per candidate.
        if len(self.matrix) == 1:
            made = delta @ self.matrix[0]
        else:
            made = torch.bmm(delta.flatten(1, 2), self.matrix[part]).view(*delta.shape[:3], -1)
        made += self.term[part, None]
        made = made.mul_(delta) if self.gram else made.square_()
        total = made.sum((2, 3)).double()
        return total + self.constants[part, None] if self.gram else total


def best_of_heads(product: Product, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the index (heads,) of each head's best candidate; ranges are (candidates, heads).

    The batch of ``product`` holds all samples of the first head, then of the second, and so on.
    """
    count, heads = scale.shape
    images = len(product.x) // heads
    wide, zeros = (part.t().repeat_interleave(images, 0) for part in (scale, zero_point))
    return product.errors(wide, zeros).view(heads, images, count).sum(1).argmin(1)


def best_operand(product: Product, scale: Tensor, zero_point: Tensor, guess: int = 0) -> int:
    """Return the index of the best candidate (candidates,), one range for the whole operand.

    A candidate is dropped as soon as another one is surely better. ``guess`` is the number of a
    probably good candidate, whose whole error is the first bound.
    """

    def errors(which: Tensor, start: int, stop: int) -> Tensor:
        return product.errors(scale[None, which], zero_point[None, which], start, stop).sum(0)

    batch, device = len(product.x), scale.device
    alive = torch.arange(len(scale), device=device)
    best = torch.as_tensor(guess, device=device)
    bound = errors(best[None], 0, batch)[0]
    partial = torch.zeros(len(scale), dtype=torch.float64, device=device)
    alive = alive[alive != best]
    size = -(-batch // 16)  # entries per slice, for at most 16 slices
    for start in range(0, batch, size):
        stop = min(start + size, batch)
        partial[alive] += errors(alive, start, stop)
        if start == 0 and len(alive):
            # The whole error of the most promising candidate is a tight bound for the others.
            first = alive[partial[alive].argmin()]
            whole = partial[first] + errors(first[None], stop, batch)[0]
            bound, best = torch.minimum(bound, whole), torch.where(whole < bound, first, best)
            alive = alive[alive != first]
        alive = alive[partial[alive] < bound]
        if not len(alive):
            return int(best)
    return int(alive[partial[alive].argmin()])
