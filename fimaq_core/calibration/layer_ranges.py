"""Ranges of one layer from its full-precision inputs."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.calibration.candidates import (
    MIN_WEIGHT_SCALE,
    Candidates,
    from_bounds,
    grid_candidates,
    minmax,
    quantiles,
)
from fimaq_core.calibration.output_error import best_operand, input_moments, weight_errors
from fimaq_core.calibration.own_error import best_by_own_error
from fimaq_core.layers import QuantConv2d, QuantLinear, QuantMatMul
from fimaq_core.quantizers.affine import AffineQuantizer, levels_of
from fimaq_core.quantizers.weight import WeightQuantizer
from fimaq_core.recipe import Recipe


def calibrate_linear(layer: QuantLinear, x: Tensor, recipe: Recipe) -> None:
    """Set the ranges of a linear layer.

    First weight (per row) and input (one range) by their own squared error, then rounds of weight and input by
    the squared error of the layer's output with the other one quantized.

    Args:
        layer: the layer, its weight in full precision.
        x: (..., in_features) full-precision inputs.
        recipe: supplies the kind of search, candidates and rounds.
    """
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    weight, flat = layer.weight.detach(), x.reshape(-1, x.shape[-1])
    if recipe.range_search == "minmax":
        _set_minmax(weights, weight)
        _set_minmax(inputs, flat.reshape(1, -1), shape=(1,))
        return

    count = recipe.range_candidates
    row_candidates = input_candidates = None
    guess = torch.zeros((), dtype=torch.long)
    if not weights.off:
        ordered = weight.sort(dim=1).values
        row_candidates = grid_candidates(ordered, weights.levels, count, MIN_WEIGHT_SCALE)
        _set_rows(weights, row_candidates, best_by_own_error(ordered, row_candidates, weights.levels))
    if not inputs.off:
        ordered = flat.reshape(1, -1).sort(dim=1).values
        input_candidates = grid_candidates(ordered, inputs.levels, count)
        guess = best_by_own_error(ordered, input_candidates, inputs.levels)[0]
        _set_input(inputs, input_candidates, int(guess))

    batched = flat.view(1, 1, -1) if x.ndim < 2 else x.reshape(x.shape[0], -1, x.shape[-1])
    for _ in range(recipe.range_rounds):
        if row_candidates is not None:
            square, cross = input_moments(flat, inputs(flat))
            errors = weight_errors(weight, row_candidates, weights.levels, square, cross)
            _set_rows(weights, row_candidates, errors.argmin(0))
        if input_candidates is not None:
            other = weights.quantized(weight).t().unsqueeze(0)
            residual = batched @ (other - weight.t())
            index = best_operand(
                batched,
                other,
                residual,
                input_candidates.scale[:, 0],
                input_candidates.zero_point[:, 0],
                inputs.levels,
                int(guess),
            )
            guess = torch.as_tensor(index)
            _set_input(inputs, input_candidates, index)


def calibrate_conv(layer: QuantConv2d, x: Tensor, recipe: Recipe) -> None:
    """Set the ranges of a convolution (the patch embedding).

    Weights per output channel: bounds between the 0.99 and the 0.9999 quantiles and the maximum, by output
    error; both bounds together, then the lower, then the upper alone. Where the input is quantized its range is min-max.

    The released code never tries the maximum itself (its loop ends one candidate early); it is tried here.

    Args:
        layer: the convolution.
        x: (N, C, H, W) inputs.
        recipe: supplies the kind of search and the candidates.
    """
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    matrix = layer.weight.detach().flatten(1)
    _set_minmax(inputs, x.reshape(1, -1), shape=(1, 1, 1, 1))
    if weights.off:
        return
    if recipe.range_search == "minmax":
        _set_minmax(weights, matrix)
        return
    count = recipe.range_candidates
    points = [0.99 + 0.0099 * (i / (count - 1)) ** 0.5 for i in range(count)] + [1.0]
    ordered = matrix.sort(dim=1).values
    uppers, lowers = quantiles(ordered, points), quantiles(ordered, [1 - point for point in points])
    moments = [_conv_moments(layer, x, inputs, group) for group in range(layer.groups)]

    def search(lower: Tensor, upper: Tensor) -> Tensor:
        candidates = from_bounds(lower, upper, weights.levels)
        rows = matrix.shape[0] // layer.groups
        errors = []
        for group, part in enumerate(torch.split(matrix, rows)):
            own = slice(group * rows, (group + 1) * rows)
            chosen = Candidates(candidates.scale[:, own], candidates.zero_point[:, own])
            errors.append(weight_errors(part, chosen, weights.levels, *moments[group]))
        index = torch.cat(errors, 1).argmin(0)
        _set_rows(weights, candidates, index)
        return index[None]

    index = search(lowers, uppers)
    index = search(lowers, uppers.gather(0, index).expand_as(uppers))
    search(lowers.gather(0, index).expand_as(lowers), uppers)


def _conv_moments(layer: QuantConv2d, x: Tensor, inputs: AffineQuantizer, group: int) -> tuple[Tensor, Tensor]:
    """Moments of one group's input patches, accumulated over images so that unfolding never needs them all."""
    channels = layer.in_channels // layer.groups
    width = channels * layer.kernel_size[0] * layer.kernel_size[1]
    square = torch.zeros(width, width, dtype=torch.float64, device=x.device)
    cross = torch.zeros_like(square)

    def patches(part: Tensor) -> Tensor:
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            pads = layer._reversed_padding_repeated_twice
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            part, padding = F.pad(part, pads, mode=mode), (0, 0)
        else:
            padding = (layer.padding[0], layer.padding[1])
        part = part[:, group * channels : (group + 1) * channels]
        columns = F.unfold(
            part, (layer.kernel_size[0], layer.kernel_size[1]), dilation=layer.dilation, padding=padding, stride=layer.stride
        )
        return columns.transpose(1, 2).reshape(-1, width)

    for part in torch.split(x, 8):
        plain = patches(part)
        quantized = plain if inputs.off else patches(inputs(part))
        more_square, more_cross = input_moments(plain, quantized)
        square += more_square
        cross += more_cross
    return square, cross


def calibrate_matmul(layer: QuantMatMul, a: Tensor, b: Tensor, recipe: Recipe) -> None:
    """Set per-head ranges of both operands of an attention product by the squared error of the product.

    Upper and lower bounds lie between the 0.99 and 0.99999 quantiles and their mirror images; both together for a,
    then for b, then rounds of a-lower, a-upper, b-lower, b-upper (the released code's order).

    Args:
        layer: the product.
        a: (batch, heads, rows, inner) full-precision left operand.
        b: (batch, heads, inner, columns) full-precision right operand.
        recipe: supplies the kind of search, candidates and rounds.
    """
    if recipe.range_search == "minmax":
        for quantizer, operand in ((layer.a_quantizer, a), (layer.b_quantizer, b)):
            _set_minmax(quantizer, operand.transpose(0, 1).flatten(1), shape=(1, -1, 1, 1))
        return
    count = recipe.range_candidates
    # The right operand is searched as the left one of the transposed product.
    left = _HeadSearch(layer.a_quantizer, a, count)
    right = _HeadSearch(layer.b_quantizer, b.transpose(2, 3), count)
    left.start()
    right.start()

    def other(search: _HeadSearch) -> tuple[Tensor, Tensor]:
        return search.quantized().transpose(2, 3), search.x.transpose(2, 3)

    left.search("both", *other(right))
    right.search("both", *other(left))
    for _ in range(recipe.range_rounds):
        for which in ("lower", "upper"):
            left.search(which, *other(right))
        for which in ("lower", "upper"):
            right.search(which, *other(left))


class _HeadSearch:
    """Bounds of one attention operand ``x`` (batch, heads, rows, inner), searched per head."""

    def __init__(self, quantizer: AffineQuantizer, x: Tensor, count: int) -> None:
        self.quantizer, self.x = quantizer, x
        if quantizer.off:
            return
        ordered = x.transpose(0, 1).flatten(1).sort(dim=1).values
        upper_in, upper, lower, lower_in = quantiles(ordered, [0.99, 0.99999, 0.00001, 0.01])
        share = torch.linspace(0, 1, count + 1, device=x.device)[:count, None]
        self.uppers = upper_in + share * (upper - upper_in)
        self.lowers = lower + share * (lower_in - lower)
        heads = x.shape[1]
        self.index = torch.full((heads,), count - 1, device=x.device)

    def start(self) -> None:
        """Set the start ranges: the widest upper with the narrowest lower bound, as released."""
        if not self.quantizer.off:
            self._set(from_bounds(self.lowers, self.uppers, self.quantizer.levels), self.index)

    def quantized(self) -> Tensor:
        """``x`` quantized with the present ranges."""
        out: Tensor = self.quantizer(self.x)
        return out

    def _set(self, candidates: Candidates, index: Tensor) -> None:
        scale, zero = candidates.pick(index)
        self.quantizer.set_range(scale.view(1, -1, 1, 1), zero.view(1, -1, 1, 1))

    def search(self, which: str, other_hat: Tensor, other: Tensor) -> None:
        """Choose anew per head, by the error of ``x̂ @ other_hat`` against ``x @ other``.

        Args:
            which: the bounds that vary, ``both``, ``lower`` or ``upper``; the other one stays at its present choice.
            other_hat, other: (batch, heads, inner, columns), quantized and in full precision.
        """
        if self.quantizer.off:
            return
        uppers, lowers = self.uppers, self.lowers
        if which == "lower":
            uppers = uppers.gather(0, self.index[None]).expand_as(uppers)
        elif which == "upper":
            lowers = lowers.gather(0, self.index[None]).expand_as(lowers)
        candidates = from_bounds(lowers, uppers, self.quantizer.levels)
        best = []
        for head in range(self.x.shape[1]):
            x, hat = self.x[:, head].contiguous(), other_hat[:, head].contiguous()
            residual = x @ (hat - other[:, head])
            best.append(
                best_operand(
                    x,
                    hat,
                    residual,
                    candidates.scale[:, head],
                    candidates.zero_point[:, head],
                    self.quantizer.levels,
                    int(self.index[head]),
                )
            )
        self.index = torch.tensor(best, device=self.x.device)
        self._set(candidates, self.index)


def _set_rows(quantizer: WeightQuantizer, candidates: Candidates, index: Tensor) -> None:
    scale, zero = candidates.pick(index)
    quantizer.set_range(scale[:, None], zero[:, None])


def _set_input(quantizer: AffineQuantizer, candidates: Candidates, index: int) -> None:
    quantizer.set_range(candidates.scale[index], candidates.zero_point[index])


def _set_minmax(quantizer: AffineQuantizer, rows: Tensor, shape: tuple[int, ...] = (-1, 1)) -> None:
    """Min-max range of each row of ``rows`` (groups, n), in the given shape."""
    if not quantizer.off:
        scale, zero = minmax(rows, levels_of(quantizer.bits))
        quantizer.set_range(scale.view(shape), zero.view(shape))
