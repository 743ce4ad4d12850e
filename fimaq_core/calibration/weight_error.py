"""Range search of weights by the squared error of the layer's output: a fast exact form.

With inputs X, their quantized form X̂ and E = X̂ - X, a row w and its quantized form w + δ give
``|X̂(w + δ) - Xw|² = δᵀSδ + 2 δᵀCw + const`` with ``S = X̂ᵀX̂`` and ``C = X̂ᵀE``: two d x d
matrices replace all tokens. Writing the error in δ and E (not as a difference of large squares)
together with float64 keeps it exact.

With ``S = LLᵀ`` it is also ``|Lᵀδ + L⁻¹Cw|² + const``, a sum of d squares. A candidate whose first
few squares exceed the whole sum of another one is out, so most cost a fraction of d². This sieve
works in float32 and keeps everything near the best; float64 decides among what is left.
"""

from itertools import pairwise

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import Candidates, block_elements

#: Relative distance from the best within which the sieve, in float32, drops nothing.
_MARGIN = 1e-3
#: Relative rounding of errors in float32, generously.
_ROUNDING = 1e-4
#: Share of the mean diagonal added to S in the sieve: dead channels leave it singular.
_RIDGE = 1e-8
#: Sums of whole numbers are exact in float32 up to here.
_WHOLE = 2**24
#: Tokens whose products with small errors are summed in float32 before float64 takes over.
_TOKENS = 2**12


def input_moments(
    x: Tensor, x_hat: Tensor, weight: Tensor, scale: Tensor | None = None, levels: int = 256
) -> tuple[Tensor, Tensor]:
    """Return ``X̂ᵀX̂`` (d, d) and ``(X̂ᵀ(X̂ - X)wᵀ)ᵀ`` (rows, d) in float64.

    Args:
        x_hat: the quantized form of ``x`` (tokens, d), or ``x`` itself.
        scale: step size (one number) of ``x_hat``, whose codes are then below ``levels`` in size.
            Products of codes are whole numbers, which float32 sums exactly up to 2**24, at a
            fraction of what float64 costs.
    """
    width = x.shape[1]
    # With few rows the inputs' errors are multiplied by the weight first: tokens x d x rows instead of tokens x d x d.
    narrow = weight.shape[0] < width
    square = torch.zeros(width, width, dtype=torch.float64, device=x.device)
    cross = torch.zeros(
        width, weight.shape[0] if narrow else width, dtype=torch.float64, device=x.device
    )
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


def weight_errors(
    weight: Tensor, candidates: Candidates, levels: int, square: Tensor, linear: Tensor
) -> Tensor:
    """Squared output error, float64 (candidates, rows), up to a constant of the row."""
    out = []
    for some in candidates.chunks(block_elements(weight.device) // weight.numel()):
        delta = _deltas(weight, some, levels).double()
        out.append((delta * (delta @ square + 2 * linear)).sum(-1))
    return torch.cat(out)


def best_weight_errors(
    weight: Tensor, candidates: Candidates, levels: int, square: Tensor, linear: Tensor, width: int
) -> Tensor:
    """:func:`weight_errors` of at least the ``width`` best of every row; others may be infinite.

    Candidates of one zero point and nearly one scale often have the same codes q: ``δ = s q - w``
    gives ``s² qᵀSq + 2 s qᵀ(Cw - Sw)`` and a constant, whose products are computed once. Where most
    codes differ, those that float32 finds clearly worse than ``width`` others are left out.
    """
    # Of candidates in the order of zero points and scales, those whose codes are not those of the one before.
    order = candidates.scale.argsort(dim=0, stable=True)
    order = order.gather(0, candidates.zero_point.gather(0, order).argsort(dim=0, stable=True))
    ordered = Candidates(candidates.scale.gather(0, order), candidates.zero_point.gather(0, order))
    scale, zero = ordered.scale, ordered.zero_point
    count, rows = scale.shape
    starts = torch.ones_like(scale, dtype=torch.bool)
    step = max(block_elements(weight.device) // weight.numel(), 1)
    for first in range(0, count - 1, step):
        part = slice(first, first + step + 1)
        codes = _codes(weight, Candidates(scale[part], zero[part]), levels)
        starts[first + 1 : first + step + 1] = (codes[1:] != codes[:-1]).any(-1)
    promising = torch.ones_like(starts)
    if int(starts.sum()) > starts.numel() // 2:
        promising = _promising(weight, ordered, levels, square.float(), linear.float(), width)
        starts = promising
    offset = linear - weight.double() @ square
    products = square.new_zeros(2, rows * count)
    row, index = starts.t().nonzero(as_tuple=True)
    step = max(block_elements(weight.device) // weight.shape[1], 1)
    for some, its in zip(torch.split(index, step), torch.split(row, step), strict=True):
        codes = _codes(weight[its], ordered.chosen(some, its), levels)[0].double()
        where = its * count + some
        products[0, where] = (codes @ square).mul_(codes).sum(-1)
        products[1, where] = (codes * offset[its]).sum(-1)
    # Candidates have the products of the last start up to them.
    last = (
        torch.where(starts.t().flatten(), torch.arange(rows * count, device=weight.device), 0)
        .cummax(0)
        .values
    )
    own, cross = products[:, last].view(2, rows, count).transpose(1, 2)
    wide = scale.double()
    errors = torch.where(promising, wide.square() * own + 2 * wide * cross, torch.inf)
    constant = (weight.double() * (weight.double() @ square - 2 * linear)).sum(1)
    return torch.empty_like(errors).scatter_(0, order, errors + constant)


def _promising(
    weight: Tensor, candidates: Candidates, levels: int, square: Tensor, linear: Tensor, width: int
) -> Tensor:
    """Mask (candidates, rows) of those that may be among the ``width`` best, by float32."""
    lower, upper = [], []
    for some in candidates.chunks(block_elements(weight.device) // weight.numel()):
        delta = _deltas(weight, some, levels)
        cross = 2 * (delta * linear).sum(-1)
        own = (delta @ square).mul_(delta).sum(-1)
        margin = _ROUNDING * (own + cross.abs())
        lower.append(own + cross - margin)
        upper.append(own + cross + margin)
    bound = torch.cat(upper).kthvalue(min(width, len(candidates.scale)), 0).values
    return torch.cat(lower) <= bound


def best_rows(
    weight: Tensor,
    candidates: Candidates,
    levels: int,
    square: Tensor,
    linear: Tensor,
    guess: Tensor,
) -> Tensor:
    """Index (rows,) of each row's candidate with the smallest squared output error.

    The errors of ``guess`` (rows,), candidates that are probably good, are the first bounds.
    """
    width = weight.shape[1]
    # Channels that weigh most come first: their squares say most about the whole sum.
    order = square.diagonal().argsort(descending=True)
    ridge = square.diagonal().mean() * _RIDGE + torch.finfo(torch.float32).tiny
    factor = torch.linalg.cholesky(
        square[order][:, order] + ridge * torch.eye(width, device=square.device)
    )
    offset = (
        torch.linalg.solve_triangular(factor, linear[:, order].t(), upper=False)
        .t()
        .float()
        .contiguous()
    )
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
        pairs = candidates.chosen(some, its)
        table[some, its] = weight_errors(weight[its], pairs, levels, square, linear[its])[0]
    return table.argmin(0)


def _deltas(weight: Tensor, candidates: Candidates, levels: int) -> Tensor:
    """Quantization errors (candidates, rows, d) for ranges (candidates, rows)."""
    return _codes(weight, candidates, levels).mul_(candidates.scale[..., None]).sub_(weight)


def _codes(weight: Tensor, candidates: Candidates, levels: int) -> Tensor:
    """Codes, the zero point subtracted, (candidates, rows, d); arguments of :func:`_deltas`."""
    zero = candidates.zero_point[..., None]
    codes = torch.div(weight, candidates.scale[..., None]).round_()
    # Two passes, which are faster than clamp with tensors for bounds.
    torch.maximum(codes, -zero, out=codes)
    return torch.minimum(codes, levels - 1 - zero, out=codes)


class _Sieve:
    """Squares of ``Lᵀδ + L⁻¹Cw = s Lᵀq + (L⁻¹Cw - Lᵀw)``, codes q and scale s, in float32.

    The second form saves two passes over all candidates. It rounds more, yet far less than the
    margin. ``factor`` is L and ``offset`` L⁻¹Cw (rows, d), all in one order of channels.
    """

    def __init__(
        self, weight: Tensor, candidates: Candidates, levels: int, factor: Tensor, offset: Tensor
    ) -> None:
        self.weight, self.candidates, self.levels, self.factor = weight, candidates, levels, factor
        self.base = offset - weight @ factor

    def all_squares(self, end: int) -> Tensor:
        """Sums (candidates, rows) of the squares of coordinates before ``end``."""
        factor, base = self.factor[:, :end].contiguous(), self.base[:, :end]
        size = block_elements(self.weight.device) // self.weight.numel()
        if self.candidates.period is not None:
            return self._all_of_grid(self.candidates.period, max(size, 1), factor, base)
        out = []
        for some in self.candidates.chunks(size):
            made = (
                (_codes(self.weight, some, self.levels) @ factor)
                .mul_(some.scale[..., None])
                .add_(base)
            )
            out.append(made.square_().sum(-1))
        return torch.cat(out)

    def _all_of_grid(self, period: int, step: int, factor: Tensor, base: Tensor) -> Tensor:
        """The same where zero points share their scales: a weight is rounded once per scale."""
        scales, zeros = (
            self.candidates.scale[:period],
            self.candidates.zero_point[::period, 0].tolist(),
        )
        table = base.new_empty(len(zeros), period, len(self.weight))
        for start in range(0, period, step):
            part = slice(start, start + step)
            scale = scales[part, :, None]
            rounded = torch.div(self.weight, scale).round_()
            codes = torch.empty_like(rounded)
            for number, zero in enumerate(zeros):
                torch.clamp(rounded, -zero, self.levels - 1 - zero, out=codes)
                table[number, part] = (codes @ factor).mul_(scale).add_(base).square_().sum(-1)
        return table.flatten(0, 1)

    def squares(self, index: Tensor, row: Tensor, start: int, end: int) -> Tensor:
        """Sums (pairs,) of squares ``start`` to ``end``, of candidates ``index`` of ``row``."""
        # L is lower triangular: channels before the first coordinate do not enter.
        factor = self.factor[start:, start:end].contiguous()
        out = [self.base.new_zeros(0)]
        step = max(block_elements(self.weight.device) // self.weight.shape[1], 1)
        for some, its in zip(torch.split(index, step), torch.split(row, step), strict=True):
            pairs = Candidates(
                self.candidates.scale[some, its], self.candidates.zero_point[some, its]
            )
            made = (_codes(self.weight[its, start:], pairs, self.levels) @ factor).mul_(
                pairs.scale[..., None]
            )
            made.add_(self.base[its, start:end])
            out.append(made.square_().sum(-1))
        return torch.cat(out)
