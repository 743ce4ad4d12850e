"""mmdet's Swin and FPN as a chain: the same function on any size, compiled once."""

import copy
from typing import Any

import pytest
import torch
from small_backbones import (
    EVERYTHING,
    OFF_BITS,
    SIZES,
    SMALL,
    CountingBackend,
    chain_of,
    detector,
    deviation,
    pictures,
)
from small_models import quick, randomise
from torch import Tensor, nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantLinear, QuantMatMul, quant_layers, set_quantized
from fimaq_core.reconstruction.mlp import use_relu
from tasks.detection.detector import BackboneAndNeck
from tasks.detection.mm import CascadeRCNN, MaskRCNN, PatchMerging, SwinBlock
from tasks.detection.swin import AnySizeSwinBlock, ExplicitPatchMerging

#: mmdet's values of Mask R-CNN with Swin-T.
TINY: dict[str, Any] = {
    "embed_dims": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "window_size": 7,
    "mlp_ratio": 4,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", [MaskRCNN, CascadeRCNN])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_chain_equals_the_real_BackboneAndNeck(
    height: int, width: int, kind: type[nn.Module]
) -> None:
    model, x = detector(kind=kind), pictures(height, width, 2)
    expected = model.extract_feat(x)
    found = BackboneAndNeck(chain_of(model))(x)
    assert min(float(one.std()) for one in expected) > 0.1
    assert deviation(found, expected) < 1e-5


@torch.no_grad()
def test_the_real_size_of_swin_t() -> None:
    model, x = detector(TINY, {"out_channels": 256}), pictures(256, 352)
    expected = model.extract_feat(x)
    chain = chain_of(model)
    assert deviation(BackboneAndNeck(chain)(x), expected) < 1e-5
    assert chain(x).shape == (1, 256 * (64 + 16 + 4 + 1), 8, 11)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": False},
        {"patch_norm": False},
        {"window_size": 4},
        {"with_cp": True},
        {"qk_scale": 0.5},
    ],
)
def test_variants_of_swin(changes: dict[str, Any]) -> None:
    model, x = detector({**SMALL, **changes}), pictures(96, 128)
    expected = model.extract_feat(x)
    assert deviation(BackboneAndNeck(chain_of(model))(x), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(97, 130), (33, 47)])
def test_the_backbone_alone_takes_any_size(height: int, width: int) -> None:
    model, x = detector(), pictures(height, width)
    expected = model.backbone(x)
    kept: tuple[Tensor, ...] = ()
    for segment in list(chain_of(model))[:-1]:
        x = segment(x)
        kept = segment.kept_with(x, kept)
    assert deviation(kept, tuple(expected)) < 1e-5


@torch.no_grad()
def test_reparameterisation_keeps_the_function_where_windows_are_padded() -> None:
    model, x = detector(), pictures(96, 128, 2)
    expected = {size: model.extract_feat(pictures(*size)) for size in SIZES}
    chain = chain_of(model)
    calibrate(BlockChain(list(chain)[:-1]), x, quick(w_bits=4, a_bits=4))
    set_quantized(chain, False)
    adapter = BackboneAndNeck(chain)
    blocks = [segment.block for segment in chain if isinstance(segment.block, AnySizeSwinBlock)]
    assert len(blocks) == 8
    assert all(block.pad.abs().max() > 0 for block in blocks)
    for size in SIZES:
        assert deviation(adapter(pictures(*size)), expected[size]) < 2e-5
    # With zeros in the buffer, the function changes on sizes that pad, and only there.
    for block in blocks:
        block.pad.zero_()
    changes = [deviation(adapter(pictures(*size)), expected[size]) for size in SIZES]
    assert changes[0] > 1e-2
    assert changes[1] < 2e-5
    assert changes[2] > 1e-2


def test_what_is_offered_for_reparameterisation_and_mlps() -> None:
    chain = chain_of(detector())
    for segment in chain:
        linears = [pair.linear for pair in segment.pairs]
        if segment.kind == "block":
            assert linears == ["attn.qkv", "mlp.fc1"]
            assert [pair.pad for pair in segment.pairs] == ["pad", None]
            assert [part.name for part in segment.mlps] == ["mlp"]
        else:
            assert linears == (["reduction"] if segment.kind == "merge" else [])
            assert segment.mlps == ()
    use_relu(chain)
    full = chain_of(detector(), {"backbone": quick(**OFF_BITS), "fpn": quick()})
    assert not any(segment.pairs or segment.mlps for segment in full)


def test_names_and_kinds_of_the_segments() -> None:
    chain = chain_of(detector({**SMALL, "depths": (1, 2, 1, 1)}))
    stages = [
        ["blocks.0", "downsample"],
        ["blocks.0", "blocks.1", "downsample"],
        ["blocks.0", "downsample"],
        ["blocks.0"],
    ]
    inner = [
        f"backbone.stages.{number}.{name}" for number, names in enumerate(stages) for name in names
    ]
    assert [segment.label for segment in chain] == ["backbone.patch_embed", *inner, "neck"]
    kinds = {"patch_embed": "patch_embed", "downsample": "merge", "neck": "neck"}
    assert [segment.kind for segment in chain] == [
        kinds.get(one.label.split(".")[-1], "block") for one in chain
    ]
    last = [f"backbone.stages.{number}.blocks.{1 if number == 1 else 0}" for number in range(4)]
    assert [segment.label for segment in chain if segment.keep is not None] == last
    assert [segment.label for segment in chain if segment.takes_kept] == ["neck"]


def test_every_layer_of_the_backbone_is_quantizable() -> None:
    model = detector()
    linears = sum(isinstance(module, nn.Linear) for module in model.backbone.modules())
    chain = chain_of(model)
    layers = [layer for segment in list(chain)[:-1] for _, layer in quant_layers(segment.block)]
    assert sum(isinstance(layer, QuantLinear) for layer in layers) == linears == 8 * 4 + 3
    assert sum(isinstance(layer, QuantMatMul) for layer in layers) == 8 * 2
    floats = [module for module in chain.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    assert floats == []
    assert [name for name, _ in quant_layers(chain.segment(0).block)] == ["projection"]


@torch.no_grad()
def test_shapes_that_the_layers_see() -> None:
    """Attention gets windows (scales per position), the MLP gets the map; products have heads."""
    chain, seen = chain_of(detector()), {}
    block = chain.segment(2).block
    for name, layer in quant_layers(block):
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: [tuple(one.shape) for one in args]})
        )
    block(torch.randn(2, 10, 15, 16))  # 2 x 3 windows an image
    assert seen["attn.qkv"] == [(12, 49, 16)]
    assert seen["attn.proj"] == [(12, 49, 16)]
    assert seen["attn.query_key"] == [(12, 1, 49, 16), (12, 1, 16, 49)]
    assert seen["attn.attention_value"] == [(12, 1, 49, 49), (12, 1, 49, 16)]
    assert seen["mlp.fc1"] == [(2, 10, 15, 16)]
    assert seen["mlp.fc2"] == [(2, 10, 15, 32)]


def _block(shift: bool) -> nn.Module:
    block = AnySizeSwinBlock(randomise(SwinBlock(8, 2, 16, window_size=7, shift=shift)), quick())
    block.pad.normal_()
    return block


def _merging() -> nn.Module:
    return ExplicitPatchMerging(randomise(PatchMerging(8, 16)), quick())


MAPS = [(14, 21), (15, 21), (14, 23), (30, 33), (50, 84), (8, 8)]


@pytest.mark.parametrize(
    "make",
    [lambda: _block(True), lambda: _block(False), _merging],
    ids=["shifted", "plain", "merging"],
)
def test_a_block_compiles_once_for_all_sizes(make: Any) -> None:
    torch.manual_seed(0)
    block, backend = make().eval().requires_grad_(False), CountingBackend()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for height, width in MAPS:
        x = torch.randn(1, height, width, 8, requires_grad=True)
        torch._dynamo.mark_dynamic(x, (1, 2))
        found, expected = compiled(x), block(x)
        weight = torch.randn_like(expected)
        assert torch.allclose(found, expected, atol=1e-6)
        (gradient,) = torch.autograd.grad((found * weight).sum(), x)
        (direct,) = torch.autograd.grad((expected * weight).sum(), x)
        assert torch.allclose(gradient, direct, atol=1e-5)
    assert backend.graphs == 1


def _with(path: str, value: object) -> MaskRCNN:
    """A small detector whose part at ``path`` is ``value``."""
    model = detector()
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, value)
    return model


class _Other(SwinBlock):
    """A block that only a subclass knows."""


def _subclassed() -> nn.Module:
    block = copy.deepcopy(detector().backbone.stages[0].blocks[1])
    block.__class__ = _Other
    return block


REFUSED: dict[str, tuple[Any, str]] = {
    "subclass": (
        lambda: _with("backbone.stages.0.blocks.1", _subclassed()),
        "Swin block of type _Other",
    ),
    "other windows": (
        lambda: _with("backbone.stages.0.blocks.1.attn.w_msa", nn.Identity()),
        "Attention of type Identity",
    ),
    "other MLP": (
        lambda: _with("backbone.stages.0.blocks.1.ffn", nn.Identity()),
        "MLP of type Identity",
    ),
    "other merging": (
        lambda: _with("backbone.stages.0.downsample", nn.Identity()),
        "Downsampling of type Identity",
    ),
    "other patches": (
        lambda: _with("backbone.patch_embed", nn.Identity()),
        "patch embedding of type Identity",
    ),
    "other backbone": (lambda: _with("backbone", nn.Identity()), "backbone of type Identity"),
    "other detector": (lambda: nn.Identity(), "detector of type Identity"),
    "no neck": (lambda: _with("neck", None), "neck of type NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ModelError, match=message):
        chain_of(make())


def test_a_chain_without_a_neck_has_no_maps() -> None:
    with pytest.raises(ModelError, match="no neck"):
        BackboneAndNeck(BlockChain(list(chain_of(detector(), EVERYTHING))[:-1]))
