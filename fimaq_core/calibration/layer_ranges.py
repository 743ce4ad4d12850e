"""Ranges of one layer from its full-precision inputs."""

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import (
    MIN_WEIGHT_SCALE,
    Candidates,
    ascending,
    from_bounds,
    grid_candidates,
    minmax,
    quantiles,
)
from fimaq_core.calibration.output_error import Product, best_of_heads, best_operand
from fimaq_core.calibration.own_error import best_by_own_error
from fimaq_core.calibration.progressive import (
    progressive_heads,
    progressive_input,
    progressive_rows,
)
from fimaq_core.calibration.shared_codes import shared_errors
from fimaq_core.calibration.weight_error import best_rows, input_moments
from fimaq_core.layers import QuantLinear, QuantMatMul
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import AffineQuantizer, WeightQuantizer, fake_quantize
from fimaq_core.recipe import Recipe


def calibrate_linear(layer: QuantLinear, x: Tensor, recipe: Recipe) -> None:
    """Set the ranges of a linear layer whose input quantizer is uniform, for inputs (..., d).

    First weight (per row) and input (one range) by their own squared error, then rounds of weight
    and input by the squared error of the layer's output with the other one quantized.
    """
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    assert isinstance(inputs, AffineQuantizer)
    weight, flat = layer.weight.detach(), x.reshape(-1, x.shape[-1])
    if recipe.range_search == "minmax":
        set_minmax(weights, weight)
        set_minmax(inputs, flat.reshape(1, -1), shape=(1,))
        return
    if recipe.range_search == "progressive":
        _progressive_linear(layer, x, recipe)
        return

    count = recipe.range_candidates
    row_candidates = input_candidates = None
    rows, index = torch.zeros(0, dtype=torch.long), 0
    if not weights.off:
        row_candidates, rows = start_rows(weights, weight, count)
    if not inputs.off:
        input_candidates, index = _start_input(inputs, ascending(flat.reshape(1, -1)), count)

    # A search sees the other one's last choice only, so the rounds end once a choice repeats itself.
    for number in range(recipe.range_rounds):
        if row_candidates is not None:
            scale = None if inputs.off else inputs.scale
            moments = input_moments(flat, inputs(flat), weight, scale, inputs.levels)
            before, rows = rows, best_rows(weight, row_candidates, weights.levels, *moments, rows)
            set_rows(weights, *row_candidates.pick(rows))
            if number and torch.equal(rows, before):
                break
        if input_candidates is None:
            break
        scales, zeros = input_candidates.scale[:, 0], input_candidates.zero_point[:, 0]
        chosen = best_operand(_input_product(layer, x), scales, zeros, index)
        inputs.set_range(input_candidates.scale[chosen], input_candidates.zero_point[chosen])
        if chosen == index or row_candidates is None:
            break
        index = chosen


def _progressive_linear(layer: QuantLinear, x: Tensor, recipe: Recipe) -> None:
    """The same search with candidates that are refined step by step (AdaLog)."""
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    assert isinstance(inputs, AffineQuantizer)
    flat, count = x.reshape(-1, x.shape[-1]), recipe.range_candidates
    ordered = ascending(flat.reshape(1, -1))
    if not weights.off:
        set_rows(
            weights, *progressive_rows(layer.weight.detach(), None, None, weights.levels, count)
        )
    if not inputs.off:
        _start_input(inputs, ordered, count)
    for _ in range(recipe.range_rounds):
        if not weights.off:
            progressive_weight(layer, flat, recipe)
        if inputs.off:
            break
        before = settings(inputs)
        inputs.set_range(
            *progressive_input(_input_product(layer, x), ordered, inputs.levels, count)
        )
        # With the input as before, the weight's next search would repeat itself, and so on.
        if weights.off or unchanged(inputs, before):
            break


def start_rows(quantizer: WeightQuantizer, weight: Tensor, count: int) -> tuple[Candidates, Tensor]:
    """Set a weight's ranges by own error; return the candidates and the rows' choices."""
    ordered = ascending(weight)
    candidates = grid_candidates(ordered, quantizer.levels, count, MIN_WEIGHT_SCALE)
    rows = best_by_own_error(ordered, candidates, quantizer.levels)
    set_rows(quantizer, *candidates.pick(rows))
    return candidates, rows


def _start_input(quantizer: AffineQuantizer, ordered: Tensor, count: int) -> tuple[Candidates, int]:
    """Set an input's range by its own error from its sorted values (1, n); return the choice."""
    candidates = grid_candidates(ordered, quantizer.levels, count)
    index = int(best_by_own_error(ordered, candidates, quantizer.levels)[0])
    quantizer.set_range(candidates.scale[index], candidates.zero_point[index])
    return candidates, index


def settings(quantizer: ActivationQuantizer) -> list[Tensor]:
    """All that a search sets of a quantizer."""
    return list(quantizer.state_dict().values())


def unchanged(quantizer: ActivationQuantizer, before: list[Tensor]) -> bool:
    """Whether a quantizer's settings are those from ``before``."""
    return all(torch.equal(*pair) for pair in zip(before, settings(quantizer), strict=True))


def progressive_weight(layer: QuantLinear, flat: Tensor, recipe: Recipe) -> None:
    """Search the weight's ranges progressively by the output's error on inputs (tokens, d)."""
    weight, weights, inputs = layer.weight.detach(), layer.weight_quantizer, layer.input_quantizer
    moments = input_moments(flat, inputs(flat), weight)
    set_rows(weights, *progressive_rows(weight, *moments, weights.levels, recipe.range_candidates))


def _input_product(layer: QuantLinear, x: Tensor) -> Product:
    """The layer's product as a function of its input's range; x: (..., d), the weight quantized."""
    weight = layer.weight.detach()
    batched = x.view(1, 1, -1) if x.ndim < 2 else x.reshape(x.shape[0], -1, x.shape[-1])
    other = layer.weight_quantizer.quantized(weight).t().unsqueeze(0)
    return Product(batched, other, batched @ (other - weight.t()), layer.input_quantizer.levels)


def calibrate_matmul(layer: QuantMatMul, a: Tensor, b: Tensor, recipe: Recipe) -> None:
    """Set uniform per-head ranges of both operands of a product by the product's squared error.

    Upper and lower bounds lie between the 0.99 and 0.99999 quantiles and their mirror images; both
    together for a, then for b, then rounds of a-lower, a-upper, b-lower, b-upper (the released
    order).
    """
    assert isinstance(layer.a_quantizer, AffineQuantizer)
    if recipe.range_search == "minmax":
        for quantizer, operand in ((layer.a_quantizer, a), (layer.b_quantizer, b)):
            set_minmax(quantizer, per_head(operand), shape=(1, -1, 1, 1))
        return
    count = recipe.range_candidates
    if recipe.range_search == "progressive":
        start_heads(layer.a_quantizer, a, count)
        start_heads(layer.b_quantizer, b, count)
        for _ in range(recipe.range_rounds):
            progressive_operand(layer.a_quantizer, a, b, layer.b_quantizer(b), count)
            before = settings(layer.b_quantizer)
            progressive_operand(layer.b_quantizer, b.mT, a.mT, layer.a_quantizer(a).mT, count)
            if unchanged(layer.b_quantizer, before):
                break
        return
    # The right operand is searched as the left one of the transposed product.
    left = _HeadSearch(layer.a_quantizer, a, count)
    right = _HeadSearch(layer.b_quantizer, b.transpose(2, 3), count)
    left.search("both", right)
    right.search("both", left)
    for _ in range(recipe.range_rounds):
        for side, other in ((left, right), (right, left)):
            side.search("lower", other)
            side.search("upper", other)


def start_heads(quantizer: AffineQuantizer, x: Tensor, count: int) -> None:
    """Set ranges per head to the grid's last but one, as released.

    Its zero point is the highest, so it serves values below zero only: rounds must follow.
    """
    if not quantizer.off:
        candidates = grid_candidates(ascending(per_head(x)), quantizer.levels, count)
        set_heads(quantizer, candidates.scale[-2], candidates.zero_point[-2])


def progressive_operand(
    quantizer: AffineQuantizer, x: Tensor, other: Tensor, other_hat: Tensor, count: int
) -> None:
    """Search ranges per head by the error of ``x̂ @ ôther``, progressively."""
    if quantizer.off:
        return
    product, ordered = head_product(x, other, other_hat, quantizer.levels), ascending(per_head(x))
    set_heads(quantizer, *progressive_heads(product, x.shape[1], ordered, quantizer.levels, count))


def per_head(x: Tensor) -> Tensor:
    """All values of each head of ``x`` (batch, heads, ...), (heads, n)."""
    return x.transpose(0, 1).flatten(1)


def head_product(x: Tensor, other: Tensor, other_hat: Tensor, levels: int) -> Product:
    """The product of :func:`progressive_operand` with all samples of a head in a row."""
    left, plain, hat = (
        part.transpose(0, 1).flatten(0, 1).contiguous() for part in (x, other, other_hat)
    )
    return Product(left, hat, left @ (hat - plain), levels)


def set_heads(quantizer: AffineQuantizer, scale: Tensor, zero_point: Tensor) -> None:
    """Set the ranges of an attention operand, each (heads,)."""
    quantizer.set_range(scale.view(1, -1, 1, 1), zero_point.view(1, -1, 1, 1))


class _HeadSearch:
    """Bounds of one attention operand per head; the start is the widest upper, narrowest lower."""

    def __init__(self, quantizer: AffineQuantizer, x: Tensor, count: int) -> None:
        self.quantizer = quantizer
        self.x = x.transpose(0, 1).contiguous()  # heads, batch, rows, inner
        self.heads = len(self.x)
        #: Index of the lower and of the upper bound of each head.
        self.index = torch.full((self.heads, 2), count - 1, device=x.device)
        #: What the last search of each kind saw and chose.
        self.memory: dict[str, tuple[Tensor, Tensor]] = {}
        if quantizer.off:
            return
        ordered = ascending(self.x.flatten(1))
        upper_in, upper, lower, lower_in = quantiles(ordered, [0.99, 0.99999, 0.00001, 0.01])
        share = torch.linspace(0, 1, count + 1, device=x.device)[:count, None]
        self.uppers = upper_in + share * (upper - upper_in)
        self.lowers = lower + share * (lower_in - lower)
        self._set()

    def _set(self) -> None:
        """Set the ranges that belong to the present indices."""
        lower, upper = (
            bounds.gather(0, row[None])
            for bounds, row in zip((self.lowers, self.uppers), self.index.t(), strict=True)
        )
        found = from_bounds(lower, upper, self.quantizer.levels)
        set_heads(self.quantizer, found.scale, found.zero_point)

    def quantized(self, heads: Tensor) -> Tensor:
        """``x`` of some heads quantized with the present ranges."""
        x = self.x[heads]
        if self.quantizer.off:
            return x
        scale, zero = (
            part.view(-1, 1, 1, 1)[heads]
            for part in (self.quantizer.scale, self.quantizer.zero_point)
        )
        return fake_quantize(x, scale, zero, self.quantizer.levels)

    def search(self, which: str, other: "_HeadSearch") -> None:
        """Choose anew per head, by the error of ``x̂ @ ôᵀ`` against ``x @ oᵀ``.

        Args:
            which: the bounds that vary, ``both``, ``lower`` or ``upper``.
            other: the other operand o, (batch, heads, columns, inner), quantized as now.
        """
        if self.quantizer.off:
            return
        held = {"both": [], "lower": [1], "upper": [0]}[which]
        free = [side for side in (0, 1) if side not in held]
        # A head whose held bound and other operand are as at the last such search chooses the same.
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
        """Best candidates of some heads; bounds in ``held`` (0 lower, 1 upper) stay."""
        bounds = [self.lowers[:, heads], self.uppers[:, heads]]
        for side in held:
            bounds[side] = (
                bounds[side].gather(0, self.index[heads, side][None]).expand_as(bounds[side])
            )
        candidates = from_bounds(bounds[0], bounds[1], self.quantizer.levels)
        x, plain, hat = (
            self.x[heads],
            other.x[heads].transpose(2, 3),
            other.quantized(heads).transpose(2, 3),
        )
        ranges = candidates.scale, candidates.zero_point
        best = torch.full_like(heads, -1)
        for head in range(len(heads)):
            scale, zero = (part[:, head] for part in ranges)
            errors = shared_errors(
                x[head], hat[head], x[head] @ plain[head], scale, zero, self.quantizer.levels
            )
            if errors is not None:
                best[head] = errors.argmin()
        rest = (best < 0).nonzero()[:, 0]
        if len(rest):
            x, plain, hat = (part[rest].flatten(0, 1) for part in (x, plain, hat))
            product = Product(x, hat, x @ (hat - plain), self.quantizer.levels)
            best[rest] = best_of_heads(product, *(part[:, rest] for part in ranges))
        return best


def set_rows(quantizer: WeightQuantizer, scale: Tensor, zero_point: Tensor) -> None:
    """Set a weight's ranges, each (rows,)."""
    quantizer.set_range(scale[:, None], zero_point[:, None])


def set_minmax(quantizer: AffineQuantizer, rows: Tensor, shape: tuple[int, ...] = (-1, 1)) -> None:
    """Set the min-max range of each row of ``rows`` (groups, n), in the given shape."""
    if not quantizer.off:
        scale, zero = minmax(rows, quantizer.levels)
        quantizer.set_range(scale.view(shape), zero.view(shape))
