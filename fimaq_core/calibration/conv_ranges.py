"""Ranges of convolutions from their full-precision inputs: patch embeddings, layers of detectors.

Inputs are one tensor (N, C, H, W), or several if sizes vary or a convolution runs once per level of
a pyramid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.calibration import candidates as grids
from fimaq_core.calibration.candidates import Candidates, ascending, quantiles
from fimaq_core.calibration.linear_ranges import set_minmax, set_rows, start_rows
from fimaq_core.calibration.own_error import best_by_own_error
from fimaq_core.calibration.progressive import candidates_of
from fimaq_core.calibration.thinning import conv_values
from fimaq_core.calibration.weight_error import Moments, Rows, best_rows, input_moments
from fimaq_core.layers import QuantConv2d, WeightLayer
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.recipe import Recipe

Inputs = Tensor | Sequence[Tensor]


def calibrate_conv(layer: QuantConv2d, x: Inputs, recipe: Recipe) -> None:
    """Set the ranges of a patch embedding.

    The weight gets one range per output channel, by the output's error. Candidates of its bounds
    are quantiles from 0.99 to 0.9999, their mirror images, and the extremes. Both bounds are
    searched together, then the lower, then the upper one alone. The input's range is min-max. The
    released code never tries the extremes (its loop ends one candidate early).
    """
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    matrix = layer.weight.detach().flatten(1)
    _set_input_minmax(inputs, x)
    if weights.off:
        return
    if recipe.range_search == "minmax":
        set_minmax(weights, matrix)
        return
    count = recipe.range_candidates
    points = [0.99 + 0.0099 * (i / (count - 1)) ** 0.5 for i in range(count)] + [1.0]
    ordered = ascending(matrix)
    uppers, lowers = quantiles(ordered, points), quantiles(ordered, [1 - point for point in points])
    if recipe.range_grid == "extended":
        uppers = torch.cat([uppers, uppers[-1:].clamp(min=0)])
        lowers = torch.cat([lowers, lowers[-1:].clamp(max=0)])
    problems = []
    for group, part in enumerate(matrix.chunk(layer.groups)):
        problems.append(Rows(part, weights.levels, *_conv_moments(layer, x, group, part)))

    def search(lower: Tensor, upper: Tensor, guess: Tensor) -> Tensor:
        found, best = grids.from_bounds(lower, upper, weights.levels), []
        size = len(matrix) // layer.groups
        for group, problem in enumerate(problems):
            own = slice(group * size, (group + 1) * size)
            chosen = Candidates(found.scale[:, own], found.zero_point[:, own])
            best.append(best_rows(problem, chosen, guess[own]))
        index = torch.cat(best)
        set_rows(weights, *found.pick(index))
        return index

    index = search(lowers, uppers, torch.full(matrix.shape[:1], count, device=matrix.device))
    index = search(lowers, uppers.gather(0, index[None]).expand_as(uppers), index)
    search(lowers.gather(0, index[None]).expand_as(lowers), uppers, index)


def _conv_moments(layer: QuantConv2d, x: Inputs, group: int, weight: Tensor) -> Moments:
    """Return the moments of one group's input patches; few images are unfolded at a time."""
    width, inputs = weight.shape[1], layer.input_quantizer
    square = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
    linear = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for part in eights(x):
        plain = input_patches(layer, part, group)
        quantized = plain if inputs.off else input_patches(layer, inputs(part), group)
        more_square, more_linear = input_moments(plain, quantized, weight)
        square += more_square
        linear += more_linear
    return square, linear


def eights(x: Inputs) -> list[Tensor]:
    """Return the inputs in parts of at most eight images."""
    parts = [x] if isinstance(x, Tensor) else x
    return [piece for part in parts for piece in torch.split(part, 8)]


def input_patches(layer: QuantConv2d, x: Tensor, group: int) -> Tensor:
    """Return the patches of ``x`` (N, C, H, W) that one group's kernels multiply.

    Their shape is (patches, channels x kernel).
    """
    channels = layer.in_channels // layer.groups
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0, 0)
    else:
        padding = (layer.padding[0], layer.padding[1])
    x = x[:, group * channels : (group + 1) * channels]
    kernel = (layer.kernel_size[0], layer.kernel_size[1])
    columns = F.unfold(x, kernel, dilation=layer.dilation, padding=padding, stride=layer.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def calibrate_conv_by_own_error(layer: WeightLayer, x: Inputs, recipe: Recipe) -> None:
    """Set the ranges of a convolution outside the patch embedding: FPN, RPN, mask head.

    As in APHQ-ViT's detection (Wu et al., CVPR 2025, arXiv:2504.02508) the weight has one range per
    output channel and the input has one range. Each range minimises its own squared error; there
    are no rounds by the output's error. Candidates are the grid of linear layers. The input has the
    min-max range as a further candidate: the grid's zero points lie around the middle, so with 8
    bits the grid covers about half of a ReLU's outputs. Min-max recipes set min-max ranges of all
    values; progressive recipes search as the others do.

    The search uses at most 2**23 input values; the finest level of a single 800 x 1333 image has 17
    million.
    """
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    assert isinstance(inputs, AffineQuantizer)
    matrix = layer.weight.detach().flatten(1)
    if recipe.range_search == "minmax":
        set_minmax(weights, matrix)
        _set_input_minmax(inputs, x)
        return
    recipe = recipe.model_copy(update={"range_search": "output-error"})  # the grid's zero points
    if not weights.off:
        start_rows(weights, matrix, recipe)
    if not inputs.off:
        ordered = ascending(conv_values([x] if isinstance(x, Tensor) else x))
        grid = candidates_of(ordered, inputs.levels, recipe=recipe)
        scale, zero = grids.minmax(ordered, inputs.levels)
        pairs = (grid.scale, scale), (grid.zero_point, zero)
        scales, zeros = (torch.cat([many, one[None]]) for many, one in pairs)
        candidates = Candidates(scales, zeros)
        scale, zero = candidates.pick(best_by_own_error(ordered, candidates, inputs.levels))
        inputs.set_range(scale.view(1, 1, 1, 1), zero.view(1, 1, 1, 1))


def _set_input_minmax(inputs: AffineQuantizer, x: Inputs) -> None:
    """Set the min-max range of all inputs."""
    parts = [x] if isinstance(x, Tensor) else x
    ends = torch.stack([end for part in parts for end in part.aminmax()])
    set_minmax(inputs, ends[None], shape=(1, 1, 1, 1))
