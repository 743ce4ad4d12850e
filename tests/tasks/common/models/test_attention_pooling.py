"""ViTs with attention pooling and without a head: the same function, and all layers found."""

import copy
from typing import Any

import pytest
import torch
from small_models import chain_of, images, quick, randomise, vit
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.families.vit import ExplicitAttentionPool, vit_body
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import QuantLinear, quant_layers, set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.reconstruct import reconstruct


def explicit(pool: AttentionPoolLatent, norm: nn.Module, skipped: int = 0) -> ExplicitAttentionPool:
    with torch.no_grad():
        return ExplicitAttentionPool(pool, norm, skipped, quick()).requires_grad_(False).eval()


def slow_pool(pool: AttentionPoolLatent, x: Tensor) -> Tensor:
    """One image, one head and one latent at a time."""
    out = []
    for tokens in x:
        rows = []
        for latent in pool.latent[0]:
            query, width = pool.q(latent), pool.head_dim
            key, value = pool.kv(tokens).chunk(2, dim=-1)
            heads = []
            for start in range(0, len(query), width):
                part = slice(start, start + width)
                weights = torch.softmax(key[:, part] @ query[part] / width**0.5, dim=0)
                heads.append(weights @ value[:, part])
            row = pool.proj(torch.cat(heads))
            rows.append(row + pool.mlp.fc2(F.gelu(pool.mlp.fc1(pool.norm(row)))))
        out.append(rows[0] if pool.pool == "token" else torch.stack(rows).mean(0))
    return torch.stack(out)


@pytest.mark.parametrize("pool_type", ["token", "avg"])
def test_pooling_equals_its_definition(pool_type: str) -> None:
    pool = AttentionPoolLatent(
        24, num_heads=3, mlp_ratio=2.0, latent_len=2, pool_type=pool_type, norm_layer=nn.LayerNorm
    )
    norm = nn.LayerNorm(24)
    randomise(nn.ModuleList([pool, norm]))
    x = torch.randn(4, 9, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = slow_pool(pool, norm(x)[:, 2:])
        assert torch.allclose(pool(norm(x)[:, 2:]), expected, rtol=1e-5, atol=1e-5)
        assert torch.allclose(explicit(pool, norm, skipped=2)(x), expected, rtol=1e-5, atol=1e-5)


POOLS: dict[str, dict[str, Any]] = {
    "norms of queries and keys": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "latents are the queries": {"q_proj": False},
    "no biases": {"qkv_bias": False},
    "positions": {"pos_embed": "abs", "feat_size": 9},
}


@pytest.mark.parametrize("name", POOLS)
def test_variants_of_the_pooling(name: str) -> None:
    pool, norm = AttentionPoolLatent(24, num_heads=3, **POOLS[name]), nn.LayerNorm(24)
    randomise(nn.ModuleList([pool, norm]))
    x = torch.randn(4, 9, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pool(norm(x))
        found = explicit(pool, norm)
        assert torch.allclose(found(x), expected, rtol=1e-5, atol=1e-5)
    # Behind added positions kv is not the norm's consumer, and a missing norm is none.
    pairs = ([] if name == "positions" else ["kv"]) + (
        ["mlp.fc1"] if "norm_layer" in POOLS[name] else []
    )
    assert [pair.linear for pair in found.pairs] == pairs


@pytest.mark.parametrize(
    "build", [{"out_features": 0}, {"pool_type": ""}], ids=["no projection", "several tokens"]
)
def test_unsupported_pooling(build: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="not supported"):
        explicit(AttentionPoolLatent(24, num_heads=3, **build), nn.LayerNorm(24))


MODELS: dict[str, dict[str, Any]] = {
    "as SigLIP": {"global_pool": "map", "class_token": False},
    "class token left out": {"global_pool": "map"},
    "registers pooled too": {
        "global_pool": "map",
        "class_token": False,
        "reg_tokens": 2,
        "pool_include_prefix": True,
    },
    "norm behind the pooling": {"global_pool": "map", "fc_norm": True},
    "class token": {"global_pool": "token"},
    "mean": {"global_pool": "avg"},
    "maximum, layer scale": {"global_pool": "max", "init_values": 0.5},
}


def tower(model: nn.Module, recipe: Recipe | None = None) -> BlockChain:
    segments, rest = vit_body(model, recipe or quick(), "trunk.", ends=True)
    assert isinstance(rest, nn.Identity)
    return BlockChain(segments)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("classes", [0, 10], ids=["tower", "classifier"])
def test_models_with_and_without_head(name: str, classes: int) -> None:
    model, x, recipe = (
        vit(2, classes=classes, **MODELS[name]),
        images(6),
        quick("rtn", w_bits=8, a_bits=8),
    )
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        chain = chain_of(model, recipe) if classes else tower(model, recipe)
        assert torch.allclose(chain(x), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape == (6, classes or 32)
    kinds = [segment.kind for segment in chain]
    pooled = MODELS[name]["global_pool"] == "map"
    assert kinds == ["patch_embed", "block", "block"] + ["block"] * pooled + ["head"] * bool(
        classes
    )
    # Every segment has something to calibrate and to learn.
    assert all(any(True for _ in quant_layers(segment.block)) for segment in chain)
    calibrate(chain, x, recipe)
    with torch.no_grad():
        quantized = chain(x)
    assert F.cosine_similarity(quantized, expected).min() > 0.998
    assert not torch.allclose(quantized, expected, rtol=1e-4, atol=1e-4)


def test_labels_are_the_names_in_the_model() -> None:
    chain = tower(vit(2, classes=0, global_pool="map"))
    labels = [segment.label for segment in chain]
    assert labels == ["trunk.patch_embed", "trunk.blocks.0", "trunk.blocks.1", "trunk.attn_pool"]
    names = [name for name, _ in quant_layers(chain.segment(3).block)]
    assert names == ["kv", "query_key", "attention_value", "proj", "mlp.fc1", "mlp.fc2"]
    last = tower(vit(2, classes=0)).segment(2)
    assert "attn.qkv" in [name for name, _ in quant_layers(last.block)]
    assert [part.name for part in last.mlps] == ["mlp"]


def test_both_norms_of_the_pooling_are_reparameterised() -> None:
    model, x = vit(1, global_pool="map"), images(8)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    chain = chain_of(model, quick())
    pool = chain.segment(2)
    assert [pair.linear for pair in pool.pairs] == ["kv", "mlp.fc1"]
    before = [pair.norm.weight.clone() for pair in pool.pairs]
    calibrate(chain, x, quick())
    for kept, pair in zip(before, pool.pairs, strict=True):
        assert not torch.allclose(kept, pair.norm.weight, rtol=1e-2)
    set_quantized(chain, False)
    with torch.no_grad():
        assert torch.allclose(chain(x), expected, rtol=1e-5, atol=1e-5)


def test_every_part_of_the_pooling_matters() -> None:
    chain, x = chain_of(vit(1, global_pool="map"), quick()), images(2)
    pool = chain.segment(2).block
    with torch.no_grad():
        before = chain(x)
        for name, value in [*pool.named_parameters(), ("query", pool.get_buffer("query"))]:
            if value.numel() == 0:  # scales before calibration
                continue
            # Softmax ignores a shift of all keys, so only the part of values in this bias moves.
            part = value[value.numel() // 2 :] if name == "kv.bias" else value
            kept = part.clone()
            part.add_(torch.linspace(-0.5, 0.7, part.numel()).view_as(part))
            assert not torch.allclose(chain(x), before, atol=1e-6), name
            part.copy_(kept)


def test_reconstruction_goes_through_the_pooling() -> None:
    recipe = quick(w_bits=3, a_bits=3, per_token=True)
    chain, x = chain_of(vit(1, global_pool="map"), recipe), images(24)
    calibrate(chain, x, recipe)
    reconstruct(chain, x, recipe, ClassifierDivergence(recipe.temperature))
    layers = dict(quant_layers(chain.segment(2).block))
    # Per token: 16 of them are pooled, by one query.
    assert layers["kv"].input_quantizer.scale.shape == (1, 16, 1)
    assert layers["query_key"].a_quantizer.scale.shape == (1, 2, 1, 1)
    assert layers["query_key"].b_quantizer.scale.shape == (1, 2, 1, 16)
    for name, layer in layers.items():
        if isinstance(layer, QuantLinear):
            assert layer.weight_quantizer.codes.numel(), name
    with torch.no_grad():
        assert torch.isfinite(chain(x)).all()
