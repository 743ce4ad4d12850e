"""Range search of weights by the squared error of the layer's output: a fast exact form.

With inputs X, their quantized form X̂ and E = X̂ - X, a row w and its quantized form w + δ give
``|X̂(w + δ) - Xw|² = δᵀSδ + 2 δᵀCw + const`` with ``S = X̂ᵀX̂`` and ``C = X̂ᵀE``: two d x d matrices replace all tokens.
Writing the error in δ and E (not as a difference of large squares) together with float64 keeps it exact.

With ``S = LLᵀ`` it is also ``|Lᵀδ + L⁻¹Cw|² + const``, a sum of d squares. A candidate whose first few squares exceed the
whole sum of another one is out, so most candidates cost a fraction of d². This sieve works in float32 and keeps
everything near the best; float64 decides among what is left.
"""

from itertools import pairwise

import torch
from torch import Tensor

from fimaq_core.calibration.blocks import block_elements
from fimaq_core.calibration.candidates import Candidates

#: Relative distance from the best within which the sieve, in float32, drops nothing.
_MARGIN = 1e-3
#: Share of the mean diagonal added to S in the sieve: dead channels leave it singular.
_RIDGE = 1e-8
#: Sums of whole numbers are exact in float32 up to here.
_WHOLE = 2**24


def input_moments(x: Tensor, x_hat: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``X̂ᵀX̂`` and ``X̂ᵀ(X̂ - X)`` in float64 for inputs (tokens, d), without a float64 copy of all of them.

    Args:
        x: (tokens, d), float32.
        x_hat: its quantized form, or ``x`` itself.
        scale: step size (one number) of ``x_hat``, whose codes are then at most 255 in size. Products of codes are whole
            numbers, which float32 sums exactly, at a fraction of what float64 costs.
    """
    width = x.shape[1]
    square = torch.zeros(width, width, dtype=torch.float64, device=x.device)
    cross = torch.zeros_like(square)
    rows = _WHOLE // 2**16 if scale is not None else max(block_elements(x.device) // width, 1)
    for part, part_hat in zip(torch.split(x, rows), torch.split(x_hat, rows), strict=True):
        if scale is None:
            wide = part_hat.double()
            square += wide.t() @ wide
            cross += wide.t() @ (wide - part.double())
        else:
            codes = torch.round(part_hat / scale)
            square += codes.t() @ codes
            cross += codes.t() @ (part_hat - part)
    if scale is not None:
        square *= scale.double().square()
        cross *= scale.double()
    return square, cross


def weight_errors(weight: Tensor, candidates: Candidates, levels: int, square: Tensor, cross: Tensor) -> Tensor:
    """Squared output error of every candidate range of every row, up to a constant of the row.

    Args:
        weight: (rows, d).
        candidates: (candidates, rows).
        levels: grid points.
        square, cross: float64 (d, d) from :func:`input_moments`.

    Returns:
        float64 (candidates, rows).
    """
    linear = 2 * (weight.double() @ cross.t())  # rows, d
    out = []
    step = max(block_elements(weight.device) // weight.numel(), 1)
    for start in range(0, candidates.scale.shape[0], step):
        some = Candidates(candidates.scale[start : start + step], candidates.zero_point[start : start + step])
        delta = _deltas(weight, some, levels).double()
        out.append((delta * (delta @ square + linear)).sum(-1))
    return torch.cat(out)


def best_rows(weight: Tensor, candidates: Candidates, levels: int, square: Tensor, cross: Tensor, guess: Tensor) -> Tensor:
    """Index (rows,) of the candidate range of each row with the smallest squared output error.

    Args:
        weight, candidates, levels, square, cross: as :func:`weight_errors`.
        guess: (rows,) candidates that are probably good; their errors are the first bounds.
    """
    width = weight.shape[1]
    # Channels that weigh most come first: their squares say most about the whole sum.
    order = square.diagonal().argsort(descending=True)
    ridge = square.diagonal().mean() * _RIDGE + torch.finfo(torch.float32).tiny
    factor = torch.linalg.cholesky(square[order][:, order] + ridge * torch.eye(width, device=square.device))
    linear = weight.double() @ cross.t()
    offset = torch.linalg.solve_triangular(factor, linear[:, order].t(), upper=False).t().float().contiguous()
    sieve = _Sieve(weight[:, order].contiguous(), candidates, levels, factor.float(), offset)

    every = torch.arange(len(weight), device=weight.device)
    bound = sieve.squares(guess, every, 0, width)
    ends = [width]
    while ends[0] > 32:
        ends.insert(0, ends[0] // 2)
    partial = sieve.all_squares(ends[0])
    # The most promising candidate is finished at once: its whole error is a tight bound for the rest.
    first = partial.argmin(0)
    whole = partial.gather(0, first[None])[0] + sieve.squares(first, every, ends[0], width)
    bound = torch.minimum(bound, whole) * (1 + _MARGIN)
    index, row = (partial <= bound).nonzero(as_tuple=True)
    partial = partial[index, row]
    for start, end in pairwise(ends):
        partial += sieve.squares(index, row, start, end)
        kept = partial <= bound[row]
        index, row, partial = index[kept], row[kept], partial[kept]
    least = bound.scatter_reduce(0, row, partial, "amin")
    kept = partial <= least[row] * (1 + _MARGIN)
    index, row = index[kept], row[kept]

    table = torch.full(candidates.scale.shape, torch.inf, dtype=torch.float64, device=weight.device)
    step = max(block_elements(weight.device) // width, 1)
    for some, its in zip(torch.split(index, step), torch.split(row, step), strict=True):
        pairs = Candidates(candidates.scale[some, its][None], candidates.zero_point[some, its][None])
        table[some, its] = weight_errors(weight[its], pairs, levels, square, cross)[0]
    return table.argmin(0)


def _deltas(weight: Tensor, candidates: Candidates, levels: int) -> Tensor:
    """Quantization errors (candidates, rows, d) of the candidates (candidates, rows) of ``weight`` (rows, d)."""
    scale, zero = candidates.scale[..., None], candidates.zero_point[..., None]
    codes = torch.div(weight, scale).round_().add_(zero).clamp_(0, levels - 1).sub_(zero)
    return codes.mul_(scale).sub_(weight)


class _Sieve:
    """Squares of ``Lᵀδ + L⁻¹Cw`` of candidates, in float32.

    Args:
        weight: (rows, d), candidates: (candidates, rows), factor: L, offset: (rows, d), all in one order of channels.
    """

    def __init__(self, weight: Tensor, candidates: Candidates, levels: int, factor: Tensor, offset: Tensor) -> None:
        self.weight, self.candidates, self.levels, self.factor, self.offset = weight, candidates, levels, factor, offset

    def all_squares(self, end: int) -> Tensor:
        """Sums (candidates, rows) of the squares of coordinates before ``end``."""
        factor, offset = self.factor[:, :end].contiguous(), self.offset[:, :end]
        out = []
        count = self.candidates.scale.shape[0]
        step = max(block_elements(self.weight.device) // self.weight.numel(), 1)
        for start in range(0, count, step):
            part = slice(start, start + step)
            chosen = Candidates(self.candidates.scale[part], self.candidates.zero_point[part])
            made = (_deltas(self.weight, chosen, self.levels) @ factor).add_(offset)
            out.append(made.square_().sum(-1))
        return torch.cat(out)

    def squares(self, index: Tensor, row: Tensor, start: int, end: int) -> Tensor:
        """Sums (pairs,) of the squares of coordinates ``start`` to ``end`` of candidates ``index`` of rows ``row``."""
        # L is lower triangular: channels before the first coordinate do not enter.
        factor = self.factor[start:, start:end].contiguous()
        out = [self.offset.new_zeros(0)]
        step = max(block_elements(self.weight.device) // self.weight.shape[1], 1)
        for some, its in zip(torch.split(index, step), torch.split(row, step), strict=True):
            pairs = Candidates(self.candidates.scale[some, its], self.candidates.zero_point[some, its])
            made = (_deltas(self.weight[its, start:], pairs, self.levels) @ factor).add_(self.offset[its, start:end])
            out.append(made.square_().sum(-1))
        return torch.cat(out)
