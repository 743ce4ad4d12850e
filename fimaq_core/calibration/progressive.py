"""Search of scale and zero point together, first coarse, then finer and finer (AdaLog).

Fast progressive combining search: Wu et al., ECCV 2024, arXiv:2407.12951. The first step evaluates
the grid of :func:`start_grid`. Each further step tries scales at smaller distances around the best
candidates. With 128 candidates per step, 16 of them kept, 6 steps evaluate 768 candidates.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import (
    MIN_SCALE,
    MIN_WEIGHT_SCALE,
    ZERO_POINTS,
    Candidates,
    Range,
    ascending,
    grid_candidates,
    with_bounds,
)
from fimaq_core.calibration.output_error import Product
from fimaq_core.calibration.own_error import errors_of_groups
from fimaq_core.calibration.similar_ranges import RangeErrors, uniform_points
from fimaq_core.calibration.weight_error import Moments, Rows, best_weight_errors
from fimaq_core.recipe import Recipe

#: Candidates kept after each step, and number of steps, as released.
_WIDTH, _STEPS = 16, 6

#: Maps candidates and a number n to errors (candidates, groups), exact for each group's n best.
Errors = Callable[[Candidates, int], Tensor]


def progressive(
    errors: Errors,
    start: Candidates,
    width: int,
    new: int,
    steps: int,
    spacing: Tensor,
    min_scale: float = MIN_SCALE,
) -> Range:
    """Return scale and zero point (groups,) with the smallest error seen.

    The first step keeps the ``width`` best candidates of the start. Each further step replaces each
    kept candidate by ``new`` candidates of the same zero point, with scales spread evenly over one
    spacing around the old scale. It keeps the ``width`` best of these and divides the spacing by
    ``new - 0.5``.

    The released search returns the best candidate of its last step, which may be worse than an
    earlier one; this search returns the best of all steps.

    Args:
        errors: errors of candidates, see :data:`Errors`; other errors may be infinite.
        start: candidates of the first step.
        width: number of candidates that each step keeps.
        new: number of new candidates for each kept one, at least 2.
        steps: number of steps, including the first one.
        spacing: (groups,) distance of neighbouring scales in ``start``; 0 refines nothing.
        min_scale: lower bound of new scales.
    """
    if new < 2:
        raise ValueError(f"a refinement needs at least 2 new candidates, not {new}")
    found = errors(start, width if steps > 1 else 1)
    least, index = found.min(0)
    best_scale, best_zero = start.pick(index)
    kept = start
    share = (torch.linspace(0, 1, new, dtype=spacing.dtype, device=spacing.device) - 0.5)[:, None]
    for left in range(steps - 2, -1, -1):
        order = found.argsort(dim=0, stable=True)[:width]
        scale, zero = kept.scale.gather(0, order), kept.zero_point.gather(0, order)
        scale = (scale[:, None] + share * spacing).clamp(min=min_scale).flatten(0, 1)
        kept = Candidates(scale, zero.repeat_interleave(new, 0))
        spacing = spacing / (new - 0.5)
        found = errors(kept, width if left else 1)
        lowest, index = found.min(0)
        better = lowest < least
        scale, zero = kept.pick(index)
        least = torch.where(better, lowest, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def start_grid(
    sorted_rows: Tensor, levels: int, count: int, min_scale: float = MIN_SCALE
) -> Candidates:
    """Return the grid of the first step: with at most L / 2 zero points, as released."""
    zero_points = min(ZERO_POINTS, levels // 2)
    return grid_candidates(sorted_rows, levels, count, min_scale, zero_points)


def candidates_of(
    sorted_rows: Tensor,
    levels: int,
    *,
    recipe: Recipe,
    min_scale: float = MIN_SCALE,
    least_scale: float = MIN_WEIGHT_SCALE,
) -> Candidates:
    """Return the candidates with which the recipe's search of ascending rows (groups, n) starts.

    ``min_scale`` is the lower bound of the grid's scales; ``least_scale`` is that of the ranges
    which ``range_grid`` extended appends.
    """
    make = start_grid if recipe.range_search == "progressive" else grid_candidates
    grid = make(sorted_rows, levels, recipe.range_candidates, min_scale)
    if recipe.range_grid == "released":
        return grid
    return with_bounds(grid, sorted_rows, levels=levels, min_scale=least_scale)


def progressive_rows(
    weight: Tensor,
    levels: int,
    count: int,
    *,
    moments: Moments | None = None,
    start: Candidates | None = None,
    min_scale: float = MIN_WEIGHT_SCALE,
) -> Range:
    """Return scale and zero point (rows,) of each row of a weight, by the output's squared error.

    ``start`` are the candidates of the first step, by default :func:`start_grid`.

    ``moments`` are those of :func:`.weight_error.input_moments`; without, the weight's own squared
    error counts.
    """
    ordered = ascending(weight)

    def errors(candidates: Candidates, width: int) -> Tensor:
        if moments is None:
            return errors_of_groups(ordered, candidates, levels)
        return best_weight_errors(Rows(weight, levels, *moments), candidates, width)

    if start is None:
        start = start_grid(ordered, levels, count, min_scale)
    return _search(errors, start, count, min_scale)


def progressive_heads(product: Product, start: Candidates, *, levels: int, count: int) -> Range:
    """Return scale and zero point (heads,), with the candidates ``start`` of the first step.

    The product is as in :func:`.output_error.best_of_heads`. A whole operand is one head.
    """
    heads = start.scale.shape[1]
    parts = (part.chunk(heads) for part in (product.x, product.other, product.residual))
    points, operands = uniform_points(levels), zip(*parts, strict=True)
    found = [RangeErrors(x, other, residual, points) for x, other, residual in operands]

    def errors(candidates: Candidates, width: int) -> Tensor:
        ranges = zip(found, candidates.scale.t(), candidates.zero_point.t(), strict=True)
        return torch.stack([own.best(scale, zero, width) for own, scale, zero in ranges], 1)

    return _search(errors, start, count, MIN_SCALE)


def _search(errors: Errors, start: Candidates, count: int, min_scale: float) -> Range:
    """Search with AdaLog's settings from a grid; its first two candidates give the spacing."""
    spacing = (start.scale[1] - start.scale[0]).abs()
    return progressive(errors, start, _WIDTH, max(count // _WIDTH, 2), _STEPS, spacing, min_scale)
