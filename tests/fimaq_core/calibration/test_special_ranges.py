"""Percentile, logarithmic and twin ranges against loops over candidates with direct errors."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.calibration import percentile_ranges, special_ranges
from fimaq_core.calibration.percentile_ranges import percentile_log_scale, percentile_range
from fimaq_core.calibration.special_ranges import (
    product_errors,
    search_adalog_gelu,
    search_adalog_softmax,
    search_after_gelu,
    search_log_gelu,
    search_twin_gelu,
    search_twin_softmax,
)
from fimaq_core.errors import DataError
from fimaq_core.layers import QuantLinear
from fimaq_core.quantizers.affine import fake_quantize
from fimaq_core.quantizers.logarithm import (
    GELU_SHIFT,
    adalog_fake_quantize,
    adalog_tables,
    log_fake_quantize,
)
from fimaq_core.quantizers.twin import twin_gelu, twin_softmax

#: A search may be worse than the loop's best only by the float32 rounding of the errors.
CLOSE = 1 + 1e-5


@pytest.fixture(autouse=True, params=[None, 150], ids=["one piece", "pieces"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each search once with temporaries for everything, once with temporaries of few rows."""
    if request.param is not None:
        for module in (percentile_ranges, special_ranges):
            monkeypatch.setattr(module, "block_elements", lambda _: request.param)


def attention(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A softmax's output (2 images, 3 heads, 7 x 9); the other operand, quantized and not."""
    torch.manual_seed(seed)
    a, b = (torch.randn(2, 3, 7, 9) * 3).softmax(-1), torch.randn(2, 3, 9, 5)
    return a, b + 0.05 * torch.randn_like(b), b


def mlp(seed: int, rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """A GELU's output (60, 8) and a weight (rows, 8), quantized and in full precision."""
    torch.manual_seed(seed)
    x, w = F.gelu(torch.randn(60, 8) * torch.linspace(0.3, 2, 8)), torch.randn(rows, 8)
    return x, w + 0.02 * torch.randn_like(w), w


def direct_error(quantized: Tensor, other: Tensor, x: Tensor, plain: Tensor) -> float:
    return float((quantized.double() @ other.double() - x.double() @ plain.double()).square().sum())


def by_adalog(x: Tensor, scale: float, q: int, levels: int, shift: float = 0.0) -> Tensor:
    return (
        adalog_fake_quantize(
            x + shift, torch.tensor(scale), *adalog_tables(q, levels), q / 37, levels
        )
        - shift
    )


def gelu_scales(x: Tensor, count: int) -> list[float]:
    positive = x[x > 0]
    low, high = float(positive.quantile(0.9)) + GELU_SHIFT, float(positive.max()) + GELU_SHIFT
    return [low + (high - low) * i / (count - 1) for i in range(count)]


@pytest.mark.parametrize("levels", [4, 16])
@pytest.mark.parametrize("size", [50, 30000])
def test_percentile_range_equals_the_loop(levels: int, size: int) -> None:
    torch.manual_seed(levels)
    rows = torch.randn(3, size)
    # Outliers worth their range: 20 lie within the 0.9999 quantile, 2 within the 0.99999 quantile.
    rows[1, :20], rows[2, :2] = 60.0, 300.0
    scale, zero = percentile_range(rows.sort(1).values, levels)
    choices = []
    for row, found_scale, found_zero in zip(rows.double(), scale, zero, strict=True):
        ranges = []
        for point in (0.999, 0.9999, 0.99999):
            high, low = row.quantile(point), row.quantile(1 - point)
            step = (high - low) / (levels - 1)
            ranges.append((step, -(low / step).round()))
        errors = [
            float((fake_quantize(row, *pair, levels) - row).square().sum()) for pair in ranges
        ]
        choices.append(errors.index(min(errors)))
        assert float(found_scale) == pytest.approx(float(ranges[choices[-1]][0]), rel=1e-5)
        assert found_zero == ranges[choices[-1]][1]
    assert size == 50 or levels == 4 or choices == [0, 1, 2]


def test_percentile_range_of_a_constant_row_is_guarded() -> None:
    scale, zero = percentile_range(torch.zeros(1, 9), 16)
    assert scale.item() == pytest.approx(1e-4)
    assert zero.item() == 0


@pytest.mark.parametrize("step", [1.0, 0.5])
@pytest.mark.parametrize("size", [40, 20000])
def test_percentile_log_scale_equals_the_loop(step: float, size: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(size) * 2).exp().view(2, -1)
    found = percentile_log_scale(x, step, 8)
    assert found.shape == ()
    scales = [x.double().flatten().quantile(point) for point in (0.999, 0.9999, 0.99999)]
    errors = [
        float((log_fake_quantize(x.double(), scale, step, 8) - x).square().sum())
        for scale in scales
    ]
    assert float(found) == pytest.approx(float(scales[errors.index(min(errors))]), rel=1e-5)


@pytest.mark.parametrize("columns", [5, 12], ids=["direct form", "gram form"])
def test_product_errors_equal_direct_ones(columns: int) -> None:
    torch.manual_seed(0)
    quantizers = [lambda x: (x * 3).round() / 3, lambda x: x.round(), lambda x: x.clone()]
    for shape in ((4,), ()):
        x, plain = torch.randn(*shape, 20, 8), torch.randn(*shape, 8, columns)
        other = plain + 0.1 * torch.randn_like(plain)
        found = product_errors(x, other, plain, quantizers)
        expected = [direct_error(quantize(x), other, x, plain) for quantize in quantizers]
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_adalog_softmax_equals_the_loop(levels: int) -> None:
    a, b_hat, b = attention(levels)
    found = search_adalog_softmax(a, b_hat, b, levels, 128)
    errors = {q: direct_error(by_adalog(a, 1.0, q, levels), b_hat, a, b) for q in range(10, 138)}
    assert errors[found] <= min(errors.values()) * CLOSE
    assert max(errors.values()) > 2 * min(errors.values())


@pytest.mark.parametrize("q", [10, 53, 137])
def test_adalog_softmax_looks_at_every_candidate(q: int) -> None:
    # q is prime, or all that divides it is below 10: no other numerator has the point 2^(-q/37).
    shifts, mantissas = adalog_tables(q, 256)
    a = (
        torch.tensor([1.0, float(mantissas[1] * 2 ** -shifts[1]), 1.0, 1.0])
        .expand(1, 1, 2, 4)
        .contiguous()
    )
    b = torch.eye(4)[None, None]
    assert search_adalog_softmax(a, b, b, 256, 128) == q
    assert search_adalog_softmax(a, b, b, 256, q - 9) == q
    assert q == 10 or search_adalog_softmax(a, b, b, 256, q - 10) != q


def gelu_loop(x: Tensor, w_hat: Tensor, w: Tensor, levels: int) -> tuple[float, float]:
    """The least errors of the first look, and of the eight numerators with 16 scales."""

    def error(scale: float, q: int) -> float:
        return direct_error(by_adalog(x, scale, q, levels, GELU_SHIFT), w_hat.t(), x, w.t())

    look = sorted((error(gelu_scales(x, 128)[-2], q), q) for q in range(10, 138))
    return look[0][0], min(error(scale, q) for _, q in look[:8] for scale in gelu_scales(x, 16))


@pytest.mark.parametrize("levels", [8, 16])
@pytest.mark.parametrize("rows", [5, 12], ids=["direct form", "gram form"])
def test_adalog_gelu_equals_the_loop(
    levels: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w_hat, w = mlp(levels, rows)
    look, grid = gelu_loop(x, w_hat, w, levels)

    def error(found: tuple[Tensor, int]) -> float:
        scale, q = found
        assert scale.shape == ()
        assert 10 <= q <= 137
        return direct_error(by_adalog(x, float(scale), q, levels, GELU_SHIFT), w_hat.t(), x, w.t())

    refined = error(search_adalog_gelu(x, w_hat, w, levels, 128))
    monkeypatch.setattr(special_ranges, "_ROUNDS", 0)
    plain = error(search_adalog_gelu(x, w_hat, w, levels, 128))
    assert plain == pytest.approx(min(look, grid), rel=1e-5)
    assert refined < plain * 0.9999


def test_adalog_gelu_remembers_its_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w_hat, w = mlp(0)
    worse = torch.tensor([1e3]), torch.tensor([10.0])
    monkeypatch.setattr(special_ranges, "progressive", lambda *_: worse)
    scale, q = search_adalog_gelu(x, w_hat, w, 8, 128)
    assert float(scale) == pytest.approx(gelu_scales(x, 128)[-2])
    error = direct_error(by_adalog(x, float(scale), q, 8, GELU_SHIFT), w_hat.t(), x, w.t())
    assert error == pytest.approx(gelu_loop(x, w_hat, w, 8)[0], rel=1e-5)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.5])
def test_adalog_gelu_looks_at_every_numerator_at_the_present_scale(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second round of a layer starts from the scale that the first round left."""
    x, _, w = mlp(1)
    present = share * gelu_scales(x, 128)[-2]
    worse = torch.tensor([1e3]), torch.tensor([10.0])
    monkeypatch.setattr(special_ranges, "progressive", lambda *_: worse)
    layer = QuantLinear.from_float(nn.Linear(*w.t().shape), 4, 3, "adalog").requires_grad_(False)
    layer.weight.copy_(w)
    low, high = w.aminmax(dim=1, keepdim=True)
    layer.weight_quantizer.set_range((high - low) / 15, (-15 * low / (high - low)).round())
    layer.input_quantizer.set_scale(torch.tensor([present]))
    hat = layer.weight_quantizer.quantized(w)
    search_after_gelu(layer, x, 128, again=True)

    def error(q: int) -> float:
        return direct_error(by_adalog(x, present, q, 8, GELU_SHIFT), hat.t(), x, w.t())

    errors = {q: error(q) for q in range(10, 138)}
    chosen = round(float(layer.input_quantizer.get_buffer("step")) * 37)
    assert float(layer.input_quantizer.scale) == pytest.approx(present)
    assert errors[chosen] <= min(errors.values()) * CLOSE
    assert search_adalog_gelu(x, hat, w, 8, 128)[0] != present  # without a present scale


@pytest.mark.parametrize("step", [1.0, 0.5])
def test_log_gelu_is_as_good_as_a_fine_grid(step: float) -> None:
    x, w_hat, w = mlp(3)

    def error(scale: float) -> float:
        quantized = log_fake_quantize(x + GELU_SHIFT, torch.tensor(scale), step, 8) - GELU_SHIFT
        return direct_error(quantized, w_hat.t(), x, w.t())

    found = search_log_gelu(x, w_hat, w, step, 8, 128)
    assert found.shape == ()
    coarse = min(error(scale) for scale in gelu_scales(x, 128))
    fine = min(error(scale) for scale in gelu_scales(x, 2000))
    assert error(float(found)) <= coarse * CLOSE
    assert error(float(found)) <= fine * 1.01


def test_a_gelu_without_positive_values_is_refused() -> None:
    x = -torch.rand(4, 3) * 0.1
    with pytest.raises(DataError, match="positive"):
        search_log_gelu(x, torch.ones(2, 3), torch.ones(2, 3), 1.0, 8, 16)


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_twin_softmax_equals_the_loop(levels: int) -> None:
    a, _, b = attention(levels + 1)
    found = search_twin_softmax(a, b, levels)
    assert found.shape == ()
    errors = {
        2.0**-i: direct_error(twin_softmax(a, torch.tensor(2.0**-i), levels), b, a, b)
        for i in range(20)
    }
    assert errors[float(found)] <= min(errors.values()) * CLOSE


def test_twin_softmax_may_choose_any_split() -> None:
    b = torch.eye(3)[None, None]
    for i in range(1, 20):
        a = torch.tensor([[[[1.0, 2.0**-i * 0.9999, 2.0**-i / 3]]]])
        assert float(search_twin_softmax(a, b, 8)) == 2.0**-i


@pytest.mark.parametrize("levels", [4, 8, 16])
@pytest.mark.parametrize("rows", [5, 12], ids=["direct form", "gram form"])
def test_twin_gelu_equals_the_loop(levels: int, rows: int) -> None:
    x, w_hat, w = mlp(levels, rows)
    found = search_twin_gelu(x, w_hat, w, levels, 50)
    assert found.shape == ()
    widest = float(x.max()) / (levels / 2 - 0.5)
    scales = [widest * (0.01 + 1.19 * i / 49) for i in range(50)]

    def error(scale: float) -> float:
        return direct_error(twin_gelu(x, torch.tensor(scale), levels), w_hat.t(), x, w.t())

    errors = [error(scale) for scale in scales]
    assert error(float(found)) <= min(errors) * (1 + 1e-4)
    assert min(abs(float(found) - scale) for scale in scales) < 1e-5 * widest
    assert math.isfinite(max(errors))


def test_searches_take_operands_that_are_not_contiguous() -> None:
    a, b_hat, b = attention(0)

    def turned(t: Tensor) -> Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    assert search_adalog_softmax(
        turned(a), turned(b_hat), turned(b), 8, 16
    ) == search_adalog_softmax(a, b_hat, b, 8, 16)
