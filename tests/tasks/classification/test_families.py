"""timm's classes as chains: the same function in full precision, and all quantizable layers."""

import copy
from typing import Any

import pytest
import timm
import torch
from small_models import chain_of, deit, images, quick, randomise, swin, vit
from timm.layers import Attention
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantLinear, QuantMatMul, quant_layers
from fimaq_core.recipe import make_recipe
from tasks.classification.task import TASK
from tasks.common.models.module_map import module_map
from tasks.common.task import LoadedModel

RECIPE = make_recipe("fimaq")

#: Name, arguments, image size. Sizes 200 and 256 make Swin pad its windows.
REAL: list[tuple[str, dict[str, Any], int]] = [
    ("vit_small_patch16_224", {}, 224),
    ("deit_tiny_patch16_224", {}, 224),
    ("deit_tiny_distilled_patch16_224", {}, 224),
    ("swin_tiny_patch4_window7_224", {}, 224),
    ("swin_tiny_patch4_window7_224", {"img_size": 256}, 256),
    ("swin_tiny_patch4_window7_224", {"img_size": 200}, 200),
]


def loaded(model: nn.Module) -> LoadedModel:
    """The model as the task gets it."""
    return LoadedModel(model, "some.tag", "", "", 10, lambda image: image, lambda image: image)


@pytest.mark.parametrize(
    ("name", "arguments", "size"), REAL, ids=[f"{name}-{size}" for name, _, size in REAL]
)
def test_chain_equals_the_real_model(name: str, arguments: dict[str, Any], size: int) -> None:
    model = randomise(timm.create_model(name, pretrained=False, **arguments))
    x = images(2, size)
    with torch.no_grad():
        expected = model(x)
        chain = TASK.build(loaded(model), RECIPE)
        found = chain(x)
    assert expected.std() > 0.1
    assert (expected[0] - expected[1]).abs().max() > 0.1
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


VARIANTS: dict[str, dict[str, Any]] = {
    "average pooling": {"global_pool": "avg"},
    "layer scale": {"init_values": 0.1},
    "register tokens": {"reg_tokens": 3},
    "no class token": {"class_token": False, "global_pool": "avg", "no_embed_class": True},
    "norm of queries and keys": {"qk_norm": True},
    "norms inside": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "norm before the blocks": {"pre_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "dynamic size": {"dynamic_img_size": True},
    "no position embedding": {"pos_embed": "none"},
    "attention pooling": {"global_pool": "map"},
    "patch dropout": {"patch_drop_rate": 0.5},
    "dropout": {
        "proj_drop_rate": 0.5,
        "attn_drop_rate": 0.5,
        "drop_path_rate": 0.5,
        "pos_drop_rate": 0.5,
        "drop_rate": 0.5,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_plain_vit(name: str) -> None:
    model, x = vit(2, **VARIANTS[name]), images(4)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        chain = chain_of(model, quick())
        assert torch.allclose(chain(x), expected, rtol=1e-5, atol=1e-5)
    calibrate(chain, x, quick())
    with torch.no_grad():
        assert torch.isfinite(chain(x)).all()


@pytest.mark.parametrize("build", [vit, deit, swin])
def test_every_part_of_the_model_matters(build: Any) -> None:
    """Each parameter of the small models changes the chain's output: none is lost or copied."""
    model = build()
    size = 40 if build is swin else 32
    x = images(2, size)
    chain = chain_of(model, quick())
    with torch.no_grad():
        before = chain(x)
        for name, parameter in chain.named_parameters():
            if parameter.numel() == 0:  # scales before calibration
                continue
            # Softmax ignores a shift of all keys, so only the values' part of this bias moves.
            part = (
                parameter[-parameter.numel() // 3 :]
                if name.endswith("attn.qkv.bias")
                else parameter
            )
            kept = part.clone()
            part.add_(torch.linspace(-0.5, 0.7, part.numel()).view_as(part))
            assert not torch.allclose(chain(x), before, atol=1e-6), name
            part.copy_(kept)
        assert torch.equal(chain(x), before)


def test_chain_can_be_copied() -> None:
    chain = chain_of(vit(1), quick())
    twin = copy.deepcopy(chain)
    x = images(2)
    with torch.no_grad():
        before = chain(x)
        for parameter in chain.parameters():
            parameter.zero_()
        assert torch.equal(twin(x), before)


UNSUPPORTED: dict[str, Any] = {
    "convnext": lambda: timm.create_model("convnext_atto", pretrained=False),
    "eva": lambda: timm.create_model("eva02_tiny_patch14_224", pretrained=False, depth=1),
    "swin v2": lambda: timm.create_model("swinv2_cr_tiny_ns_224", pretrained=False),
    "relative position vit": lambda: timm.create_model(
        "vit_relpos_small_patch16_224", pretrained=False, depth=1
    ),
    "parallel blocks": lambda: vit(1, block_fn=ParallelScalingBlock),
    "attention pooling without projections": lambda: vit(1, global_pool="prr"),
    "gated mlp": lambda: timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, depth=1, mlp_layer=timm.layers.SwiGLUPacked
    ),
    "a class of its own": lambda: type("MyViT", (type(vit(1)),), {})(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2
    ),
}


def gated() -> nn.Module:
    """Attention of timm's own class, with its gate."""
    model = vit(1)
    model.blocks[0].attn = Attention(32, 2, qkv_bias=True, gated=True)
    return model


@pytest.mark.parametrize("name", [*UNSUPPORTED, "gated attention"])
def test_unsupported_models_are_named(name: str) -> None:
    model = gated() if name == "gated attention" else UNSUPPORTED[name]()
    with pytest.raises(ModelError, match=r"not supported|no model family|no linear classifier"):
        TASK.build(loaded(model), RECIPE)


def expected_names(model: nn.Module) -> tuple[set[str], int]:
    """Linear and convolution layers of the original model, and its number of attention blocks."""
    names = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    return names, sum(
        type(module).__name__ in ("Attention", "WindowAttention") for module in model.modules()
    )


@pytest.mark.parametrize(
    ("build", "size", "head"),
    [(vit, 32, "head"), (deit, 32, "head"), (swin, 40, "head.fc")],
    ids=["vit", "deit", "swin"],
)
def test_module_map_lists_everything(build: Any, size: int, head: str) -> None:
    model = build()
    names, attentions = expected_names(model)
    recipe = quick(w_bits=3, a_bits=4, head_bits=8)
    chain = chain_of(model, recipe)
    calibrate(chain, images(8, size), recipe)
    found = module_map(chain)
    layers = {entry.name: entry for entry in found.quantized if entry.kind != "product"}
    # DeiT's two heads are one segment called "head".
    assert {name.replace("head.head", "head") for name in layers} == names
    assert len(layers) == len(names)
    products = [entry for entry in found.quantized if entry.kind == "product"]
    assert len(products) == 2 * attentions
    assert len({entry.name for entry in products}) == len(products)
    for entry in products:
        assert entry.name.endswith(("attn.query_key", "attn.attention_value"))
        assert (entry.input_bits, entry.other_bits) == (4, 4)
        assert (entry.weight_quantizer, entry.input_quantizer, entry.other_quantizer) == (
            "none",
            "uniform",
            "uniform",
        )
    patch = layers["patch_embed.proj"]
    assert (patch.kind, patch.weight_bits, patch.input_bits) == ("convolution", 3, 32)
    assert patch.input_ranges == "full precision"
    assert (patch.weight_quantizer, patch.input_quantizer, patch.other_bits) == (
        "uniform",
        "none",
        None,
    )
    for name, entry in layers.items():
        assert entry.weight_bits == 3, name
        if name.startswith("head"):
            assert entry.input_bits == 8, name
        elif name != "patch_embed.proj":
            assert entry.input_bits == 4, name
    assert any(name.startswith(head) for name in layers)


def test_module_map_names_what_stays_in_full_precision() -> None:
    chain = chain_of(swin(40), quick())
    calibrate(chain, images(8, 40), quick())
    full = module_map(chain).full_precision
    norms = [entry for entry in full if "(LayerNorm)" in entry]
    assert len(norms) == 1 + 4 * 2 + 1 + 1  # patch embedding, four blocks, merging, before the head
    assert sum("(GELU)" in entry for entry in full) == 4
    assert not any("Linear" in entry or "Conv" in entry or "Quant" in entry for entry in full)


def test_every_linear_layer_became_quantizable() -> None:
    for build in (vit, deit, swin):
        chain = chain_of(build(), quick())
        plain = [
            name for name, module in chain.named_modules() if type(module) in (nn.Linear, nn.Conv2d)
        ]
        assert plain == []
        kinds = {type(layer) for _, layer in quant_layers(chain)}
        assert {QuantLinear, QuantMatMul} <= kinds


def test_swin_merging_and_norms_are_paired() -> None:
    pairs = {
        f"{segment.label}: {pair.linear}"
        for segment in chain_of(swin(40), quick())
        for pair in segment.pairs
    }
    blocks = {
        f"layers.{i}.blocks.{j}: {name}"
        for i in (0, 1)
        for j in (0, 1)
        for name in ("attn.qkv", "mlp.fc1")
    }
    assert pairs == blocks | {"layers.1.downsample: reduction"}
    kinds = [segment.kind for segment in chain_of(swin(40), quick())]
    assert kinds == ["patch_embed", "block", "block", "merge", "block", "block", "head"]
