"""Affine quantization in three forms: values against loops, gradients by finite differences."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from fimaq_core.quantizers import activation, affine
from fimaq_core.quantizers.activation import Form
from fimaq_core.quantizers.affine import AffineQuantizer, fake_quantize, learned_fake_quantize
from fimaq_core.quantizers.dropping import draw_keys, eager_mask, threshold_of

FORMS: tuple[Form, ...] = get_args(Form)
KEY = draw_keys(1, torch.Generator().manual_seed(6))[0]


def quantizer(
    form: Form, scale: Tensor, zero: Tensor, bits: int = 3, probability: float = 1.0
) -> AffineQuantizer:
    """A quantizer that learns in ``form``; scale and zero point keep their dtype."""
    made = AffineQuantizer(bits)
    made.set_range(scale, zero)
    made.scale, made.zero_point, made.key = (
        torch.nn.Parameter(scale.detach().clone()),
        zero.clone(),
        KEY.clone(),
    )
    made.top = made.top.to(scale.dtype)
    made.learning, made.keep_probability = form, probability
    return made


def loop_quantize(x: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Quantize element by element, in Python."""
    x, scale, zero = (np.asarray(t.numpy()) for t in torch.broadcast_tensors(x, scale, zero))
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        code = round(float(x[index] / scale[index])) + int(zero[index])
        code = min(max(code, 0), levels - 1)
        out[index] = np.float32(code - int(zero[index])) * scale[index]
    return torch.from_numpy(out)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "shape",
    [(1,), (5, 1), (1, 7), (5, 7)],
    ids=["per tensor", "per row", "per column", "per element"],
)
def test_fake_quantize_equals_the_loop(bits: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(bits)
    levels = 2**bits
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
    assert AffineQuantizer(bits).levels == 2**bits
    x = torch.linspace(-12, 12, 4001)
    found = fake_quantize(
        x, torch.tensor([20 / (2**bits - 1)]), torch.tensor([float(2 ** (bits - 1))]), 2**bits
    )
    assert len(found.unique()) == 2**bits


def test_fake_quantize_leaves_its_input_alone() -> None:
    x = torch.randn(4, 4)
    before = x.clone()
    fake_quantize(x, torch.tensor([0.1]), torch.tensor([3.0]), 8)
    assert torch.equal(x, before)


SCALES = {"per tensor": (1,), "per token": (1, 6, 1), "per head": (4, 1, 1)}


@pytest.mark.parametrize("shape", SCALES.values(), ids=SCALES.keys())
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_learned_form(shape: tuple[int, ...], dropping: bool, form: Form) -> None:
    """Gradient in x: 1 inside the range and where dropped, else 0; in s: finite differences."""
    torch.manual_seed(3)
    levels = 8
    x = torch.randn(4, 6, 5, dtype=torch.float64) * 2
    start = torch.rand(shape, dtype=torch.float64) * 0.3 + 0.2
    zero = torch.randint(2, 6, shape).double()
    keep = eager_mask(x, KEY, 128) == 1 if dropping else None
    upstream = torch.randn_like(x)

    x.requires_grad_(True)
    made = quantizer(form, start, zero, probability=0.5 if dropping else 1.0)
    scale: Tensor = made.scale
    # The fused form's masks are float32, so for float64 values it is given one.
    wide = None if keep is None else keep.double()
    out = learned_fake_quantize(x, scale, zero, levels, wide) if form == "fused" else made(x)
    (out * upstream).sum().backward()
    plain = fake_quantize(x.detach(), scale.detach(), zero, levels)
    expected_out = plain if keep is None else torch.where(keep, plain, x.detach())
    assert torch.allclose(
        out.detach(), expected_out, rtol=0, atol=1e-12
    )  # by definition the rounding is x / s plus a rest

    with torch.no_grad():
        unclamped = torch.round(x / scale) + zero
        inside = (unclamped >= 0) & (unclamped <= levels - 1)
        assert 10 < int(inside.sum()) < inside.numel() - 10
        passes = inside if keep is None else inside | ~keep
        assert x.grad is not None
        assert torch.allclose(x.grad, upstream * passes, rtol=1e-14, atol=0)

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
            numeric[index] = ((held(scale + moved) - held(scale - moved)) * upstream).sum() / (
                2 * step
            )
        assert scale.grad is not None
        assert torch.allclose(scale.grad, numeric, rtol=1e-6, atol=1e-7)


def test_scale_gradient_of_clamped_values_is_that_of_the_true_function() -> None:
    """Beyond the range, the quantizer is smooth in s: its own finite differences must agree."""
    x = torch.tensor([50.0, -50.0, 80.0], dtype=torch.float64)
    zero, step = torch.tensor([3.0], dtype=torch.float64), 1e-5
    scale = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    learned_fake_quantize(x, scale, zero, 8).sum().backward()
    with torch.no_grad():
        numeric = (
            fake_quantize(x, scale + step, zero, 8).sum()
            - fake_quantize(x, scale - step, zero, 8).sum()
        ) / (2 * step)
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(float(numeric), rel=1e-8)
    assert float(scale.grad) == pytest.approx(4 - 3 + 4)


@pytest.mark.parametrize("form", FORMS)
def test_no_mask_is_drawn_when_everything_is_quantized(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((activation, "eager_mask"), (affine, "traced_mask")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a mask was drawn"))
    x, scale, zero = torch.randn(40), torch.tensor([0.3]), torch.tensor([4.0])
    assert torch.allclose(
        quantizer(form, scale, zero)(x), fake_quantize(x, scale, zero, 8), rtol=0, atol=1e-6
    )
    with pytest.raises(pytest.fail.Exception, match="a mask was drawn"):
        quantizer(form, scale, zero, probability=0.5)(x)


#: Shapes of scales against x of shape (batch, tokens, channels) or (batch, heads, rows, columns).
GRAINS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "per tensor": ((6, 17, 12), (1,)),
    "per token": ((6, 17, 12), (1, 17, 1)),
    "per head": ((4, 3, 9, 7), (1, 3, 1, 1)),
    "per head and row": ((4, 3, 9, 7), (1, 3, 9, 1)),
}


def example(grain: str) -> tuple[Tensor, Tensor, Tensor]:
    """Values of which some are clamped at either end, scales and zero points."""
    shape, scales = GRAINS[grain]
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(shape, generator=generator) * 2
    scale = torch.rand(scales, generator=generator) * 0.3 + 0.3
    zero = torch.randint(2, 6, scales, generator=generator).float()
    codes = torch.round(x / scale) + zero
    assert (codes < 0).any()
    assert (codes > 7).any()
    return x, scale, zero


def through(
    made: AffineQuantizer, x: Tensor, upstream: Tensor, transposed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients in x and in the scale."""
    leaf = x.detach().requires_grad_(True)
    made.scale.requires_grad_(True)
    out = made(leaf, transposed)
    grad_x, grad_scale = torch.autograd.grad((out * upstream).sum(), (leaf, made.scale))
    return out.detach(), grad_x, grad_scale


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("probability", [0.25, 0.5, 1.0])
def test_the_forms_agree(grain: str, probability: float) -> None:
    x, scale, zero = example(grain)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    out, grad_x, grad_scale = through(
        quantizer("textbook", scale, zero, probability=probability), x, upstream
    )
    dropped = float((out == x).double().mean())
    assert abs(dropped - (1 - probability)) < 0.08
    for form in ("fused", "traced"):
        other, other_x, other_scale = through(
            quantizer(form, scale, zero, probability=probability), x, upstream
        )
        assert float((other - out).abs().max()) <= 1e-6
        assert torch.allclose(other_x, grad_x, rtol=1e-6, atol=0)
        assert other_scale.shape == scale.shape
        assert float((other_scale - grad_scale).abs().max()) <= 1e-5 * float(grad_scale.abs().max())
    assert float(grad_scale.abs().min()) > 0
    if probability == 1:
        assert 0.02 < float((grad_x == 0).double().mean()) < 0.5


@pytest.mark.parametrize("grain", ["per head", "per head and row"])
@pytest.mark.parametrize("form", [*FORMS, None])
def test_transposed_operand_has_its_own_scale(grain: str, form: Form | None) -> None:
    """Quantizing xᵀ as transposed equals the transpose of quantizing x, in value and gradients."""
    x, scale, zero = example(grain)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    made = quantizer("fused", scale, zero)
    made.learning = form
    if form is None:
        assert torch.equal(made(x.mT.contiguous(), transposed=True).mT, made(x))
        return
    out, grad_x, grad_scale = through(made, x, upstream)
    for source in (x.mT, x.mT.contiguous()):
        other, other_x, other_scale = through(made, source, upstream.mT, transposed=True)
        assert torch.equal(other.mT, out)
        assert torch.allclose(other_x.mT, grad_x, rtol=1e-6, atol=0)
        assert torch.allclose(
            other_scale, grad_scale, rtol=1e-5, atol=1e-5 * float(grad_scale.abs().max())
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_gradients_on_grid_points(form: Form, probability: float) -> None:
    """Gradient where the output equals the input: it passes, and the scale has none."""
    scale, zero = torch.tensor([0.5]), torch.tensor([3.0])
    x = (torch.arange(8.0) - 3).repeat(20) * 0.5
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    out, grad_x, grad_scale = through(
        quantizer(form, scale, zero, probability=probability), x, upstream
    )
    assert torch.equal(out, x)
    assert torch.allclose(grad_x, upstream, rtol=1e-6, atol=0)
    assert grad_scale.tolist() == [0.0]


def test_quantizer_module() -> None:
    x = torch.randn(3, 4)
    made = AffineQuantizer(4)
    with pytest.raises(RuntimeError, match="before calibration"):
        made(x)
    assert torch.equal(AffineQuantizer(32)(x), x)
    scale, zero = torch.tensor([0.3]), torch.tensor([7.0])
    made.set_range(scale, zero)
    expected = fake_quantize(x, scale, zero, 16)
    assert torch.equal(made(x), expected)
    made.keep_probability = 0.5
    assert torch.equal(made(x), expected)  # nothing is dropped outside of learning
    for form in FORMS:
        made.learning, made.key = form, KEY.clone()
        mixed = made(x)
        keep = eager_mask(x, KEY, threshold_of(0.5)) == 1
        assert torch.allclose(mixed, torch.where(keep, expected, x), rtol=0, atol=1e-6)
        assert torch.equal(mixed[~keep], x[~keep])
        assert not torch.equal(mixed, expected)
        made.key = made.key + 1
        assert not torch.equal(made(x), mixed)


def test_keys_and_masks_are_no_part_of_a_checkpoint() -> None:
    assert set(AffineQuantizer(4).state_dict()) == {"scale", "zero_point"}


def test_quantizer_takes_its_shapes_from_a_checkpoint() -> None:
    saved, fresh = AffineQuantizer(4), AffineQuantizer(4)
    saved.set_range(torch.rand(1, 5, 1) + 0.1, torch.tensor([7.0]))
    fresh.load_state_dict(saved.state_dict(), strict=True)
    x = torch.randn(2, 5, 3)
    assert torch.equal(fresh(x), saved(x))
