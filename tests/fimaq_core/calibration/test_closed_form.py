"""GPTQ and GPTAQ against slow versions that solve a least-squares problem per column."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fimaq_core.calibration import closed_form as module
from fimaq_core.calibration.candidates import minmax
from fimaq_core.calibration.closed_form import ClosedForm, LayerMoments, closed_form, round_layer
from fimaq_core.calibration.refit import RoundingGrid
from fimaq_core.errors import NumericsError
from fimaq_core.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear, WeightLayer
from fimaq_core.quantizers.affine import fake_quantize

Array = NDArray[np.float64]


def inputs(tokens: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated inputs in full precision, and inputs that a quantized prefix changed."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing + 0.5
    noise = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return x, x + noise + 0.3 * x.roll(1, 1)


def problem(rows: int, width: int, levels: int = 8, share: float = 0.8) -> tuple[Tensor, ...]:
    """Weight, scale and zero point; a share of the range below 1 clamps some codes."""
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    scale, zero = minmax(weight, levels)
    return weight, scale[:, None] * share, zero[:, None]


def moments(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    return x_hat.t() @ x_hat, (x - x_hat).t() @ x_hat


def nearest(value: Array, scale: Array, zero: Array, levels: int) -> Array:
    return np.clip(np.round(value / scale) + zero, 0, levels - 1)


def by_columns(
    weight: Tensor, grid: RoundingGrid, x: Tensor, x_hat: Tensor, damp: float
) -> tuple[Array, Array]:
    """Codes and compensated weights: after each column, least squares over the later columns.

    Each solution makes ``X̂ ŵ_q + X̂ w' (later)`` near ``X w_q + X̂ w (later)``, with a ridge on the
    change of the later columns. Equal inputs x and x_hat make GPTQ.
    """
    full, hat = x.numpy(), x_hat.numpy()
    free = weight.double().numpy().copy()
    scale, zero = grid.scale[:, 0].double().numpy(), grid.zero_point[:, 0].double().numpy()
    diagonal = (hat**2).sum(0)
    ridge, codes = damp * diagonal.mean(), np.zeros_like(free)
    order = np.argsort(-diagonal, kind="stable")
    for place, q in enumerate(order):
        codes[:, q] = nearest(free[:, q], scale, zero, grid.levels)
        point, later = (codes[:, q] - zero) * scale, order[place + 1 :]
        wanted = np.outer(full[:, q], free[:, q]) - np.outer(hat[:, q], point)
        rows = np.concatenate([hat[:, later], np.sqrt(ridge) * np.eye(len(later))])
        target = np.concatenate([wanted, np.zeros((len(later), len(free)))])
        free[:, later] += np.linalg.lstsq(rows, target, rcond=None)[0].T
    return codes, free


def by_inverse_updates(weight: Tensor, grid: RoundingGrid, hessian: Array) -> Array:
    """Codes by the formulas of optimal brain quantization: an inverse that loses a row per step."""
    free, inverse = weight.double().numpy().copy(), np.linalg.inv(hessian)
    scale, zero = grid.scale[:, 0].double().numpy(), grid.zero_point[:, 0].double().numpy()
    codes = np.zeros_like(free)
    for q in np.argsort(-hessian.diagonal(), kind="stable"):
        codes[:, q] = nearest(free[:, q], scale, zero, grid.levels)
        error = free[:, q] - (codes[:, q] - zero) * scale
        free -= np.outer(error / inverse[q, q], inverse[q])
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


@pytest.mark.parametrize("asymmetric", [False, True], ids=["gptq", "gptaq"])
@pytest.mark.parametrize(("width", "columns"), [(24, 7), (24, 128), (140, 128)])
def test_equals_least_squares_after_each_column(
    monkeypatch: pytest.MonkeyPatch, asymmetric: bool, width: int, columns: int
) -> None:
    monkeypatch.setattr(module, "_COLUMNS", columns)
    x, x_hat = inputs(3 * width, width)
    weight, scale, zero = problem(6, width)
    grid = RoundingGrid(scale, zero, 8)
    square, pull = moments(x, x_hat)
    found = closed_form(weight, grid, square=square, pull=pull if asymmetric else None, damp=0.01)
    codes, free = by_columns(weight, grid, x if asymmetric else x_hat, x_hat, 0.01)
    assert found.codes.dtype == found.weight.dtype == torch.float32
    np.testing.assert_array_equal(found.codes.numpy(), codes)
    np.testing.assert_allclose(found.weight.numpy(), free, rtol=1e-5, atol=1e-6)
    assert found.damp == 0.01
    assert (codes == 0).any()
    assert (codes == 7).any()


def test_gptq_equals_optimal_brain_quantization() -> None:
    _, x_hat = inputs(90, 30)
    weight, scale, zero = problem(5, 30)
    square = x_hat.t() @ x_hat
    found = closed_form(weight, RoundingGrid(scale, zero, 8), square=square, damp=0.01)
    hessian = (square + 0.01 * square.diagonal().mean() * torch.eye(30)).numpy()
    codes = by_inverse_updates(weight, RoundingGrid(scale, zero, 8), hessian)
    np.testing.assert_array_equal(found.codes.numpy(), codes)


def test_two_columns_by_hand() -> None:
    """H = [[4, 2], [2, 2]] and w = (0.6, 0.8), on whole numbers, zero point 4.

    Column 0 has the larger diagonal entry. It becomes 1, a change of 0.4. The change d of column 1
    that keeps the error 4 * 0.4² + 2 * 2 * 0.4 d + 2 d² smallest is d = -0.4, so 0.8 becomes 0.4,
    which is rounded to 0. Changes (0.4, -0.8) have the error 0.64 - 1.28 + 1.28 = 0.64. Rounding to
    nearest gives (1, 1), changes (0.4, 0.2) and the error 0.64 + 0.32 + 0.08 = 1.04.
    """
    square = torch.tensor([[4.0, 2.0], [2.0, 2.0]], dtype=torch.float64)
    weight = torch.tensor([[0.6, 0.8]])
    grid = RoundingGrid(torch.ones(1, 1), torch.full((1, 1), 4.0), 16)
    found = closed_form(weight, grid, square=square, damp=0.0)
    assert found.codes.tolist() == [[5.0, 4.0]]
    assert torch.allclose(found.weight, torch.tensor([[0.6, 0.4]]))
    # The same with the columns exchanged: the order follows the diagonal.
    found = closed_form(weight.flip(1), grid, square=square.flip(0, 1), damp=0.0)
    assert found.codes.tolist() == [[4.0, 5.0]]


def test_gptaq_with_two_columns_by_hand() -> None:
    """One token: X̂ = (2, 1) where X = (3, 1); w = (1, 1) lies on the grid.

    Column 0 has no error, but its input lost 1. With a ridge of damp * (4 + 1) / 2 = 1 on the
    change d of column 1, (1 * d - 1 * w_0)² + d² is smallest at d = 0.5, so column 1 is rounded at
    1.5. (At 2, the output 2 * 1 + 1 * 2 would be that on X, 3 * 1 + 1 * 1.)
    """
    x_hat = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    square, pull = moments(torch.tensor([[3.0, 1.0]], dtype=torch.float64), x_hat)
    grid = RoundingGrid(torch.ones(1, 1), torch.full((1, 1), 4.0), 16)
    found = closed_form(torch.ones(1, 2), grid, square=square, pull=pull, damp=0.4)
    assert torch.allclose(found.weight, torch.tensor([[1.0, 1.5]]))


def test_gptaq_with_unchanged_inputs_is_gptq() -> None:
    x, _ = inputs(80, 20)
    weight, scale, zero = problem(6, 20)
    grid = RoundingGrid(scale, zero, 8)
    square, pull = moments(x, x)
    with_pull = closed_form(weight, grid, square=square, pull=pull, damp=0.01)
    without = closed_form(weight, grid, square=square, damp=0.01)
    assert torch.equal(with_pull.codes, without.codes)
    assert torch.equal(with_pull.weight, without.weight)


def test_independent_inputs_are_rounded_to_nearest() -> None:
    weight, scale, zero = problem(6, 20)
    square = torch.rand(20, dtype=torch.float64).add(0.1).diag()
    found = closed_form(weight, RoundingGrid(scale, zero, 8), square=square, damp=0.01)
    expected = nearest(weight.numpy(), scale.numpy(), zero.numpy(), 8)
    np.testing.assert_array_equal(found.codes.numpy(), expected)
    assert torch.allclose(found.weight, weight)


def error(found: Tensor, weight: Tensor, x: Tensor, x_hat: Tensor) -> float:
    return float((x_hat @ found.double().t() - x @ weight.double().t()).square().sum())


@pytest.mark.parametrize("seed", range(4))
def test_output_errors_fall_from_nearest_to_gptq_and_gptaq(seed: int) -> None:
    """On X̂ for GPTQ, against the outputs on X for GPTAQ."""
    x, x_hat = inputs(400, 24, seed)
    weight, scale, zero = problem(12, 24, levels=16, share=1.0)
    grid, (square, pull) = RoundingGrid(scale, zero, 16), moments(x, x_hat)
    found = {
        "nearest": fake_quantize(weight, scale, zero, 16),
        "gptq": (closed_form(weight, grid, square=square, damp=0.01).codes - zero) * scale,
        "gptaq": (closed_form(weight, grid, square=square, pull=pull, damp=0.01).codes - zero)
        * scale,
    }
    own = {name: error(value, weight, x_hat, x_hat) for name, value in found.items()}
    assert own["gptq"] < 0.8 * own["nearest"]
    target = {name: error(value, weight, x, x_hat) for name, value in found.items()}
    assert target["gptaq"] < target["gptq"]


def test_inputs_that_are_always_zero_are_safe() -> None:
    """Their columns are rounded to nearest, and do not change the others."""
    x, x_hat = inputs(60, 12)
    x, x_hat = x.clone(), x_hat.clone()
    x[:, 3] = x_hat[:, 3] = 0
    weight, scale, zero = problem(4, 12)
    grid, (square, pull) = RoundingGrid(scale, zero, 8), moments(x, x_hat)
    found = closed_form(weight, grid, square=square, pull=pull, damp=0.01)
    assert found.weight[:, 3].equal(weight[:, 3])
    assert found.damp == 0.01
    none = closed_form(weight, grid, square=torch.zeros(12, 12, dtype=torch.float64), damp=0.01)
    expected = nearest(weight.numpy(), scale.numpy(), zero.numpy(), 8)
    np.testing.assert_array_equal(none.codes.numpy(), expected)


def test_singular_moments_are_damped_more() -> None:
    one = torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, scale, zero = problem(4, 16)
    grid = RoundingGrid(scale, zero, 8)
    found = closed_form(weight, grid, square=one.t() @ one, damp=1e-30)
    assert 1e-30 < found.damp < 1e-8
    assert bool(found.weight.isfinite().all())


def test_moments_that_are_not_finite_are_refused() -> None:
    weight, scale, zero = problem(4, 3)
    square = torch.eye(3, dtype=torch.float64)
    square[1, 1] = float("nan")
    with pytest.raises(NumericsError, match="NaN or infinite"):
        closed_form(weight, RoundingGrid(scale, zero, 8), square=square, damp=0.01)


def calibrated(layer: WeightLayer) -> WeightLayer:
    matrix = layer.weight.detach().flatten(1)
    scale, zero = minmax(matrix, layer.weight_quantizer.levels)
    layer.weight_quantizer.set_range(scale[:, None], zero[:, None])
    return layer


def rounded(layer: WeightLayer, x: Tensor, full: Tensor | None) -> ClosedForm:
    found = LayerMoments(layer)
    found.add(x, full)
    return round_layer(found, 0.01, asymmetric=full is not None)


CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 6, 3, padding=1), (4, 3, 7, 8)),
    "strided": (nn.Conv2d(3, 6, 4, stride=4), (4, 3, 12, 8)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (4, 4, 7, 8)),
    "transposed": (nn.ConvTranspose2d(3, 6, 2, stride=2), (4, 3, 5, 6)),
    "transposed wide": (
        nn.ConvTranspose2d(3, 5, (3, 4), (2, 3), (1, 0), (1, 2), dilation=(2, 1)), (4, 3, 5, 6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_moments_of_convolutions_are_those_of_their_outputs(name: str) -> None:
    """For one output channel δ: Σ outputs(δ)² = δ H δᵀ, and outputs of X and X̂ give the pull."""
    torch.manual_seed(0)
    plain, shape = CONVOLUTIONS[name]
    form = QuantConvTranspose2d if "transposed" in name else QuantConv2d
    layer = form.from_float(plain, 3, 32)
    x_hat, x = torch.randn(shape), torch.randn(shape)
    found = LayerMoments(layer)
    found.add(x_hat, x)
    probe = torch.randn_like(layer.weight)
    outputs = [layer.compute(each, probe, None).double() for each in (x, x_hat)]
    rows = probe.flatten(1).double().chunk(found.groups)
    for group, own in enumerate(rows):
        full, hat = (one.chunk(found.groups, 1)[group].sum((0, 2, 3)) for one in (
            (outputs[0] - outputs[1]) * outputs[1], outputs[1].square()
        ))  # fmt: skip
        quadratic = ((own @ found.square[group]) * own).sum(1)
        assert torch.allclose(quadratic, hat, rtol=1e-5)
        assert torch.allclose(((own @ found.pull[group]) * own).sum(1), full, rtol=1e-4, atol=1e-4)


def test_a_convolution_is_rounded_as_a_linear_layer_on_its_patches() -> None:
    torch.manual_seed(1)
    conv = calibrated(QuantConv2d.from_float(nn.Conv2d(3, 5, 4, stride=4), 3, 32))
    linear = QuantLinear.from_float(nn.Linear(48, 5), 3, 32)
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1))
    x, full = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8)
    tokens = [functional.unfold(each, 4, stride=4).transpose(1, 2) for each in (x, full)]
    found, expected = rounded(conv, x, full), rounded(calibrated(linear), *tokens)
    assert torch.equal(found.codes, expected.codes)
    assert torch.allclose(found.weight, expected.weight, atol=1e-5)


def test_patches_of_large_images_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATCHES", 10)
    layer = QuantConv2d.from_float(nn.Conv2d(1, 2, 1), 3, 32)
    found = LayerMoments(layer)
    found.add(torch.ones(3, 1, 9, 9))
    assert found.square.item() == 30
