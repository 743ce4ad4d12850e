"""Ranges of an attention product from its full-precision operands.

Rounds search one operand after the other, by the squared error of the product with the other
operand quantized.
"""

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import ascending, from_bounds, quantiles
from fimaq_core.calibration.linear_ranges import set_minmax, settings, unchanged
from fimaq_core.calibration.output_error import Product, best_of_heads
from fimaq_core.calibration.progressive import candidates_of, progressive_heads
from fimaq_core.calibration.shared_codes import shared_errors
from fimaq_core.calibration.special_ranges import search_adalog_softmax, search_twin_softmax
from fimaq_core.layers import QuantMatMul
from fimaq_core.quantizers.affine import AffineQuantizer, fake_quantize
from fimaq_core.quantizers.special import AdaLogQuantizer, TwinQuantizer
from fimaq_core.recipe import Recipe


def calibrate_matmul(layer: QuantMatMul, a: Tensor, b: Tensor, recipe: Recipe) -> None:
    """Set the ranges of a product for operands (batch, heads, ...), one range per head.

    The grid search takes upper bounds between the 0.99 and 0.99999 quantiles, and lower bounds
    between the 0.00001 and 0.01 quantiles. It searches both bounds of a, then both of b, then in
    rounds a's lower and upper and b's lower and upper bound (the released order). A left quantizer
    made for softmax outputs has one range for all heads.
    """
    left, right = layer.a_quantizer, layer.b_quantizer
    if not isinstance(left, AffineQuantizer):
        _calibrate_after_softmax(layer, a, b, recipe)
    elif recipe.range_search == "minmax":
        for quantizer, operand in ((left, a), (right, b)):
            set_minmax(quantizer, per_head(operand), shape=(1, -1, 1, 1))
    elif recipe.range_search == "progressive":
        start_heads(left, a, recipe)
        start_heads(right, b, recipe)
        for _ in range(recipe.range_rounds):
            search_operand(left, a, b, right(b), recipe)
            before = settings(right)
            search_operand(right, b.mT, a.mT, left(a).mT, recipe)
            if unchanged(right, before):
                break
    else:
        # The right operand is the left one of the transposed product.
        first, second = _HeadSearch(left, a, recipe), _HeadSearch(right, b.mT, recipe)
        first.search("both", second)
        second.search("both", first)
        for _ in range(recipe.range_rounds):
            for side, other in ((first, second), (second, first)):
                side.search("lower", other)
                side.search("upper", other)


def _calibrate_after_softmax(layer: QuantMatMul, a: Tensor, b: Tensor, recipe: Recipe) -> None:
    """Set the ranges of a product whose left quantizer is made for softmax outputs.

    Logarithmic quantizers of fixed base keep scale 1, the largest value of a softmax.
    """
    left, right, count = layer.a_quantizer, layer.b_quantizer, recipe.range_candidates
    if not left.off:
        left.set_scale(torch.ones(1, 1, 1, 1, device=a.device))
    if recipe.range_search == "minmax":
        set_minmax(right, per_head(b), shape=(1, -1, 1, 1))
    else:
        start_heads(right, b, recipe)
    for number in range(max(recipe.range_rounds, 1)):
        hat, before = right(b), settings(left)
        if isinstance(left, AdaLogQuantizer) and not left.off:
            extended = recipe.range_grid == "extended"
            left.set_base(search_adalog_softmax(a, hat, b, left.levels, count, extended=extended))
        elif isinstance(left, TwinQuantizer) and not left.off:
            left.set_scale(search_twin_softmax(a, b, left.levels).view(1, 1, 1, 1))
        if right.off or recipe.range_search == "minmax" or (number and unchanged(left, before)):
            return
        search_operand(right, b.mT, a.mT, left(a).mT, recipe)


def start_heads(quantizer: AffineQuantizer, x: Tensor, recipe: Recipe) -> None:
    """Set the range of each head to the last but one candidate of the grid, as released.

    This candidate has the highest zero point and suits only values below zero: rounds must follow.
    Extended candidates start with the last one, min-max.
    """
    if not quantizer.off:
        candidates = candidates_of(ascending(per_head(x)), quantizer.levels, recipe=recipe)
        which = -1 if recipe.range_grid == "extended" else -2
        set_heads(quantizer, candidates.scale[which], candidates.zero_point[which])


def search_operand(
    quantizer: AffineQuantizer, x: Tensor, other: Tensor, other_hat: Tensor, recipe: Recipe
) -> None:
    """Search one range per head by the error of ``x̂ @ other_hat``: progressive or in the grid."""
    if quantizer.off:
        return
    left, plain, hat = (
        part.transpose(0, 1).flatten(0, 1).contiguous() for part in (x, other, other_hat)
    )  # all samples of a head in a row
    levels, count = quantizer.levels, recipe.range_candidates
    grid = candidates_of(ascending(per_head(x)), levels, recipe=recipe)
    product = Product(left, hat, left @ (hat - plain), levels)
    if recipe.range_search == "progressive":
        scale, zero = progressive_heads(product, grid, levels=levels, count=count)
    else:
        scale, zero = grid.pick(best_of_heads(product, grid.scale, grid.zero_point))
    set_heads(quantizer, scale, zero)


def per_head(x: Tensor) -> Tensor:
    """Return all values of each head of ``x`` (batch, heads, ...), (heads, n)."""
    return x.transpose(0, 1).flatten(1)


def set_heads(quantizer: AffineQuantizer, scale: Tensor, zero_point: Tensor) -> None:
    """Set scales and zero points of an attention operand, each (heads,)."""
    quantizer.set_range(scale.view(1, -1, 1, 1), zero_point.view(1, -1, 1, 1))


class _HeadSearch:
    """Search of the bounds of one attention operand per head.

    At the start the upper bound is the widest candidate and the lower bound the narrowest one.
    """

    def __init__(self, quantizer: AffineQuantizer, x: Tensor, recipe: Recipe) -> None:
        self.quantizer, count = quantizer, recipe.range_candidates
        self.x = x.transpose(0, 1).contiguous()  # heads, batch, rows, inner
        self.heads = len(self.x)
        #: index of the lower and of the upper bound of each head
        self.index = torch.full((self.heads, 2), count - 1, device=x.device)
        #: last search of each kind: the indices on which its result depends, and its choices
        self.memory: dict[str, tuple[Tensor, Tensor]] = {}
        if quantizer.off:
            return
        ordered = ascending(self.x.flatten(1))
        upper_in, upper, lower, lower_in = quantiles(ordered, [0.99, 0.99999, 0.00001, 0.01])
        share = torch.linspace(0, 1, count + 1, device=x.device)[:count, None]
        self.uppers = upper_in + share * (upper - upper_in)
        self.lowers = lower + share * (lower_in - lower)
        if recipe.range_grid == "extended":
            ends = quantiles(ordered, [0.0, 1.0])
            self.lowers = torch.cat([self.lowers, ends[:1].clamp(max=0)])
            self.uppers = torch.cat([self.uppers, ends[1:].clamp(min=0)])
        self._set()

    def _set(self) -> None:
        """Set the ranges of the current indices."""
        rows = self.index.t()[:, None]
        lower, upper = self.lowers.gather(0, rows[0]), self.uppers.gather(0, rows[1])
        found = from_bounds(lower, upper, self.quantizer.levels)
        set_heads(self.quantizer, found.scale, found.zero_point)

    def quantized(self, heads: Tensor) -> Tensor:
        """Return ``x`` of ``heads``, quantized with the current ranges."""
        x, quantizer = self.x[heads], self.quantizer
        if quantizer.off:
            return x
        scale = quantizer.scale.view(-1, 1, 1, 1)[heads]
        zero = quantizer.zero_point.view(-1, 1, 1, 1)[heads]
        return fake_quantize(x, scale, zero, quantizer.levels)

    def search(self, which: str, other: "_HeadSearch") -> None:
        """Choose bounds per head by the error of ``x̂ @ ôᵀ`` against ``x @ oᵀ``.

        Args:
            which: the bounds to choose: ``both``, ``lower`` or ``upper``.
            other: search of the other operand o; its current ranges quantize o.
        """
        if self.quantizer.off:
            return
        held: list[int] = {"both": [], "lower": [1], "upper": [0]}[which]
        free = [side for side in (0, 1) if side not in held]
        # If held bound and other operand are as in the last search of this kind, so is the choice.
        seen = torch.cat([self.index[:, held], other.index], 1)
        chosen = self.index[:, free[0]]
        heads = torch.arange(self.heads, device=chosen.device)
        if which in self.memory:
            before, chosen = self.memory[which]
            heads = (seen != before).any(1).nonzero()[:, 0]
        if len(heads):
            chosen = chosen.clone()
            chosen[heads] = self._best(heads, held, other)
        self.memory[which] = (seen, chosen)
        self.index = self.index.clone()
        self.index[:, free] = chosen[:, None]
        self._set()

    def _best(self, heads: Tensor, held: list[int], other: "_HeadSearch") -> Tensor:
        """Return the best candidates of ``heads``; bounds in ``held`` (0 lower, 1 upper) stay."""
        bounds = [self.lowers[:, heads], self.uppers[:, heads]]
        for side in held:
            own = bounds[side].gather(0, self.index[heads, side][None])
            bounds[side] = own.expand_as(bounds[side])
        levels = self.quantizer.levels
        candidates = from_bounds(bounds[0], bounds[1], levels)
        scales, zeros = candidates.scale, candidates.zero_point
        x, plain = self.x[heads], other.x[heads].transpose(2, 3)
        hat, best = other.quantized(heads).transpose(2, 3), torch.full_like(heads, -1)
        for head in range(len(heads)):
            operands = x[head], hat[head], x[head] @ plain[head]
            errors = shared_errors(*operands, scales[:, head], zeros[:, head], levels)
            if errors is not None:
                best[head] = errors.argmin()
        rest = (best < 0).nonzero()[:, 0]
        if len(rest):
            x, plain, hat = (part[rest].flatten(0, 1) for part in (x, plain, hat))
            product = Product(x, hat, x @ (hat - plain), levels)
            best[rest] = best_of_heads(product, scales[:, rest], zeros[:, rest])
        return best
