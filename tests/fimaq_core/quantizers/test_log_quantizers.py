"""Logarithmic quantizers by hand and against loops, AdaLog's tables, and learned gradients."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.quantizers.logarithm import (
    GELU_SHIFT,
    adalog_fake_quantize,
    adalog_tables,
    learned_log_fake_quantize,
    log_codes,
    log_fake_quantize,
)

#: Steps of log2, of log√2 and of AdaLog at both ends and in between.
STEPS = {"log2": 1.0, "log√2": 0.5, "q=10": 10 / 37, "q=29": 29 / 37, "q=137": 137 / 37}


def values(count: int = 4000) -> Tensor:
    """Positive values over many octaves, some above 1."""
    return torch.exp2(torch.rand(count) * 14 - 13)


def loop_codes(x: Tensor, scale: float, step: float) -> list[int]:
    """Quantize element by element, in Python's floats."""
    return [round(-math.log2(min(max(float(v) / scale, 1e-15), 1.0)) / step) for v in x]


def far_from_ties(x: Tensor, scale: float, step: float) -> Tensor:
    """Values of ``x`` whose code float32 cannot round to the neighbour."""
    position = -torch.log2((x.double() / scale).clamp(1e-15, 1)) / step
    return x[((position - position.floor()) - 0.5).abs() > 1e-4]


def test_log2_by_hand() -> None:
    x = torch.tensor([2.0, 1.0, 0.71, 0.70, 0.5, 0.25, 0.125, 0.09, 0.088, 0.0625, 0.0, -1.0])
    expected = [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.125, 0.125, 0.0, 0.0, 0.0, 0.0]
    assert log_fake_quantize(x, torch.tensor(1.0), 1.0, 4).tolist() == expected
    assert log_fake_quantize(x * 3, torch.tensor(3.0), 1.0, 4).tolist() == [
        3 * value for value in expected
    ]


def test_log_root_2_by_hand() -> None:
    # Codes change at 2^-0.25 = 0.841, 2^-0.75 = 0.595, 2^-1.25 = 0.420, 2^-1.75 = 0.297.
    x = torch.tensor([1.0, 0.85, 0.83, 0.6, 0.59, 0.43, 0.41, 0.3, 0.29])
    assert log_codes(x, torch.tensor(1.0), 0.5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    root = math.sqrt(0.5)
    expected = [1, 1, root, root, 0.5, 0.5, root / 2, root / 2, 0]
    assert log_fake_quantize(x, torch.tensor(1.0), 0.5, 4).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("levels", [4, 8, 16, 256])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_log_fake_quantize_equals_the_loop(step: float, levels: int, scale: float) -> None:
    torch.manual_seed(levels)
    x = far_from_ties(values(), scale, step)
    codes = loop_codes(x, scale, step)
    expected = [scale * 2 ** (-step * code) if code < levels else 0.0 for code in codes]
    found = log_fake_quantize(x, torch.tensor(scale), step, levels)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    # Zeros on both sides, not small numbers.
    assert ((found == 0) == (torch.tensor(expected) == 0)).all()
    assert torch.equal(found, log_fake_quantize(x, torch.tensor(scale), torch.tensor(step), levels))


def test_scales_and_steps_broadcast() -> None:
    torch.manual_seed(0)
    x = values(60).view(3, 4, 5)
    scale, step = torch.rand(3, 1, 1) + 0.1, torch.tensor([0.3, 1.0, 0.5, 2.0]).view(4, 1)
    found = log_fake_quantize(x, scale, step, 8)
    for row in range(3):
        for column in range(4):
            expected = log_fake_quantize(x[row, column], scale[row], step[column], 8)
            assert torch.equal(found[row, column], expected.view(5))


def test_nan_stays_nan() -> None:
    assert log_fake_quantize(
        torch.tensor([float("nan"), 0.5]), torch.tensor(1.0), 1.0, 4
    ).isnan().tolist() == [True, False]


@pytest.mark.parametrize("q", [10, 11, 36, 37, 38, 74, 100, 137])
@pytest.mark.parametrize("levels", [2, 4, 8, 16, 64, 256])
def test_adalog_tables_equal_an_explicit_computation(q: int, levels: int) -> None:
    shifts, mantissas = adalog_tables(q, levels)
    assert shifts.dtype == mantissas.dtype == torch.float32
    assert shifts.tolist() == [k * q // 37 for k in range(levels)]
    unit = 2 * levels - 2
    expected = [np.float32(round(2 ** (-((k * q) % 37) / 37) * unit) / unit) for k in range(levels)]
    assert mantissas.tolist() == [float(value) for value in expected]


@pytest.mark.parametrize("q", [10, 23, 37, 90, 137])
@pytest.mark.parametrize("levels", [4, 8, 16, 256])
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_adalog_by_tables(q: int, levels: int, scale: float) -> None:
    torch.manual_seed(q)
    x = far_from_ties(values(), scale, q / 37)
    tables = adalog_tables(q, levels)
    found = adalog_fake_quantize(x, torch.tensor(scale), *tables, q / 37, levels)
    codes = loop_codes(x, scale, q / 37)
    shifts, mantissas = (table.tolist() for table in tables)
    exact = [
        np.float32(scale) * np.float32(2.0 ** -shifts[k] * mantissas[k]) if k < levels else 0.0
        for k in codes
    ]
    assert found.tolist() == [float(value) for value in exact]
    # Beside the definition there is only the mantissas' rounding, to a multiple of 1 / (2L - 2).
    definition = torch.tensor(
        [scale * 2 ** (-q / 37 * k) if k < levels else 0.0 for k in codes], dtype=torch.float64
    )
    unit = torch.tensor(
        [scale * 2.0 ** -(k * q // 37) / (2 * levels - 2) for k in codes], dtype=torch.float64
    )
    difference = (found.double() - definition).abs()
    assert (difference <= unit / 2 * (1 + 1e-5)).all()
    if q % 37:
        assert difference.max() > 0


def test_adalog_with_q_37_is_log2() -> None:
    x = values()
    found = adalog_fake_quantize(x, torch.tensor(0.8), *adalog_tables(37, 16), 1.0, 16)
    assert torch.equal(found, log_fake_quantize(x, torch.tensor(0.8), 1.0, 16))


def test_gelu_shift_is_gelus_minimum() -> None:
    x = torch.linspace(-1, -0.5, 2**20)
    shifted = F.gelu(x) + GELU_SHIFT
    assert abs(float(shifted.min())) < 1e-7


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("levels", [4, 16, 256])
def test_learned_form_has_the_same_values_and_the_gradients_of_its_rules(
    step: float, levels: int
) -> None:
    torch.manual_seed(0)
    x = torch.cat(
        [values(), torch.tensor([0.0, -0.0, -1.0, 1e-30, 0.6, 0.60001, 5.0])]
    ).requires_grad_()
    scale = torch.tensor([0.6], requires_grad=True)
    out = learned_log_fake_quantize(x, scale, step, levels)
    plain = log_fake_quantize(x.detach(), scale.detach(), step, levels)
    assert torch.equal(out, plain)
    weight = torch.randn_like(plain)
    grad_x, grad_scale = torch.autograd.grad(out, (x, scale), weight)

    ratio = x.detach() / scale.detach()
    above, below = ratio >= 1, ratio <= 1e-15
    inside = ~above & ~below
    expected = torch.where(inside, plain / x.detach(), 0.0)  # includes 0 where k >= L, since x̂ is
    assert torch.allclose(grad_x, expected * weight, rtol=1e-6, atol=0)
    # Only clamped values add to the gradient of the scale: 1 at the top, at the bottom the lowest
    # point (if there is one).
    lowest = round(-math.log2(1e-15) / step)
    bottom = 2.0 ** (-step * lowest) if lowest < levels else 0.0
    assert float(grad_scale) == pytest.approx(
        float((above * weight + below * bottom * weight).sum()), rel=1e-4
    )
    assert above.sum() > 10
    assert (plain[inside] == 0).any() or levels * step > 13


def test_scale_gradient_within_the_range_is_exactly_zero() -> None:
    torch.manual_seed(0)
    x, scale = torch.rand(1000) * 0.999, torch.ones(1, requires_grad=True)
    (grad,) = torch.autograd.grad(learned_log_fake_quantize(x, scale, 10 / 37, 16).sum(), scale)
    assert float(grad) == 0


def test_scale_gradient_has_the_shape_of_the_scale() -> None:
    x = torch.tensor([[0.5, 3.0, 4.0], [0.5, 0.1, 7.0]])
    scale = torch.tensor([[1.0], [2.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 10.0, 100.0], [1.0, 10.0, 1000.0]])
    (grad,) = torch.autograd.grad(learned_log_fake_quantize(x, scale, 1.0, 8), scale, weight)
    assert grad.tolist() == [[110.0], [1000.0]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_values_that_are_not_kept_pass(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (values(200) - 0.1).requires_grad_()
    scale = torch.tensor([0.3], requires_grad=True)
    mask = torch.rand(200) < 0.5
    out = learned_log_fake_quantize(x, scale, 0.5, 8, mask.to(dtype))
    whole = learned_log_fake_quantize(x, scale, 0.5, 8)
    assert torch.equal(out, torch.where(mask, whole, x))
    found = torch.autograd.grad(out.sum(), (x, scale))
    expected = torch.autograd.grad((whole * mask).sum(), (x, scale))
    assert torch.equal(found[0], expected[0] + ~mask)
    assert torch.equal(found[1], expected[1])


def test_learned_form_compiles_as_a_whole() -> None:
    torch.manual_seed(0)
    x, scale = values(64).requires_grad_(), torch.tensor([0.5], requires_grad=True)
    keep = torch.rand(64) < 0.5
    compiled = torch.compile(learned_log_fake_quantize, fullgraph=True, backend="eager")
    found, expected = (
        form(x, scale, 20 / 37, 8, keep) for form in (compiled, learned_log_fake_quantize)
    )
    assert torch.equal(found, expected)
    for mine, other in zip(
        *(torch.autograd.grad(out.sum(), (x, scale)) for out in (found, expected)), strict=True
    ):
        assert torch.equal(mine, other)
