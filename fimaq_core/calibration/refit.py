"""ERQ's calibration of one layer (Zhong et al., ICML 2024, arXiv:2407.06794): refit, then rounding.

The range of the inputs is set before. Then:

1. Ridge regression refits weight and bias to the quantized inputs.
2. Percentiles give the ranges of the refit weight.
3. The rounding is decided half by half; each time the columns still free compensate the error.

The float weight and bias stay: the results are codes and a bias for the quantized form. With inputs
X, their quantized form X̂ and A = [X̂, 1], everything follows from second moments of A and X, so no
matrix of tokens x rows is ever made.

Differences from the released code: the ridge is that of the released README (option coe 10000,
times 0.1), added to sums over all tokens; the released default is twice as large. Layers without a
token axis (the classifier) are refit with a ridge of 0.1, as released. With the rule ``gradient`` a
rounding changes only where the released code changes it, but never if that raises the error.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import block_elements
from fimaq_core.calibration.conv_ranges import Inputs, eights, input_patches
from fimaq_core.calibration.percentile_ranges import weight_percentiles
from fimaq_core.errors import NumericsError
from fimaq_core.layers import QuantConv2d, QuantLinear, WeightLayer
from fimaq_core.recipe import Recipe

#: A matrix counts as singular if a squared pivot of its Cholesky factor is below this share of the
#: diagonal entry: such a pivot is only rounding.
_SINGULAR = 1e-12
#: Ridge of the refit for inputs (samples, d); factor of the ridge for convolutions.
_CLASSIFIER_RIDGE, _CONV_FACTOR = 0.1, 10.0


@dataclass(frozen=True)
class InputMoments:
    """Sums over tokens of inputs X and their quantized form X̂, as the regressions need them."""

    square: Tensor  # (d, d) float64, X̂ᵀX̂
    cross: Tensor  # (d, d) float64, X̂ᵀX
    #: (d,) float64, column sums of X̂ and of X
    sum_hat: Tensor
    sum_plain: Tensor
    count: int  # tokens


#: Weight or codes (rows, d), and bias (rows,) or None, float32.
Fit = tuple[Tensor, Tensor | None]


class RoundingGrid(NamedTuple):
    """Points to which a weight can be rounded."""

    scale: Tensor  # (rows, 1)
    zero_point: Tensor  # (rows, 1)
    levels: int  # number of grid points


def refit_moments(x: Tensor, x_hat: Tensor) -> InputMoments:
    """Return the moments of inputs and their quantized form, each (tokens, d)."""
    count, width = x.shape
    square, cross = torch.zeros(2, width, width, dtype=torch.float64, device=x.device).unbind()
    sum_hat, sum_plain = torch.zeros(2, width, dtype=torch.float64, device=x.device).unbind()
    rows = max(block_elements(x.device) // width, 1)
    for part, part_hat in zip(torch.split(x, rows), torch.split(x_hat, rows), strict=True):
        plain, hat = part.double(), part_hat.double()
        square += hat.t() @ hat
        cross += hat.t() @ plain
        sum_hat += hat.sum(0)
        sum_plain += plain.sum(0)
    return InputMoments(square, cross, sum_hat, sum_plain, count)


def ridge_refit(weight: Tensor, bias: Tensor | None, moments: InputMoments, ridge: float) -> Fit:
    """Fit weight (rows, d) and bias (rows,) to the quantized inputs; return both in float32.

    The paper's activation quantization error reduction: with W = [w, b] and the full-precision
    output Y = Xwᵀ + b, W becomes W + δ with ``(AᵀA + ridge I)δᵀ = Aᵀ(Y - AWᵀ)``. Without a bias the
    column of ones is left out of A. The ridge is added to the whole diagonal, the bias's entry too.

    Raises:
        NumericsError: the moments are not finite, or singular for this ridge.
    """
    # Y - AWᵀ = (X - X̂)wᵀ: the bias cancels.
    pull = moments.cross - moments.square
    if bias is not None:
        pull = torch.cat([pull, (moments.sum_plain - moments.sum_hat)[None]])
    joint, square = _joint(weight, bias), _second_moments(moments, bias)
    joint += _ridge_solve(square, weight.detach().double() @ pull.t(), ridge)
    width = weight.shape[1]
    return joint[:, :width].float(), None if bias is None else joint[:, width].float()


def refine_rounding(
    weight: Tensor,
    bias: Tensor | None,
    grid: RoundingGrid,
    moments: InputMoments,
    ridge: float,
    flips: int = 100,
    steep: bool = False,
) -> Fit:
    """Choose codes half by half (the paper's weight quantization error reduction).

    The first half of the columns still free is rounded. Single roundings are flipped while a flip
    lowers the output error of this half. Then ridge regression changes the second half and the bias
    to compensate the remaining error. The bias takes part as a last column, never rounded.

    Weight, bias and ridge are as in :func:`ridge_refit`. A row gets at most ``flips`` flips per
    half. With ``steep`` its flips end where the largest gradient of the mean squared error (over
    tokens, in units of the weight) is at most half a step of the grid, as released.

    Returns:
        Codes (rows, d), float32 integers in [0, levels - 1], and the new bias, float32.

    Raises:
        NumericsError: the moments are not finite, or singular for this ridge.
    """
    square = _second_moments(moments, bias)
    grid = RoundingGrid(grid.scale.detach().double(), grid.zero_point.double(), grid.levels)
    free, least = _joint(weight, bias), moments.count if steep else 0
    codes: list[Tensor] = []
    # A first half never contains the last column, so the bias is never rounded.
    while (width := free.shape[1]) > 1:
        half = width // 2
        chosen = _rounded(free[:, :half], grid, square[:half, :half], flips, least)
        error = (chosen - grid.zero_point) * grid.scale - free[:, :half]
        pull = error @ square[:half, half:]
        free = free[:, half:] - _ridge_solve(square[half:, half:], pull, ridge)
        square = square[half:, half:]
        codes.append(chosen)
    if bias is None:
        codes.append(_rounded(free, grid, square))
    return torch.cat(codes, 1).float(), None if bias is None else free[:, 0].float()


def _rounded(
    weight: Tensor, grid: RoundingGrid, square: Tensor, flips: int = 0, least: int = 0
) -> Tensor:
    """Return codes, rounded to nearest and then flipped to lower ``δ square δᵀ``; all float64."""
    scale, zero_point, levels = grid
    ratio = weight / scale
    codes = (ratio.round() + zero_point).clamp_(0, levels - 1)
    if not flips:
        return codes
    # A turn is the change by a flip: 1, -1, or 0 where clamping leaves one point.
    turn = -2 * codes
    for end in (ratio.floor(), ratio.ceil()):
        turn += (end + zero_point).clamp_(0, levels - 1)
    product = ((codes - zero_point) * scale - weight) @ square
    _flip(codes, turn, product, square, scale[:, 0], flips, least)
    return codes


def _flip(
    codes: Tensor,
    turn: Tensor,
    product: Tensor,
    square: Tensor,
    scale: Tensor,
    flips: int,
    least: int,
) -> None:
    """Flip ``codes`` in place, one code per row at a time, while the objective δ square δᵀ falls.

    ``turn`` holds the change of each code by a flip, ``product`` is δ square; both are overwritten.
    The gradient of the objective is twice the product. The next flip of a row is that with the
    smallest turn times product. A flip by ``h = scale turn`` changes the objective by ``2 h product
    + h² diagonal``, which is negative if ``2 turn product + scale diagonal`` is. The gradient must
    also exceed ``least scale / 2``.
    """
    rows, diagonal = torch.arange(len(codes), device=codes.device), square.diagonal()
    for _ in range(flips):
        slope, column = (turn * product).min(1)
        # A row without a useful flip stays as it is; rows are left out once half are done.
        falls = (2 * slope + scale * diagonal[column] < 0) & (4 * slope + least * scale < 0)
        left = int(falls.sum())
        if not left:
            return
        if 2 * left <= len(falls):
            state = (rows, turn, product, scale, column)
            rows, turn, product, scale, column = (values[falls] for values in state)
            falls = falls[falls]
        change = turn.gather(1, column[:, None]) * falls[:, None]
        codes[rows, column] += change[:, 0]
        turn.scatter_add_(1, column[:, None], -2 * change)
        product.addcmul_(change * scale[:, None], square[column])


def _joint(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return [w, b] as a new float64 tensor."""
    parts = [weight] if bias is None else [weight, bias[:, None]]
    return torch.cat([part.detach().double() for part in parts], 1)


def _second_moments(moments: InputMoments, bias: Tensor | None) -> Tensor:
    """Return AᵀA, or X̂ᵀX̂ without a bias."""
    if bias is None:
        return moments.square
    total = moments.sum_hat[:, None]
    corner = total.new_full((1, 1), moments.count)
    return torch.cat([torch.cat([moments.square, total], 1), torch.cat([total.t(), corner], 1)])


def _ridge_solve(square: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve ``x (square + ridge I) = right`` for x (rows, n); ``square`` (n, n) is symmetric."""
    matrix = square + ridge * torch.eye(len(square), dtype=square.dtype, device=square.device)
    if not bool(matrix.isfinite().all()):
        raise NumericsError(
            "the second moments of a layer's inputs are NaN or infinite; "
            "its inputs cannot be calibrated on."
        )
    factor, info = torch.linalg.cholesky_ex(matrix)
    # Rounding can hide a singular matrix from the factorization, but not from the pivots' sizes.
    if bool(info) or not bool((factor.diagonal().square() > _SINGULAR * matrix.diagonal()).all()):
        problem = "leaves the regression on a layer's inputs singular"
        raise NumericsError(f"a ridge of {ridge:g} {problem}; raise the ridge.")
    return torch.cholesky_solve(right.t(), factor).t()


def reduce_linear_error(layer: QuantLinear, x: Tensor, recipe: Recipe) -> None:
    """Refit a linear layer to inputs (..., d), whose range is set, and decide its rounding."""
    flat, own = x.reshape(-1, x.shape[-1]), None if layer.bias is None else layer.bias.detach()
    moments, ridge = refit_moments(flat, layer.input_quantizer(flat)), recipe.refit_ridge
    first_ridge = ridge if x.ndim > 2 else min(_CLASSIFIER_RIDGE, ridge)
    fit = ridge_refit(layer.weight.detach(), own, moments, first_ridge)
    weight_percentiles(layer, fit[0], extended=recipe.range_grid == "extended")
    _decide(layer, fit, moments, ridge, recipe)


def reduce_conv_error(layer: QuantConv2d, x: Inputs, recipe: Recipe) -> None:
    """Decide the rounding of a patch embedding with inputs (N, C, H, W), without a refit.

    With the rule ``gradient`` no rounding is flipped. Convolutions in groups, in necks and in heads
    are rounded to nearest: a kernel of 3 x 3 x 256 would need moments of 2304 x 2304 over 66,800
    patches of an 800 x 1333 image's finest level.
    """
    if layer.groups != 1:
        return
    parts = [input_patches(layer, layer.input_quantizer(part), 0) for part in eights(x)]
    patches, weight = torch.cat(parts), layer.weight.detach().flatten(1)
    bias = None if layer.bias is None else layer.bias.detach()
    moments, ridge = refit_moments(patches, patches), _CONV_FACTOR * recipe.refit_ridge
    _decide(layer, (weight, bias), moments, ridge, recipe)


def _decide(
    layer: WeightLayer, fit: Fit, moments: InputMoments, ridge: float, recipe: Recipe
) -> None:
    """Set the codes and the bias of the quantized form; the ranges of the weight are set."""
    (weight, bias), quantizer = fit, layer.weight_quantizer
    steep = recipe.refit_rule == "gradient"
    flips = 0 if steep and isinstance(layer, QuantConv2d) else recipe.refit_flips
    if not quantizer.off:
        grid = RoundingGrid(quantizer.scale, quantizer.zero_point, quantizer.levels)
        codes, bias = refine_rounding(weight, bias, grid, moments, ridge, flips, steep)
        quantizer.set_codes(codes)
    if bias is not None:
        layer.quantized_bias = bias.detach().float().contiguous()
