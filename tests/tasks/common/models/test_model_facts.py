"""Sizes and operations of a model: by hand, by formula, and by PyTorch's own counter."""

from math import ceil

import pytest
import torch
from small_models import chain_of, deit, images, quick, swin, vit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.layers import QuantConvTranspose2d, QuantLinear, QuantMatMul, quant_layers
from fimaq_core.quantizers.affine import AffineQuantizer
from fimaq_core.recipe import Recipe, make_recipe
from tasks.classification.task import TASK
from tasks.common.models.facts import LayerFacts, ModelFacts, count_macs, model_facts
from tasks.common.request import ModelRequest

RTN = make_recipe("rtn", {"range_images": 4})


def demo(
    name: str, recipe: Recipe = RTN, *, calibrated: bool = False
) -> tuple[BlockChain, torch.Tensor, int]:
    """A demo model as a chain, one image of zeros, and the parameters of the float model."""
    loaded = TASK.load(ModelRequest(name))
    assert loaded.input_shape is not None
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    chain = TASK.build(loaded, recipe)
    if calibrated:
        calibrate(
            chain,
            torch.rand(4, *loaded.input_shape, generator=torch.Generator().manual_seed(0)),
            recipe,
        )
    return chain, torch.zeros(1, *loaded.input_shape), parameters


def by_name(facts: ModelFacts) -> dict[str, LayerFacts]:
    return {layer.name: layer for layer in facts.layers}


def factor_bits(layer: LayerFacts) -> tuple[int, int]:
    """Bits of input and weight, or of the two operands of a product."""
    other = layer.other_bits
    return layer.input_bits, layer.weight_bits if other is None else other


def test_macs_of_a_vit_by_hand() -> None:
    """4 x 8 patches of 8 x 8 x 1 and a class token: 33 tokens of width 80, four heads of 20."""
    chain, image, _ = demo("demo_vit")
    expected = {"patch_embed.proj": 4 * 8 * 64 * 80, "head": 80 * 100}
    for block in range(4):
        expected |= {
            f"blocks.{block}.attn.qkv": 33 * 80 * 240,
            f"blocks.{block}.attn.query_key": 4 * 33 * 20 * 33,
            f"blocks.{block}.attn.attention_value": 4 * 33 * 33 * 20,
            f"blocks.{block}.attn.proj": 33 * 80 * 80,
            f"blocks.{block}.mlp.fc1": 33 * 80 * 320,
            f"blocks.{block}.mlp.fc2": 33 * 320 * 80,
        }
    assert count_macs(chain, image) == expected
    assert model_facts(chain, image).totals["macs"] == 11_006_400


def test_macs_of_padded_windows_by_formula() -> None:
    """40 pixels: 10 x 10 tokens, padded to 12 x 12; then 5 x 5 to 8 x 8. MLPs see no padding."""
    chain = chain_of(swin(40), RTN)
    expected = {
        "patch_embed.proj": 10 * 10 * (4 * 4 * 3) * 16,
        "head.fc": 32 * 10,
        "layers.1.downsample.reduction": 25 * 64 * 32,
    }
    for stage, (side, width) in enumerate(((10, 16), (5, 32))):
        padded = (4 * ceil(side / 4)) ** 2
        for block in range(2):
            name = f"layers.{stage}.blocks.{block}"
            expected |= {
                f"{name}.attn.qkv": padded * width * 3 * width,
                f"{name}.attn.query_key": padded * 16 * width,
                f"{name}.attn.attention_value": padded * 16 * width,
                f"{name}.attn.proj": padded * width * width,
                f"{name}.mlp.fc1": side * side * width * 2 * width,
                f"{name}.mlp.fc2": side * side * width * 2 * width,
            }
    assert count_macs(chain, images(1, 40)) == expected


@pytest.mark.parametrize(("build", "size"), [(vit, 32), (deit, 32), (swin, 40), (swin, 32)])
def test_macs_agree_with_pytorchs_counter(build: object, size: int) -> None:
    chain = chain_of(build(size=size) if build is swin else build(), RTN)  # type: ignore[operator]
    image = images(1, size)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        chain(image)
    assert (
        sum(count_macs(chain, image).values()) == counter.get_total_flops() // 2
    )  # two operations a MAC


def test_sizes_of_a_w4a4_vit_by_hand() -> None:
    chain, image, parameters = demo("demo_vit", calibrated=True)
    facts = model_facts(chain, image)
    sums, layers = facts.totals, by_name(facts)
    weights = 80 * 64 + 4 * (240 * 80 + 80 * 80 + 2 * 320 * 80) + 100 * 80
    assert sums["weights"] == weights
    assert sums["weight_bits"] == 4 * weights
    # A scale of 32 and a zero point of 4 bits: one per channel, input, head of operand.
    assert layers["blocks.2.attn.qkv"].overhead_bits == 36 * (240 + 1)
    assert layers["blocks.2.attn.query_key"].overhead_bits == 36 * (4 + 4)
    assert layers["patch_embed.proj"].overhead_bits == 36 * 80  # its input is not quantized
    rows = 80 + 4 * (240 + 80 + 320 + 80) + 100
    assert sums["overhead_bits"] == 36 * (rows + 4 * 4 + 1 + 4 * 2 * 8)
    # Rounding to nearest adds no parameters: every other value stays and counts once.
    assert sums["full_precision_values"] == parameters - weights
    assert sums["full_size_bits"] == 32 * parameters
    assert sums["size_bits"] == 4 * weights + sums["overhead_bits"] + 32 * (parameters - weights)
    assert sums["weight_ratio"] == 8.0


def test_decided_roundings_do_not_change_the_size() -> None:
    from fimaq_core.pipeline import freeze

    chain, image, _ = demo("demo_vit", calibrated=True)
    before = model_facts(chain, image)
    freeze(chain)
    assert model_facts(chain, image) == before


def test_bops_of_a_w4a4_vit_by_hand() -> None:
    chain, image, _ = demo("demo_vit")
    sums = model_facts(chain, image).totals
    patch, rest = 163_840, 11_006_400 - 163_840
    assert sums["bops"] == patch * 4 * 32 + rest * 4 * 4
    assert sums["full_bops"] == 11_006_400 * 1024
    assert sums["bops_ratio"] == pytest.approx(57.96, abs=0.005)
    assert (
        sums["quantized_macs"] == sums["macs"]
    )  # the patch embedding's weights are quantized, its input is not


def test_what_is_off_counts_in_full() -> None:
    chain, image, _ = demo("demo_vit", make_recipe("rtn", {"w_bits": 32, "a_bits": 32}))
    sums = model_facts(chain, image).totals
    assert (sums["bops"], sums["quantized_macs"], sums["size_bits"]) == (
        sums["full_bops"],
        0,
        sums["full_size_bits"],
    )

    chain, image, _ = demo("demo_vit", make_recipe("rtn", {"w_bits": 3, "a_bits": 32}))
    facts = model_facts(chain, image)
    products = 8 * 87_120
    assert facts.totals["quantized_macs"] == facts.totals["macs"] - products
    assert facts.totals["bops"] == (facts.totals["macs"] - products) * 3 * 32 + products * 1024
    entry = by_name(facts)["head"]
    assert (entry.weight_quantizer, entry.input_quantizer) == ("uniform", "none")


def test_operands_of_different_bits() -> None:
    chain, image, _ = demo("demo_vit")
    product = chain.segment(2).block.attn.attention_value
    assert isinstance(product, QuantMatMul)
    product.a_quantizer = AffineQuantizer(8)
    layer = by_name(model_facts(chain, image))["blocks.1.attn.attention_value"]
    assert (layer.input_bits, layer.other_bits) == (8, 4)
    assert (layer.input_quantizer, layer.other_quantizer) == ("uniform", "uniform")
    assert layer.bops == 87_120 * 8 * 4
    assert (layer.weights, layer.size_bits) == (0, 0)


def test_what_stays_in_full_precision() -> None:
    chain, image, _ = demo("demo_vit")
    kept = {
        part.name: (part.kind, part.values) for part in model_facts(chain, image).full_precision
    }
    norms = {f"blocks.{block}.norm{number}" for block in range(4) for number in (1, 2)} | {
        "head.before.norm"
    }
    assert {name for name, (kind, _) in kept.items() if kind == "LayerNorm"} == norms
    assert all(kept[name] == ("LayerNorm", 2 * 80) for name in norms)
    assert kept["blocks.0.before.cls_token"] == ("parameter", 80)
    assert kept["blocks.0.before.pos_embed"] == ("parameter", 33 * 80)
    assert kept["blocks.3.attn.qkv.bias"] == ("bias", 240)
    assert len(kept) == 9 + 2 + 1 + 4 * 4 + 1


def test_swin_counts_its_bias_tables_not_what_is_looked_up_from_them() -> None:
    chain, image, parameters = demo("demo_swin", calibrated=True)
    facts = model_facts(chain, image)
    kept = {part.name: part.values for part in facts.full_precision}
    assert kept["layers.1.blocks.0.attn.bias"] == 7 * 7 * 4  # windows of 4 x 4, four heads
    pads = 2 * 32 + 2 * 64
    assert facts.totals["weights"] + facts.totals["full_precision_values"] == parameters + pads


def test_reparameterization_adds_the_biases_it_made() -> None:
    recipe = quick(w_bits=4, a_bits=4)
    chain = chain_of(swin(32), recipe)
    before = model_facts(chain, images(1)).totals["full_precision_values"]
    calibrate(chain, images(8), recipe)
    assert (
        model_facts(chain, images(1)).totals["full_precision_values"] == before + 32
    )  # the merging's reduction had none


def test_float_layers_are_named_and_not_taken_for_quantized() -> None:
    body = nn.Sequential(
        nn.Linear(6, 5, bias=False), QuantLinear.from_float(nn.Linear(5, 4, bias=False), 4, 8)
    )
    body[1].register_buffer("quantized_bias", torch.zeros(4))
    chain = BlockChain([Segment("body", "block", body, before=nn.Conv2d(4, 6, 3, groups=2))])
    chain.segment(0).before.register_forward_hook(lambda _, args, out: out.flatten(2).mT)
    facts = model_facts(chain, torch.zeros(1, 4, 5, 7))
    positions = 3 * 5
    macs = {
        "body.before": positions * 9 * 2 * 6,
        "body.0": positions * 6 * 5,
        "body.1": positions * 5 * 4,
    }
    assert {layer.name: layer.macs for layer in facts.layers} == macs
    assert [factor_bits(layer) for layer in facts.layers] == [(32, 32), (32, 32), (8, 4)]
    assert facts.totals["quantized_macs"] == macs["body.1"]
    assert {part.name: part.values for part in facts.full_precision} == {
        "body.before.bias": 6,
        "body.1.bias": 4,
    }


@pytest.mark.parametrize("form", ["float", "quantizable"])
def test_transposed_convolutions(form: str) -> None:
    """Every one of 3 x 4 x 5 input values meets 6 kernels of 2 x 3; in groups half of them."""
    up: nn.Module = nn.ConvTranspose2d(4, 6, (2, 3), stride=2)
    if form == "quantizable":
        up = QuantConvTranspose2d.from_float(up, 3, 8)  # type: ignore[arg-type]
    body = nn.Sequential(up, nn.ConvTranspose2d(6, 4, 1, groups=2, bias=False))
    chain, image = BlockChain([Segment("body", "predictor", body)]), torch.zeros(1, 4, 3, 5)
    facts = model_facts(chain, image)
    macs = {"body.0": 4 * 15 * 6 * 6, "body.1": 6 * (6 * 11) * 2}
    assert {layer.name: layer.macs for layer in facts.layers} == macs
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        chain(image)
    assert counter.get_total_flops() // 2 == sum(macs.values())
    assert [layer.kind for layer in facts.layers] == ["transposed convolution"] * 2
    bits = (8, 3) if form == "quantizable" else (32, 32)
    assert [factor_bits(layer) for layer in facts.layers] == [bits, (32, 32)]
    assert facts.totals["weights"] == 4 * 6 * 6 + 6 * 2
    assert {part.name: part.values for part in facts.full_precision} == {"body.0.bias": 6}


def test_counting_leaves_the_chain_as_it_was() -> None:
    chain, image, _ = demo("demo_swin", calibrated=True)
    layers = [layer for _, layer in quant_layers(chain)]
    layers[3].quantized = False
    before, switches = chain(image + 0.5), [layer.quantized for layer in layers]
    first = model_facts(chain, image)
    assert [layer.quantized for layer in layers] == switches
    assert not any(module._forward_hooks for module in chain.modules())
    assert torch.equal(chain(image + 0.5), before)
    assert model_facts(chain, image) == first
    with pytest.raises(ValueError, match="one image is needed, got 2"):
        count_macs(chain, torch.cat([image, image]))
