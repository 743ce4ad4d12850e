"""Learned rounding against AdaRound's definition, element by element."""

import math

import pytest
import torch
from torch import Tensor, nn

from fimaq_core.layers import QuantLinear, decide_rounding
from fimaq_core.quantizers.affine import WeightQuantizer
from fimaq_core.quantizers.rounding import (
    RoundingProblem,
    alpha_gradient,
    initial_alpha,
    penalty_slope,
    rounding_penalty,
    soft_rounding,
)


def problem(
    seed: int = 0,
) -> tuple[RoundingProblem, list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """A matrix and a convolution weight of different bits, with ranges that clamp at both ends."""
    torch.manual_seed(seed)
    weights = [torch.randn(6, 10), torch.randn(4, 3, 2, 2) * 0.5]
    scales = [torch.rand(6, 1) * 0.2 + 0.1, torch.rand(4, 1) * 0.1 + 0.15]
    zeros = [torch.randint(1, 7, (6, 1)).float(), torch.randint(0, 4, (4, 1)).float()]
    levels = [8, 4]
    return RoundingProblem.build(weights, scales, zeros, levels), weights, scales, zeros, levels


def plain_soft(alpha: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """The definition of the paper, differentiable by autograd."""
    h = (1.2 * torch.sigmoid(alpha) - 0.1).clamp(0, 1)
    rows = weight.flatten(1)
    codes = (torch.floor(rows / scale) + h.view_as(rows) + zero).clamp(0, levels - 1)
    return (scale * (codes - zero)).view_as(weight)


def test_soft_weight_equals_the_definition_element_by_element() -> None:
    rounding, weights, scales, zeros, levels = problem()
    rounding.alpha.copy_(torch.randn_like(rounding.alpha) * 3)
    soft, h = rounding.split(rounding.soft()), soft_rounding(rounding.alpha)
    position, clamped = 0, 0
    for found, weight, scale, zero, count in zip(soft, weights, scales, zeros, levels, strict=True):
        assert found.shape == weight.shape
        flat, rows = found.flatten(1), weight.flatten(1)
        for i in range(rows.shape[0]):
            for j in range(rows.shape[1]):
                sigma = 1 / (1 + math.exp(-float(rounding.alpha.detach()[position])))
                expected_h = min(max(1.2 * sigma - 0.1, 0.0), 1.0)
                code = math.floor(float(rows[i, j] / scale[i, 0])) + expected_h + float(zero[i, 0])
                clamped += not 0 <= code <= count - 1
                code = min(max(code, 0.0), count - 1.0)
                assert float(h[position]) == pytest.approx(expected_h, abs=1e-6)
                assert float(flat[i, j]) == pytest.approx(
                    float(scale[i, 0]) * (code - float(zero[i, 0])), abs=2e-6
                )
                position += 1
    assert position == rounding.alpha.numel()
    assert clamped > 10


def gradient_by_autograd(
    upstream: list[Tensor], weight: float, beta: float, alpha: Tensor, seed: int
) -> Tensor:
    """Gradient of ``Σ upstream · ŵ + weight · penalty`` by the definitions."""
    _, weights, scales, zeros, levels = problem(seed)
    reference = alpha.clone().requires_grad_(True)
    pieces = reference.split([part.numel() for part in weights])
    total = weight * rounding_penalty((1.2 * torch.sigmoid(reference) - 0.1).clamp(0, 1), beta)
    for piece, part, scale, zero, count, up in zip(
        pieces, weights, scales, zeros, levels, upstream, strict=True
    ):
        total = total + (plain_soft(piece, part, scale, zero, count) * up).sum()
    (found,) = torch.autograd.grad(total, reference)
    return found


@pytest.mark.parametrize("weight", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("beta", [2.0, 7.3, 20.0])
def test_gradient_equals_autograd_of_the_definition(weight: float, beta: float) -> None:
    rounding, weights, *_ = problem(1)
    rounding.alpha.copy_(torch.randn_like(rounding.alpha) * 3)
    rounding.alpha[:4] = torch.tensor([0.0, 30.0, -30.0, 1e-4])
    upstream = [torch.randn_like(part) for part in weights]
    flat = torch.cat([part.flatten() for part in upstream])
    found = alpha_gradient(
        rounding.alpha, rounding.gain, flat, torch.tensor(weight), torch.tensor(beta)
    )
    expected = gradient_by_autograd(upstream, weight, beta, rounding.alpha, 1)
    clipped = (soft_rounding(rounding.alpha) == 0) | (soft_rounding(rounding.alpha) == 1)
    assert clipped.sum() > 10
    assert (found[clipped] == 0).all()
    assert (found[~clipped & (rounding.gain > 0)] != 0).all()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_only_the_weights_need_a_gradient() -> None:
    """α also trains by the loss alone (as in the warm-up), and by the penalty alone."""
    rounding, weights, *_ = problem(2)
    off, beta = torch.tensor(0.0), torch.tensor(2.0)
    upstream = [2 * part for part in rounding.split(rounding.soft())]
    flat = torch.cat([part.flatten() for part in upstream])
    found = alpha_gradient(rounding.alpha, rounding.gain, flat, off, beta)
    assert torch.allclose(
        found, gradient_by_autograd(upstream, 0.0, 2.0, rounding.alpha, 2), rtol=1e-5, atol=1e-6
    )
    assert float(found.abs().max()) > 0.01
    nothing = [torch.zeros_like(part) for part in weights]
    found = alpha_gradient(
        rounding.alpha, rounding.gain, torch.zeros_like(flat), torch.tensor(0.5), beta
    )
    assert torch.allclose(
        found, gradient_by_autograd(nothing, 0.5, 2.0, rounding.alpha, 2), rtol=1e-5, atol=1e-6
    )
    assert float(found.abs().max()) > 0.01


def test_soft_weight_starts_at_the_clamped_weight() -> None:
    rounding, weights, scales, zeros, levels = problem()
    for found, weight, scale, zero, count in zip(
        rounding.split(rounding.soft()), weights, scales, zeros, levels, strict=True
    ):
        rows = weight.flatten(1)
        expected = ((rows / scale + zero).clamp(0, count - 1) - zero) * scale
        assert torch.allclose(found.flatten(1), expected, atol=1e-5)
        assert not torch.allclose(found, weight, atol=1e-3)


def test_initial_alpha_inverts_the_soft_rounding() -> None:
    fraction = torch.linspace(0, 1, 101)
    assert torch.isfinite(initial_alpha(fraction)).all()
    assert torch.allclose(soft_rounding(initial_alpha(fraction)), fraction, atol=1e-6)


def test_codes_are_floor_or_floor_plus_one_before_clamping() -> None:
    rounding, weights, scales, zeros, levels = problem()
    rounding.alpha.copy_(torch.randn_like(rounding.alpha))
    position, ups, downs = 0, 0, 0
    for codes, weight, scale, zero, count in zip(
        rounding.codes(), weights, scales, zeros, levels, strict=True
    ):
        rows = weight.flatten(1)
        for i in range(rows.shape[0]):
            for j in range(rows.shape[1]):
                floor = math.floor(float(rows[i, j] / scale[i, 0])) + int(zero[i, 0])
                up = float(rounding.alpha.detach()[position]) >= 0
                assert int(codes[i, j]) == min(max(floor + up, 0), count - 1)
                ups, downs, position = ups + up, downs + (not up), position + 1
    assert min(ups, downs) > 10


def test_untrained_codes_round_to_nearest() -> None:
    """α = 0 stands for h = 1/2, so codes decided at the start are those of rounding to nearest."""
    rounding, weights, scales, zeros, levels = problem(5)
    for codes, weight, scale, zero, count in zip(
        rounding.codes(), weights, scales, zeros, levels, strict=True
    ):
        nearest = (torch.round(weight.flatten(1) / scale) + zero).clamp(0, count - 1)
        assert torch.equal(codes, nearest)


@pytest.mark.parametrize("beta", [2.0, 7.3, 20.0])
def test_penalty_and_its_gradient(beta: float) -> None:
    h = torch.tensor([0.0, 0.1, 0.4, 0.5, 0.75, 1.0], dtype=torch.float64, requires_grad=True)
    penalty = rounding_penalty(h, beta)
    penalty.backward()
    expected = sum(1 - abs(2 * value - 1) ** beta for value in h.tolist())
    slopes = [
        -2 * beta * abs(2 * v - 1) ** (beta - 1) * math.copysign(1, 2 * v - 1) for v in h.tolist()
    ]
    assert penalty.item() == pytest.approx(expected, rel=1e-12)
    assert h.grad is not None
    assert h.grad.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-12)
    by_hand = penalty_slope(h.detach(), torch.tensor(beta, dtype=torch.float64))
    assert by_hand.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-12)
    assert float(rounding_penalty(torch.tensor([0.0, 1.0, 1.0]), beta)) == 0


def test_weight_quantizer_uses_decided_codes() -> None:
    weight = torch.randn(4, 3, 2, 2)
    quantizer = WeightQuantizer(3)
    quantizer.set_range(torch.rand(4, 1) + 0.1, torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    nearest = quantizer.quantized(weight)
    assert nearest.shape == weight.shape
    codes = torch.randint(0, 8, (4, 12))
    quantizer.set_codes(codes)
    expected = ((codes - quantizer.zero_point) * quantizer.scale).view_as(weight)
    assert torch.equal(quantizer.quantized(weight), expected)
    fresh = WeightQuantizer(3)
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(fresh.quantized(weight), expected)
    assert fresh.codes.dtype == torch.uint8


def test_deciding_the_rounding_changes_nothing_but_the_storage() -> None:
    torch.manual_seed(0)
    layer = QuantLinear.from_float(nn.Linear(5, 4), 3, 4)
    layer.weight_quantizer.set_range(torch.rand(4, 1) * 0.1 + 0.05, torch.full((4, 1), 3.0))
    before = layer.weight_quantizer.quantized(layer.weight.detach())
    decide_rounding(layer)
    assert layer.weight_quantizer.codes.shape == (4, 5)
    assert torch.equal(layer.weight_quantizer.quantized(layer.weight.detach()), before)
    kept = layer.weight_quantizer.codes.clone()
    layer.weight_quantizer.set_codes(7 - kept)
    decide_rounding(layer)
    assert torch.equal(layer.weight_quantizer.codes, 7 - kept)
