"""Range search by the squared error of a layer's output: fast exact forms.

Weights. With inputs X, their quantized form X̂ and E = X̂ - X, a row w and its quantized form w + δ give
``|X̂(w + δ) - Xw|² = δᵀ(X̂ᵀX̂)δ + 2 δᵀ(X̂ᵀE)w + const``: two d x d matrices replace all tokens. Writing the error in
δ and E (not as a difference of large squares) together with float64 keeps it exact.

Operands (a linear layer's input, either side of an attention product). With operand x, its quantized form
x + D and the other side's quantized form M, the error is ``|D M + R|²``, R the error that M alone makes. It is a sum
of squares over tokens, so a candidate whose partial sum has passed the best candidate's whole sum can be dropped:
the rest of the data need not be looked at. Where M has more columns than rows, ``Σ D∘(D MMᵀ + 2 R Mᵀ) + const`` costs
rows² instead of rows x columns.
"""

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import Candidates
from fimaq_core.quantizers.affine import fake_quantize

#: Elements of a temporary. Small enough that the few temporaries of a search stay in a core's caches.
CHUNK = 2**18


def input_moments(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``X̂ᵀX̂`` and ``X̂ᵀ(X̂ - X)`` in float64 for inputs (tokens, d), without a float64 copy of all of them."""
    width = x.shape[1]
    square = torch.zeros(width, width, dtype=torch.float64, device=x.device)
    cross = torch.zeros_like(square)
    rows = max(CHUNK // width, 1)
    for part, part_hat in zip(torch.split(x, rows), torch.split(x_hat, rows), strict=True):
        wide = part_hat.double()
        square += wide.t() @ wide
        cross += wide.t() @ (wide - part.double())
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
    rows, width = weight.shape
    linear = 2 * (weight.double() @ cross.t())  # rows, d
    out = []
    step = max(CHUNK // (rows * width), 1)
    for start in range(0, candidates.scale.shape[0], step):
        scale = candidates.scale[start : start + step, :, None]
        zero = candidates.zero_point[start : start + step, :, None]
        delta = (fake_quantize(weight, scale, zero, levels) - weight).double()
        out.append((delta * (delta @ square + linear)).sum(-1))
    return torch.cat(out)


def best_operand(
    x: Tensor, other: Tensor, residual: Tensor, scale: Tensor, zero_point: Tensor, levels: int, guess: int = 0
) -> int:
    """Index of the candidate range of ``x`` with the smallest squared error of ``x̂ @ other + residual - x @ other``.

    Args:
        x: (batch, rows, inner), the operand in full precision.
        other: (batch or 1, inner, columns), the other operand, quantized.
        residual: (batch, rows, columns), ``x @ (other - other in full precision)``.
        scale, zero_point: (candidates,).
        levels: grid points.
        guess: a candidate that is probably good; its whole error is the first bound.
    """
    batch, _, inner = x.shape
    gram = other.shape[2] > inner
    if gram:
        matrix = other @ other.transpose(1, 2)
        term = 2 * (residual @ other.transpose(1, 2))
        constants = residual.double().square().sum((1, 2))
    else:
        matrix, term = other, residual

    def errors(part: slice, which: Tensor) -> Tensor:
        """float64 (len(which),): error of candidates ``which`` on the batch entries ``part``."""
        piece = x[part]
        total = torch.zeros(len(which), dtype=torch.float64, device=x.device)
        step = max(CHUNK // (piece.numel() * max(matrix.shape[2], inner) // inner), 1)
        for start in range(0, len(which), step):
            chosen = which[start : start + step]
            s, z = scale[chosen, None, None], zero_point[chosen, None, None]
            delta = fake_quantize(piece[:, None], s, z, levels).sub_(piece[:, None])  # batch, candidates, rows, inner
            # Candidates join the rows, so that the other operand is never copied per candidate.
            if matrix.shape[0] == 1:
                made = delta @ matrix[0]
            else:
                made = torch.bmm(delta.flatten(1, 2), matrix[part]).view(*delta.shape[:3], -1)
            made += term[part, None]
            made = made.mul_(delta) if gram else made.square_()
            total[start : start + step] = made.sum((2, 3)).double().sum(0)
        return total + constants[part].sum() if gram else total

    alive = torch.arange(len(scale), device=x.device)
    pieces = _pieces(batch)
    bound = sum(errors(part, alive[guess : guess + 1])[0] for part in pieces)
    best = torch.as_tensor(guess, device=x.device)
    partial = torch.zeros(len(scale), dtype=torch.float64, device=x.device)
    alive = alive[alive != guess]
    for number, part in enumerate(pieces):
        partial[alive] += errors(part, alive)
        if number == 0 and len(alive):
            # The most promising candidate is finished at once: its whole error is a tight bound for the rest.
            first = alive[partial[alive].argmin()]
            whole = partial[first] + sum(errors(rest, first[None])[0] for rest in pieces[1:])
            if whole < bound:
                bound, best = whole, first
            alive = alive[alive != first]
        alive = alive[partial[alive] < bound]
        if not len(alive):
            return int(best)
    return int(alive[partial[alive].argmin()])


def _pieces(batch: int, first: int = 8) -> list[slice]:
    """Slices of a batch: a small piece first (it drops most candidates), then pieces twice as large each."""
    out, start, size = [], 0, max(batch // first // 2, 1)
    while start < batch:
        out.append(slice(start, min(start + size, batch)))
        start, size = start + size, size * 2
    return out
