"""Direct candidate search: one pass over all data of a layer per candidate.

The fast searches of :mod:`fimaq_core.calibration` are checked against it. It tries the same
candidates in the same order, each as its definition says: quantize, run the layer, sum the squared
error of its output.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.calibration.candidates import (
    MIN_WEIGHT_SCALE,
    Candidates,
    from_bounds,
    grid_candidates,
    quantiles,
)
from fimaq_core.calibration.reparameterize import reparameterize
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.layers import QuantConv2d, QuantLinear, QuantMatMul, quant_layers, set_quantized
from fimaq_core.quantizers.affine import AffineQuantizer, WeightQuantizer, fake_quantize
from fimaq_core.recipe import OFF, Recipe

#: Returns the error of every group (groups,) for one candidate's scale and zero point (groups,).
Errors = Callable[[Tensor, Tensor], Tensor]


def search(candidates: Candidates, errors: Errors) -> Tensor:
    """Return the index (groups,) of the best candidate of each group, by trying all of them."""
    table = [
        errors(scale, zero)
        for scale, zero in zip(candidates.scale, candidates.zero_point, strict=True)
    ]
    return torch.stack(table).argmin(0)


@torch.no_grad()
def calibrate_directly(
    chain: BlockChain, images: Tensor, recipe: Recipe, batch_size: int = 32
) -> None:
    """Set all ranges of ``chain``, in place, as the calibration of the core does.

    Args:
        chain: the model.
        images: (N, C, H, W) calibration images; the first ``recipe.range_images`` are used.
        recipe: bits and settings of the search; ``range_search`` must be ``output-error``.
        batch_size: images a forward pass.
    """
    set_quantized(chain, False)
    x = images[: recipe.range_images].to(next(chain.parameters()).device)
    for segment in chain:
        x, inputs = run_segment(segment, x, batch_size)
        for name, layer in quant_layers(segment.block):
            if isinstance(layer, QuantConv2d):
                calibrate_conv(layer, inputs[name][0], recipe)
            elif isinstance(layer, QuantMatMul):
                calibrate_matmul(layer, inputs[name][0], inputs[name][1], recipe)
            else:
                calibrate_linear(
                    layer, move_norm(segment, name, layer, inputs[name][0], recipe), recipe
                )
    set_quantized(chain, True)


def run_segment(
    segment: Segment, x: Tensor, batch_size: int = 32
) -> tuple[Tensor, dict[str, tuple[Tensor, ...]]]:
    """The segment's output for ``x``, and the inputs of its quantizable layers by name."""
    seen: dict[str, list[tuple[Tensor, ...]]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: seen.setdefault(name, []).append(args)

    handles = [
        layer.register_forward_pre_hook(keep(name)) for name, layer in quant_layers(segment.block)
    ]
    out = torch.cat([segment(part) for part in torch.split(x, batch_size)])
    for handle in handles:
        handle.remove()
    return out, {
        name: tuple(torch.cat(parts) for parts in zip(*args, strict=True))
        for name, args in seen.items()
    }


def move_norm(segment: Segment, name: str, layer: QuantLinear, x: Tensor, recipe: Recipe) -> Tensor:
    """Reparameterise the layer with the norm before it, if it has one; return its new inputs."""
    bits, levels = layer.input_quantizer.bits, layer.input_quantizer.levels
    found = [pair for pair in segment.pairs if pair.linear == name]
    if not found or not recipe.reparameterize or bits == OFF or bits != layer.weight_quantizer.bits:
        return x
    channels = x.flatten(0, -2).t().contiguous()
    candidates = grid_candidates(channels.sort(dim=1).values, levels, recipe.range_candidates)
    scale, zero = candidates.pick(search(candidates, own_error(channels, levels)))
    pad = None if found[0].pad is None else segment.block.get_buffer(found[0].pad)
    r, b = reparameterize(found[0].norm, layer, scale, zero, pad)
    return x / r - b


def own_error(rows: Tensor, levels: int) -> Errors:
    """The rows' (groups, n) own squared error as a function of their ranges."""
    return lambda scale, zero: (
        (fake_quantize(rows, scale[:, None], zero[:, None], levels) - rows).square().sum(1)
    )


def calibrate_linear(layer: QuantLinear, x: Tensor, recipe: Recipe) -> None:
    """Calibrate by own errors, then rounds of weight and input by the output's error."""
    weights, inputs, weight = layer.weight_quantizer, layer.input_quantizer, layer.weight.detach()
    rows = columns = None
    if not weights.off:
        rows = grid_candidates(
            weight.sort(dim=1).values, weights.levels, recipe.range_candidates, MIN_WEIGHT_SCALE
        )
        set_rows(weights, rows, search(rows, own_error(weight, weights.levels)))
    if not inputs.off:
        flat = x.reshape(1, -1)
        columns = grid_candidates(flat.sort(dim=1).values, inputs.levels, recipe.range_candidates)
        inputs.set_range(*columns.pick(search(columns, own_error(flat, inputs.levels))))
    for _ in range(recipe.range_rounds):
        if rows is not None:
            search_weight(layer, x, rows)
        if columns is not None:
            search_input(layer, x, columns)


def search_weight(layer: QuantLinear, x: Tensor, candidates: Candidates) -> None:
    """The weight's ranges by the squared error of the output, the input quantized."""
    weight, levels = layer.weight.detach(), layer.weight_quantizer.levels
    target, x_hat = F.linear(x, weight), layer.input_quantizer(x)

    def errors(scale: Tensor, zero: Tensor) -> Tensor:
        quantized = fake_quantize(weight, scale[:, None], zero[:, None], levels)
        return (F.linear(x_hat, quantized) - target).square().flatten(0, -2).sum(0)

    set_rows(layer.weight_quantizer, candidates, search(candidates, errors))


def search_input(layer: QuantLinear, x: Tensor, candidates: Candidates) -> None:
    """The input's range by the squared error of the output, the weight quantized."""
    levels = layer.input_quantizer.levels
    target, w_hat = F.linear(x, layer.weight), layer.weight_quantizer.quantized(layer.weight)

    def errors(scale: Tensor, zero: Tensor) -> Tensor:
        return (
            (F.linear(fake_quantize(x, scale, zero, levels), w_hat) - target).square().sum()[None]
        )

    layer.input_quantizer.set_range(*candidates.pick(search(candidates, errors)))


def calibrate_conv(layer: QuantConv2d, x: Tensor, recipe: Recipe) -> None:
    """Min-max for the input; bounds of the weight by output error: both, lower, upper."""
    weights, inputs, count = layer.weight_quantizer, layer.input_quantizer, recipe.range_candidates
    if not inputs.off:
        lower, upper = x.amin().clamp(max=0).view(1, 1), x.amax().clamp(min=0).view(1, 1)
        inputs.set_range(
            *(
                part.view(1, 1, 1, 1)
                for part in from_bounds(lower, upper, inputs.levels).pick(
                    torch.zeros_like(lower[0]).long()
                )
            )
        )
    if weights.off:
        return
    matrix, x_hat = layer.weight.detach().flatten(1), inputs(x)
    target = layer._conv_forward(x, layer.weight, None)

    def errors(scale: Tensor, zero: Tensor) -> Tensor:
        quantized = fake_quantize(matrix, scale[:, None], zero[:, None], weights.levels).view_as(
            layer.weight
        )
        return (layer._conv_forward(x_hat, quantized, None) - target).square().sum((0, 2, 3))

    points = [0.99 + 0.0099 * (i / (count - 1)) ** 0.5 for i in range(count)] + [1.0]
    ordered = matrix.sort(dim=1).values
    uppers, lowers = quantiles(ordered, points), quantiles(ordered, [1 - point for point in points])
    index = search(from_bounds(lowers, uppers, weights.levels), errors)
    index = search(
        from_bounds(lowers, uppers.gather(0, index[None]).expand_as(uppers), weights.levels), errors
    )
    last = from_bounds(lowers.gather(0, index[None]).expand_as(lowers), uppers, weights.levels)
    set_rows(weights, last, search(last, errors))


def calibrate_matmul(layer: QuantMatMul, a: Tensor, b: Tensor, recipe: Recipe) -> None:
    """Bounds of both operands per head by product error: both, then rounds of lower, upper."""
    target = a @ b
    sides = [
        Operand(layer.a_quantizer, a, recipe.range_candidates),
        Operand(layer.b_quantizer, b, recipe.range_candidates),
    ]

    def choose(side: int, which: str) -> None:
        moving, fixed = sides[side], sides[1 - side].quantized()

        def errors(scale: Tensor, zero: Tensor) -> Tensor:
            hat = moving.quantized(scale, zero)
            product = hat @ fixed if side == 0 else fixed @ hat
            return (product - target).square().sum((0, 2, 3))

        moving.choose(which, errors)

    for side in (0, 1):
        choose(side, "both")
    for _ in range(recipe.range_rounds):
        for side in (0, 1):
            for which in ("lower", "upper"):
                choose(side, which)


class Operand:
    """One side (batch, heads, rows, columns) of a product; candidate bounds (candidates, heads)."""

    def __init__(self, quantizer: AffineQuantizer, x: Tensor, count: int) -> None:
        self.quantizer, self.x = quantizer, x
        if quantizer.off:
            return
        ordered = x.transpose(0, 1).flatten(1).sort(dim=1).values
        upper_in, upper, lower, lower_in = quantiles(ordered, [0.99, 0.99999, 0.00001, 0.01])
        share = torch.linspace(0, 1, count + 1, device=x.device)[:count, None]
        self.bounds = {
            "lower": lower + share * (lower_in - lower),
            "upper": upper_in + share * (upper - upper_in),
        }
        self.index = torch.full((x.shape[1],), count - 1, device=x.device)
        self._set(from_bounds(self.bounds["lower"], self.bounds["upper"], quantizer.levels))

    def _set(self, candidates: Candidates) -> None:
        scale, zero = candidates.pick(self.index)
        self.quantizer.set_range(scale.view(1, -1, 1, 1), zero.view(1, -1, 1, 1))

    def quantized(self, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        """``x`` quantized with ranges (heads,), or with the present ones."""
        if scale is None or zero is None:
            out: Tensor = self.quantizer(self.x)
            return out
        return fake_quantize(
            self.x, scale.view(1, -1, 1, 1), zero.view(1, -1, 1, 1), self.quantizer.levels
        )

    def choose(self, which: str, errors: Errors) -> None:
        """Search the ``lower`` or the ``upper`` bound, or ``both`` together."""
        if self.quantizer.off:
            return
        bounds = dict(self.bounds)
        for held in bounds:
            if which not in (held, "both"):
                bounds[held] = bounds[held].gather(0, self.index[None]).expand_as(bounds[held])
        candidates = from_bounds(bounds["lower"], bounds["upper"], self.quantizer.levels)
        self.index = search(candidates, errors)
        self._set(candidates)


def set_rows(quantizer: WeightQuantizer, candidates: Candidates, index: Tensor) -> None:
    """Set the chosen range of every row."""
    scale, zero = candidates.pick(index)
    quantizer.set_range(scale[:, None], zero[:, None])
