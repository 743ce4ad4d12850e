"""Errors of many ranges at once against one direct computation each, in float64."""

import pytest
import torch
from torch import Tensor

from fimaq_core.calibration import similar_ranges
from fimaq_core.calibration.candidates import Candidates
from fimaq_core.calibration.similar_ranges import RangeErrors, uniform_points
from fimaq_core.calibration.special_ranges import _adalog_points, _logarithm
from fimaq_core.calibration.weight_error import Rows, best_weight_errors, input_moments
from fimaq_core.quantizers.affine import fake_quantize
from fimaq_core.quantizers.logarithm import GELU_SHIFT, adalog_fake_quantize, adalog_tables

LEVELS = 16


def operands(columns: int, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """An operand (12, 7, 9), the other one quantized and in full precision."""
    torch.manual_seed(columns)
    x, plain = torch.randn(12, 7, 9), torch.randn(1 if shared else 12, 9, columns)
    return x, plain + 0.1 * torch.randn_like(plain), plain


def near(scale: float, distance: float) -> tuple[Tensor, Tensor]:
    """40 scales in no order, neighbours ``distance`` apart, of two kinds."""
    order = torch.randperm(40)
    return (scale * (1 + distance * torch.arange(40) / 40))[order], torch.tensor([7.0, 8.0]).repeat(
        20
    )


def check(found: Tensor, expected: Tensor, width: int) -> None:
    """Check that finite errors are right, and that infinite ones are not among the best."""
    assert found.dtype == torch.float64
    finite = found.isfinite()
    assert int(finite.sum()) >= width
    assert found[finite].tolist() == pytest.approx(expected[finite].tolist(), rel=2e-6)
    assert (expected[~finite] >= expected.kthvalue(width).values * (1 - 1e-6)).all()


@pytest.fixture(params=["alone", "runs"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each candidate by itself, or all of a kind in one run."""
    cost = (1e9, 0.0, 0.0) if request.param == "alone" else (0.0, 0.0, 0.0)
    for name, value in zip(("_RUN_COST", "_CHANGE_COST", "_PAIR_COST"), cost, strict=True):
        monkeypatch.setattr(similar_ranges, name, value)
    return str(request.param)


@pytest.mark.parametrize("block", [2**21, 16 * 7 * 9 * 5], ids=["one piece", "pieces"])
@pytest.mark.parametrize("distance", [0.0, 1e-4, 0.05, 1.0])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("columns", [5, 14], ids=["direct form", "gram form"])
def test_uniform_errors_equal_direct_ones(
    columns: int,
    shared: bool,
    distance: float,
    block: int,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(similar_ranges, "block_elements", lambda _: block)
    x, other, plain = operands(columns, shared)
    scale, zero = near(0.3, distance)
    target = x.double() @ plain.double()
    quantized = [fake_quantize(x, *pair, LEVELS).double() for pair in zip(scale, zero, strict=True)]
    expected = torch.stack([(one @ other.double() - target).square().sum() for one in quantized])
    errors = RangeErrors(x, other, x @ (other - plain), uniform_points(LEVELS))
    for width in (1, 16, 40):
        found = errors.best(scale, zero, width)
        check(found, expected, width)
        assert way == "alone" or found.isfinite().all()


@pytest.mark.parametrize("distance", [1e-4, 0.05, 1.0])
def test_adalog_errors_equal_direct_ones(distance: float, way: str) -> None:
    x, other, plain = operands(5, True)
    x = torch.nn.functional.gelu(x)
    shifted = x + GELU_SHIFT
    scale, q = near(1.5, distance)
    q = q + 11
    expected = []
    for one, numerator in zip(scale, q.int().tolist(), strict=True):
        quantized = (
            adalog_fake_quantize(
                shifted, one, *adalog_tables(numerator, LEVELS), numerator / 37, LEVELS
            )
            - GELU_SHIFT
        )
        expected.append(
            (quantized.double() @ other.double() - x.double() @ plain.double()).square().sum()
        )
    errors = RangeErrors(
        shifted, other, x @ (other - plain), _adalog_points(LEVELS), _logarithm(shifted)
    )
    check(errors.best(scale, q, 8), torch.stack(expected), 8)


def test_candidates_that_are_clearly_worse_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar_ranges, "_RUN_COST", 1e9)
    x, other, plain = operands(5, True)
    errors = RangeErrors(x, other, x @ (other - plain), uniform_points(LEVELS))
    errors.step = 1
    scale = torch.linspace(0.05, 3, 60)
    assert int(errors.best(scale, torch.full((60,), 8.0), 4).isfinite().sum()) < 30


@pytest.mark.parametrize(
    "distance", [1e-4, 0.02, 1.0, 8.0], ids=["shared codes", "some shared", "more", "sieve"]
)
@pytest.mark.parametrize("width", [1, 16])
def test_weight_errors_equal_direct_ones(distance: float, width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(200, 12), torch.randn(6, 12)
    x_hat = fake_quantize(x, torch.tensor(0.4), torch.tensor(8.0), LEVELS)
    pairs = [near(0.2 + 0.05 * row, distance) for row in range(6)]
    candidates = Candidates(
        torch.stack([scale for scale, _ in pairs], 1), torch.stack([zero for _, zero in pairs], 1)
    )
    rows = Rows(weight, LEVELS, *input_moments(x, x_hat, weight))
    found = best_weight_errors(rows, candidates, width)
    constant = ((x_hat - x).double() @ weight.double().t()).square().sum(0)
    for row in range(6):
        quantized = [
            fake_quantize(weight[row], *pair, LEVELS) for pair in zip(*pairs[row], strict=True)
        ]
        target = x.double() @ weight[row].double()
        expected = torch.stack(
            [(x_hat.double() @ one.double() - target).square().sum() for one in quantized]
        )
        check(found[:, row] + constant[row], expected, width)
    assert found.isinf().any() == (distance == 8.0)
