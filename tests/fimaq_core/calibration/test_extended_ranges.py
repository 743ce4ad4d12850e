"""Extended candidates: 8 bits lose only the rounding, and no search falls behind min-max."""

import json

import pytest
import torch
from torch import Tensor, nn

from fimaq_core.calibration.candidates import ascending, grid_candidates, minmax, with_bounds
from fimaq_core.calibration.conv_ranges import calibrate_conv_by_own_error
from fimaq_core.calibration.linear_ranges import calibrate_linear, set_minmax
from fimaq_core.calibration.percentile_ranges import linear_percentiles, percentile_range
from fimaq_core.calibration.product_ranges import calibrate_matmul, per_head
from fimaq_core.calibration.reparameterize import channel_ranges
from fimaq_core.calibration.special_ranges import search_adalog_softmax
from fimaq_core.layers import QuantConv2d, QuantLinear, QuantMatMul
from fimaq_core.quantizers.affine import AffineQuantizer, fake_quantize
from fimaq_core.quantizers.logarithm import log_fake_quantize
from fimaq_core.recipe import OFF, Recipe, make_recipe

SEARCHES = ["fimaq", "adalog", "repq"]  # grid, progressive, percentiles


def recipe(method: str = "fimaq", grid: str = "extended", **more: object) -> Recipe:
    return make_recipe(method, {"range_candidates": 64, "range_grid": grid, **more})


def linear(x: Tensor, bits: tuple[int, int], method: str, grid: str) -> QuantLinear:
    """A calibrated layer; its random weight depends on the width only."""
    torch.manual_seed(1)
    layer = QuantLinear.from_float(nn.Linear(x.shape[-1], 6), *bits).requires_grad_(False)
    nn.init.orthogonal_(layer.weight)
    layer.weight[0].abs_()
    if method == "repq":
        linear_percentiles(layer, x, extended=grid == "extended")
    else:
        calibrate_linear(layer, x, recipe(method, grid))
    return layer


def output_error(layer: QuantLinear, x: Tensor) -> float:
    x_hat = layer.input_quantizer(x).double()
    w_hat = layer.weight_quantizer.quantized(layer.weight).double()
    return float((x_hat @ w_hat.t() - x.double() @ layer.weight.double().t()).square().sum())


DATA = {
    "one sign": lambda: torch.rand(4, 12, 10) * 3,
    "below zero": lambda: -torch.rand(4, 12, 10),
    "far from zero": lambda: 5 + torch.rand(4, 12, 10) / 10,
    "behind a GELU": lambda: nn.functional.gelu(torch.randn(4, 12, 10) * 2),
    "outliers": lambda: torch.randn(4, 12, 10) + 80 * (torch.rand(4, 12, 10) > 0.99),
    "a tiny span": lambda: torch.rand(4, 12, 10) * 1e-4,
    "constant channels": lambda: torch.randn(4, 12, 10) * (torch.arange(10) > 3) + 0.5,
    "zeros": lambda: torch.zeros(4, 12, 10),
}
each_data = pytest.mark.parametrize("name", DATA)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("sign", [1, -1])
def test_inputs_of_one_sign_lose_only_the_rounding_at_8_bits(method: str, sign: int) -> None:
    """Uniform values in [0, 1] have the error step² / 12 with the step 1 / 255."""
    torch.manual_seed(0)
    x = sign * torch.rand(8, 100, 10)
    expected = 1 / 255**2 / 12
    layer = linear(x, (OFF, 8), method, "extended")
    assert float((layer.input_quantizer(x) - x).square().mean()) == pytest.approx(expected, rel=0.1)
    if method != "repq":  # the released grid ends at the middle
        layer = linear(x, (OFF, 8), method, "released")
        assert float((layer.input_quantizer(x) - x).square().mean()) > 100 * expected

    convolution = QuantConv2d.from_float(nn.Conv2d(8, 4, 1), OFF, 8).requires_grad_(False)
    calibrate_conv_by_own_error(convolution, x.view(10, 8, 10, 10), recipe("adalog"))
    assert float((convolution.input_quantizer(x) - x).square().mean()) < expected * 1.1

    layer, a = QuantMatMul(8, 8), x.view(10, 2, 20, 20)
    calibrate_matmul(layer, a, a, recipe("fimaq" if method == "repq" else method, range_rounds=1))
    for quantizer in (layer.a_quantizer, layer.b_quantizer):
        assert float((quantizer(a) - a).square().mean()) < expected * 1.1


@each_data
@pytest.mark.parametrize("bits", [3, 8])
def test_the_last_candidate_is_min_max_and_all_contain_zero(name: str, bits: int) -> None:
    torch.manual_seed(0)
    rows, levels = ascending(DATA[name]().flatten(0, 1).t().contiguous()), 2**bits
    grid = grid_candidates(rows, levels, 64)
    found = with_bounds(grid, rows, levels=levels)
    assert torch.equal(found.scale[:64], grid.scale)
    assert torch.equal(found.zero_point[:64], grid.zero_point)
    assert found.period is None
    for mine, expected in zip(
        (found.scale[-1], found.zero_point[-1]), minmax(rows, levels), strict=True
    ):
        assert torch.allclose(mine, expected, rtol=1e-6)
    assert 0 <= found.zero_point.min() <= found.zero_point.max() <= levels - 1


@each_data
@pytest.mark.parametrize("bits", [(OFF, 3), (OFF, 8), (3, OFF), (8, OFF)], ids=str)
def test_a_linear_layer_never_falls_behind_released_or_min_max(
    name: str, bits: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    x = DATA[name]()
    best = output_error(linear(x, bits, "rtn", "released"), x)
    progressive = output_error(linear(x, bits, "adalog", "extended"), x)
    assert progressive <= best * (1 + 1e-5) + 1e-12
    best = min(best, output_error(linear(x, bits, "fimaq", "released"), x))
    assert output_error(linear(x, bits, "fimaq", "extended"), x) <= best * (1 + 1e-5) + 1e-12


@each_data
@pytest.mark.parametrize("bits", [3, 8])
def test_a_product_never_falls_behind_released_or_min_max(name: str, bits: int) -> None:
    torch.manual_seed(0)
    a, b = DATA[name]().view(4, 2, 6, 10), torch.randn(4, 2, 10, 7)

    def error(layer: QuantMatMul) -> float:
        return float((layer.a_quantizer(a).double() @ b.double() - a.double() @ b.double()).norm())

    def calibrated(method: str, grid: str, rounds: int) -> float:
        layer = QuantMatMul(OFF, bits)
        calibrate_matmul(layer, a, b, recipe(method, grid, range_rounds=rounds))
        return error(layer)

    layer = QuantMatMul(OFF, bits)
    assert isinstance(layer.a_quantizer, AffineQuantizer)
    set_minmax(layer.a_quantizer, per_head(a), shape=(1, -1, 1, 1))
    slack, best = 1 + 1e-5, error(layer)
    assert calibrated("adalog", "extended", 2) <= best * slack + 1e-9
    assert calibrated("fimaq", "extended", 2) <= best * slack + 1e-9
    best = min(best, calibrated("fimaq", "released", 0))
    assert calibrated("fimaq", "extended", 0) <= best * slack + 1e-9


@each_data
@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("bits", [3, 8])
def test_channels_before_reparameterisation(name: str, method: str, bits: int) -> None:
    torch.manual_seed(0)
    x, levels = DATA[name]().flatten(0, 1), 2**bits

    def errors(scale: Tensor, zero: Tensor) -> Tensor:
        return (fake_quantize(x, scale, zero, levels) - x).double().square().sum(0)

    scale, zero = minmax(x.t(), levels)
    floor = scale.clamp(min=1e-4)  # dead channels must not divide by zero
    best = errors(floor, (zero * scale / floor).round())
    found = channel_ranges(x, levels, recipe(method))
    assert (found[0] >= 1e-4 * (1 - 1e-6)).all()
    assert (errors(*found) <= best * (1 + 1e-5) + 1e-10).all()
    if method != "adalog":
        best = errors(*channel_ranges(x, levels, recipe(method, "released")))
        assert (errors(*found) <= best * (1 + 1e-5) + 1e-10).all()


def test_percentiles_and_the_extremes() -> None:
    """At 8 bits clipping a thousandth of a uniform distribution costs more than its steps."""
    torch.manual_seed(0)
    rows = torch.rand(1, 500).sort().values
    scale, zero = percentile_range(rows, 256, extended=True)
    assert float(scale) == pytest.approx(float(rows[0, -1] - rows[0, 0]) / 255, rel=1e-2)
    assert float((fake_quantize(rows, scale, zero, 256) - rows).abs().max()) <= float(scale) * 0.51


def test_adalog_has_finer_bases_with_many_levels() -> None:
    torch.manual_seed(0)
    a, b = (torch.rand(2, 1, 30, 12) * 0.9 + 0.1).softmax(-1), torch.randn(2, 1, 12, 5)
    a = a / a.amax()
    q = search_adalog_softmax(a, b, b, 256, 64, extended=True)
    assert 1 <= q < 10 <= search_adalog_softmax(a, b, b, 256, 64)
    errors = [
        float((log_fake_quantize(a, torch.ones(()), one / 37, 256) - a).square().sum())
        for one in (q, 10)
    ]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("method", ["fimaq", "ptq4vit", "erq", "rtn"])
def test_recipes_of_7_and_8_bits_only_have_extended_candidates(method: str) -> None:
    for bits in (3, 4, 6):
        assert make_recipe(method, {"w_bits": bits, "a_bits": bits}).range_grid == "released"
    for bits in ({"w_bits": 7, "a_bits": 4}, {"w_bits": 4, "a_bits": 8}):
        assert make_recipe(method, bits).range_grid == "extended"
    new = make_recipe(method, {"w_bits": 8, "a_bits": 8})
    older = json.loads(new.model_dump_json(exclude={"range_grid"}))
    assert Recipe.model_validate(older).range_grid == "released"
    assert Recipe.model_validate(older).digest() != new.digest()
    given = {"w_bits": 8, "a_bits": 8, "range_grid": "released"}
    assert make_recipe(method, given) == Recipe.model_validate(older)
