"""Ridge refit and refined rounding against explicit regressions and a slow version of one row."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fimaq_core.calibration.candidates import minmax
from fimaq_core.calibration.refit import (
    InputMoments,
    RoundingGrid,
    refine_rounding,
    refit_moments,
    ridge_refit,
)
from fimaq_core.errors import NumericsError
from fimaq_core.quantizers.affine import fake_quantize

Array = NDArray[np.float64]
biases = pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])


def inputs(tokens: int, width: int, levels: int = 8) -> tuple[Tensor, Tensor]:
    """Correlated inputs off zero, and their quantized form."""
    mixing = torch.randn(width, width) * torch.linspace(0.1, 1.5, width)[:, None]
    x = torch.randn(tokens, width) @ mixing + torch.randn(width)
    scale = (x.amax() - x.amin()) / (levels - 1)
    return x, fake_quantize(x, scale, (-x.amin() / scale).round(), levels)


def parameters(rows: int, width: int, biased: bool) -> tuple[Tensor, Tensor | None]:
    return torch.randn(rows, width), torch.randn(rows) if biased else None


def grid(weight: Tensor, levels: int, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Grid (rows, 1) over ``share`` of each row's range: a smaller share clamps."""
    scale, zero = minmax(weight, levels)
    return scale[:, None] * share, zero[:, None]


def extended(x_hat: Tensor, biased: bool) -> Array:
    """A, in float64."""
    wide = x_hat.double().numpy()
    return np.concatenate([wide, np.ones((len(wide), 1))], 1) if biased else wide


def joint(weight: Tensor, bias: Tensor | None) -> Array:
    """[w, b], in float64."""
    return torch.cat([weight] if bias is None else [weight, bias[:, None]], 1).double().numpy()


def output_errors(x: Tensor, x_hat: Tensor, before: Array, after: Array, biased: bool) -> Array:
    """Squared error of each row's output with quantized inputs and new parameters."""
    return ((extended(x_hat, biased) @ after.T - extended(x, biased) @ before.T) ** 2).sum(0)


def test_moments_of_many_tokens_are_those_of_float64() -> None:
    torch.manual_seed(0)
    x = torch.randn(300_001, 8) * torch.logspace(-3, 2, 8) + 50  # more than one piece
    x_hat = (x / 0.7).round() * 0.7
    found = refit_moments(x, x_hat)
    wide, wide_hat = x.double().numpy(), x_hat.double().numpy()
    for moment, expected in (
        (found.square, wide_hat.T @ wide_hat),
        (found.cross, wide_hat.T @ wide),
        (found.sum_hat, wide_hat.sum(0)),
        (found.sum_plain, wide.sum(0)),
    ):
        assert moment.dtype == torch.float64
        np.testing.assert_allclose(moment.numpy(), expected, rtol=1e-11)
    assert found.count == 300_001
    weight, bias = parameters(5, 8, True)
    for made, expected in zip(
        ridge_refit(weight, bias, found, 1e3),
        explicit_refit(x, x_hat, weight, bias, 1e3),
        strict=True,
    ):
        np.testing.assert_allclose(made.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("elements", [1, 40, 10**6])
def test_pieces_of_tokens_make_the_same_moments(
    monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr("fimaq_core.calibration.refit.block_elements", lambda device: elements)
    torch.manual_seed(0)
    x, x_hat = inputs(37, 6)
    found = refit_moments(x, x_hat)
    assert torch.allclose(found.square, x_hat.double().t() @ x_hat.double(), rtol=1e-12)
    assert torch.allclose(found.cross, x_hat.double().t() @ x.double(), rtol=1e-12)
    assert torch.allclose(found.sum_plain, x.double().sum(0), rtol=1e-12)


def explicit_refit(
    x: Tensor, x_hat: Tensor, weight: Tensor, bias: Tensor | None, ridge: float
) -> tuple[Array, Array]:
    """The normal equations on matrices of all tokens."""
    biased = bias is not None
    a, old = extended(x_hat, biased), joint(weight, bias)
    residual = extended(x, biased) @ old.T - a @ old.T
    new = old + np.linalg.solve(a.T @ a + ridge * np.eye(a.shape[1]), a.T @ residual).T
    return new[:, : weight.shape[1]], new[:, -1]


@biases
@pytest.mark.parametrize("ridge", [0.0, 0.1, 30.0, 1e9])
def test_refit_solves_the_normal_equations(biased: bool, ridge: float) -> None:
    torch.manual_seed(0)
    x, x_hat = inputs(200, 14)
    weight, bias = parameters(9, 14, biased)
    before = weight.clone()
    new_weight, new_bias = ridge_refit(weight, bias, refit_moments(x, x_hat), ridge)
    expected_weight, expected_bias = explicit_refit(x, x_hat, weight, bias, ridge)
    assert torch.equal(weight, before)
    assert new_weight.dtype == torch.float32
    np.testing.assert_allclose(new_weight.numpy(), expected_weight, rtol=1e-5, atol=1e-6)
    if new_bias is None:
        assert not biased
    else:
        assert new_bias.dtype == torch.float32
        np.testing.assert_allclose(new_bias.numpy(), expected_bias, rtol=1e-5, atol=1e-6)
    if ridge == 1e9:
        assert torch.allclose(new_weight, weight, atol=1e-4)


@biases
@pytest.mark.parametrize("ridge", [0.0, 1e-7])
def test_refit_without_a_ridge_is_least_squares(biased: bool, ridge: float) -> None:
    torch.manual_seed(1)
    x, x_hat = inputs(150, 10)
    weight, bias = parameters(6, 10, biased)
    target = torch.from_numpy(extended(x, biased) @ joint(weight, bias).T)
    best = (
        torch.linalg.lstsq(torch.from_numpy(extended(x_hat, biased)), target).solution.t().numpy()
    )
    np.testing.assert_allclose(
        joint(*ridge_refit(weight, bias, refit_moments(x, x_hat), ridge)),
        best,
        rtol=1e-5,
        atol=1e-6,
    )


@biases
@pytest.mark.parametrize("ridge", [0.0, 1.0, 1000.0])
def test_refit_lowers_the_output_error_of_every_row(biased: bool, ridge: float) -> None:
    torch.manual_seed(2)
    x, x_hat = inputs(300, 20)
    weight, bias = parameters(12, 20, biased)
    old = joint(weight, bias)
    new = joint(*ridge_refit(weight, bias, refit_moments(x, x_hat), ridge))
    assert (
        output_errors(x, x_hat, old, new, biased)
        < 0.999 * output_errors(x, x_hat, old, old, biased)
    ).all()


def test_refit_leaves_weights_of_unquantized_inputs_alone() -> None:
    torch.manual_seed(0)
    x, _ = inputs(50, 6)
    weight, bias = parameters(4, 6, True)
    new_weight, new_bias = ridge_refit(weight, bias, refit_moments(x, x), 0.0)
    assert torch.equal(new_weight, weight)
    assert new_bias is not None
    assert torch.equal(new_bias, bias)


def slow_row(
    row: Array,
    biased: bool,
    scale: float,
    zero: float,
    levels: int,
    a: Array,
    ridge: float,
    flips: int,
    steep: bool,
) -> tuple[list[int], float | None, int]:
    """Refine one row by loops over elements and tokens; return codes, bias and kept flips."""
    current, codes, kept = row.copy(), {}, 0
    free = list(range(len(row)))

    def clamped(code: float) -> int:
        return int(min(max(code, 0), levels - 1))

    def value(code: int) -> float:
        return (code - zero) * scale

    while len(free) > 1:
        half, rest = free[: len(free) // 2], free[len(free) // 2 :]
        moment = sum(np.outer(token[half], token[half]) for token in a) / len(a)
        for i in half:
            codes[i] = clamped(np.round(current[i] / scale) + zero)

        def deltas(half: list[int] = half) -> Array:
            return np.array([value(codes[i]) - current[i] for i in half])

        for _ in range(flips):
            delta = deltas()
            gradient = 2 * moment @ delta
            best = None
            for k, i in enumerate(half):
                below, above = (
                    clamped(np.floor(current[i] / scale) + zero),
                    clamped(np.ceil(current[i] / scale) + zero),
                )
                if below == above or np.sign(delta[k]) != np.sign(gradient[k]) or gradient[k] == 0:
                    continue
                if best is None or abs(gradient[k]) > abs(gradient[best[0]]):
                    best = k, i, above if codes[i] == below else below
            if best is None or (steep and abs(gradient[best[0]]) <= scale / 2):
                break
            before = codes[best[1]]
            codes[best[1]] = best[2]
            if not deltas() @ moment @ deltas() < delta @ moment @ delta:
                codes[best[1]] = before
                break
            kept += 1
        delta = deltas()
        current[half] += delta
        normal = a[:, rest].T @ a[:, rest] + ridge * np.eye(len(rest))
        current[rest] -= np.linalg.solve(normal, a[:, rest].T @ (a[:, half] @ delta))
        free = rest
    if not biased:
        codes[free[0]] = clamped(np.round(current[free[0]] / scale) + zero)
    return [codes[i] for i in sorted(codes)], current[-1] if biased else None, kept


@biases
@pytest.mark.parametrize("width", [1, 2, 3, 11, 24])
@pytest.mark.parametrize(
    ("levels", "share"), [(4, 1.0), (16, 0.4)], ids=["2 bits", "4 bits, clamped"]
)
@pytest.mark.parametrize(
    ("flips", "steep"), [(0, False), (1, False), (3, False), (100, False), (100, True)]
)
def test_rounding_equals_a_slow_version(
    biased: bool, width: int, levels: int, share: float, flips: int, steep: bool
) -> None:
    torch.manual_seed(width)
    x, x_hat = inputs(60, width)
    weight, bias = parameters(12, width, biased)
    scale, zero = grid(weight, levels, share)
    codes, new_bias = refine_rounding(
        weight, bias, RoundingGrid(scale, zero, levels), refit_moments(x, x_hat), 2.0, flips, steep
    )
    assert codes.dtype == torch.float32
    a, old, kept = extended(x_hat, biased), joint(weight, bias), 0
    for number, row in enumerate(old):
        found = slow_row(
            row, biased, float(scale[number]), float(zero[number]), levels, a, 2.0, flips, steep
        )
        assert codes[number].tolist() == found[0]
        kept += found[2]
        if new_bias is not None:
            assert float(new_bias[number]) == pytest.approx(found[1], rel=1e-5, abs=1e-6)
    assert (new_bias is not None) == biased
    # The comparison means nothing where no flip is ever kept.
    assert kept >= 4 or width < 11 or not flips


def test_the_released_rule_flips_nothing_where_gradients_are_under_half_a_step() -> None:
    """The gradient grows with the square of the inputs, the step does not."""
    torch.manual_seed(5)
    x, x_hat = inputs(400, 40)
    weight, bias = parameters(30, 40, True)
    scale, zero = grid(weight, 8)

    def codes(size: float, flips: int, steep: bool) -> Tensor:
        moments, points = refit_moments(size * x, size * x_hat), RoundingGrid(scale, zero, 8)
        found, _ = refine_rounding(weight, bias, points, moments, 0.0, flips, steep)
        return found[:, :20]  # the first half, which no earlier half compensates

    delta = (codes(1.0, 0, False) - zero) * scale - weight[:, :20]
    second = x_hat[:, :20].double().T @ x_hat[:, :20].double() / len(x_hat)
    largest = (2 * delta.double() @ second).abs().amax(1) / scale[:, 0]  # in steps
    small = float(0.49 / largest.max()) ** 0.5
    assert torch.equal(codes(small, 100, True), codes(small, 0, False))
    assert not torch.equal(codes(small, 100, False), codes(small, 0, False))
    large = float(100 / largest.min()) ** 0.5
    assert torch.equal(codes(large, 1, True), codes(large, 1, False))
    assert not torch.equal(codes(large, 1, True), codes(large, 0, False))


def first_half_errors(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, moments: InputMoments
) -> Tensor:
    """The objective that flips of the first half lower, (rows,)."""
    half = (weight.shape[1] + 1) // 2  # the bias counts
    delta = ((codes.double() - zero) * scale.double() - weight.double())[:, :half]
    return ((delta @ moments.square[:half, :half]) * delta).sum(1)


@pytest.mark.parametrize("levels", [4, 16])
def test_flips_lower_the_error_until_none_is_left(levels: int) -> None:
    torch.manual_seed(3)
    moments = refit_moments(*inputs(400, 40))
    weight, bias = parameters(30, 40, True)
    scale, zero = grid(weight, levels)
    path = []
    for flips in range(25):
        codes, _ = refine_rounding(
            weight, bias, RoundingGrid(scale, zero, levels), moments, 1.0, flips
        )
        path.append(first_half_errors(weight, codes, scale, zero, moments))
    table = torch.stack(path)
    fell = table[1:] < table[:-1]
    assert (fell | (table[1:] == table[:-1])).all()
    # A row stays as it is once a flip was refused, and rows differ in when.
    assert not (fell[1:] & ~fell[:-1]).any()
    assert len(set(fell.sum(0).tolist())) >= 3
    assert not fell[-1].any()
    assert table[-1].sum() < 0.9 * table[0].sum()


@biases
@pytest.mark.parametrize("bits", [3, 4])
def test_both_steps_lower_the_output_error(biased: bool, bits: int) -> None:
    torch.manual_seed(4)
    levels = 2**bits
    x, x_hat = inputs(1000, 48, 64)
    weight, bias = parameters(32, 48, biased)
    moments, old = refit_moments(x, x_hat), joint(weight, bias)

    def error(weight: Tensor, bias: Tensor | None) -> float:
        return float(output_errors(x, x_hat, old, joint(weight, bias), biased).sum())

    def refined(weight: Tensor, bias: Tensor | None, flips: int) -> float:
        scale, zero = grid(weight, levels)
        codes, new_bias = refine_rounding(
            weight, bias, RoundingGrid(scale, zero, levels), moments, 1.0, flips
        )
        assert ((codes >= 0) & (codes <= levels - 1) & (codes == codes.round())).all()
        return error((codes - zero) * scale, new_bias)

    def nearest(weight: Tensor, bias: Tensor | None) -> float:
        return error(fake_quantize(weight, *grid(weight, levels), levels), bias)

    refit = ridge_refit(weight, bias, moments, 1.0)
    best, plain = refined(*refit, 100), nearest(weight, bias)
    assert refined(weight, bias, 100) < 0.75 * plain
    assert best < 0.65 * min(plain, nearest(*refit))
    assert best < 0.97 * refined(*refit, 0)
    assert best < 0.97 * refined(weight, bias, 100)


def test_zero_flips_round_to_nearest_and_compensate() -> None:
    """Two columns: the first is rounded; the regression gives the second and the bias."""
    torch.manual_seed(5)
    _, x_hat = inputs(80, 2)
    weight, bias = parameters(7, 2, True)
    scale, zero = grid(weight, 4)
    codes, new_bias = refine_rounding(
        weight, bias, RoundingGrid(scale, zero, 4), refit_moments(x_hat, x_hat), 0.5, 0
    )
    a, current = torch.from_numpy(extended(x_hat, True)), torch.from_numpy(joint(weight, bias))
    for column in (0, 1):
        rounded = fake_quantize(current[:, column : column + 1], scale.double(), zero.double(), 4)
        assert torch.equal((codes[:, column : column + 1] - zero) * scale.double(), rounded)
        rest = a[:, column + 1 :]
        normal = rest.t() @ rest + 0.5 * torch.eye(rest.shape[1])
        moved = torch.linalg.solve(
            normal,
            rest.t() @ a[:, column : column + 1] @ (rounded - current[:, column : column + 1]).t(),
        )
        current[:, column + 1 :] -= moved.t()
    assert new_bias is not None
    assert torch.allclose(new_bias.double(), current[:, 2], rtol=1e-5, atol=1e-6)


def test_values_outside_the_grid_stay_at_its_ends() -> None:
    torch.manual_seed(6)
    moments = refit_moments(*inputs(90, 12))
    weight = torch.randn(5, 12)
    weight[:, :6] = torch.tensor(
        [9.0, -9.0, 7.6, -8.6, 20.0, -20.0]
    )  # the first half; the grid is -8 to 7
    codes, _ = refine_rounding(
        weight, None, RoundingGrid(torch.ones(5, 1), torch.full((5, 1), 8.0), 16), moments, 1.0
    )
    assert codes[:, :6].tolist() == [[15.0, 0.0, 15.0, 0.0, 15.0, 0.0]] * 5
    assert codes.min() >= 0
    assert codes.max() <= 15


def test_weights_on_the_grid_are_left_alone() -> None:
    torch.manual_seed(7)
    weight = torch.randint(-8, 8, (6, 10)) * 0.37
    scale, zero = torch.full((6, 1), 0.37), torch.full((6, 1), 8.0)
    bias = torch.randn(6)
    codes, new_bias = refine_rounding(
        weight, bias, RoundingGrid(scale, zero, 16), refit_moments(*inputs(50, 10)), 0.1
    )
    assert torch.equal((codes - zero) * scale, weight)
    assert new_bias is not None
    assert torch.allclose(new_bias, bias, atol=1e-6)


def dead(x: Tensor) -> Tensor:
    return torch.cat([x[:, :-1], torch.zeros_like(x[:, :1])], 1)


def doubled(x: Tensor) -> Tensor:
    return torch.cat([x[:, :-1], 1.7 * x[:, -2:-1]], 1)


@pytest.mark.parametrize(
    "spoil",
    [dead, doubled, lambda x: x[:3]],
    ids=["dead channel", "dependent channels", "few tokens"],
)
@pytest.mark.parametrize("seed", range(6))
def test_a_singular_regression_asks_for_a_ridge(spoil: object, seed: int) -> None:
    torch.manual_seed(seed)  # the last pivot is zero up to rounding, of either sign
    assert callable(spoil)
    x, x_hat = (spoil(values) for values in inputs(60, 12))
    weight, bias = parameters(4, 12, True)
    scale, zero = grid(weight, 8)
    moments = refit_moments(x, x_hat)
    with pytest.raises(NumericsError, match="raise the ridge"):
        ridge_refit(weight, bias, moments, 0.0)
    with pytest.raises(NumericsError, match="raise the ridge"):
        refine_rounding(weight, bias, RoundingGrid(scale, zero, 8), moments, 0.0)
    for part in (
        *ridge_refit(weight, bias, moments, 0.1),
        *refine_rounding(weight, bias, RoundingGrid(scale, zero, 8), moments, 0.1),
    ):
        assert part is not None
        assert part.isfinite().all()


def test_inputs_that_are_not_finite_are_named() -> None:
    x, x_hat = torch.ones(2, 10, 3).unbind()
    x_hat[4, 1] = torch.nan
    with pytest.raises(NumericsError, match="NaN"):
        ridge_refit(torch.ones(2, 3), None, refit_moments(x, x_hat), 1.0)
