"""ERQ's calibration of one layer (Zhong et al., ICML 2024, arXiv:2407.06794): refit, then rounding.

The inputs' range is set already. Weight and bias are refit to the quantized inputs by ridge
regression, the refit weight gets its ranges by percentiles, and its rounding is decided half by
half, what is left each time compensating. The float layer stays: the result is codes and a quantized
bias. With inputs X, their quantized form X̂ and A = [X̂, 1], everything follows from second moments of
A and X: no matrix of tokens x rows is ever made.

Differences from the released code: the ridge is the README's (its option coe 10000, times 0.1),
added to sums over all tokens; the released default is twice that. Layers without a token axis (the
classifier) are refit with a ridge of 0.1, as released.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import block_elements
from fimaq_core.calibration.conv_ranges import Inputs, eights, input_patches
from fimaq_core.calibration.percentile_ranges import weight_percentiles
from fimaq_core.errors import NumericsError
from fimaq_core.layers import QuantConv2d, QuantLinear
from fimaq_core.recipe import Recipe

#: Share of a coordinate's second moment that the coordinates before it leave unexplained; less is the work of rounding.
_SINGULAR = 1e-12
#: Ridge of the first refit of layers whose inputs are (samples, d), and the factor of a convolution's, as released.
_CLASSIFIER_RIDGE, _CONV_FACTOR = 0.1, 10.0


@dataclass(frozen=True)
class InputMoments:
    """Sums over tokens of what inputs X and their quantized form X̂ contribute to a regression."""

    square: Tensor  # (d, d) float64, X̂ᵀX̂
    cross: Tensor  # (d, d) float64, X̂ᵀX
    #: (d,) float64, column sums of X̂ and of X
    sum_hat: Tensor
    sum_plain: Tensor
    count: int  # tokens


def refit_moments(x: Tensor, x_hat: Tensor) -> InputMoments:
    """Moments of inputs and their quantized form, (tokens, d) each, without a wide copy of them."""
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


def ridge_refit(
    weight: Tensor, bias: Tensor | None, moments: InputMoments, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """Fit weight and bias to the quantized inputs; return both in float32.

    The paper's activation quantization error reduction: with W = [w, b] and the full-precision
    output Y = Xwᵀ + b, W becomes W + δ with ``(AᵀA + ridge I)δᵀ = Aᵀ(Y - AWᵀ)``. Without a bias the
    column of ones is left out of A. The ridge is added to the diagonal as it is, the bias's entry
    included.

    Raises:
        NumericsError: the moments are not finite, or singular for this ridge.
    """
    # Y - AWᵀ = (X - X̂)wᵀ: the bias cancels.
    pull = moments.cross - moments.square
    if bias is not None:
        pull = torch.cat([pull, (moments.sum_plain - moments.sum_hat)[None]])
    joint = _joint(weight, bias)
    joint += _ridge_solve(
        _second_moments(moments, bias), weight.detach().double() @ pull.t(), ridge
    )
    width = weight.shape[1]
    return joint[:, :width].float(), None if bias is None else joint[:, width].float()


def refine_rounding(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    levels: int,
    moments: InputMoments,
    ridge: float,
    flips: int = 100,
) -> tuple[Tensor, Tensor | None]:
    """Choose codes half by half (the paper's weight quantization error reduction).

    The first half of the columns still free is rounded, single roundings are flipped while that
    lowers the half's own output error, and ridge regression lets the columns behind it, and the
    bias, make up for the rest. The bias takes part as a last column that is never rounded.

    Args:
        scale, zero_point: (rows, 1), the grid.
        ridge: as in :func:`ridge_refit`.
        flips: most flips of a row in one half.

    Returns:
        Codes (rows, d), float32 integers in [0, levels - 1], and the new bias, float32.

    Raises:
        NumericsError: the moments are not finite, or singular for this ridge.
    """
    square = _second_moments(moments, bias)
    scale, zero_point = scale.detach().double(), zero_point.double()
    free = _joint(weight, bias)
    codes: list[Tensor] = []
    # The bias is last, and a first half never contains the last of two or more.
    while (width := free.shape[1]) > 1:
        half = width // 2
        chosen = _rounded(free[:, :half], scale, zero_point, levels, square[:half, :half], flips)
        error = (chosen - zero_point) * scale - free[:, :half]
        free = free[:, half:] - _ridge_solve(
            square[half:, half:], error @ square[:half, half:], ridge
        )
        square = square[half:, half:]
        codes.append(chosen)
    if bias is None:
        codes.append(_rounded(free, scale, zero_point, levels, square, 0))
    return torch.cat(codes, 1).float(), None if bias is None else free[:, 0].float()


def _rounded(
    weight: Tensor, scale: Tensor, zero_point: Tensor, levels: int, square: Tensor, flips: int
) -> Tensor:
    """Codes, rounded to nearest, then flipped for a lower ``δ square δᵀ``; all float64."""
    ratio = weight / scale
    codes = (ratio.round() + zero_point).clamp_(0, levels - 1)
    if not flips:
        return codes
    ends = (
        (ratio.floor() + zero_point).clamp_(0, levels - 1),
        (ratio.ceil() + zero_point).clamp_(0, levels - 1),
    )
    # How a flip changes the code: up, down, or not at all where clamping leaves one point.
    turn = ends[0] + ends[1] - 2 * codes
    product = ((codes - zero_point) * scale - weight) @ square
    _flip(codes, turn, product, square, scale[:, 0], flips)
    return codes


def _flip(
    codes: Tensor, turn: Tensor, product: Tensor, square: Tensor, scale: Tensor, flips: int
) -> None:
    """Flip ``codes`` in place, one a row at a time.

    ``turn`` (what flips would add) and ``product`` (δ square) are used up. A weight that can be
    flipped lies between two points, so its error and its turn have opposite signs: error and
    gradient agree in sign where turn times gradient is negative. The gradient is twice the product.
    A flip by h changes the objective by ``2h product + h² diagonal``, which is negative if
    ``2 turn product + scale diagonal`` is.
    """
    rows, diagonal = torch.arange(len(codes), device=codes.device), square.diagonal()
    for _ in range(flips):
        slope, column = (turn * product).min(1)
        # A row that is refused keeps its state and is refused again, so that it may stay until most rows are done.
        falls = 2 * slope + scale * diagonal[column] < 0
        left = int(falls.sum())
        if not left:
            return
        if 2 * left <= len(falls):
            rows, turn, product, scale, column = (
                values[falls] for values in (rows, turn, product, scale, column)
            )
            falls = falls[falls]
        change = turn.gather(1, column[:, None]) * falls[:, None]
        codes[rows, column] += change[:, 0]
        turn.scatter_add_(1, column[:, None], -2 * change)
        product.addcmul_(change * scale[:, None], square[column])


def _joint(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[w, b] as a new float64 tensor."""
    parts = [weight] if bias is None else [weight, bias[:, None]]
    return torch.cat([part.detach().double() for part in parts], 1)


def _second_moments(moments: InputMoments, bias: Tensor | None) -> Tensor:
    """AᵀA; without a bias X̂ᵀX̂."""
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
            "the second moments of a layer's inputs are NaN or infinite; its inputs cannot be calibrated on."
        )
    factor, info = torch.linalg.cholesky_ex(matrix)
    # Rounding can hide a singular matrix from the factorization; its pivots tell.
    if bool(info) or not bool((factor.diagonal().square() > _SINGULAR * matrix.diagonal()).all()):
        raise NumericsError(
            f"a ridge of {ridge:g} leaves the regression on a layer's inputs singular; raise the ridge."
        )
    return torch.cholesky_solve(right.t(), factor).t()


def reduce_linear_error(layer: QuantLinear, x: Tensor, recipe: Recipe) -> None:
    """Refit a linear layer whose input range is set, on (..., d), and decide its rounding."""
    flat = x.reshape(-1, x.shape[-1])
    own = None if layer.bias is None else layer.bias.detach()
    moments = refit_moments(flat, layer.input_quantizer(flat))
    ridge = recipe.refit_ridge if x.ndim > 2 else min(_CLASSIFIER_RIDGE, recipe.refit_ridge)
    weight, bias = ridge_refit(layer.weight.detach(), own, moments, ridge)
    weight_percentiles(layer, weight)
    _decide(layer, weight, bias, moments, recipe, recipe.refit_ridge)


def reduce_conv_error(layer: QuantConv2d, x: Inputs, recipe: Recipe) -> None:
    """Decide a patch embedding's rounding on inputs (N, C, H, W); as released it is not refit.

    (Its input is not quantized.) Convolutions in groups, necks and heads keep rounding to nearest:
    a kernel of 3 x 3 x 256 has moments of 2304 x 2304, and an image of 800 x 1333 adds 66,800
    patches at the finest level alone.
    """
    if layer.groups != 1:
        return
    patches = torch.cat(
        [input_patches(layer, layer.input_quantizer(part), 0) for part in eights(x)]
    )
    bias = None if layer.bias is None else layer.bias.detach()
    weight = layer.weight.detach().flatten(1)
    _decide(
        layer,
        weight,
        bias,
        refit_moments(patches, patches),
        recipe,
        _CONV_FACTOR * recipe.refit_ridge,
    )


def _decide(
    layer: QuantLinear | QuantConv2d,
    weight: Tensor,
    bias: Tensor | None,
    moments: InputMoments,
    recipe: Recipe,
    ridge: float,
) -> None:
    """Set codes and the quantized form's bias from a weight (rows, d) whose ranges are set."""
    quantizer = layer.weight_quantizer
    if not quantizer.off:
        scale, zero = quantizer.scale.detach(), quantizer.zero_point
        codes, bias = refine_rounding(
            weight, bias, scale, zero, quantizer.levels, moments, ridge, recipe.refit_flips
        )
        quantizer.set_codes(codes)
    if bias is not None:
        layer.quantized_bias = bias.detach().float().contiguous()
