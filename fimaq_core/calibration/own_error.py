"""Range search by a tensor's own squared error, exact and without a pass per candidate.

A uniform quantizer maps an interval of values to one point. On sorted values the squared error of
an interval follows from prefix sums of 1, x and x², so after one sort a candidate costs L lookups.
(A value exactly between two points may go to either point; its error is the same.)
"""

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import Candidates
from fimaq_core.quantizers.affine import fake_quantize

#: Cost of one lookup of the sorted form, in elements of a plain pass (measured on a CPU).
_LOOKUP_COST = 100
#: Elements of a temporary in a plain pass (it stays in a core's caches) and in the sorted form.
_CHUNK = 2**18
_TABLE = 2**22


def own_errors(sorted_rows: Tensor, candidates: Candidates, levels: int) -> Tensor:
    """Return the squared error, float64 (candidates, groups), on ascending rows (groups, n)."""
    groups, count = sorted_rows.shape
    if count < _LOOKUP_COST * levels:
        return _direct(sorted_rows, candidates, levels)
    values = sorted_rows.double()
    pad = values.new_zeros(groups, 1)
    first = torch.cat([pad, values.cumsum(1)], 1)
    second = torch.cat([pad, values.square().cumsum(1)], 1)
    code = torch.arange(levels, device=values.device, dtype=torch.float64)
    ranges = candidates.scale, candidates.zero_point
    scale, zero = (part.t().double()[:, :, None] for part in ranges)
    points = (code - zero) * scale  # groups, candidates, L
    middles = points[..., :-1] + scale / 2
    cuts = torch.searchsorted(values, middles.reshape(groups, -1)).view(middles.shape)
    ends = torch.zeros_like(cuts[..., :1])
    edges = torch.cat([ends, cuts, ends + count], -1)

    def between(prefix: Tensor) -> Tensor:
        return prefix.gather(1, edges.reshape(groups, -1)).view(edges.shape).diff(dim=-1)

    errors = between(second) - 2 * points * between(first) + points.square() * edges.diff(dim=-1)
    return errors.sum(-1).t()


def _direct(rows: Tensor, candidates: Candidates, levels: int) -> Tensor:
    """Return the errors by one pass per candidate: cheaper for short rows and many ``levels``."""
    out = []
    for some in candidates.chunks(_CHUNK // rows.numel()):
        x_hat = fake_quantize(rows, some.scale[..., None], some.zero_point[..., None], levels)
        out.append(x_hat.sub_(rows).double().square_().sum(-1))
    return torch.cat(out)


def errors_of_groups(sorted_rows: Tensor, candidates: Candidates, levels: int) -> Tensor:
    """Return :func:`own_errors`, computed for some groups at a time to bound the memory."""
    step = max(_TABLE // (candidates.scale.shape[0] * levels), 1)
    scales, zeros = (torch.split(x, step, 1) for x in (candidates.scale, candidates.zero_point))
    pieces = zip(torch.split(sorted_rows, step), scales, zeros, strict=True)
    errors = [own_errors(rows, Candidates(scale, zero), levels) for rows, scale, zero in pieces]
    return torch.cat(errors, 1)


def best_by_own_error(sorted_rows: Tensor, candidates: Candidates, levels: int) -> Tensor:
    """Return the index (groups,) of the candidate with the smallest own squared error."""
    return errors_of_groups(sorted_rows, candidates, levels).argmin(0)
