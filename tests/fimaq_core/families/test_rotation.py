"""Rotations: the matrices, exactness in every family, and their effect on outliers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import chain_of, deit, images, quick, swin, vit
from torch import Tensor, nn

from fimaq_core import load, quantize
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.families.rotation import Stream, hadamard, randomised, rotation
from fimaq_core.layers import quant_layers
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples

ROTATED, ROTATED_NOT = quick(rotate="hadamard"), quick()


def test_hadamard_matrices_of_all_usual_widths_have_orthogonal_rows_of_ones() -> None:
    # 1408 = 11 · 128 and 1152 = 9 · 128 need Paley's orders 44 and 36.
    for size in (1, 2, 4, 12, 16, 20, 28, 36, 96, 192, 384, 768, 1024, 1152, 1280, 1408):
        matrix = hadamard(size)
        assert matrix is not None
        assert bool((matrix.abs() == 1).all())
        probe = torch.arange(size, dtype=torch.float64)
        some = torch.stack([probe, probe % 3 - 1, torch.nn.functional.one_hot(probe.long())[-1]])
        assert torch.equal(some @ matrix @ matrix.t(), size * some)


def test_h12_has_the_rows_of_the_squares_modulo_11() -> None:
    matrix = hadamard(12)
    assert matrix is not None
    # 1, 3, 4, 5 and 9 are the squares modulo 11, so the differences i - j decide the signs.
    row = [1 if one == 0 or (-one) % 11 in (1, 3, 4, 5, 9) else -1 for one in range(11)]
    assert matrix[0].tolist() == [1] * 12
    assert matrix[1].tolist() == [-1, *row]


@pytest.mark.parametrize("size", [3, 6, 18, 92])
def test_sizes_without_a_known_hadamard_matrix_have_none(size: int) -> None:
    assert hadamard(size) is None
    assert randomised(size) is None
    with pytest.raises(ModelError, match=f"{size} channels cannot be rotated.*set rotate to none"):
        rotation(size)


@pytest.mark.parametrize("width", [16, 96, 384])
def test_the_rotation_is_orthogonal_nearly_flat_and_keeps_the_vector_of_ones(width: int) -> None:
    turn, eye = rotation(width), torch.eye(width, dtype=torch.float64)
    assert torch.allclose(turn @ turn.t(), eye, atol=1e-12)
    assert torch.allclose(turn.sum(1), torch.ones(width, dtype=torch.float64), atol=1e-12)
    assert float(turn.abs().max()) < 3 * width**-0.5
    assert torch.equal(turn, rotation(width))


MODELS = {
    "vit": vit,
    "deit": deit,
    "scaled blocks and registers": lambda: vit(init_values=0.1, reg_tokens=3),
    "mean": lambda: vit(global_pool="avg"),
    "mean behind the norm": lambda: vit(global_pool="avg", fc_norm=False),
    "norm before the blocks": lambda: vit(pre_norm=True),
    "attention pooling": lambda: vit(global_pool="map"),
    "norms of queries and keys": lambda: vit(qk_norm=True),
    "norms in attention and MLP": lambda: vit(scale_attn_norm=True, scale_mlp_norm=True),
    "no biases": lambda: vit(qkv_bias=False, width=24),
    "swin": lambda: swin(32),
    "swin with padded windows": swin,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("in_float64")
def test_a_rotated_model_equals_the_float_model(name: str) -> None:
    model = MODELS[name]().double()
    x = images(3, 40 if name.endswith("windows") else 32)
    with torch.no_grad():
        wanted = model(x)
        chain = chain_of(model, ROTATED)
        found = chain(x)
    assert float((found - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())
    blocks = [segment for segment in chain if "pool" not in segment.label]
    for norm in (pair.norm for segment in blocks for pair in segment.pairs):
        assert bool((norm.weight == 1).all() and (norm.bias == 0).all())


@torch.no_grad()
def peak(chain: BlockChain, layer: str) -> float:
    """Largest absolute value of a layer's input over its root mean square."""
    seen: list[Tensor] = []
    module = dict(quant_layers(chain))[layer]
    with module.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        chain(images(4))
    return float(seen[0].abs().max() / seen[0].square().mean().sqrt())


@pytest.mark.parametrize("layer", ["1.block.attn.qkv", "2.block.mlp.fc1"])
def test_a_large_channel_of_the_stream_is_spread_over_all(layer: str) -> None:
    model = vit(width=64)
    with torch.no_grad():
        model.patch_embed.proj.bias[3] += 40
        for block in model.blocks:
            for norm in (block.norm1, block.norm2):
                norm.weight.fill_(1)
    rotated = chain_of(copy.deepcopy(model), ROTATED)
    name = f"segments.{layer}"
    assert peak(rotated, name) < 0.5 * peak(chain_of(model, ROTATED_NOT), name)


def test_a_large_channel_of_a_heads_values_is_spread_over_the_head() -> None:
    model = vit(width=64)
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias[2 * 64 + 5] += 40
    rotated, name = chain_of(copy.deepcopy(model), ROTATED), "segments.1.block.attn.proj"
    assert peak(rotated, name) < 0.5 * peak(chain_of(model, ROTATED_NOT), name)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: vit(width=36 + 16), "A stream of 52 channels cannot be rotated"),
        (lambda: vit(norm_layer=nn.RMSNorm), "norms of type RMSNorm"),
        (lambda: vit(global_pool="max", fc_norm=False), "pooling of kind max"),
    ],
)
def test_models_that_cannot_be_rotated_are_refused(model: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        chain_of(model(), ROTATED)


def test_modules_with_blocks_of_their_own_cannot_be_rotated() -> None:
    model = vit()
    with pytest.raises(ModelError, match=r"blocks= and head=.*cannot be rotated"):
        quantize(model, images(8), blocks=model.blocks, head=model.head, rotate="hadamard")


def test_a_weight_of_0_before_padded_windows_is_refused_only_with_a_bias() -> None:
    layer, norm, pad = nn.Linear(8, 8), nn.LayerNorm(8), torch.zeros(8)
    with torch.no_grad():
        norm.weight[2], norm.bias[5] = 0, 1
        Stream(8, ROTATED).read(copy.deepcopy(norm), layer, pad=pad)
        norm.bias[2] = 1
    with pytest.raises(ModelError, match="a weight of 0 in a norm before padded windows"):
        Stream(8, ROTATED).read(norm, layer, pad=pad)


@pytest.mark.parametrize(
    ("model", "size", "changes"),
    [
        (lambda: vit(1, init_values=0.1, pre_norm=True), 32, {"reconstruct_mlp": True}),
        (swin, 40, {"reconstruct": False}),
    ],
)
def test_a_saved_rotated_model_gives_the_same_outputs_again(
    model: Any, size: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    original, x = model(), images(8, size)
    few = {name: getattr(ROTATED, name) for name in ("range_candidates", "range_rounds", "rotate")}
    few |= {"steps": 4, "fisher_k": 2, "mlp_steps": 2, "w_bits": 4, "a_bits": 4, "progress": False}
    quantized = quantize(original, x, **few | changes)
    path = tmp_path / "rotated.safetensors"
    quantized.save(path)
    with torch.no_grad():
        assert torch.equal(load(path, original)(x), quantized(x))


@pytest.mark.parametrize("recipe", [ROTATED, ROTATED_NOT])
def test_norms_of_rotated_models_are_not_reparameterised(recipe: Recipe) -> None:
    chain = chain_of(vit(1), recipe)
    before = [pair.norm.weight.clone() for pair in chain.segment(1).pairs]
    calibrate(chain, Samples(images(8)), recipe)
    found = [pair.norm.weight for pair in chain.segment(1).pairs]
    same = [torch.equal(a, b) for a, b in zip(before, found, strict=True)]
    assert same == [recipe is ROTATED] * 2
