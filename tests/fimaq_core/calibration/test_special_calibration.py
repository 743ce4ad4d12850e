"""Calibration of layers: percentiles (RepQ-ViT), special quantizers, ERQ, progressive search."""

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_models import chain_of, images, quick, swin, vit
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.calibration.candidates import MIN_WEIGHT_SCALE, ascending, grid_candidates
from fimaq_core.calibration.linear_ranges import calibrate_linear, search_weight
from fimaq_core.calibration.percentile_ranges import (
    conv_percentiles,
    input_percentile,
    linear_percentiles,
    percentile_range,
    weight_percentiles,
)
from fimaq_core.calibration.product_ranges import calibrate_matmul, search_operand
from fimaq_core.calibration.refit import (
    RoundingGrid,
    reduce_conv_error,
    reduce_linear_error,
    refine_rounding,
    refit_moments,
    ridge_refit,
)
from fimaq_core.chain import BlockChain
from fimaq_core.fisher.divergence import ClassifierDivergence, kl_divergence
from fimaq_core.layers import (
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    QuantMatMul,
    decide_rounding,
    quant_layers,
    set_quantized,
)
from fimaq_core.pipeline import quantize_chain
from fimaq_core.quantizers.affine import AffineQuantizer, fake_quantize
from fimaq_core.quantizers.logarithm import (
    GELU_SHIFT,
    adalog_fake_quantize,
    adalog_tables,
    log_fake_quantize,
)
from fimaq_core.quantizers.twin import twin_gelu, twin_softmax
from fimaq_core.recipe import OFF, Kind, Recipe, make_recipe
from fimaq_core.store import Resources
from tasks.classification.data import open_source
from tasks.classification.task import TASK
from tasks.common.data.images import Images
from tasks.common.request import DataRequest, ModelRequest

pytestmark = pytest.mark.slow

Array = NDArray[np.float64]
Search = tuple[float, float]
SPECIAL: tuple[Kind, ...] = ("log2", "logsqrt2", "adalog", "twin")

# RepQ-ViT's ranges of a whole chain.


def percentile_rule(values: Array, bits: int) -> Search:
    """RepQ-ViT's rule: of three pairs of percentiles the one whose quantized values are nearest."""
    best = (np.inf, 0.0, 0.0)
    for share in (0.999, 0.9999, 0.99999):
        high, low = np.quantile(values, share), np.quantile(values, 1 - share)
        scale = (high - low) / (2**bits - 1)
        zero = np.round(-low / scale)
        codes = np.clip(np.round(values / scale) + zero, 0, 2**bits - 1)
        best = min(best, (float((((codes - zero) * scale - values) ** 2).sum()), scale, zero))
    return best[1], best[2]


def log_rule(values: Array, bits: int) -> float:
    """The same for log√2, whose range starts at 0."""
    best = (np.inf, 0.0)
    for share in (0.999, 0.9999, 0.99999):
        scale = np.quantile(values, share)
        codes = np.round(-2 * np.log2(np.clip(values / scale, 1e-15, 1)))
        points = np.where(codes < 2**bits, scale * 2.0 ** (-codes / 2), 0)
        best = min(best, (float(((points - values) ** 2).sum()), scale))
    return best[1]


def numbers(x: Tensor) -> Array:
    return x.detach().double().numpy()


def float_inputs(
    model: nn.Module, recipe: Recipe, x: Tensor
) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Tensor], Tensor]:
    """Full-precision inputs and weights of every quantizable layer, and the model's outputs."""
    chain, seen = chain_of(model, recipe), {}
    for name, layer in quant_layers(chain):
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args))
    with torch.no_grad():
        out = chain(x)
    return (
        seen,
        {
            name: layer.weight
            for name, layer in quant_layers(chain)
            if not isinstance(layer, QuantMatMul)
        },
        out,
    )


def pairs_of(chain: BlockChain) -> set[str]:
    """Names of the linear layers behind a norm that can be reparameterised."""
    return {
        f"segments.{number}.block.{pair.linear}"
        for number, segment in enumerate(chain)
        for pair in segment.pairs
    }


@pytest.mark.parametrize("bits", [(4, 4), (3, 4), (4, 8)])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_percentile_ranges_of_a_chain_are_repq_vits(name: str, bits: tuple[int, int]) -> None:
    build, size = {"vit": (lambda: vit(1), 32), "swin": (lambda: swin(40), 40)}[name]
    settings: dict[str, object] = {"w_bits": bits[0], "a_bits": bits[1], "range_inputs": "float"}
    settings["range_grid"] = "released"
    recipe, x = quick("repq", range_images=4, **settings), images(4, size)
    inputs, weights, expected = float_inputs(build(), recipe, x)
    chain = chain_of(build(), recipe)
    calibrate(chain, x, recipe)
    behind_norms, reparameterised = pairs_of(chain), 0
    for name, layer in quant_layers(chain):
        if isinstance(layer, QuantMatMul):
            operands = [(layer.b_quantizer, inputs[name][1])]
            if isinstance(layer.a_quantizer, AffineQuantizer):
                operands.append((layer.a_quantizer, inputs[name][0]))
            else:
                assert name.endswith("attention_value")
                assert layer.a_quantizer.scale.shape == (1, 1, 1, 1)
                assert float(layer.a_quantizer.scale) == pytest.approx(
                    log_rule(numbers(inputs[name][0]), bits[1]), rel=1e-4
                )
            for quantizer, operand in operands:
                assert isinstance(quantizer, AffineQuantizer)
                scale, zero = percentile_rule(numbers(operand).ravel(), bits[1])
                assert quantizer.scale.shape == (1, 1, 1, 1)
                assert float(quantizer.scale) == pytest.approx(scale, rel=1e-4)
                assert float(quantizer.zero_point) == zero
            continue
        weight = weights[name]
        if isinstance(layer, QuantLinear):
            quantizer = layer.input_quantizer
            assert isinstance(quantizer, AffineQuantizer)
            values = numbers(inputs[name][0]).reshape(-1, layer.in_features)
            if name in behind_norms:
                ranges = [percentile_rule(channel, bits[1]) for channel in values.T]
                scales, zeros = np.array(ranges).T
                scale, zero = scales.mean(), np.round(zeros.mean())
                # Each channel's factor has gone into the weight.
                weight = weight * torch.tensor(scales / scale, dtype=torch.float32)
                assert (scales / scale).std() > 0.1
                reparameterised += 1
            else:
                scale, zero = percentile_rule(values.ravel(), bits[1])
            assert quantizer.scale.shape == (1,)
            assert float(quantizer.scale) == pytest.approx(scale, rel=1e-4)
            assert float(quantizer.zero_point) == zero
        assert torch.allclose(layer.weight, weight, rtol=1e-3)
        rows = np.array(
            [
                percentile_rule(row, bits[0])
                for row in numbers(layer.weight).reshape(len(weight), -1)
            ]
        )
        np.testing.assert_allclose(
            numbers(layer.weight_quantizer.scale)[:, 0], rows[:, 0], rtol=1e-4
        )
        np.testing.assert_array_equal(numbers(layer.weight_quantizer.zero_point)[:, 0], rows[:, 1])
    assert reparameterised == len(behind_norms) > 0
    set_quantized(chain, False)
    with torch.no_grad():
        assert torch.allclose(chain(x), expected, atol=1e-4)


def set_when_called(chain: BlockChain, x: Tensor, recipe: Recipe) -> None:
    """Set each range when its layer is called by the quantized model, as the released code does.

    Layers behind norms get one range per channel.
    """
    behind_norms = pairs_of(chain)
    if not recipe.reparameterize_merges:
        behind_norms = {name for name in behind_norms if not name.endswith("reduction")}

    def set_ranges(name: str, layer: QuantLayer, args: tuple[Tensor, ...]) -> None:
        if isinstance(layer, QuantMatMul):
            input_percentile(layer.a_quantizer, args[0], (1, 1, 1, 1))
            input_percentile(layer.b_quantizer, args[1], (1, 1, 1, 1))
        elif name in behind_norms:
            assert isinstance(layer.input_quantizer, AffineQuantizer)
            channels = ascending(args[0].flatten(0, -2).t().contiguous())
            layer.input_quantizer.set_range(*percentile_range(channels, 2**recipe.a_bits))
        else:
            input_percentile(layer.input_quantizer, args[0], (1,))
        if not isinstance(layer, QuantMatMul):
            weight_percentiles(layer)
        layer.quantized = True

    for name, layer in quant_layers(chain):
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: set_ranges(name, layer, args)
        )
    with torch.no_grad():
        chain(x)


@pytest.mark.parametrize("method", ["repq", "erq"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_ranges_are_those_behind_quantized_layers(name: str, method: str) -> None:
    build, size = {"vit": (lambda: vit(2), 32), "swin": (lambda: swin(40), 40)}[name]
    recipe, x = quick(method, w_bits=3, a_bits=3, range_images=4), images(4, size)
    chain, expected = chain_of(build(), recipe), chain_of(build(), recipe)
    calibrate(chain, x, recipe)
    set_when_called(expected, x, recipe)
    moved, float_model = 0, chain_of(build(), recipe)
    calibrate(float_model, x, recipe.model_copy(update={"range_inputs": "float"}))
    pairs = zip(quant_layers(chain), quant_layers(expected), strict=True)
    others = dict(quant_layers(float_model))
    for (label, layer), (_, wanted) in pairs:
        for part in ("a_quantizer", "b_quantizer", "input_quantizer"):
            own, other = getattr(layer, part, None), getattr(wanted, part, None)
            if own is None:
                continue
            assert own.scale.numel() == 1
            moved += not torch.equal(own.scale, getattr(others[label], part).scale)
            assert float(own.scale) == pytest.approx(float(other.scale.mean()), rel=1e-5)
            if isinstance(own, AffineQuantizer):
                assert float(own.zero_point) == float(other.zero_point.mean().round())
    assert moved > 10
    if method == "repq":  # a refit changes the weights
        weights = [layer for _, layer in quant_layers(chain) if not isinstance(layer, QuantMatMul)]
        for layer in weights:
            before = layer.weight_quantizer.scale.clone()
            weight_percentiles(layer)  # of the weight after reparameterisation
            assert torch.equal(layer.weight_quantizer.scale, before)
    set_quantized(chain, False)
    with torch.no_grad():
        assert torch.allclose(chain(x), chain_of(build(), recipe)(x), atol=1e-4)


def test_minmax_ranges_behind_quantized_layers_are_those_of_the_inputs_there() -> None:
    """Without reparameterisation the finished model shows each layer the input it was set for."""
    recipe, x = (
        quick("rtn", w_bits=3, a_bits=3, range_images=4, range_inputs="quantized"),
        images(4),
    )
    chain = chain_of(vit(2), recipe)
    calibrate(chain, x, recipe)
    checked = 0

    def check(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal checked
        assert isinstance(layer, QuantLinear)
        assert isinstance(layer.input_quantizer, AffineQuantizer)
        scale = (args[0].max().clamp(min=0) - args[0].min().clamp(max=0)) / 7
        assert float(layer.input_quantizer.scale) == pytest.approx(float(scale), rel=1e-5)
        checked += 1

    for _, layer in quant_layers(chain):
        if isinstance(layer, QuantLinear):
            layer.register_forward_pre_hook(check)
    with torch.no_grad():
        chain(x)
    assert checked == 9


def test_a_convolution_of_8_bits_has_the_percentiles_of_the_images() -> None:
    recipe, x = quick("repq", w_bits=3, a_bits=3, range_images=4), images(4)
    chain = chain_of(vit(1), recipe)
    calibrate(chain, x, recipe)
    _, layer = next(quant_layers(chain))
    assert isinstance(layer, QuantConv2d)
    scale, zero = percentile_rule(numbers(x).ravel(), 8)
    assert layer.input_quantizer.bits == 8
    assert float(layer.input_quantizer.scale) == pytest.approx(scale, rel=1e-4)
    assert float(layer.input_quantizer.zero_point) == zero


# Layers with special quantizers.


def after_gelu(kind: Kind, bits: int, seed: int = 0) -> tuple[QuantLinear, Tensor]:
    torch.manual_seed(seed)
    layer = QuantLinear.from_float(nn.Linear(10, 6), bits, bits, kind).requires_grad_(False)
    return layer, F.gelu(
        torch.randn(3, 12, 10) * torch.linspace(0.3, 2, 10) + torch.linspace(-1, 1, 10)
    )


def after_softmax(
    kind: Kind, bits: int, softmax_bits: int | None = None, seed: int = 0
) -> tuple[QuantMatMul, Tensor, Tensor]:
    torch.manual_seed(seed)
    a, b = (
        (torch.randn(3, 2, 8, 9) * 2.5).softmax(-1),
        torch.randn(3, 2, 9, 6) * (1 + torch.rand(1, 2, 1, 6)),
    )
    return QuantMatMul(bits, softmax_bits, kind), a, b


def error(x_hat: Tensor, other_hat: Tensor, x: Tensor, other: Tensor) -> float:
    """Squared error of ``x̂ @ ôther`` in float64."""
    return float((x_hat.double() @ other_hat.double() - x.double() @ other.double()).square().sum())


def linear_error(layer: QuantLinear, x: Tensor) -> float:
    """Squared error of a linear layer's output with its ranges as they are."""
    hat = layer.weight_quantizer.quantized(layer.weight)
    return error(layer.input_quantizer(x), hat.t(), x, layer.weight.t())


def product_error(layer: QuantMatMul, a: Tensor, b: Tensor) -> float:
    return error(layer.a_quantizer(a), layer.b_quantizer(b), a, b)


def affine(x: Tensor, pair: Search, levels: int) -> Tensor:
    return fake_quantize(x, torch.tensor(pair[0]), torch.tensor(pair[1]), levels)


def grid_of(
    values: Tensor, levels: int, count: int, floor: float = 1e-4, search: str = "output-error"
) -> list[Search]:
    """Candidates; the progressive search starts with at most half as many zero points as levels."""
    zeros = min(16, levels // 2 if search == "progressive" else levels)
    found = grid_candidates(ascending(values.reshape(1, -1)), levels, count, floor, zeros)
    return list(zip(found.scale[:, 0].tolist(), found.zero_point[:, 0].tolist(), strict=True))


def refined(
    errors: Callable[[Search], float],
    start: list[Search],
    width: int,
    new: int,
    steps: int,
    spacing: float,
    floor: float,
) -> Search:
    """Progressive search in plain Python: the best of all candidates seen."""
    found = sorted((errors(pair), number, pair) for number, pair in enumerate(start))
    best = found[0]
    for _ in range(steps - 1):
        pairs = [
            (max(scale + (i / (new - 1) - 0.5) * spacing, floor), other)
            for _, _, (scale, other) in found[:width]
            for i in range(new)
        ]
        spacing /= new - 0.5
        found = sorted((errors(pair), number, pair) for number, pair in enumerate(pairs))
        best = min(best, found[0])
    return best[2]


def slow_affine(
    errors: Callable[[Search], float], values: Tensor, levels: int, recipe: Recipe, floor: float
) -> Search:
    """The recipe's search of a uniform range for ``values``, candidate by candidate."""
    start = grid_of(values, levels, recipe.range_candidates, floor, recipe.range_search)
    if recipe.range_search == "output-error":
        return min(start, key=errors)
    new = max(recipe.range_candidates // 16, 2)
    return refined(errors, start, 16, new, 6, abs(start[1][0] - start[0][0]), floor)


def slow_after_gelu(
    kind: Kind, layer: QuantLinear, x: Tensor, levels: int, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """One round of a linear layer behind a GELU; quantized inputs and quantized weight."""
    weight, count = layer.weight, recipe.range_candidates
    flat = x.flatten(0, -2)

    def own(row: Tensor) -> Callable[[Search], float]:
        return lambda pair: float((affine(row.double(), pair, levels) - row).square().sum())

    ranges = [slow_affine(own(row), row, levels, recipe, MIN_WEIGHT_SCALE) for row in weight]
    hat = torch.stack([affine(row, pair, levels) for row, pair in zip(weight, ranges, strict=True)])
    x_hat = slow_gelu(kind, flat, hat, weight, levels, count)

    def output(row: Tensor) -> Callable[[Search], float]:
        return lambda pair: error(x_hat, affine(row.double(), pair, levels), flat, row)

    ranges = [slow_affine(output(row), row, levels, recipe, MIN_WEIGHT_SCALE) for row in weight]
    return x_hat, torch.stack(
        [affine(row, pair, levels) for row, pair in zip(weight, ranges, strict=True)]
    )


def slow_gelu(
    kind: Kind, x: Tensor, hat: Tensor, weight: Tensor, levels: int, count: int
) -> Tensor:
    """Inputs quantized as found candidate by candidate."""

    def quantize_by(pair: Search) -> Tensor:
        scale, q = torch.tensor(pair[0]), int(pair[1])
        if kind == "twin":
            return twin_gelu(x, scale, levels)
        if kind == "adalog":
            return (
                adalog_fake_quantize(
                    x + GELU_SHIFT, scale, *adalog_tables(q, levels), q / 37, levels
                )
                - GELU_SHIFT
            )
        return (
            log_fake_quantize(x + GELU_SHIFT, scale, 1.0 if kind == "log2" else 0.5, levels)
            - GELU_SHIFT
        )

    def errors(pair: Search) -> float:
        return error(quantize_by(pair), hat.t(), x, weight.t())

    if kind == "twin":
        widest = float(x.max()) / (levels / 2 - 0.5)
        return quantize_by(
            min([(widest * (0.01 + 1.19 * i / (count - 1)), 0.0) for i in range(count)], key=errors)
        )
    positive = x[x > 0]
    low, high = float(positive.quantile(0.9)) + GELU_SHIFT, float(positive.max()) + GELU_SHIFT

    def scales(number: int) -> list[float]:
        return [low + (high - low) * i / (number - 1) for i in range(number)]

    if kind == "adalog":
        look = sorted(((scales(count)[-2], float(q)) for q in range(10, 10 + count)), key=errors)
        few = scales(count // 8)
        start = [(scale, q) for _, q in look[:8] for scale in few]
        found = refined(errors, start, 32, max(count // 32, 2), 6, few[1] - few[0], 1e-4)
        return quantize_by(min(look[0], found, key=errors))
    wide = scales(count)
    return quantize_by(
        refined(
            errors, [(s, 0.0) for s in wide], 32, max(count // 32, 2), 6, wide[1] - wide[0], 1e-4
        )
    )


@pytest.mark.parametrize("search", ["output-error", "progressive"])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_layer_behind_a_gelu_equals_a_slow_calibration(
    kind: Kind, bits: int, search: str
) -> None:
    layer, x = after_gelu(kind, bits)
    recipe = make_recipe(
        "adalog", {"range_search": search, "range_candidates": 32, "range_rounds": 1}
    )
    calibrate_linear(layer, x, recipe)
    x_hat, hat = slow_after_gelu(kind, layer, x, 2**bits, recipe)
    flat = x.flatten(0, -2)
    # Candidates of all but equal errors may be chosen differently.
    assert linear_error(layer, x) == pytest.approx(
        error(x_hat, hat.t(), flat, layer.weight.t()), rel=2e-3
    )
    assert layer.input_quantizer.scale.shape == (1,)
    assert (layer.input_quantizer(flat) - x_hat).square().mean() < 1e-3 * (
        x_hat - flat
    ).square().mean()


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("search", ["minmax", "output-error", "progressive"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_behind_a_gelu_no_search_ends_above_its_start(kind: Kind, search: str, rounds: int) -> None:
    """The start: weights as the search's first look leaves them, and the widest range of inputs."""
    for bits in (2, 4):
        layer, x = after_gelu(kind, bits, seed=bits)
        recipe = make_recipe(
            "adalog", {"range_search": search, "range_candidates": 32, "range_rounds": rounds}
        )
        first = copy.deepcopy(layer)
        linear = QuantLinear.from_float(copy.deepcopy(layer), bits, OFF)
        calibrate_linear(linear, x, recipe.model_copy(update={"range_rounds": 0}))
        first.weight_quantizer.load_state_dict(linear.weight_quantizer.state_dict())
        top = float(x.max())
        first.input_quantizer.set_scale(
            torch.tensor([top / (2 ** (bits - 1) - 0.5) if kind == "twin" else top + GELU_SHIFT])
        )
        calibrate_linear(layer, x, recipe)
        assert linear_error(layer, x) <= linear_error(first, x) * (1 + 1e-6)


def slow_left(kind: Kind, a: Tensor, b_hat: Tensor, b: Tensor, levels: int, count: int) -> Tensor:
    """Softmax outputs quantized as found candidate by candidate."""
    one = torch.tensor(1.0)
    if kind in ("log2", "logsqrt2"):
        return log_fake_quantize(a, one, 1.0 if kind == "log2" else 0.5, levels)
    if kind == "twin":
        made = [twin_softmax(a, torch.tensor(2.0**-i), levels) for i in range(20)]
        return min(made, key=lambda a_hat: error(a_hat, b, a, b))
    made = [
        adalog_fake_quantize(a, one, *adalog_tables(q, levels), q / 37, levels)
        for q in range(10, 10 + count)
    ]
    return min(made, key=lambda a_hat: error(a_hat, b_hat, a, b))


@pytest.mark.parametrize("search", ["output-error", "progressive"])
@pytest.mark.parametrize("bits", [(3, 3), (4, 4), (4, 8), (4, 2)])
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_product_behind_a_softmax_equals_a_slow_calibration(
    kind: Kind, bits: tuple[int, int], search: str
) -> None:
    layer, a, b = after_softmax(kind, *bits)
    recipe = make_recipe(
        "adalog", {"range_search": search, "range_candidates": 64, "range_rounds": 1}
    )
    calibrate_matmul(layer, a, b, recipe)
    levels, heads = 2 ** bits[0], range(b.shape[1])
    start = torch.stack(
        [
            affine(b[:, head], grid_of(b[:, head], levels, 64, search=search)[-2], levels)
            for head in heads
        ],
        1,
    )
    a_hat = slow_left(kind, a, start, b, 2 ** bits[1], 64)
    assert torch.equal(layer.a_quantizer(a), a_hat)
    assert layer.b_quantizer.scale.shape == (1, 2, 1, 1)
    for head in heads:
        own, hat, values = a[:, head], a_hat[:, head], b[:, head]

        def errors(
            pair: Search, own: Tensor = own, hat: Tensor = hat, values: Tensor = values
        ) -> float:
            return error(hat, affine(values, pair, levels), own, values)

        best = slow_affine(errors, values, levels, recipe, 1e-4)
        found = (
            float(layer.b_quantizer.scale[0, head]),
            float(layer.b_quantizer.zero_point[0, head]),
        )
        # Candidates of all but equal errors may be chosen differently.
        assert errors(found) == pytest.approx(errors(best), rel=1e-3)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("search", ["minmax", "output-error", "progressive"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_behind_a_softmax_no_search_ends_above_its_start(
    kind: Kind, search: str, rounds: int
) -> None:
    """The start: AdaLog's first base or the widest split, and the right operand's first range."""
    for bits in (2, 4):
        layer, a, b = after_softmax(kind, bits, seed=bits)
        recipe = make_recipe(
            "adalog", {"range_search": search, "range_candidates": 64, "range_rounds": rounds}
        )
        first = copy.deepcopy(layer)
        first.a_quantizer.set_scale(torch.ones(1, 1, 1, 1))
        calibrate_matmul(layer, a, b, recipe)
        candidates = grid_candidates(ascending(b.transpose(0, 1).flatten(1)), 2**bits, 64)
        first.b_quantizer.set_range(
            candidates.scale[-2].view(1, -1, 1, 1), candidates.zero_point[-2].view(1, -1, 1, 1)
        )
        if search == "minmax":
            first.b_quantizer.load_state_dict(layer.b_quantizer.state_dict())
        assert product_error(layer, a, b) <= product_error(first, a, b) * (1 + 1e-6)
        assert float(layer.a_quantizer.scale) == 1 or kind == "twin"


# Progressive search against the grid it starts from.


@pytest.mark.parametrize("bits", [(4, 4), (3, 4), (8, 8)])
def test_a_progressive_search_never_ends_above_the_grids(bits: tuple[int, int]) -> None:
    """Weights for fixed inputs, right operands for fixed softmax outputs, and whole layers."""
    grid = make_recipe("fimaq", {"range_candidates": 64, "range_rounds": 1})
    fine = make_recipe("adalog", {"range_candidates": 64, "range_rounds": 1})
    better = 0
    for seed in range(3):
        torch.manual_seed(seed)
        layer = QuantLinear.from_float(nn.Linear(10, 6), *bits).requires_grad_(False)
        x = torch.randn(3, 12, 10) * torch.linspace(0.3, 2, 10) + torch.linspace(-1, 1, 10)
        whole = copy.deepcopy(layer)
        calibrate_linear(layer, x, grid.model_copy(update={"range_rounds": 0}))
        flat = x.flatten(0, -2)
        # The grid's best range of each row for these inputs.
        x_hat, levels = layer.input_quantizer(flat), 2 ** bits[0]
        least = 0.0
        for row in layer.weight:
            pairs = grid_of(row, levels, 64, MIN_WEIGHT_SCALE, "progressive")
            least += min(
                error(x_hat, affine(row.double(), pair, levels), flat, row) for pair in pairs
            )
        search_weight(layer, flat, None, torch.zeros(0), fine)
        assert linear_error(layer, x) <= least * (1 + 1e-9)
        better += linear_error(layer, x) < least * 0.999
        calibrate_linear(layer, x, grid)
        calibrate_linear(whole, x, fine)
        assert linear_error(whole, x) < linear_error(layer, x)

        product, a, b = after_softmax("log2", bits[0], bits[1], seed)
        calibrate_matmul(product, a, b, grid)
        a_hat = product.a_quantizer(a)
        on_grid = 0.0
        for head in range(b.shape[1]):
            own, hat, values = a[:, head], a_hat[:, head], b[:, head]
            pairs = grid_of(values, levels, 64, search="progressive")
            on_grid += min(error(hat, affine(values, pair, levels), own, values) for pair in pairs)
        search_operand(product.b_quantizer, b.mT, a.mT, a_hat.mT, fine)
        assert product_error(product, a, b) <= on_grid * (1 + 1e-6)
        better += product_error(product, a, b) < on_grid * 0.999
    assert better >= 5


def test_more_rounds_of_a_uniform_product_do_not_lose_what_was_won() -> None:
    """Three progressive rounds, AdaLog's own setting, against the search of both bounds."""
    for seed in range(2):
        torch.manual_seed(seed)
        a, b = torch.randn(3, 2, 8, 10), torch.randn(3, 2, 10, 8) * (1 + torch.rand(1, 2, 10, 1))
        found = {}
        for search, rounds in itertools.product(("output-error", "progressive"), (1, 3)):
            layer = QuantMatMul(4)
            recipe = make_recipe(
                "fimaq", {"range_search": search, "range_candidates": 64, "range_rounds": rounds}
            )
            calibrate_matmul(layer, a, b, recipe)
            found[search, rounds] = product_error(layer, a, b)
        assert found["progressive", 3] < found["progressive", 1]
        assert found["progressive", 3] < found["output-error", 3] * 1.05


# ERQ on one layer.


def erq(**changes: object) -> Recipe:
    return make_recipe("erq", {"refit_ridge": 3.0, "refit_flips": 20}, changes)


def linear_for_erq(bits: int, biased: bool, shape: tuple[int, ...]) -> tuple[QuantLinear, Tensor]:
    """A layer with percentile ranges, on correlated inputs (*shape, 24) off zero."""
    torch.manual_seed(1)
    layer = QuantLinear.from_float(nn.Linear(24, 10, bias=biased), bits, bits).requires_grad_(False)
    x = torch.randn(*shape, 24) @ (
        torch.randn(24, 24) * torch.linspace(0.1, 1, 24)[:, None]
    ) + torch.randn(24)
    linear_percentiles(layer, x)
    return layer, x


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "shape", [(5, 30), (150,), (3, 5, 10)], ids=["tokens", "no tokens", "a grid of tokens"]
)
@pytest.mark.parametrize("bits", [3, 4])
def test_error_reduction_of_a_linear_layer_is_refit_and_refined_rounding(
    bits: int, shape: tuple[int, ...], biased: bool
) -> None:
    layer, x = linear_for_erq(bits, biased, shape)
    nearest = copy.deepcopy(layer)
    decide_rounding(nearest)
    before = {
        name: value.clone() for name, value in layer.named_parameters() if "quantizer" not in name
    }
    reduce_linear_error(layer, x, erq())

    levels, flat = 2**bits, x.reshape(-1, 24)
    x_hat = layer.input_quantizer(flat)
    moments = refit_moments(flat, x_hat)
    # Layers without tokens (the classifier) have a smaller ridge in the refit.
    weight, bias = ridge_refit(layer.weight, layer.bias, moments, 0.1 if len(shape) == 1 else 3.0)
    scale, zero = percentile_range(ascending(weight), levels, MIN_WEIGHT_SCALE)
    codes, bias = refine_rounding(
        weight, bias, RoundingGrid(scale[:, None], zero[:, None], levels), moments, 3.0, 20
    )
    assert torch.equal(layer.weight_quantizer.scale[:, 0], scale)
    assert torch.equal(layer.weight_quantizer.zero_point[:, 0], zero)
    assert torch.equal(layer.weight_quantizer.codes, codes.to(torch.uint8))
    assert (
        layer.quantized_bias.numel() == 0
        if bias is None
        else torch.equal(layer.quantized_bias, bias)
    )
    assert (bias is not None) == biased

    for name, value in before.items():
        assert torch.equal(dict(layer.named_parameters())[name], value), name
    target = layer(x)
    layer.quantized = nearest.quantized = True
    reduced, plain = ((one(x) - target).square().sum() for one in (layer, nearest))
    assert reduced < 0.75 * plain


def test_each_ridge_is_at_most_the_recipes() -> None:
    made = []
    for ridge in (0.05, 0.1):
        layer, x = linear_for_erq(4, True, (150,))
        reduce_linear_error(layer, x, erq(refit_ridge=ridge))
        flat = x.reshape(-1, 24)
        weight, _ = ridge_refit(
            layer.weight, layer.bias, refit_moments(flat, layer.input_quantizer(flat)), ridge
        )
        scale, _ = percentile_range(ascending(weight), 16, MIN_WEIGHT_SCALE)
        assert torch.equal(layer.weight_quantizer.scale[:, 0], scale)
        made.append(layer.quantized_bias)
    assert not torch.equal(*made)


@pytest.mark.parametrize(("rule", "flips"), [("error", 20), ("gradient", 0)])
def test_error_reduction_of_a_convolution_rounds_alone(rule: str, flips: int) -> None:
    torch.manual_seed(2)
    layer = QuantConv2d.from_float(nn.Conv2d(3, 8, 4, stride=4), 3, OFF).requires_grad_(False)
    x = images(10)
    conv_percentiles(layer, x)
    nearest = copy.deepcopy(layer)
    decide_rounding(nearest)
    weight, bias, ranges = (
        layer.weight.clone(),
        layer.bias.clone(),
        layer.weight_quantizer.scale.clone(),
    )  # type: ignore[union-attr]
    reduce_conv_error(layer, x, erq(refit_rule=rule))
    patches = F.unfold(x, 4, stride=4).transpose(1, 2).reshape(-1, 48)
    scale, zero = layer.weight_quantizer.scale, layer.weight_quantizer.zero_point
    codes, expected = refine_rounding(
        weight.flatten(1),
        bias,
        RoundingGrid(scale, zero, 8),
        refit_moments(patches, patches),
        30.0,
        flips,
    )
    assert torch.equal(layer.weight_quantizer.codes, codes.to(torch.uint8))
    assert expected is not None
    assert torch.allclose(layer.quantized_bias, expected, atol=1e-6)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(scale, ranges)
    target = layer(x)
    layer.quantized = nearest.quantized = True
    left = (layer(x) - target).square().sum() / (nearest(x) - target).square().sum()
    assert left < (0.75 if flips else 0.95)


# On a trained model.


@functools.cache
def held_out() -> tuple[Tensor, Tensor]:
    """300 test pairs and the demo ViT's logits in full precision."""
    loaded = TASK.load(ModelRequest("demo_vit"))
    source = open_source(loaded, DataRequest(), "val").head(300)
    read = Images(source.ids, source.targets, source.read, loaded.eval_transform, False)
    x = torch.stack([read[number][0] for number in range(300)])  # type: ignore[index]
    with torch.no_grad():
        return x, loaded.model(x)


@functools.cache
def divergence(method: str, **changes: Any) -> float:
    """KL of the calibrated demo ViT's classes to full precision, mean over seeds."""
    found = []
    x, reference = held_out()
    for seed in (1, 2):
        recipe = make_recipe(
            method, {"calibration_transform": "eval", "seed": seed, "reconstruct": False}, changes
        )
        loaded = TASK.load(ModelRequest("demo_vit"))
        calibration = TASK.calibration(loaded, DataRequest(), recipe).images
        assert len(calibration) == 32
        chain = TASK.build(loaded, recipe)
        quantize_chain(chain, calibration, recipe, ClassifierDivergence(20.0), Resources())
        with torch.no_grad():
            found.append(float(kl_divergence(chain(x), reference)))
    return sum(found) / len(found)


def test_special_softmax_quantizers_of_4_bits_beat_the_uniform_one_on_a_trained_model() -> None:
    """With all else in full precision: at 4 bits the difference is of the size between seeds."""
    alone: dict[str, object] = {"w_bits": OFF, "a_bits": OFF, "s_bits": 4}
    uniform = divergence("repq", softmax_quantizer="uniform", **alone)
    assert divergence("repq", softmax_quantizer="logsqrt2", **alone) < 0.7 * uniform
    searched: dict[str, object] = {
        **alone,
        "gelu_quantizer": "uniform",
        "range_search": "output-error",
    }
    for kind in ("adalog", "twin"):
        assert divergence("adalog", softmax_quantizer=kind, **searched) < 0.7 * uniform


@pytest.mark.parametrize("bits", [3, 4])
def test_error_reduction_beats_its_starting_point_on_a_trained_model(bits: int) -> None:
    same: dict[str, object] = {"w_bits": bits, "a_bits": bits}
    plain = {**same, "range_inputs": "float", "patch_input_bits": OFF}
    repq = divergence("repq", **plain)
    assert divergence("erq", refit_rule="error", **plain) < 0.9 * repq
    if bits == 3:
        assert divergence("erq", **same) < 0.9 * divergence("repq", **same)
    few = {"calibration_images": 32, "range_images": 32, "w_bits": bits, "a_bits": bits}
    assert repq < 0.7 * divergence("rtn", **few)
