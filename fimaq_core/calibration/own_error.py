"""Range search by a tensor's own squared quantization error, exact and without a pass per candidate.

A uniform quantizer maps an interval of values to one point. On sorted values the squared error of an
interval follows from the prefix sums of 1, x and x², so after one sort a candidate costs L lookups
instead of a pass over the data. (A value exactly between two points may be put on either side; its
error is the same.)
"""

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import Candidates


def own_errors(sorted_rows: Tensor, candidates: Candidates, levels: int) -> Tensor:
    """Sum of squared errors of every candidate.

    Args:
        sorted_rows: (groups, n), ascending.
        candidates: scales and zero points (candidates, groups).
        levels: grid points.

    Returns:
        float64 (candidates, groups).
    """
    values = sorted_rows.double()
    groups, count = values.shape
    pad = values.new_zeros(groups, 1)
    first = torch.cat([pad, values.cumsum(1)], 1)
    second = torch.cat([pad, values.square().cumsum(1)], 1)
    code = torch.arange(levels, device=values.device, dtype=torch.float64)
    scale = candidates.scale.t().double()[:, :, None]
    points = (code - candidates.zero_point.t().double()[:, :, None]) * scale  # groups, candidates, L
    middles = points[..., :-1] + scale / 2
    cuts = torch.searchsorted(values, middles.reshape(groups, -1)).view(middles.shape)
    ends = torch.zeros_like(cuts[..., :1])
    edges = torch.cat([ends, cuts, ends + count], -1)

    def between(prefix: Tensor) -> Tensor:
        return prefix.gather(1, edges.reshape(groups, -1)).view(edges.shape).diff(dim=-1)

    errors = between(second) - 2 * points * between(first) + points.square() * edges.diff(dim=-1)
    return errors.sum(-1).t()


def best_by_own_error(sorted_rows: Tensor, candidates: Candidates, levels: int) -> Tensor:
    """Index (groups,) of the candidate with the smallest own squared error."""
    return own_errors(sorted_rows, candidates, levels).argmin(0)
