"""Range searches against brute force: own error; output error of weights, inputs and operands."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.calibration.candidates import (
    Candidates,
    from_bounds,
    grid_candidates,
    minmax,
    quantiles,
    with_bounds,
)
from fimaq_core.calibration.conv_ranges import calibrate_conv
from fimaq_core.calibration.linear_ranges import calibrate_linear
from fimaq_core.calibration.output_error import Product, best_operand
from fimaq_core.calibration.own_error import best_by_own_error, own_errors
from fimaq_core.calibration.product_ranges import calibrate_matmul
from fimaq_core.calibration.shared_codes import shared_errors
from fimaq_core.calibration.weight_error import Rows, best_rows, input_moments, weight_errors
from fimaq_core.layers import QuantConv2d, QuantLinear, QuantMatMul
from fimaq_core.quantizers.affine import fake_quantize
from fimaq_core.recipe import Recipe, make_recipe

#: A fast search may pick another candidate only if its direct error is this close to the best.
CLOSE = 1 + 1e-5


def heavy(*shape: int) -> Tensor:
    """Values with a heavy tail (Student's t, 3 degrees of freedom)."""
    normal = torch.randn(shape)
    return normal / (torch.randn(3, *shape).square().mean(0)).sqrt()


KINDS = {"normal": torch.randn, "heavy": heavy}


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 1001])
def test_quantiles(count: int) -> None:
    torch.manual_seed(count)
    rows = heavy(3, count).double()
    points = [0.0, 1e-5, 0.01, 0.1, 0.37, 0.9, 0.99999, 1.0]
    expected = torch.quantile(rows, torch.tensor(points, dtype=torch.float64), dim=1)
    assert torch.allclose(
        quantiles(rows.sort(dim=1).values, points), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("levels", [4, 8, 16, 64, 256])
def test_grid_candidates(levels: int) -> None:
    torch.manual_seed(0)
    rows = heavy(3, 500).sort(dim=1).values
    found = grid_candidates(rows, levels, 128)
    zeros = min(16, levels)
    scales = 128 // zeros
    assert found.scale.shape == found.zero_point.shape == (zeros * scales, 3)
    inner = rows.quantile(0.9, dim=1) - rows.quantile(0.1, dim=1)
    full = rows[:, -1] - rows[:, 0]
    assert torch.allclose(found.scale.amin(0), inner / (levels - 1), rtol=1e-5)
    assert torch.allclose(found.scale.amax(0), full / (levels - 1), rtol=1e-5)
    for group in range(3):
        pairs = set(
            zip(found.scale[:, group].tolist(), found.zero_point[:, group].tolist(), strict=True)
        )
        assert len(pairs) == zeros * scales
    first = levels // 2 - zeros // 2
    assert sorted(found.zero_point[:, 0].unique().tolist()) == list(range(first, first + zeros))


@pytest.mark.parametrize("levels", [4, 16, 256])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lookup_cost", [0, 10**9], ids=["sorted form", "pass per candidate"])
def test_own_errors_equal_a_direct_pass_per_candidate(
    monkeypatch: pytest.MonkeyPatch, levels: int, kind: str, lookup_cost: int
) -> None:
    monkeypatch.setattr("fimaq_core.calibration.own_error._LOOKUP_COST", lookup_cost)
    torch.manual_seed(levels)
    rows = KINDS[kind](4, 700)
    ordered = rows.sort(dim=1).values
    candidates = grid_candidates(ordered, levels, 64)
    found = own_errors(ordered, candidates, levels)
    assert found.shape == candidates.scale.shape
    scale, zero = candidates.scale.double()[:, :, None], candidates.zero_point.double()[:, :, None]
    direct = (fake_quantize(rows.double(), scale, zero, levels) - rows.double()).square().sum(-1)
    assert torch.allclose(found, direct, rtol=1e-5 if lookup_cost else 1e-9)
    chosen = best_by_own_error(ordered, candidates, levels)
    assert (direct.gather(0, chosen[None])[0] <= direct.amin(0) * CLOSE).all()


def test_many_groups_are_searched_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ordered = heavy(23, 40).sort(dim=1).values
    candidates = grid_candidates(ordered, 16, 64)
    whole = best_by_own_error(ordered, candidates, 16)
    assert torch.equal(whole, own_errors(ordered, candidates, 16).argmin(0))
    monkeypatch.setattr("fimaq_core.calibration.own_error._TABLE", 5 * 64 * 16)
    assert torch.equal(best_by_own_error(ordered, candidates, 16), whole)


def test_own_errors_of_a_constant_row() -> None:
    ordered = torch.full((1, 9), 2.5)
    candidates = Candidates(torch.tensor([[0.5], [1.0]]), torch.tensor([[0.0], [0.0]]))
    assert own_errors(ordered, candidates, 16)[:, 0].tolist() == pytest.approx([0.0, 9 * 0.25])


def test_minmax_spans_the_values_and_zero() -> None:
    rows = torch.tensor([[-1.0, 0.5, 3.0], [1.0, 2.0, 4.0], [-4.0, -2.0, -1.0], [0.0, 0.0, 0.0]])
    scale, zero = minmax(rows, 16)
    assert torch.allclose(scale[:3], torch.tensor([4.0, 4.0, 4.0]) / 15)
    assert zero.tolist()[:3] == [4.0, 0.0, 15.0]
    quantized = fake_quantize(rows, scale[:, None], zero[:, None], 16)
    assert ((quantized - rows).abs() <= scale[:, None] * 0.75).all()
    assert torch.equal(quantized[3], rows[3])


def recipe(bits: int = 4, **changes: object) -> Recipe:
    return make_recipe("fimaq", {"w_bits": bits, "a_bits": bits, "range_candidates": 64, **changes})


def output_errors(
    weight: Tensor, x: Tensor, x_hat: Tensor, candidates: Candidates, levels: int
) -> Tensor:
    """Directly, in float64: squared output error of every candidate and row."""
    out = []
    target = x.double() @ weight.double().t()
    for scale, zero in zip(candidates.scale, candidates.zero_point, strict=True):
        quantized = fake_quantize(weight, scale[:, None], zero[:, None], levels)
        out.append((x_hat.double() @ quantized.double().t() - target).square().sum(0))
    return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("input_bits", [3, 32])
def test_weight_errors_equal_direct_output_errors(kind: str, bits: int, input_bits: int) -> None:
    torch.manual_seed(bits)
    x = KINDS[kind](300, 24) * torch.linspace(0.1, 5, 24) + 2
    span = x.amax() - x.amin()
    x_hat = (
        x if input_bits == 32 else fake_quantize(x, span / 7, (-x.amin() / (span / 7)).round(), 8)
    )
    weight = KINDS[kind](10, 24)
    levels = 2**bits
    candidates = grid_candidates(weight.sort(dim=1).values, levels, 64)
    rows = Rows(weight, levels, *input_moments(x, x_hat, weight))
    found = weight_errors(rows, candidates)
    direct = output_errors(weight, x, x_hat, candidates, levels)
    # The fast form leaves out a constant per row.
    offset = ((x_hat.double() - x.double()) @ weight.double().t()).square().sum(0)
    assert torch.allclose(found + offset, direct, rtol=1e-6)
    chosen = direct.gather(0, found.argmin(0)[None])[0]
    assert (chosen <= direct.amin(0) * CLOSE).all()
    for guess in (0, 63):
        index = best_rows(rows, candidates, torch.full((10,), guess))
        assert (direct.gather(0, index[None])[0] <= direct.amin(0) * (1 + 1e-6)).all()


@pytest.mark.parametrize("levels", [8, 256])
@pytest.mark.parametrize("rows", [5, 20])
def test_moments_of_whole_codes(levels: int, rows: int) -> None:
    torch.manual_seed(0)
    x = heavy(1500, 12) + 3
    scale = (x.amax() - x.amin()) / (levels - 1)
    x_hat = fake_quantize(x, scale, (-x.amin() / scale).round(), levels)
    weight, wide, wide_hat = heavy(rows, 12), x.double(), x_hat.double()
    expected_all = wide_hat.t() @ wide_hat, weight.double() @ (wide_hat - wide).t() @ wide_hat
    exact = input_moments(x, x_hat, weight)
    for found, expected in zip(exact, expected_all, strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().mean()))
    for found, expected in zip(input_moments(x, x_hat, weight, scale, levels), exact, strict=True):
        # The sums of errors are float32, and their terms mostly cancel.
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-5 * float(expected.abs().mean()))


def test_weight_search_with_dead_channels_and_rows() -> None:
    """Inputs without signal leave the moments singular; rows of zeros have no range to choose."""
    torch.manual_seed(0)
    x = torch.randn(9, 24)
    x[:, ::3] = 0
    weight = heavy(6, 24)
    weight[2] = 0
    candidates = grid_candidates(weight.sort(dim=1).values, 8, 64)
    rows = Rows(weight, 8, *input_moments(x, x, weight))
    index = best_rows(rows, candidates, torch.zeros(6, dtype=torch.long))
    direct = output_errors(weight, x, x, candidates, 8)
    assert (direct.gather(0, index[None])[0] <= direct.amin(0) * (1 + 1e-6)).all()


@pytest.mark.parametrize("levels", [8, 16])
@pytest.mark.parametrize("columns", [4, 11])
@pytest.mark.parametrize("moving", ["lower", "upper", "both"])
def test_errors_from_shared_codes_equal_direct_ones(
    monkeypatch: pytest.MonkeyPatch, levels: int, columns: int, moving: str
) -> None:
    monkeypatch.setattr("fimaq_core.calibration.shared_codes._CROWD", 0)  # a batch entry at a time
    monkeypatch.setattr("fimaq_core.calibration.shared_codes._ELEMENTS", 1)
    monkeypatch.setattr("fimaq_core.calibration.shared_codes._ROWS", 1)
    torch.manual_seed(levels)
    x, other, target = heavy(5, 7, 6), heavy(5, 6, columns), heavy(5, 7, columns)
    share = torch.linspace(0, 1, 70)[:, None]
    lower = -4 + (2 * share if moving != "upper" else 0 * share)
    upper = 2 + (3 * share if moving != "lower" else 0 * share)
    candidates = from_bounds(lower, upper, levels)
    found = shared_errors(
        x, other, target, candidates.scale[:, 0], candidates.zero_point[:, 0], levels
    )
    assert found is not None
    direct = [
        (fake_quantize(x, scale, zero, levels).double() @ other.double() - target.double())
        .square()
        .sum()
        for scale, zero in zip(candidates.scale[:, 0], candidates.zero_point[:, 0], strict=True)
    ]
    assert torch.allclose(found, torch.stack(direct), rtol=1e-6)


def test_shared_codes_are_left_to_a_pass_per_candidate_where_most_change() -> None:
    torch.manual_seed(0)
    x, other = torch.randn(4, 7, 6), torch.randn(4, 6, 5)
    candidates = from_bounds(torch.linspace(-4, -1, 64)[:, None], torch.full((64, 1), 4.0), 256)
    assert (
        shared_errors(x, other, x @ other, candidates.scale[:, 0], candidates.zero_point[:, 0], 256)
        is None
    )


def direct_operand_errors(
    x: Tensor, other: Tensor, other_fp: Tensor, candidates: Candidates, levels: int
) -> Tensor:
    """Directly, in float64: squared error of the product for every candidate."""
    target = x.double() @ other_fp.double()
    found = [
        (fake_quantize(x, scale, zero, levels).double() @ other.double() - target).square().sum()
        for scale, zero in zip(candidates.scale[:, 0], candidates.zero_point[:, 0], strict=True)
    ]
    return torch.stack(found)


SHAPES = {
    "direct form": (20, 16, 6),
    "gram form": (7, 5, 40),
    "one image": (9, 16, 4),
    "square": (6, 6, 6),
}


@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [True, False], ids=["weight", "activation"])
def test_best_operand_equals_brute_force(
    rows: int, inner: int, columns: int, batch: int, kind: str, shared: bool
) -> None:
    torch.manual_seed(batch + inner)
    levels = 8
    x = KINDS[kind](batch, rows, inner)
    other_fp = KINDS[kind](1 if shared else batch, inner, columns)
    step = other_fp.abs().amax() / 4
    other = fake_quantize(other_fp, step, torch.tensor(4.0), levels)
    residual = x @ (other - other_fp)
    candidates = grid_candidates(x.reshape(1, -1).sort(dim=1).values, levels, 64)
    direct = direct_operand_errors(x, other, other_fp, candidates, levels)
    for guess in (0, 31, int(direct.argmin()), int(direct.argmax())):
        index = best_operand(
            Product(x, other, residual, levels),
            candidates.scale[:, 0],
            candidates.zero_point[:, 0],
            guess,
        )
        assert direct[index] <= direct.min() * CLOSE


def test_best_operand_looks_at_every_image() -> None:
    """Dropping candidates by partial sums keeps the best, even if only the last image decides."""
    torch.manual_seed(0)
    x = torch.rand(32, 8, 6) * 0.01
    x[-1] = torch.rand(8, 6) * 100
    other = torch.randn(1, 6, 3)
    scale = torch.tensor([0.01 / 15, 0.1, 1.0, 100 / 15])
    zero = torch.zeros(4)
    for guess in range(4):
        assert best_operand(Product(x, other, torch.zeros(32, 8, 3), 16), scale, zero, guess) == 3


@pytest.mark.parametrize(
    ("bits", "grid"), [(3, "released"), (3, "extended"), (8, "released"), (8, "extended")]
)
def test_linear_search_equals_a_slow_one(bits: int, grid: str) -> None:
    """The whole alternation, with every candidate's error computed directly."""
    torch.manual_seed(1)
    layer = QuantLinear.from_float(nn.Linear(20, 8), bits, bits)
    x = heavy(6, 10, 20) * torch.linspace(0.3, 3, 20)
    settings, levels = recipe(bits, range_grid=grid), 2**bits
    calibrate_linear(layer, x, settings)

    weight, flat = layer.weight.detach(), x.reshape(-1, 20)
    rows = grid_candidates(weight.sort(dim=1).values, levels, 64, 1e-12)
    values = flat.reshape(1, -1).sort(dim=1).values
    inputs = grid_candidates(values, levels, 64)
    if grid == "extended":
        rows = with_bounds(rows, weight.sort(dim=1).values, levels=levels)
        inputs = with_bounds(inputs, values, levels=levels)
    row_index = own(weight, rows, levels).argmin(0)
    input_index = int(own(flat.reshape(1, -1), inputs, levels).argmin())
    for _ in range(settings.range_rounds):
        x_hat = fake_quantize(
            flat, inputs.scale[input_index], inputs.zero_point[input_index], levels
        )
        weight_table = output_errors(weight, flat, x_hat, rows, levels)
        row_index = weight_table.argmin(0)
        scale, zero = rows.pick(row_index)
        w_hat = fake_quantize(weight, scale[:, None], zero[:, None], levels)
        input_table = direct_operand_errors(flat, w_hat.t(), weight.t(), inputs, levels)
        input_index = int(input_table.argmin())
    scale, zero = rows.pick(row_index)
    assert torch.equal(layer.weight_quantizer.scale[:, 0], scale)
    assert torch.equal(layer.weight_quantizer.zero_point[:, 0], zero)
    assert float(layer.input_quantizer.scale) == float(inputs.scale[input_index])
    assert float(layer.input_quantizer.zero_point) == float(inputs.zero_point[input_index])


def own(rows: Tensor, candidates: Candidates, levels: int) -> Tensor:
    """Own squared errors, directly."""
    scale, zero = candidates.scale[:, :, None].double(), candidates.zero_point[:, :, None].double()
    return (fake_quantize(rows.double(), scale, zero, levels) - rows.double()).square().sum(-1)


CONVOLUTIONS = {
    "patch embedding": {"in_channels": 3, "out_channels": 6, "kernel_size": 4, "stride": 4},
    "padding": {"in_channels": 3, "out_channels": 6, "kernel_size": 3, "stride": 2, "padding": 1},
    "groups": {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 2},
    "same": {
        "in_channels": 2,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": "same",
        "dilation": 2,
    },
    "reflect": {
        "in_channels": 2,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": 2,
        "padding_mode": "reflect",
    },
}


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@pytest.mark.parametrize("input_bits", [32, 8, 3])
def test_convolution_search_equals_a_slow_one(settings: dict[str, object], input_bits: int) -> None:
    torch.manual_seed(2)
    layer = QuantConv2d.from_float(nn.Conv2d(**settings), 3, input_bits)
    with torch.no_grad():
        layer.weight.copy_(heavy(*layer.weight.shape))
    x = torch.randn(11, layer.in_channels, 12, 12) + 0.3
    calibrate_conv(layer, x, recipe(3, range_candidates=24))

    matrix, levels = layer.weight.detach().flatten(1), 8
    if input_bits != 32:
        span = x.max() - x.min()
        assert float(layer.input_quantizer.scale) == pytest.approx(
            float(span) / (2**input_bits - 1), rel=1e-5
        )
    double = nn.Conv2d(**settings).double().requires_grad_(False)
    double.bias.zero_()

    def run(weight: Tensor, inputs: Tensor) -> Tensor:
        double.weight.copy_(weight.double().view_as(double.weight))
        return double(inputs.double())

    target, x_hat = run(matrix, x), layer.input_quantizer(x)

    def errors(candidates: Candidates) -> Tensor:
        found = []
        for scale, zero in zip(candidates.scale, candidates.zero_point, strict=True):
            output = run(fake_quantize(matrix, scale[:, None], zero[:, None], levels), x_hat)
            found.append((output - target).square().sum((0, 2, 3)))
        return torch.stack(found)

    points = torch.tensor(
        [0.99 + 0.0099 * (i / 23) ** 0.5 for i in range(24)] + [1.0], dtype=torch.float64
    )
    uppers = matrix.double().quantile(points, dim=1).float()
    lowers = matrix.double().quantile(1 - points, dim=1).float()
    index = errors(from_bounds(lowers, uppers, levels)).argmin(0)
    held = uppers.gather(0, index[None]).expand_as(uppers)
    index = errors(from_bounds(lowers, held, levels)).argmin(0)
    held = lowers.gather(0, index[None]).expand_as(lowers)
    table = errors(from_bounds(held, uppers, levels))
    quantizer = layer.weight_quantizer
    reached = errors(Candidates(quantizer.scale[:, 0][None], quantizer.zero_point[:, 0][None]))[0]
    assert (reached <= table.amin(0) * CLOSE).all()


def attention_operands(heads: int = 3) -> tuple[Tensor, Tensor]:
    """softmax(scores) and values, heads of very different sizes."""
    size = torch.tensor([0.2, 1.0, 6.0][:heads])[:, None, None]
    scores = torch.randn(5, heads, 9, 9) * 2 * size.clamp(min=0.5)
    return scores.softmax(-1), heavy(5, heads, 9, 4) * size


@pytest.mark.parametrize("operands", ["scores", "softmax"])
@pytest.mark.parametrize("bits", [3, 4])
def test_product_search_equals_a_slow_one(operands: str, bits: int) -> None:
    torch.manual_seed(7)
    if operands == "softmax":
        a, b = attention_operands()
    else:
        a, b = heavy(5, 3, 9, 6), heavy(5, 3, 6, 9) * torch.tensor([1.0, 3.0, 0.1])[:, None, None]
    layer, levels, count, rounds = QuantMatMul(bits), 2**bits, 32, 2
    calibrate_matmul(layer, a, b, recipe(bits, range_candidates=count, range_rounds=rounds))
    assert layer.a_quantizer.scale.shape == layer.b_quantizer.scale.shape == (1, 3, 1, 1)

    share = torch.linspace(0, 1, count + 1)[:count]
    for head in range(3):
        operand = {"a": a[:, head], "b": b[:, head]}
        bounds = {}
        for name, values in operand.items():
            q = (
                values.double()
                .flatten()
                .quantile(torch.tensor([0.99, 0.99999, 1e-5, 0.01], dtype=torch.float64))
                .float()
            )
            bounds[name] = (
                q[2] + share * (q[3] - q[2]),
                q[0] + share * (q[1] - q[0]),
            )  # lowers, uppers
        present = {
            name: from_bounds(lows[-1].view(1, 1), ups[-1].view(1, 1), levels)
            for name, (lows, ups) in bounds.items()
        }
        chosen: dict[str, tuple[int, int]] = {}

        def hat(name: str, ranges: Candidates, operand: dict[str, Tensor] = operand) -> Tensor:
            return fake_quantize(operand[name], ranges.scale[0, 0], ranges.zero_point[0, 0], levels)

        def search(name: str, low: int | None, up: int | None, free: list[tuple[int, int]]) -> None:
            lows, ups = bounds[name]  # noqa: B023 - called in this round of the loop only
            candidates = from_bounds(
                torch.stack([lows[i if low is None else low] for i, _ in free])[:, None],
                torch.stack([ups[j if up is None else up] for _, j in free])[:, None],
                levels,
            )
            left = name == "a"
            x = operand["a"] if left else operand["b"].transpose(1, 2)  # noqa: B023
            partner = "b" if left else "a"
            other, other_hat = operand[partner], hat(partner, present[partner])  # noqa: B023
            if not left:
                other, other_hat = other.transpose(1, 2), other_hat.transpose(1, 2)
            best = int(direct_operand_errors(x, other_hat, other, candidates, levels).argmin())
            first, last = free[best]
            pair = first if low is None else low, last if up is None else up
            chosen[name] = pair  # noqa: B023
            scale, zero_point = candidates.scale, candidates.zero_point
            one = slice(best, best + 1)
            present[name] = Candidates(scale[one], zero_point[one])  # noqa: B023

        same = [(i, i) for i in range(count)]
        search("a", None, None, same)
        search("b", None, None, same)
        for _ in range(rounds):
            for name in ("a", "b"):
                search(name, None, chosen[name][1], same)
                search(name, chosen[name][0], None, same)
        for name, quantizer in (("a", layer.a_quantizer), ("b", layer.b_quantizer)):
            assert float(quantizer.scale[0, head]) == pytest.approx(
                float(present[name].scale), rel=1e-5
            ), (head, name)
            assert float(quantizer.zero_point[0, head]) == float(present[name].zero_point), (
                head,
                name,
            )


def test_only_what_is_on_gets_a_range() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6)
    layer = QuantLinear.from_float(nn.Linear(6, 3), 32, 4)
    calibrate_linear(layer, x, recipe(4))
    assert layer.weight_quantizer.scale.numel() == 0
    assert layer.input_quantizer.scale.numel() == 1
    layer = QuantLinear.from_float(nn.Linear(6, 3), 4, 32)
    calibrate_linear(layer, x, recipe(4))
    assert layer.weight_quantizer.scale.shape == (3, 1)
    assert layer.input_quantizer.scale.numel() == 0
    layer.quantized = True
    assert torch.equal(
        layer(x), F.linear(x, layer.weight_quantizer.quantized(layer.weight), layer.bias)
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_minmax_ranges_of_layers(bits: int) -> None:
    torch.manual_seed(0)
    settings = make_recipe("rtn", {"w_bits": bits, "a_bits": bits})
    layer = QuantLinear.from_float(nn.Linear(6, 3), bits, bits)
    x = torch.randn(4, 5, 6) + 1
    calibrate_linear(layer, x, settings)
    weight = layer.weight.detach()
    expected = (weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)) / (2**bits - 1)
    assert torch.allclose(layer.weight_quantizer.scale[:, 0], expected)
    assert float(layer.input_quantizer.scale) == pytest.approx(
        float((x.max() - x.min()) / (2**bits - 1)), rel=1e-6
    )
    product = QuantMatMul(bits)
    a, b = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 5, 4)
    calibrate_matmul(product, a, b, settings)
    assert torch.allclose(product.a_quantizer.scale.flatten(), a.amax((0, 2, 3)) / (2**bits - 1))
    assert (product.a_quantizer.zero_point == 0).all()
    assert torch.allclose(
        product.b_quantizer.scale.flatten(), (b.amax((0, 2, 3)) - b.amin((0, 2, 3))) / (2**bits - 1)
    )
