"""The product of two activations, with operands that lie in memory as they are or transposed."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from fimaq_core.layers import QuantMatMul
from fimaq_core.quantizers.activation import Form
from fimaq_core.quantizers.affine import fake_quantize

FORMS: tuple[Form, ...] = get_args(Form)


def example(transposed: bool, columns: int = 9) -> tuple[QuantMatMul, Tensor, Tensor]:
    """A product with scales per head and row of a, per head and column of b; its operands."""
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(3, 2, 7, 5, generator=generator)
    b = (
        torch.randn(3, 2, columns, 5, generator=generator).mT
        if transposed
        else torch.randn(3, 2, 5, columns, generator=generator)
    )
    layer = QuantMatMul(3)
    layer.a_quantizer.set_range(
        torch.rand(1, 2, 7, 1, generator=generator) * 0.3 + 0.3, torch.full((1, 2, 1, 1), 4.0)
    )
    layer.b_quantizer.set_range(
        torch.rand(1, 2, 1, columns, generator=generator) * 0.3 + 0.3, torch.full((1, 2, 1, 1), 3.0)
    )
    return layer, a, b


@pytest.mark.parametrize("transposed", [False, True])
def test_values(transposed: bool) -> None:
    layer, a, b = example(transposed)
    assert torch.equal(layer(a, b), a @ b)
    layer.quantized = True
    expected = fake_quantize(
        a, layer.a_quantizer.scale, layer.a_quantizer.zero_point, 8
    ) @ fake_quantize(b, layer.b_quantizer.scale, layer.b_quantizer.zero_point, 8)
    assert torch.allclose(layer(a, b), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, a @ b, atol=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_do_not_depend_on_how_b_lies(form: Form) -> None:
    found = []
    for contiguous in (False, True):
        layer, a, b = example(True)
        b = b.contiguous() if contiguous else b
        layer.quantized = True
        for quantizer in (layer.a_quantizer, layer.b_quantizer):
            quantizer.learning = form
            quantizer.scale.requires_grad_(True)
        leaves = [
            a.requires_grad_(True),
            b.requires_grad_(True),
            layer.a_quantizer.scale,
            layer.b_quantizer.scale,
        ]
        upstream = torch.randn(3, 2, 7, 9, generator=torch.Generator().manual_seed(5))
        found.append(torch.autograd.grad((layer(a, b) * upstream).sum(), leaves))
        assert found[-1][1].stride() == b.stride()
    for lying, standing in zip(*found, strict=True):
        assert lying.shape == standing.shape
        assert torch.allclose(lying, standing, rtol=1e-5, atol=1e-5 * float(standing.abs().max()))
        assert float(standing.abs().max()) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_products_keep_float32_operands(form: Form) -> None:
    layer, a, b = example(True)
    layer.quantized = True
    layer.a_quantizer.learning = layer.b_quantizer.learning = form
    a.requires_grad_(True)
    b.requires_grad_(True)
    exact = torch.autograd.grad(layer(a, b).square().sum(), (a, b))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(a, b)
    assert out.dtype == torch.bfloat16
    rough = torch.autograd.grad(out.float().square().sum(), (a, b))
    for fine, coarse in zip(exact, rough, strict=True):
        assert coarse.dtype == torch.float32
        assert not torch.equal(fine, coarse)
        assert torch.allclose(fine, coarse, rtol=0.05, atol=0.02 * float(fine.abs().max()))
