"""Selection of rows for the range searches, if there are too many: evenly spread, by a fixed rule.

Samples of varying shapes are images of detectors, with up to a hundred times a classifier's tokens.
A range search needs no more rows than a few hundred images of a classifier have.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Most rows (over all heads) and values of the inputs of a linear layer or an attention product.
ROWS, VALUES = 2**15, 2**25
#: Most values of a convolution's input.
CONV_VALUES = 2**23

_GOLDEN = (math.sqrt(5) - 1) / 2


def spread(count: int, wanted: int, device: torch.device | None = None) -> Tensor:
    """Return one index per stretch, for ``wanted`` equal stretches of ``count`` rows; or all.

    Multiples of the golden ratio give the place in the stretch, so the indices have no period.
    (Tokens of an image repeat with its width.)
    """
    if wanted >= count:
        return torch.arange(count, device=device)
    stretch = torch.arange(wanted + 1, device=device) * count // wanted
    share = torch.frac(torch.arange(wanted, device=device, dtype=torch.float64) * _GOLDEN)
    return stretch[:-1] + (share * stretch.diff()).long()


def in_pieces(rows: Tensor) -> Tensor:
    """Return ``rows`` (count, d) as (pieces, rows, d), at most 32 pieces for partial sums."""
    pieces = math.gcd(len(rows), 32)
    return rows.view(pieces, -1, rows.shape[-1])


def positions(x: Tensor) -> Tensor:
    """Return a convolution's input (N, C, ...) as rows, (N x positions, C)."""
    return x.flatten(2).transpose(1, 2).flatten(0, 1)


def conv_values(x: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the values (1, n) of a convolution's input: all of one, at most 2**23 of several."""
    if isinstance(x, Tensor):
        return x.reshape(1, -1)
    wanted = max(CONV_VALUES // x[0].shape[1], 1)
    total = sum(part.numel() // part.shape[1] for part in x)
    if total <= wanted:
        return torch.cat([part.reshape(-1) for part in x])[None]
    index, start, kept = spread(total, wanted, x[0].device), 0, []
    for part in x:
        rows = positions(part)
        own = index[(index >= start) & (index < start + len(rows))] - start
        kept.append(rows[own].flatten())
        start += len(rows)
    return torch.cat(kept)[None]
