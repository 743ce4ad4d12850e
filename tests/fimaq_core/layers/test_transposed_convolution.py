"""Transposed convolutions against the float layer and their definition, and as part of a block."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Measured, quick
from torch import Tensor, nn
from torch.func import functional_call

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.checkpoint import Fingerprint, load_checkpoint, save_checkpoint
from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantConvTranspose2d, decide_roundings, quant_layers, set_quantized
from fimaq_core.pipeline import freeze, quantize_chain
from fimaq_core.quantizers.affine import fake_quantize

SETTINGS: dict[str, dict[str, Any]] = {
    "mask head": {"kernel_size": 2, "stride": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "one-sided": {
        "kernel_size": (1, 3),
        "stride": (2, 1),
        "padding": (0, 1),
        "dilation": (1, 2),
        "bias": False,
    },
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def make(
    settings: dict[str, Any], bits: int = 3
) -> tuple[nn.ConvTranspose2d, QuantConvTranspose2d, Tensor]:
    torch.manual_seed(1)
    plain = nn.ConvTranspose2d(5, 4, **settings).requires_grad_(False)
    return plain, QuantConvTranspose2d.from_float(plain, bits, bits), torch.randn(2, 5, 4, 3)


def set_ranges(layer: QuantConvTranspose2d) -> None:
    layer.weight_quantizer.set_range(
        torch.linspace(0.05, 0.2, 4)[:, None], torch.tensor([3.0, 4.0, 3.0, 5.0])[:, None]
    )
    layer.input_quantizer.set_range(torch.full((1, 1, 1, 1), 0.4), torch.full((1, 1, 1, 1), 3.0))


def by_definition(
    x: Tensor, rows: Tensor, bias: Tensor | None, layer: nn.ConvTranspose2d, shape: torch.Size
) -> Tensor:
    """Sum of every input value times every kernel; ``rows`` is (out, in x height x width)."""
    height, width = layer.kernel_size
    kernels = rows.view(len(rows), x.shape[1], height, width).double()
    wide = torch.zeros(*shape[:2], shape[2] + 40, shape[3] + 40, dtype=torch.float64)
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            for i in range(height):
                for j in range(width):
                    top = row * layer.stride[0] + i * layer.dilation[0] - layer.padding[0] + 20
                    left = column * layer.stride[1] + j * layer.dilation[1] - layer.padding[1] + 20
                    wide[:, :, top, left] += x[:, :, row, column].double() @ kernels[:, :, i, j].t()
    out = wide[:, :, 20 : 20 + shape[2], 20 : 20 + shape[3]]
    return out if bias is None else out + bias[:, None, None]


@each_setting
def test_full_precision_is_the_float_layer(settings: dict[str, Any]) -> None:
    plain, layer, x = make(settings)
    assert torch.equal(layer(x), plain(x))
    assert layer.weight.shape[:2] == (4, 5)
    assert layer.bias is plain.bias
    assert layer(x[:0]).shape == plain(x)[:0].shape  # an image without regions


@each_setting
@pytest.mark.parametrize("decided", [False, True])
def test_quantized_form_by_definition(settings: dict[str, Any], decided: bool) -> None:
    plain, layer, x = make(settings)
    set_ranges(layer)
    # Weights of one output channel (second dimension of the float layer) share a range.
    weights = torch.stack(
        [
            fake_quantize(
                plain.weight[:, o].flatten(),
                layer.weight_quantizer.scale[o],
                layer.weight_quantizer.zero_point[o],
                8,
            )
            for o in range(4)
        ]
    )
    x_hat = ((x / 0.4).round() + 3).clamp(0, 7).sub(3) * 0.4
    if decided:
        decide_roundings(layer)
        assert layer.weight_quantizer.codes.shape == (4, layer.weight[0].numel())
    full = layer(x)
    set_quantized(layer, True)
    expected = by_definition(x_hat, weights, plain.bias, plain, full.shape)
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)
    assert (layer(x) - full).abs().max() > 0.1
    assert [name for name, _ in quant_layers(nn.Sequential(layer))] == ["0"]


def test_a_bias_of_the_quantized_form_and_the_state_survive_a_checkpoint(tmp_path: Path) -> None:
    _, layer, x = make(SETTINGS["mask head"])
    set_ranges(layer)
    decide_roundings(layer)
    layer.quantized_bias = torch.arange(4.0)
    set_quantized(layer, True)
    assert torch.allclose(
        layer(x).mean((0, 2, 3)) - torch.arange(4.0),
        (layer(x) - layer.quantized_bias[:, None, None]).mean((0, 2, 3)),
    )
    fingerprint = Fingerprint(
        weights="w" * 64, calibration="c" * 64, recipe=quick().model_dump(mode="json")
    )
    save_checkpoint(tmp_path / "one.safetensors", layer.state_dict(), fingerprint, {})
    other = QuantConvTranspose2d.from_float(nn.ConvTranspose2d(5, 4, 2, 2), 3, 3).requires_grad_(
        False
    )
    load_checkpoint(tmp_path / "one.safetensors", other, fingerprint)
    set_quantized(other, True)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.quantized_bias, torch.arange(4.0))
    set_quantized(other, False)
    set_quantized(layer, False)
    assert torch.equal(other(x), layer(x))


def test_groups_are_refused() -> None:
    with pytest.raises(ModelError, match="2 groups"):
        QuantConvTranspose2d.from_float(nn.ConvTranspose2d(4, 4, 2, groups=2), 4, 4)


@each_setting
def test_gradients_reach_soft_weights(settings: dict[str, Any]) -> None:
    plain, layer, x = make(settings)
    set_ranges(layer)
    set_quantized(layer, True)
    layer.soft = True
    soft = torch.randn(layer.weight.shape, requires_grad=True)
    layer_out = functional_call(layer, {"weight": soft}, (x,))
    direction = torch.randn(layer_out.shape)
    (found,) = torch.autograd.grad((layer_out * direction).sum(), soft)
    # The output is linear in the weight: the gradient in one weight is what a unit there gives.
    x_hat = layer.input_quantizer(x)
    for row, column in ((0, 0), (1, 2), (3, layer.weight[0].numel() - 1)):
        unit = torch.zeros(4, layer.weight[0].numel())
        unit[row, column] = 1
        expected = (by_definition(x_hat, unit, None, plain, layer_out.shape) * direction).sum()
        assert float(found.flatten(1)[row, column]) == pytest.approx(
            float(expected), rel=1e-4, abs=1e-4
        )


def upsampler(bits: int) -> BlockChain:
    torch.manual_seed(4)
    plain = [nn.ConvTranspose2d(6, 8, 2, 2), nn.ConvTranspose2d(8, 3, 3, 1, 1)]
    first, second = (QuantConvTranspose2d.from_float(one, bits, bits) for one in plain)
    return BlockChain([Segment("up", "neck", nn.Sequential(first, nn.ReLU(), second))])


def test_a_block_with_transposed_convolutions_is_reconstructed() -> None:
    """Learned rounding has a smaller output error than nearest, and decides the codes."""
    recipe = quick("qdrop", w_bits=3, a_bits=6, steps=150, activation_prob=1.0)
    x = torch.randn(24, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    learned, nearest = upsampler(3), upsampler(3)
    for layer in nearest.segment(0).block[::2]:  # type: ignore[index]
        layer.input_quantizer.bits = 6
    for layer in learned.segment(0).block[::2]:  # type: ignore[index]
        layer.input_quantizer.bits = 6
    target = learned(x)
    calibrate(nearest, x, recipe)
    freeze(nearest)
    log = quantize_chain(learned, x, recipe, Measured(lambda a, b: (a - b).square().mean()))
    assert (learned(x) - target).square().sum() < 0.7 * (nearest(x) - target).square().sum()
    assert log.last_loss["up"] < 0.7
    codes = [layer.weight_quantizer.codes for _, layer in quant_layers(learned)]
    assert [tuple(code.shape) for code in codes] == [(8, 24), (3, 72)]
    assert any(
        (a != b.weight_quantizer.codes).any()
        for a, (_, b) in zip(codes, quant_layers(nearest), strict=True)
    )  # type: ignore[union-attr]
