"""Affine quantization against loops, its straight-through gradients against finite differences, and random dropping."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fimaq_core.quantizers.affine import AffineQuantizer, bernoulli_mask, fake_quantize, learned_fake_quantize, levels_of


def loop_quantize(x: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Element by element, in Python."""
    x, scale, zero = (np.asarray(t.numpy()) for t in torch.broadcast_tensors(x, scale, zero))
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        code = round(float(x[index] / scale[index])) + int(zero[index])
        code = min(max(code, 0), levels - 1)
        out[index] = np.float32(code - int(zero[index])) * scale[index]
    return torch.from_numpy(out)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1,), (5, 1), (1, 7), (5, 7)], ids=["per tensor", "per row", "per column", "per element"])
def test_fake_quantize_equals_the_loop(bits: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(bits)
    levels = levels_of(bits)
    x = torch.randn(5, 7) * 3
    scale = torch.rand(shape) + 0.05
    zero = torch.randint(0, levels, shape).float()
    x[0, 0], x[0, 1] = 1e6, -1e6
    found = fake_quantize(x, scale, zero, levels)
    assert torch.equal(found, loop_quantize(x, scale, zero, levels))
    codes = found / scale + zero
    assert float(codes.round().min()) >= 0
    assert float(codes.round().max()) <= levels - 1
    assert torch.allclose(codes, codes.round(), atol=1e-3)


def test_halves_go_to_even_as_round_does() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5])
    assert fake_quantize(x, torch.ones(1), torch.tensor([4.0]), 16).tolist() == [0.0, 2.0, 2.0, 0.0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels(bits: int) -> None:
    assert levels_of(bits) == 2**bits
    x = torch.linspace(-12, 12, 4001)
    found = fake_quantize(x, torch.tensor([20 / (2**bits - 1)]), torch.tensor([float(2 ** (bits - 1))]), 2**bits)
    assert len(found.unique()) == 2**bits


def test_fake_quantize_leaves_its_input_alone() -> None:
    x = torch.randn(4, 4)
    before = x.clone()
    fake_quantize(x, torch.tensor([0.1]), torch.tensor([3.0]), 8)
    assert torch.equal(x, before)


SCALES = {"per tensor": (1,), "per token": (1, 6, 1), "per head": (4, 1, 1)}


@pytest.mark.parametrize("shape", SCALES.values(), ids=SCALES.keys())
@pytest.mark.parametrize("dropping", [False, True])
def test_gradients_of_the_learned_form(shape: tuple[int, ...], dropping: bool) -> None:
    """In x: 1 inside the range and where dropped, else 0. In s: finite differences with the roundings held."""
    torch.manual_seed(3)
    levels = 8
    x = torch.randn(4, 6, 5, dtype=torch.float64) * 2
    scale = torch.rand(shape, dtype=torch.float64) * 0.3 + 0.2
    zero = torch.randint(2, 6, shape).double()
    keep = torch.rand(4, 6, 5) < 0.5 if dropping else None
    upstream = torch.randn_like(x)

    x.requires_grad_(True)
    scale.requires_grad_(True)
    out = learned_fake_quantize(x, scale, zero, levels, None if keep is None else keep.double())
    (out * upstream).sum().backward()
    plain = fake_quantize(x.detach(), scale.detach(), zero, levels)
    assert torch.equal(out.detach(), plain if keep is None else torch.where(keep, plain, x.detach()))

    with torch.no_grad():
        unclamped = torch.round(x / scale) + zero
        inside = (unclamped >= 0) & (unclamped <= levels - 1)
        assert 10 < int(inside.sum()) < inside.numel() - 10
        passes = inside if keep is None else inside | ~keep
        assert x.grad is not None
        assert torch.equal(x.grad, upstream * passes)

        residue = torch.round(x / scale) - x / scale
        code = unclamped.clamp(0, levels - 1) - zero

        def held(s: Tensor) -> Tensor:
            quantized = torch.where(inside, (x / s + residue) * s, code * s)
            return quantized if keep is None else torch.where(keep, quantized, x)

        assert torch.allclose(held(scale), out, atol=1e-12)
        step, numeric = 1e-6, torch.zeros_like(scale)
        for index in np.ndindex(tuple(scale.shape)):
            moved = torch.zeros_like(scale)
            moved[index] = step
            numeric[index] = ((held(scale + moved) - held(scale - moved)) * upstream).sum() / (2 * step)
        assert scale.grad is not None
        assert torch.allclose(scale.grad, numeric, rtol=1e-6, atol=1e-7)


def test_scale_gradient_of_clamped_values_is_that_of_the_true_function() -> None:
    """Beyond the range the quantizer itself is smooth in s, so its own finite differences must agree."""
    x = torch.tensor([50.0, -50.0, 80.0], dtype=torch.float64)
    zero, step = torch.tensor([3.0], dtype=torch.float64), 1e-5
    scale = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    learned_fake_quantize(x, scale, zero, 8).sum().backward()
    with torch.no_grad():
        numeric = (fake_quantize(x, scale + step, zero, 8).sum() - fake_quantize(x, scale - step, zero, 8).sum()) / (2 * step)
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(float(numeric), rel=1e-8)
    assert float(scale.grad) == pytest.approx(4 - 3 + 4)


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 0.3, 0.9])
def test_mask_frequency(probability: float) -> None:
    like = torch.empty(613, 331)
    mask = bernoulli_mask(like, probability, torch.Generator().manual_seed(5))
    assert mask is not None
    assert mask.shape == like.shape
    assert mask.dtype == like.dtype
    assert ((mask == 0) | (mask == 1)).all()
    count = like.numel()
    deviation = math.sqrt(probability * (1 - probability) / count)
    assert abs(float(mask.double().mean()) - probability) <= 4.5 * deviation
    # Neither neighbours nor the eight bytes of a word depend on one another.
    bits = mask.flatten()[: count // 8 * 8].double() - mask.double().mean()
    for distance in (1, 3, 8):
        assert abs(float((bits[distance:] * bits[:-distance]).mean())) <= 4.5 * probability * (1 - probability) / math.sqrt(count)
    assert (bits.view(-1, 8).mean(0).abs() <= 4.5 * deviation * math.sqrt(8)).all()


def test_mask_at_one_half_is_exact() -> None:
    """128 of the 256 values of a byte keep an element, so the probability is 0.5 and not nearly so."""
    like = torch.empty(3, 7, 5)
    mask = bernoulli_mask(like, 0.5, torch.Generator().manual_seed(11))
    words = torch.empty(14, dtype=torch.int64).random_(-(2**63), None, generator=torch.Generator().manual_seed(11))
    octets = np.frombuffer(words.numpy().tobytes(), dtype=np.uint8)[: like.numel()]
    assert mask is not None
    assert np.array_equal(mask.numpy().ravel() == 1, octets < 128)
    assert sum(value < 128 for value in range(256)) * 2 == 256


@pytest.mark.parametrize("probability", [0.5, 0.3])
def test_mask_follows_the_generator(probability: float) -> None:
    like = torch.empty(40, 40)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        first, second = (bernoulli_mask(like, probability, generator) for _ in range(2))
        assert first is not None
        assert second is not None
        assert not torch.equal(first, second)
        return torch.stack([first, second])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_no_mask_is_drawn_when_everything_is_quantized() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert bernoulli_mask(torch.empty(8), 1.0, generator) is None
    assert torch.equal(generator.get_state(), state)


def test_quantizer_module() -> None:
    x = torch.randn(3, 4)
    quantizer = AffineQuantizer(4)
    with pytest.raises(RuntimeError, match="before calibration"):
        quantizer(x)
    assert torch.equal(AffineQuantizer(32)(x), x)
    scale, zero = torch.tensor([0.3]), torch.tensor([7.0])
    quantizer.set_range(scale, zero)
    expected = fake_quantize(x, scale, zero, 16)
    assert torch.equal(quantizer(x), expected)
    quantizer.training_scale, quantizer.keep_probability = True, 0.5
    quantizer.generator = torch.Generator().manual_seed(4)
    mixed = quantizer(x)
    assert ((mixed == expected) | (mixed == x)).all()
    assert not torch.equal(mixed, expected)


def test_quantizer_takes_its_shapes_from_a_checkpoint() -> None:
    quantizer, fresh = AffineQuantizer(4), AffineQuantizer(4)
    quantizer.set_range(torch.rand(1, 5, 1) + 0.1, torch.tensor([7.0]))
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    x = torch.randn(2, 5, 3)
    assert torch.equal(fresh(x), quantizer(x))
