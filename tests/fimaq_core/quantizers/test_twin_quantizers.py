"""Twin uniform quantizers by hand and against loops, and the gradients of their learned forms."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.quantizers.logarithm import GELU_SHIFT
from fimaq_core.quantizers.twin import learned_twin, twin_gelu, twin_softmax

LEARNED = [partial(learned_twin, twin_softmax), partial(learned_twin, twin_gelu)]


def loop_softmax(x: Tensor, split: float, levels: int) -> list[float]:
    """Quantize element by element, in Python's floats."""
    top = levels // 2 - 1
    out = []
    for value in x.tolist():
        step = split / top if value < split else 1 / top
        out.append(min(max(round(value / step), 0), top) * step)
    return out


def loop_gelu(x: Tensor, scale: float, levels: int) -> list[float]:
    """Quantize element by element, in Python's floats."""
    half = levels // 2
    out = []
    for value in x.tolist():
        step, lowest, highest = (
            (scale, 0, half - 1) if value >= 0 else (GELU_SHIFT / half, -half, 0)
        )
        out.append(min(max(round(value / step), lowest), highest) * step)
    return out


def test_softmax_by_hand() -> None:
    # H - 1 = 3: the lower range's points are 0, 1/12, 1/6, 1/4, the upper one's 0, 1/3, 2/3, 1.
    x = torch.tensor([-0.1, 0.04, 0.05, 0.12, 0.13, 0.24, 0.25, 0.49, 0.51, 0.84, 1.0, 1.5])
    expected = [0, 0, 1 / 12, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 3, 2 / 3, 1, 1, 1]
    assert twin_softmax(x, torch.tensor(0.25), 8).tolist() == pytest.approx(expected)


def test_softmax_with_two_bits() -> None:
    # H - 1 = 1: the points are 0, the split and 1.
    x = torch.tensor([0.0, 0.05, 0.07, 0.1249, 0.126, 0.49, 0.51, 1.0])
    assert twin_softmax(x, torch.tensor(0.125), 4).tolist() == pytest.approx(
        [0, 0, 0.125, 0.125, 0, 0, 1, 1]
    )


def test_gelu_by_hand() -> None:
    # H = 4: positive points 0 to 3 scales, negative ones in quarters of the shift.
    quarter = GELU_SHIFT / 4
    x = torch.tensor(
        [9.0, 1.3, 1.2, 0.76, 0.74, 0.2, 0.0, -0.02, -0.03, -0.06, -0.07, -0.169, -0.16997, -1.0]
    )
    expected = [
        1.5,
        1.5,
        1.0,
        1.0,
        0.5,
        0,
        0,
        0,
        -quarter,
        -quarter,
        -2 * quarter,
        *[-4 * quarter] * 3,
    ]
    assert twin_gelu(x, torch.tensor(0.5), 8).tolist() == pytest.approx(expected)


def test_gelu_with_two_bits() -> None:
    half = GELU_SHIFT / 2
    x = torch.tensor([4.0, 0.6, 0.4, 0.0, -0.04, -0.05, -0.13, -0.17])
    assert twin_gelu(x, torch.tensor(1.0), 4).tolist() == pytest.approx(
        [1, 1, 0, 0, 0, -half, -2 * half, -2 * half]
    )


@pytest.mark.parametrize("levels", [4, 8, 16, 64, 256])
def test_both_equal_the_loop_and_have_the_stated_number_of_points(levels: int) -> None:
    torch.manual_seed(levels)
    half = levels // 2
    x = torch.cat([torch.rand(20000), torch.rand(20000) * 0.1])
    for split in (0.5, 0.1, 2.0**-7):
        found = twin_softmax(x, torch.tensor(split), levels)
        expected = torch.tensor(loop_softmax(x, torch.tensor(split).item(), levels))
        # A value that lies within float32's error of the middle of two points may go either way.
        assert ((found - expected).abs() < 1e-6).float().mean() > 0.999
        assert (found - expected).abs().max() < 1.01 / (half - 1)
    x = F.gelu(torch.randn(40000) * 2)
    scale = torch.tensor(7.0 / half)
    found = twin_gelu(x, scale, levels)
    assert (
        (found - torch.tensor(loop_gelu(x, scale.item(), levels))).abs() < 1e-5
    ).float().mean() > 0.999
    grid = torch.cat([torch.linspace(-0.2, 0, 50001), torch.linspace(0, 8, 50001)])
    assert len(twin_gelu(grid, scale, levels).unique()) == levels
    assert float(twin_gelu(grid, scale, levels).min()) == pytest.approx(-GELU_SHIFT)


def test_scales_broadcast() -> None:
    torch.manual_seed(0)
    x, per_row = torch.rand(3, 50), torch.tensor([[0.5], [0.1], [0.02]])
    for row in range(3):
        assert torch.equal(twin_softmax(x, per_row, 8)[row], twin_softmax(x[row], per_row[row], 8))
        assert torch.equal(
            twin_gelu(x - 0.3, per_row, 8)[row], twin_gelu(x[row] - 0.3, per_row[row], 8)
        )


@pytest.mark.parametrize("levels", [4, 8, 64])
def test_gradients_of_the_softmax_form(levels: int) -> None:
    torch.manual_seed(0)
    top = levels // 2 - 1
    x = torch.cat(
        [torch.rand(500) * 0.3, torch.rand(500), torch.tensor([-0.9, 1.9])]
    ).requires_grad_()
    split = torch.tensor([0.23], requires_grad=True)
    out = learned_twin(twin_softmax, x, split, levels)
    values, bound = x.detach(), split.detach()
    assert torch.equal(out, twin_softmax(values, bound, levels))
    weight = torch.randn(len(x))
    grad_x, grad_split = torch.autograd.grad(out, (x, split), weight)
    low = values < bound
    inside = torch.ones(len(x))
    inside[-2:] = 0
    assert torch.allclose(grad_x, weight * inside)
    # The lower range has the step split / (H - 1). The slope is rounding error / step inside it,
    # and the code (here 0) where clamped.
    slope = torch.where(low, (out.detach() - values * inside) / bound, 0.0)
    assert float(grad_split) == pytest.approx(float((slope * weight).sum()), rel=1e-4)
    assert low.sum() > 100
    assert top >= 1


@pytest.mark.parametrize("levels", [4, 8, 64])
def test_gradients_of_the_gelu_form(levels: int) -> None:
    torch.manual_seed(0)
    half = levels // 2
    x = torch.cat([F.gelu(torch.randn(1000) * 2), torch.tensor([0.0, -0.9])]).requires_grad_()
    scale = torch.tensor([3.0 / half], requires_grad=True)
    out = learned_twin(twin_gelu, x, scale, levels)
    values, step = x.detach(), scale.detach()
    assert torch.equal(out, twin_gelu(values, step, levels))
    weight = torch.randn(len(x))
    grad_x, grad_scale = torch.autograd.grad(out, (x, scale), weight)
    saturated = torch.round(values / step) > half - 1
    assert saturated.sum() > 5
    inside = ~saturated & (values > -0.5)
    assert torch.allclose(grad_x, weight * inside)
    slope = torch.where(saturated, half - 1.0, (out.detach() - values) / step) * (values >= 0)
    assert float(grad_scale) == pytest.approx(float((slope * weight).sum()), rel=1e-4)


@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_values_that_are_not_kept_pass(learned: Callable[..., Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(200, requires_grad=True), torch.tensor([0.3], requires_grad=True)
    mask = torch.rand(200) < 0.5
    out, whole = learned(x, scale, 8, mask.to(dtype)), learned(x, scale, 8)
    assert torch.equal(out, torch.where(mask, whole, x))
    found = torch.autograd.grad(out.sum(), (x, scale))
    expected = torch.autograd.grad((whole * mask).sum(), (x, scale))
    assert torch.equal(found[0], expected[0] + ~mask)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("learned", LEARNED)
def test_learned_forms_compile_as_a_whole(learned: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(64, requires_grad=True), torch.tensor([0.3], requires_grad=True)
    keep = (torch.rand(64) < 0.5).float()
    compiled = torch.compile(learned, fullgraph=True, backend="eager")
    found, expected = (form(x, scale, 8, keep) for form in (compiled, learned))
    assert torch.equal(found, expected)
    for mine, other in zip(
        *(torch.autograd.grad(out.sum(), (x, scale)) for out in (found, expected)), strict=True
    ):
        assert torch.equal(mine, other)
