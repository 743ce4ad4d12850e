"""Output errors of candidate ranges that change only few codes.

Neighbouring candidates of an attention operand's bounds differ little, so with few bits a row has
the same codes for long stretches of candidates. With codes q (zero point subtracted) and scale s
the output error of a row is ``|s qM - t|² = s² |qM|² - 2 s qM·t + |t|²``. Both products are
computed once per stretch. With ``G = MMᵀ`` they are also ``qGqᵀ`` and ``q·(tMᵀ)``, which is cheaper
if M has more columns than rows.

The terms are squares of whole outputs, not of small errors; since sums are in float64, only the
rounding of the outputs remains, as in any other form.
"""

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import block_elements

#: If a larger share of elements or rows changes, one pass per candidate is cheaper.
_ELEMENTS, _ROWS = 0.5, 0.25
#: Elements x candidates of a batch, as multiple of a temporary's elements: few elements change.
_CROWD = 32
#: Candidates that are checked together for elements whose codes change.
_SEGMENT = 64


def shared_errors(
    x: Tensor, other: Tensor, target: Tensor, scale: Tensor, zero_point: Tensor, levels: int
) -> Tensor | None:
    """Return the squared error, float64 (candidates,), of ``x̂ @ other``; None if this is slow.

    ``x`` (batch, rows, inner) is in full precision, ``other`` (batch, inner, columns) quantized,
    ``target`` (batch, rows, columns) the wanted product. Neighbouring candidates are similar.
    """
    count = len(scale)
    step = max(_CROWD * block_elements(x.device) // (count * x[0].numel()), 1)
    square = torch.zeros(count, dtype=torch.float64, device=x.device)
    cross = torch.zeros_like(square)
    ranges = torch.stack([scale, -zero_point, levels - 1 - zero_point])
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        found = _sums(x[part], other[part], target[part], ranges, sure=start > 0)
        if found is None:
            return None
        square += found[0]
        cross += found[1]
    wide = scale.double()
    return wide.square() * square - 2 * wide * cross + target.double().square().sum()


def _sums(
    x: Tensor, other: Tensor, target: Tensor, ranges: Tensor, sure: bool
) -> tuple[Tensor, Tensor] | None:
    """Return sums (candidates,) of ``|qM|²`` and ``qM·t``.

    Returns None if this is slow, except with ``sure``.
    """
    batch, rows, inner = x.shape
    flat = x.reshape(-1, inner)
    starts = _starts(flat, ranges, sure)
    if starts is None:
        return None
    row, candidate = starts.nonzero(as_tuple=True)  # of stretches, by row, then by candidate
    if not sure and len(row) > _ROWS * starts.numel():
        return None
    codes = _codes(flat[row], ranges[:, candidate, None])

    # Stretches of one batch entry share M, so one batched product of a padded tensor serves all.
    lengths = starts.view(batch, -1).sum(1)
    entry = row // rows
    slot = torch.arange(len(row), device=x.device) - (lengths.cumsum(0) - lengths)[entry]
    packed = codes.new_zeros(batch, int(lengths.max()), inner)
    packed[entry, slot] = codes
    if other.shape[2] > inner:
        made = torch.bmm(packed, other @ other.transpose(1, 2))[entry, slot]
        square = made.mul_(codes).sum(1, dtype=torch.float64)
        pull = (target @ other.transpose(1, 2)).reshape(-1, inner)
        cross = codes.mul_(pull[row]).sum(1, dtype=torch.float64)
    else:
        made = torch.bmm(packed, other)[entry, slot]
        square = made.square().sum(1, dtype=torch.float64)
        cross = made.mul_(target.reshape(-1, target.shape[2])[row]).sum(1, dtype=torch.float64)

    def total(values: Tensor) -> Tensor:
        """Return sums over rows for every candidate, from the values of stretches."""
        step = values.clone()
        step[1:] -= torch.where(candidate[1:] > 0, values[:-1], 0)
        table = torch.zeros(starts.shape, dtype=torch.float64, device=x.device)
        table[row, candidate] = step
        return table.sum(0).cumsum(0)

    return total(square), total(cross)


def _codes(x: Tensor, ranges: Tensor) -> Tensor:
    """Return codes, the zero point subtracted; ``ranges`` (3, ...): scale, least, largest code."""
    scale, lowest, highest = ranges
    codes = torch.div(x, scale).round_()
    torch.maximum(codes, lowest, out=codes)
    return torch.minimum(codes, highest, out=codes)


def _starts(flat: Tensor, ranges: Tensor, sure: bool) -> Tensor | None:
    """Return a mask (rows, candidates) of the candidates that begin a stretch; None if slow."""
    count, inner = ranges.shape[1], flat.shape[1]
    starts = torch.zeros(len(flat), count, dtype=torch.bool, device=flat.device)
    starts[:, 0] = True
    values = flat.flatten()
    for first in range(0, count - 1, _SEGMENT):
        part = ranges[:, first : first + _SEGMENT + 1]
        least, most = part.amin(1), part.amax(1)
        small, large = torch.div(values, most[0]).round_(), torch.div(values, least[0]).round_()
        low = torch.minimum(small, large)
        # Clamping is monotone in value and bounds, so all codes lie between `low` and `high`.
        high = torch.maximum(small, large, out=large)
        for codes, bounds in ((low, least), (high, most)):
            torch.maximum(codes, bounds[1], out=codes)
            torch.minimum(codes, bounds[2], out=codes)
        element = (low != high).nonzero()[:, 0]
        if not sure and len(element) > _ELEMENTS * len(values):
            return None
        codes = _codes(values[element], part[..., None])  # candidates of the segment, elements
        step, changed = (codes[1:] != codes[:-1]).nonzero(as_tuple=True)
        starts[element[changed] // inner, first + 1 + step] = True
    return starts
