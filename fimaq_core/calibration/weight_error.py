"""Range search of weights by the squared error of the layer's output: a fast exact form.

With inputs X, their quantized form X̂ and E = X̂ - X, a row w and its quantized form w + δ give
``|X̂(w + δ) - Xw|² = δᵀSδ + 2 δᵀCw + const`` with ``S = X̂ᵀX̂`` and ``C = X̂ᵀE``: two d x d
matrices replace all tokens. The error is exact, since its terms are products of the small δ and E
(not a difference of large squares), computed in float64.

With ``S = LLᵀ`` the error is also ``|Lᵀδ + L⁻¹Cw|² + const``, a sum of d squares. A candidate is
dropped once its first few squares exceed the whole sum of another one, so most candidates cost a
fraction of d². This sieve works in float32 and keeps every candidate near the best; float64 decides
among these.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import Candidates, block_elements

#: Relative distance from the best error within which the sieve, in float32, drops no candidate.
_MARGIN = 1e-3
#: Upper bound of the relative rounding of errors in float32.
_ROUNDING = 1e-4
#: Share of the mean diagonal that the sieve adds to S, which dead channels make singular.
_RIDGE = 1e-8
#: Largest sum of whole numbers that is exact in float32.
_WHOLE = 2**24
#: Most tokens whose products with small errors are summed in float32.
_TOKENS = 2**12

#: The matrices ``X̂ᵀX̂`` (d, d) and ``(Cw)ᵀ`` (rows, d), float64.
Moments = tuple[Tensor, Tensor]


class Rows(NamedTuple):
    """Rows of a weight, and the input moments from which their output errors follow."""

    weight: Tensor  # (rows, d)
    levels: int  # number of grid points
    square: Tensor  # (d, d) float64, S
    linear: Tensor  # (rows, d) float64, (Cw)ᵀ

    def codes(self, candidates: Candidates) -> Tensor:
        """Return codes, the zero point subtracted, (candidates, rows, d)."""
        zero = candidates.zero_point[..., None]
        codes = torch.div(self.weight, candidates.scale[..., None]).round_()
        # These two passes are faster than one clamp between tensors.
        torch.maximum(codes, -zero, out=codes)
        return torch.minimum(codes, self.levels - 1 - zero, out=codes)

    def deltas(self, candidates: Candidates) -> Tensor:
        """Return quantization errors (candidates, rows, d)."""
        return self.codes(candidates).mul_(candidates.scale[..., None]).sub_(self.weight)

    def chosen(self, row: Tensor) -> "Rows":
        """Return the rows of numbers ``row`` (pairs,)."""
        return self._replace(weight=self.weight[row], linear=self.linear[row])

    def step(self) -> int:
        """Return the number of candidates of all rows that one temporary may hold."""
        return max(block_elements(self.weight.device) // self.weight.numel(), 1)

    def pairs(self, index: Tensor, row: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Split pairs of candidate ``index`` and row ``row`` so that temporaries stay small."""
        step = max(block_elements(self.weight.device) // self.weight.shape[1], 1)
        return zip(torch.split(index, step), torch.split(row, step), strict=True)


def input_moments(
    x: Tensor, x_hat: Tensor, weight: Tensor, scale: Tensor | None = None, levels: int = 256
) -> Moments:
    """Return ``X̂ᵀX̂`` (d, d) and ``(X̂ᵀ(X̂ - X)wᵀ)ᵀ`` (rows, d) in float64.

    Args:
        x: (tokens, d) inputs.
        x_hat: their quantized form, or ``x`` itself.
        weight: (rows, d).
        scale: scale (one number) of ``x_hat``, if all tokens share it. Then the moments are those
            of codes: whole numbers, which float32 sums exactly up to 2**24 and faster than float64.
        levels: number of grid points of ``x_hat``.
    """
    width = x.shape[1]
    # With few rows it is cheaper to multiply the inputs' errors by the weight first.
    narrow = weight.shape[0] < width
    columns = weight.shape[0] if narrow else width
    square = torch.zeros(width, width, dtype=torch.float64, device=x.device)
    cross = torch.zeros(width, columns, dtype=torch.float64, device=x.device)
    rows = max(block_elements(x.device) // width, 1)
    if scale is not None:
        rows = min(_WHOLE // levels**2, _TOKENS)
    wide_weight = weight.double()
    for part, part_hat in zip(torch.split(x, rows), torch.split(x_hat, rows), strict=True):
        if scale is None:
            wide = part_hat.double()
            square += wide.t() @ wide
            if x_hat is not x:
                error = wide - part.double()
                cross += wide.t() @ (error @ wide_weight.t() if narrow else error)
        else:
            codes, error = torch.round(part_hat / scale), part_hat - part
            square += codes.t() @ codes
            cross += codes.t() @ (error @ weight.t() if narrow else error)
    if scale is not None:
        square *= scale.double().square()
        cross *= scale.double()
    return square, cross.t() if narrow else wide_weight @ cross.t()


def weight_errors(rows: Rows, candidates: Candidates) -> Tensor:
    """Return the squared output error, float64 (candidates, rows), up to a constant per row."""
    out = []
    for some in candidates.chunks(rows.step()):
        delta = rows.deltas(some).double()
        out.append((delta * (delta @ rows.square + 2 * rows.linear)).sum(-1))
    return torch.cat(out)


def best_weight_errors(rows: Rows, candidates: Candidates, width: int) -> Tensor:
    """Return errors of at least the ``width`` best candidates per row; others may be infinite.

    Values are those of :func:`weight_errors`. Candidates with one zero point and similar scales
    often have the same codes q. With ``δ = s q - w`` the error is ``s² qᵀSq + 2 s qᵀ(Cw - Sw)`` and
    a constant, so both products are computed once per q. If most codes differ, candidates that are
    clearly worse than ``width`` others in float32 are left out.
    """
    weight, levels, square, linear = rows
    # Candidates are ordered by zero point, then scale; `starts` marks codes unlike those before.
    order = candidates.scale.argsort(dim=0, stable=True)
    order = order.gather(0, candidates.zero_point.gather(0, order).argsort(dim=0, stable=True))
    ordered = Candidates(candidates.scale.gather(0, order), candidates.zero_point.gather(0, order))
    scale, zero = ordered.scale, ordered.zero_point
    count = len(scale)
    starts = torch.ones_like(scale, dtype=torch.bool)
    step = rows.step()
    for first in range(0, count - 1, step):
        part = slice(first, first + step + 1)
        codes = rows.codes(Candidates(scale[part], zero[part]))
        starts[first + 1 : first + step + 1] = (codes[1:] != codes[:-1]).any(-1)
    promising = torch.ones_like(starts)
    if int(starts.sum()) > starts.numel() // 2:
        narrow = Rows(weight, levels, square.float(), linear.float())
        starts = promising = _promising(narrow, ordered, width)
    offset = linear - weight.double() @ square
    products = square.new_zeros(2, len(weight) * count)
    row, index = starts.t().nonzero(as_tuple=True)
    for some, its in rows.pairs(index, row):
        codes = rows.chosen(its).codes(ordered.chosen(some, its))[0].double()
        where = its * count + some
        products[0, where] = (codes @ square).mul_(codes).sum(-1)
        products[1, where] = (codes * offset[its]).sum(-1)
    # A candidate has the products of the last start before it, or its own.
    places = torch.arange(len(weight) * count, device=weight.device)
    last = torch.where(starts.t().flatten(), places, 0).cummax(0).values
    own, cross = products[:, last].view(2, len(weight), count).transpose(1, 2)
    wide = scale.double()
    errors = torch.where(promising, wide.square() * own + 2 * wide * cross, torch.inf)
    constant = (weight.double() * (weight.double() @ square - 2 * linear)).sum(1)
    return torch.empty_like(errors).scatter_(0, order, errors + constant)


def _promising(rows: Rows, candidates: Candidates, width: int) -> Tensor:
    """Return a mask (candidates, rows) of those that may be among the ``width`` best."""
    lower, upper = [], []
    for some in candidates.chunks(rows.step()):
        delta = rows.deltas(some)
        cross = 2 * (delta * rows.linear).sum(-1)
        own = (delta @ rows.square).mul_(delta).sum(-1)
        margin = _ROUNDING * (own + cross.abs())
        lower.append(own + cross - margin)
        upper.append(own + cross + margin)
    bound = torch.cat(upper).kthvalue(min(width, len(candidates.scale)), 0).values
    return torch.cat(lower) <= bound


def best_rows(rows: Rows, candidates: Candidates, guess: Tensor) -> Tensor:
    """Return the index (rows,) of each row's candidate with the smallest squared output error.

    ``guess`` (rows,) are numbers of probably good candidates; their errors are the first bounds.
    """
    weight, _, square, linear = rows
    device, width = weight.device, weight.shape[1]
    # The channels of largest weight come first, since they decide most about the whole sum.
    order = square.diagonal().argsort(descending=True)
    ridge = square.diagonal().mean() * _RIDGE + torch.finfo(torch.float32).tiny
    matrix = square[order][:, order] + ridge * torch.eye(width, device=device)
    factor = torch.linalg.cholesky(matrix)
    offset = torch.linalg.solve_triangular(factor, linear[:, order].t(), upper=False)
    own = rows._replace(weight=weight[:, order].contiguous())  # the sieve needs no moments
    sieve = _Sieve(own, candidates, factor.float(), offset.t().float().contiguous())

    every = torch.arange(len(weight), device=device)
    bound = sieve.squares(guess, every, 0, width)
    ends = [width]
    while ends[0] > 32:
        ends.insert(0, ends[0] // 2)
    partial = sieve.all_squares(ends[0])
    # The whole error of the most promising candidate is a tight bound for the others.
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

    table = torch.full(candidates.scale.shape, torch.inf, dtype=torch.float64, device=device)
    for some, its in rows.pairs(index, row):
        table[some, its] = weight_errors(rows.chosen(its), candidates.chosen(some, its))[0]
    return table.argmin(0)


class _Sieve:
    """Squares of ``Lᵀδ + L⁻¹Cw = s Lᵀq + (L⁻¹Cw - Lᵀw)``, codes q and scale s, in float32.

    The second form saves two passes over all candidates; its rounding is far below the margin.
    ``factor`` is L (d, d) and ``offset`` L⁻¹Cw (rows, d), with the channels in the same order.
    """

    def __init__(self, rows: Rows, candidates: Candidates, factor: Tensor, offset: Tensor) -> None:
        self.rows, self.candidates, self.factor = rows, candidates, factor
        self.base = offset - rows.weight @ factor

    def all_squares(self, end: int) -> Tensor:
        """Return sums (candidates, rows) of the squares of coordinates before ``end``."""
        factor, base = self.factor[:, :end].contiguous(), self.base[:, :end]
        if self.candidates.period is not None:
            return self._all_of_grid(self.candidates.period, factor, base)
        out = []
        for some in self.candidates.chunks(self.rows.step()):
            made = (self.rows.codes(some) @ factor).mul_(some.scale[..., None]).add_(base)
            out.append(made.square_().sum(-1))
        return torch.cat(out)

    def _all_of_grid(self, period: int, factor: Tensor, base: Tensor) -> Tensor:
        """Return the sums of a grid, whose zero points share scales: one rounding per scale."""
        weight, levels, step = self.rows.weight, self.rows.levels, self.rows.step()
        scales, zeros = self.candidates.scale[:period], self.candidates.zero_point[::period, 0]
        table = base.new_empty(len(zeros), period, len(weight))
        for start in range(0, period, step):
            part = slice(start, start + step)
            scale = scales[part, :, None]
            rounded = torch.div(weight, scale).round_()
            codes = torch.empty_like(rounded)
            for number, zero in enumerate(zeros.tolist()):
                torch.clamp(rounded, -zero, levels - 1 - zero, out=codes)
                table[number, part] = (codes @ factor).mul_(scale).add_(base).square_().sum(-1)
        return table.flatten(0, 1)

    def squares(self, index: Tensor, row: Tensor, start: int, end: int) -> Tensor:
        """Return sums (pairs,) of squares ``start`` to ``end``, of pairs of candidate and row."""
        # L is lower triangular, so channels before `start` have no influence.
        factor, tail = self.factor[start:, start:end].contiguous(), self.rows.weight[:, start:]
        scale, zero = self.candidates.scale, self.candidates.zero_point
        out = [self.base.new_zeros(0)]
        for some, its in self.rows.pairs(index, row):
            pairs = Candidates(scale[some, its], zero[some, its])
            codes = self.rows._replace(weight=tail[its]).codes(pairs)
            made = (codes @ factor).mul_(pairs.scale[..., None]).add_(self.base[its, start:end])
            out.append(made.square_().sum(-1))
        return torch.cat(out)
