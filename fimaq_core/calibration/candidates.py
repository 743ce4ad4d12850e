"""Candidate ranges of all searches: FIMA-Q's, after RepQ-ViT (Li et al., ICCV 2023), AdaLog's."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Zero points of a grid, at most one per level.
ZERO_POINTS = 16
#: Pairs of bounds among the extended candidates.
_BOUNDS = 32
#: Elements of a temporary on a CPU and on other devices. On a CPU a few temporaries must fit into
#: the last cache (2**18 took 1.3 times as long, 2**23 as long). GPUs need larger ones.
_CPU, _OTHER = 2**21, 2**25
#: Lower bound of activation scales, as released; dead channels would divide by zero.
MIN_SCALE = 1e-4
#: Lower bound of weight scales; an all-zero row would divide by zero.
MIN_WEIGHT_SCALE = 1e-12

#: Scale and zero point.
Range = tuple[Tensor, Tensor]


def block_elements(device: torch.device) -> int:
    """Return the number of elements that one temporary of a search may have on ``device``."""
    return _CPU if device.type == "cpu" else _OTHER


@dataclass(frozen=True)
class Candidates:
    """Scales and zero points to choose from, each (candidates, groups)."""

    scale: Tensor
    zero_point: Tensor
    #: number of candidates after which the scales repeat, with the next zero point for all groups;
    #: None if they do not repeat
    period: int | None = None

    def pick(self, index: Tensor) -> Range:
        """Return scale and zero point (groups,) of each group's candidate ``index`` (groups,)."""
        row = index.unsqueeze(0)
        return self.scale.gather(0, row)[0], self.zero_point.gather(0, row)[0]

    def chunks(self, size: int) -> "Iterator[Candidates]":
        """Split the candidates into parts of at most ``size``, and of at least one."""
        step = max(size, 1)
        parts = torch.split(self.scale, step), torch.split(self.zero_point, step)
        for scale, zero in zip(*parts, strict=True):
            yield Candidates(scale, zero)

    def chosen(self, index: Tensor, row: Tensor) -> "Candidates":
        """Return one candidate per pair, (1, pairs): candidate ``index`` of group ``row``."""
        return Candidates(self.scale[index, row][None], self.zero_point[index, row][None])


def ascending(rows: Tensor) -> Tensor:
    """Sort each row (..., n). On CPUs NumPy sorts, which takes a tenth of the time."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.sort(rows.detach().numpy(), axis=-1))
    return rows.sort(dim=-1).values


def quantiles(sorted_rows: Tensor, points: list[float]) -> Tensor:
    """Return quantiles (points, groups) of ascending rows (groups, n), linearly interpolated.

    They are exact; ``torch.quantile`` refuses more than 2**24 values, and the released code
    averages the quantiles of pieces.
    """
    last = sorted_rows.shape[1] - 1
    out = []
    for point in points:
        position = point * last
        low = min(int(position), last)
        high = min(low + 1, last)
        weight = position - low
        out.append(sorted_rows[:, low] * (1 - weight) + sorted_rows[:, high] * weight)
    return torch.stack(out)


def grid_candidates(
    sorted_rows: Tensor,
    levels: int,
    count: int,
    min_scale: float = MIN_SCALE,
    zero_points: int = ZERO_POINTS,
) -> Candidates:
    """Return a grid of ``count`` candidates: zero points around L/2, times scales.

    There are ``zero_points`` zero points, but at most L. ``sorted_rows`` (groups, n) are ascending.
    Scales run evenly from the span between the 0.1 and 0.9 quantiles to the full span.
    """
    zeros = min(zero_points, levels)
    scales = max(count // zeros, 1)
    upper_in, upper, lower_in, lower = quantiles(sorted_rows, [0.9, 1.0, 0.1, 0.0])
    narrow, wide = upper_in - lower_in, upper - lower
    share = torch.linspace(0, 1, scales, device=narrow.device)[:, None]
    spans = narrow + share * (wide - narrow)
    first = levels // 2 - zeros // 2
    zero = torch.arange(first, first + zeros, device=narrow.device, dtype=torch.float32)
    return Candidates(
        (spans / (levels - 1)).clamp(min=min_scale).repeat(zeros, 1),
        zero.repeat_interleave(scales)[:, None].expand(-1, spans.shape[1]).contiguous(),
        period=scales,
    )


def with_bounds(
    grid: Candidates, sorted_rows: Tensor, *, levels: int, min_scale: float = MIN_WEIGHT_SCALE
) -> Candidates:
    """Append ranges with any zero point to a grid; the last one is that of :func:`minmax`.

    With many levels the zero points of :func:`grid_candidates` lie close to the middle, so the grid
    covers only half of an input of one sign. The further bounds run evenly from the 0.1 and 0.9
    quantiles to the extremes of ``sorted_rows`` (groups, n); each range contains zero.
    """
    upper_in, upper, lower_in, lower = quantiles(sorted_rows, [0.9, 1.0, 0.1, 0.0])
    share = (torch.arange(1, _BOUNDS + 1, device=upper.device) / _BOUNDS)[:, None]
    lowers = torch.lerp(lower_in.clamp(max=0), lower.clamp(max=0), share)
    uppers = torch.lerp(upper_in.clamp(min=0), upper.clamp(min=0), share)
    more = from_bounds(lowers, uppers, levels, min_scale)
    scale = torch.cat([grid.scale, more.scale])
    return Candidates(scale, torch.cat([grid.zero_point, more.zero_point]))


def from_bounds(
    lower: Tensor, upper: Tensor, levels: int, min_scale: float = MIN_WEIGHT_SCALE
) -> Candidates:
    """Return the candidates of given bounds (candidates, groups), with rounded zero points."""
    scale = ((upper - lower) / (levels - 1)).clamp(min=min_scale)
    return Candidates(scale, -torch.round(lower / scale))


def minmax(values: Tensor, levels: int) -> Range:
    """Return scale and zero point (groups,) that span each row of ``values`` (groups, n) and zero.

    Since zero is in the range, zero padding and dead channels have no error.
    """
    lower = values.amin(dim=1).clamp(max=0)
    upper = values.amax(dim=1).clamp(min=0)
    found = from_bounds(lower[None], upper[None], levels)
    return found.scale[0], found.zero_point[0]
