"""LayerNorm reparameterisation keeps the float function, also with padding behind the norm."""

import copy
from typing import Any

import pytest
import torch
from small_models import chain_of, deit, images, quick, randomise, swin, vit
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fimaq_core.calibration import layer_ranges
from fimaq_core.calibration import reparameterize as reparameterize_module
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.calibration.reparameterize import channel_ranges, reparameterize
from fimaq_core.chain import BlockChain
from fimaq_core.errors import NumericsError
from fimaq_core.families.parts import swap_mlp
from fimaq_core.families.swin import ExplicitSwinBlock
from fimaq_core.families.vit import ExplicitAttention
from fimaq_core.layers import QuantLinear, QuantMatMul, quant_layers, set_quantized
from fimaq_core.quantizers.affine import fake_quantize
from fimaq_core.recipe import make_recipe


def test_closed_form() -> None:
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(6), nn.Linear(6, 4)
    randomise(nn.Sequential(norm, linear))
    x = torch.randn(50, 6)
    before, after = norm(x).detach(), linear(norm(x)).detach()
    scale, zero = torch.rand(6) + 0.2, torch.randint(0, 16, (6,)).float()
    pad = torch.zeros(6)
    r, b = reparameterize(norm, linear, scale, zero, pad)
    common = float(scale.mean())
    common_zero = round(float(zero.mean()))
    for channel in range(6):
        assert float(r[channel]) == pytest.approx(float(scale[channel]) / common, rel=1e-5)
        low = -float(zero[channel] * scale[channel])
        # The channel's own lower bound becomes the common one.
        assert low / float(r[channel]) - float(b[channel]) == pytest.approx(
            -common_zero * common, abs=1e-4
        )
    assert torch.allclose(norm(x), before / r - b, atol=1e-5)
    assert torch.allclose(linear(norm(x)), after, atol=1e-4)
    assert torch.allclose(pad, -b)


def test_missing_biases_are_made() -> None:
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(6, bias=False), nn.Linear(6, 4, bias=False)
    x = torch.randn(20, 6)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6) + 0.5)
    before = linear(norm(x)).detach()
    reparameterize(norm, linear, torch.rand(6) + 0.2, torch.randint(0, 16, (6,)).float())
    assert torch.allclose(linear(norm(x)), before, atol=1e-4)


def test_common_range_serves_every_channel_as_its_own() -> None:
    """Afterwards one range quantizes each channel as its own range did (up to the zero point)."""
    torch.manual_seed(1)
    norm, linear = nn.LayerNorm(6), nn.Linear(6, 4)
    x = norm(torch.randn(400, 6)).detach() * torch.tensor([0.1, 1, 2, 5, 10, 20]) + torch.arange(6)
    scale, zero = channel_ranges(x, 16, make_recipe("fimaq", {"range_candidates": 64}))
    r, b = reparameterize(norm, linear, scale, zero)
    own = fake_quantize(x, scale, zero, 16)
    moved = fake_quantize(x / r - b, scale.mean(), zero.mean().round(), 16)
    assert torch.allclose((moved + b) * r, own, atol=float(scale.max()))
    assert ((moved + b) * r - x).square().mean() < 2 * (own - x).square().mean()


def run_float(chain: BlockChain, x: Tensor) -> Tensor:
    set_quantized(chain, False)
    with torch.no_grad():
        return chain(x)


MODELS = {
    "vit": (vit, 32),
    "deit": (deit, 32),
    "swin with padding": (lambda: swin(40), 40),
    "swin": (lambda: swin(32), 32),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [4, 8])
def test_calibration_leaves_the_float_model_alone(name: str, bits: int) -> None:
    build, size = MODELS[name]
    model = build()
    x = images(12, size)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    chain = chain_of(model, quick(w_bits=bits, a_bits=bits))
    norms = [pair.norm.weight.clone() for segment in chain for pair in segment.pairs]
    calibrate(chain, x, quick(w_bits=bits, a_bits=bits))
    moved = [pair.norm.weight for segment in chain for pair in segment.pairs]
    assert moved
    assert all(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(norms, moved, strict=True))
    assert torch.allclose(run_float(chain, x), expected, atol=1e-4)
    set_quantized(chain, True)
    with torch.no_grad():
        assert not torch.allclose(chain(x), expected, atol=1e-4)


def test_real_blocks_of_timm() -> None:
    """One ViT block and one shifted Swin block with padded windows, at real widths."""
    torch.manual_seed(0)
    settings = quick()
    block = randomise(Block(192, 3, qkv_bias=True))
    x = torch.randn(4, 50, 192)
    expected = block(x).detach()
    block.attn = ExplicitAttention(block.attn, settings)
    swap_mlp(block.mlp, settings)
    assert torch.allclose(block(x), expected, atol=1e-5)
    for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
        reparameterize(norm, linear, torch.rand(192) + 0.1, torch.randint(0, 16, (192,)).float())
    assert torch.allclose(block(x), expected, atol=1e-4)

    original = SwinTransformerBlock(96, (10, 12), num_heads=3, window_size=7, shift_size=3)
    randomise(original)
    x = torch.randn(2, 10, 12, 96)
    expected = original(x).detach()
    swin_block = ExplicitSwinBlock(original, settings)
    assert torch.allclose(swin_block(x), expected, atol=1e-5)
    scale, zero = torch.rand(96) + 0.1, torch.randint(0, 16, (96,)).float()
    reparameterize(swin_block.norm1, swin_block.attn.qkv, scale, zero, swin_block.get_buffer("pad"))
    assert torch.allclose(swin_block(x), expected, atol=1e-4)
    swin_block.get_buffer("pad").zero_()
    assert not torch.allclose(
        swin_block(x), expected, atol=1e-2
    )  # what zero padding would have done


@pytest.mark.parametrize(
    "converted", [False, True], ids=["as built", "moved to another type and back"]
)
def test_pad_values_follow_the_norm(monkeypatch: pytest.MonkeyPatch, converted: bool) -> None:
    """The pad value of every Swin block becomes -b; also after a move, which replaces buffers."""
    shifts: list[Tensor] = []

    def record(norm: nn.LayerNorm, *args: Any) -> tuple[Tensor, Tensor]:
        r, b = reparameterize(norm, *args)
        shifts.append(b)
        owners.append(norm)
        return r, b

    owners: list[nn.LayerNorm] = []
    monkeypatch.setattr(reparameterize_module, "reparameterize", record)
    model, x = swin(40), images(8, 40)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    chain = chain_of(model, quick())
    if converted:
        chain.to(torch.float64).to(torch.float32)
    calibrate(chain, x, quick())
    blocks = [segment.block for segment in chain if isinstance(segment.block, ExplicitSwinBlock)]
    assert len(blocks) == 4
    for block in blocks:
        (b,) = (shift for norm, shift in zip(owners, shifts, strict=True) if norm is block.norm1)
        assert torch.allclose(block.get_buffer("pad"), -b)
        assert block.get_buffer("pad").abs().max() > 0.01
    assert torch.allclose(run_float(chain, x), expected, atol=1e-4)


def test_no_reparameterisation_where_bits_differ_or_it_is_off() -> None:
    for settings in (
        quick(w_bits=3, a_bits=4),
        quick(reparameterize=False),
        quick("rtn"),
        quick(w_bits=4, a_bits=32),
    ):
        model = vit(1)
        weights = copy.deepcopy(model.state_dict())
        chain = chain_of(model, settings)
        calibrate(chain, images(8), settings)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "mlp.fc1.weight"):
            assert torch.equal(
                chain.segment(1).block.state_dict()[name], weights[f"blocks.0.{name}"]
            )


def test_every_quantizer_gets_a_range_of_its_granularity() -> None:
    settings = make_recipe("fimaq", {"range_images": 6, "range_candidates": 32, "range_rounds": 1})
    chain = chain_of(swin(40), settings)
    calibrate(chain, images(6, 40), settings)
    for name, layer in quant_layers(chain):
        if isinstance(layer, QuantMatMul):
            heads = 2 if ".1." in name or ".2." in name else 4
            assert (
                layer.a_quantizer.scale.shape == layer.b_quantizer.scale.shape == (1, heads, 1, 1)
            ), name
        else:
            assert layer.weight_quantizer.scale.shape == (layer.weight.shape[0], 1), name
            assert layer.input_quantizer.scale.numel() == (
                1 if isinstance(layer, QuantLinear) else 0
            ), name


def test_layers_calibrate_on_the_full_precision_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer sees another's quantization, and each block runs once."""
    model, x = vit(2), images(8)
    plain = chain_of(copy.deepcopy(model), quick("rtn"))
    inputs: dict[str, Tensor] = {}
    for name, layer in quant_layers(plain):
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0].clone())
        )
    with torch.no_grad():
        plain(x)
    seen: list[Tensor] = []
    original = layer_ranges.calibrate_linear
    monkeypatch.setattr(
        layer_ranges,
        "calibrate_linear",
        lambda layer, x, r: (seen.append(x), original(layer, x, r)),
    )
    chain = chain_of(model, quick("rtn"))
    calibrate(chain, x, quick("rtn"), batch_size=3)
    names = [name for name, layer in quant_layers(chain) if isinstance(layer, QuantLinear)]
    assert len(seen) == len(names) == 9
    for name, found in zip(names, seen, strict=True):
        assert torch.allclose(found, inputs[name], atol=1e-5), name


def test_not_a_number_is_named() -> None:
    chain = chain_of(vit(2), quick())
    x = images(8)
    with torch.no_grad():
        chain.segment(2).block.norm2.bias[0] = float("nan")
    with pytest.raises(NumericsError, match=r"blocks\.1\.mlp\.fc1"):
        calibrate(chain, x, quick())
    chain = chain_of(vit(1), quick())
    x[3, 0, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match="patch_embed"):
        calibrate(chain, x, quick())
