"""open_clip's real classes as chains: the same function in full precision, all layers found."""

import copy
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import CustomTransformer, QuickGELU
from small_clip import END, SIGLIP_TEXT, TEXT, VISION, both, clip, embeddings, timm_clip, token_ids
from small_models import images, quick, vit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.layers import QuantConv2d, QuantLinear, QuantMatMul, quant_layers, set_quantized
from fimaq_core.recipe import make_recipe
from tasks.common.models.module_map import module_map
from tasks.retrieval.towers import build_towers

pytestmark = pytest.mark.slow

MODELS: dict[str, Callable[[], Any]] = {
    "QuickGELU": lambda: clip(quick_gelu=True),
    "GELU": lambda: clip(),
    "mean, norm last": lambda: clip(
        {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}
    ),
    "mean, norm first": lambda: clip(
        {"pool_type": "avg", "pos_embed_type": "sin_cos_2d"}, {"pool_type": "first"}
    ),
    "class token, norm last": lambda: clip(
        {"final_ln_after_pool": True}, {"pool_type": "eos", "eos_id": END}
    ),
    "layer scale": lambda: clip({"ls_init_value": 0.1}, {"ls_init_value": 0.1}),
    "patch dropout": lambda: clip({"patch_dropout": 0.5}),
    "norms in float32": lambda: clip(cast_dtype=torch.bfloat16),
    "CustomTextCLIP": lambda: clip(custom=True),
    "CustomTextCLIP, end": lambda: clip(text={"pool_type": "eos", "eos_id": END}, custom=True),
    "no projection of texts": lambda: clip(
        text={"proj_type": "none", "pool_type": "last"}, custom=True
    ),
    "no mask in CLIP": lambda: clip(text=SIGLIP_TEXT),
    "as SigLIP": lambda: timm_clip("test_vit3", "map", "none", SIGLIP_TEXT),
    "as SigLIP 2": lambda: timm_clip(
        "test_vit3", "map", "none", SIGLIP_TEXT | {"act_kwargs": {"approximate": "tanh"}}
    ),
    "timm, projection": lambda: timm_clip("test_vit", "token", "linear", patch_dropout=0.5),
    "timm, projection with bias": lambda: timm_clip(
        "test_vit2", "avg", "linear", timm_proj_bias=True, timm_drop=0.5
    ),
    "timm, MLP": lambda: timm_clip("test_vit2", "avg", "mlp"),
    "timm, classifier as projection": lambda: timm_clip("test_vit", "token", None),
    "timm, nothing behind the mean": lambda: timm_clip("test_vit2", "avg", "none"),
}


def inputs(count: int = 4) -> dict[str, Tensor]:
    return {"vision": images(count), "text": token_ids(count)}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_chains_equal_the_model(name: str) -> None:
    model, given = MODELS[name](), inputs()
    expected = embeddings(model, given["vision"], given["text"])
    chains = both(model, quick())
    assert list(chains) == ["vision", "text"]
    for tower, chain in chains.items():
        with torch.no_grad():
            found = chain(given[tower])
        assert found.shape == expected[tower].shape
        assert (expected[tower][0] - expected[tower][1]).abs().max() > 0.1
        assert relative(found, expected[tower]) < 1e-5, tower


@pytest.mark.parametrize("name", ["QuickGELU", "mean, norm last", "as SigLIP", "timm, MLP"])
def test_calibration(name: str) -> None:
    """Reparameterisation keeps the float function; 8 bits come close to it, 3 bits do not."""
    model, given = MODELS[name](), inputs(8)
    expected = embeddings(model, given["vision"], given["text"])
    for recipe in (quick(), quick("rtn", w_bits=8, a_bits=8), quick("rtn", w_bits=3, a_bits=3)):
        for tower, chain in both(copy.deepcopy(model), recipe).items():
            pairs = [pair for segment in chain for pair in segment.pairs]
            norms = [pair.norm.weight.clone() for pair in pairs]
            calibrate(chain, given[tower], recipe)
            with torch.no_grad():
                quantized = chain(given[tower])
                set_quantized(chain, False)
                assert relative(chain(given[tower]), expected[tower]) < 1e-5, tower
            if recipe.reparameterize:
                assert len(pairs) == 2 * sum(segment.kind == "block" for segment in chain)
                for before, pair in zip(norms, pairs, strict=True):
                    assert not torch.allclose(before, pair.norm.weight, rtol=1e-2)
            closeness = F.cosine_similarity(quantized, expected[tower]).min()
            assert recipe.w_bits != 8 or closeness > 0.99, tower
            assert recipe.w_bits != 3 or closeness < 0.99, tower


def test_parameters_are_taken_over() -> None:
    """No parameter is copied, except transposed projections."""
    model = clip()
    owned = {id(parameter) for parameter in model.parameters()}
    projections = {id(model.visual.proj), id(model.text_projection), id(model.logit_scale)}
    chains = both(model, quick())
    taken = {
        id(parameter)
        for chain in chains.values()
        for parameter in chain.parameters()
        if parameter.numel()
    }
    assert owned - taken == projections
    assert len(taken - owned) == 2


@pytest.mark.parametrize("name", ["GELU", "as SigLIP", "timm, nothing behind the mean"])
def test_every_part_of_the_towers_matters(name: str) -> None:
    given = inputs(2)
    for tower, chain in both(MODELS[name](), quick()).items():
        with torch.no_grad():
            before = chain(given[tower])
            for key, parameter in chain.named_parameters():
                if parameter.numel() == 0:  # scales before calibration
                    continue
                # Softmax ignores a shift of all keys, so only the values in these biases move.
                keys = {"qkv.bias": 2 / 3, ".kv.bias": 1 / 2}
                share = max(
                    (value for end, value in keys.items() if key.endswith(end)), default=0.0
                )
                part = parameter[round(share * len(parameter)) :]
                kept = part.clone()
                part.add_(torch.linspace(-0.5, 0.7, part.numel()).view_as(part))
                assert not torch.allclose(chain(given[tower]), before, atol=1e-6), key
                part.copy_(kept)
            assert torch.equal(chain(given[tower]), before)


def test_chains_can_be_copied() -> None:
    given = inputs(2)
    for tower, chain in both(clip(), quick()).items():
        twin = copy.deepcopy(chain)
        with torch.no_grad():
            before = chain(given[tower])
            for parameter in chain.parameters():
                parameter.zero_()
            assert torch.equal(twin(given[tower]), before)


def changed(ids: Tensor, position: Callable[[int], int]) -> Tensor:
    """``ids`` with another word at a position that depends on where the text ends."""
    ids = ids.clone()
    for row in ids:
        end = int((row == END).nonzero()[0])
        row[position(end)] = 1 + (row[position(end)] + 7) % (END - 2)
    return ids


QUANTIZERS = ["off", "uniform", "log2", "logsqrt2", "adalog", "twin"]


@pytest.mark.parametrize("pool", ["argmax", "eos"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_no_token_sees_what_follows(pool: str, quantizer: str) -> None:
    """This holds with quantizers too: none turns a softmax output of 0 into another value."""
    recipe = quick("rtn", softmax_quantizer="uniform" if quantizer == "off" else quantizer)
    chain = build_towers(clip(text={"pool_type": pool, "eos_id": END}), recipe, ["text"])["text"]
    ids = token_ids(8)
    if quantizer != "off":
        calibrate(chain, ids, recipe)
    with torch.no_grad():
        before = chain(ids)
        assert torch.equal(chain(changed(ids, lambda end: end + 1)), before)
        after = chain(changed(ids, lambda end: 0))
        assert ((after - before).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("pool", ["last", "first"])
def test_without_mask_every_token_counts(pool: str) -> None:
    chain = both(clip(text=SIGLIP_TEXT | {"pool_type": pool}), quick())["text"]
    ids = token_ids(4)
    with torch.no_grad():
        for position in range(TEXT["context_length"]):
            other = ids.clone()
            other[:, position] = (other[:, position] + 5) % END
            assert ((chain(other) - chain(ids)).abs().amax(1) > 1e-4).all()


def test_texts_may_be_shorter_than_the_context() -> None:
    """Tokens that the mask hides do not count."""
    chain, ids = both(clip(), quick())["text"], token_ids(3)
    with torch.no_grad():
        assert torch.allclose(chain(ids[:, :7]), chain(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["argmax", "eos"])
def test_side_is_the_position_of_the_end(pool: str) -> None:
    chain = both(clip(text={"pool_type": pool, "eos_id": END}), quick())["text"]
    ids = token_ids(9)
    ids[3, 11] = END  # of two ends the first counts
    side = chain.side_of(ids)
    assert side is not None
    assert side.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [segment.takes_side for segment in chain] == [False, False, True]


def test_vision_and_fixed_positions_have_no_side() -> None:
    chains = both(clip(text={"pool_type": "last"}), quick())
    assert all(chain.side is None for chain in chains.values())


def test_only_the_towers_asked_for_are_changed() -> None:
    model = clip()
    (name,) = build_towers(model, quick(), ["text"])
    assert name == "text"
    assert not any(
        isinstance(module, QuantLinear | QuantConv2d) for module in model.visual.modules()
    )
    with pytest.raises(ModelError, match=r"no tower 'visoin'.*Did you mean 'vision'"):
        build_towers(model, quick(), ["visoin"])


def layer_names(chain: BlockChain) -> dict[str, tuple[int, int]]:
    """Weight and input bits of linear layers and convolutions by name."""
    return {
        entry.name: (entry.weight_bits, entry.input_bits)
        for entry in module_map(chain).quantized
        if entry.kind != "product"
    }


def expected_blocks(prefix: str) -> dict[str, tuple[int, int]]:
    names = ("attn.qkv", "attn.proj", "mlp.c_fc", "mlp.c_proj")
    return {f"{prefix}.resblocks.{number}.{name}": (3, 4) for number in (0, 1) for name in names}


def test_layers_have_their_names_in_the_model() -> None:
    recipe = make_recipe("fimaq", {"w_bits": 3, "a_bits": 4, "head_bits": 8})
    chains = both(clip(), recipe)
    ends = {"visual.conv1": (3, 32), "visual.proj": (3, 8)}
    assert layer_names(chains["vision"]) == expected_blocks("visual.transformer") | ends
    assert layer_names(chains["text"]) == expected_blocks("transformer") | {
        "text_projection": (3, 8)
    }
    chains = both(clip(custom=True), recipe)
    assert layer_names(chains["text"]) == expected_blocks("text.transformer") | {
        "text.text_projection": (3, 8)
    }
    kinds = {tower: [segment.kind for segment in chain] for tower, chain in chains.items()}
    assert kinds == {
        "vision": ["patch_embed", "block", "block", "projection"],
        "text": ["block", "block", "projection"],
    }
    products = [entry for entry in module_map(chains["text"]).quantized if entry.kind == "product"]
    assert [entry.name for entry in products[:2]] == [
        f"text.transformer.resblocks.0.attn.{name}" for name in ("query_key", "attention_value")
    ]


def test_names_in_timm_towers() -> None:
    recipe = make_recipe("fimaq", {"w_bits": 3, "a_bits": 4, "head_bits": 8})
    names = layer_names(both(MODELS["timm, MLP"](), recipe)["vision"])
    assert names["visual.trunk.patch_embed.proj"] == (3, 32)
    assert names["visual.trunk.blocks.7.attn.qkv"] == (3, 4)
    assert (names["visual.head.mlp.fc1"], names["visual.head.mlp.fc2"]) == ((3, 8), (3, 4))
    assert layer_names(both(MODELS["timm, projection"](), recipe)["vision"])[
        "visual.head.proj"
    ] == (3, 8)
    assert layer_names(both(MODELS["timm, classifier as projection"](), recipe)["vision"])[
        "visual.trunk.head"
    ] == (3, 8)
    names = layer_names(both(MODELS["as SigLIP"](), recipe)["vision"])
    pool = [name for name in names if "attn_pool" in name]
    assert pool == [
        f"visual.trunk.attn_pool.{name}" for name in ("kv", "proj", "mlp.fc1", "mlp.fc2")
    ]


def test_what_stays_in_full_precision() -> None:
    chains = both(clip(), quick())
    text = module_map(chains["text"]).full_precision
    assert "transformer.resblocks.0.before.token_embedding (Embedding)" in text
    assert "text_projection.before.ln_final (LayerNorm)" in text
    for name in MODELS:
        for chain in both(MODELS[name](), quick()).values():
            left = {type(module) for module in chain.modules()} & {
                nn.Linear,
                nn.Conv2d,
                nn.MultiheadAttention,
            }
            assert not left, name
            kinds = {type(layer) for _, layer in quant_layers(chain)}
            assert {QuantLinear, QuantMatMul} <= kinds
            # Every segment has something to calibrate and to learn.
            assert all(any(True for _ in quant_layers(segment.block)) for segment in chain)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_mlps_are_named_for_reconstruction(quick_gelu: bool) -> None:
    for chain in both(clip(quick_gelu=quick_gelu), quick()).values():
        for segment in chain:
            assert len(segment.mlps) == (segment.kind == "block")
            for part in segment.mlps:
                mlp, x = segment.block.get_submodule(part.name), torch.randn(3, 32)
                fc1, act, fc2 = (mlp.get_submodule(name) for name in (part.fc1, part.act, part.fc2))
                assert type(act) is (QuickGELU if quick_gelu else nn.GELU)
                assert type(act) in part.gelu
                assert torch.equal(mlp(x), fc2(act(fc1(x))))


def test_gelu_quantizers_need_gelu() -> None:
    recipe = quick("rtn", gelu_quantizer="log2")
    with pytest.raises(ModelError, match="this MLP has QuickGELU: use uniform"):
        both(clip(quick_gelu=True), recipe)
    for chain in both(clip(), recipe).values():
        found = {
            name: layer.input_quantizer.kind
            for name, layer in quant_layers(chain)
            if isinstance(layer, QuantLinear)
        }
        assert {kind for name, kind in found.items() if name.endswith("c_proj")} == {"log2"}
        assert {kind for name, kind in found.items() if not name.endswith("c_proj")} == {"uniform"}


def changed_model(change: Callable[[Any], object], **options: Any) -> Any:
    model = clip(**options)
    change(model)
    return model


def cross_attention(model: Any) -> None:
    model.transformer.resblocks[1].ln_1_kv = nn.LayerNorm(32)


def hugging_face(model: Any) -> None:
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model.text = HFTextEncoder(
        "bert", 24, config=config, pooler_type="mean_pooler", proj_type="linear"
    )


def coca() -> nn.Module:
    pooled = {
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 4,
        "output_tokens": True,
    }
    text = {"embed_cls": True, "output_tokens": True, "context_length": 11}
    return open_clip.CoCa(32, TEXT | {"layers": 1}, TEXT | text, VISION | pooled)


def set_attribute(path: str, name: str, value: object) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


def other_widths() -> nn.Module:
    return nn.MultiheadAttention(32, 2, kdim=16, vdim=16)


#: Changes that are not supported, and words of the message.
UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "another class": (lambda: vit(1), "type VisionTransformer"),
    "a class of its own": (lambda: type("MyCLIP", (CLIP,), {})(24, VISION, TEXT), "type MyCLIP"),
    "CoCa": (coca, "type CoCa"),
    "ResNet": (
        lambda: clip({"layers": (1, 1, 1, 1), "width": 16, "head_width": 64}),
        "type ModifiedResNet",
    ),
    "custom blocks": (lambda: clip({"qk_norm": True}), "type CustomResidualAttentionBlock"),
    "custom transformer": (
        lambda: changed_model(lambda m: setattr(m, "transformer", CustomTransformer(32, 1, 2))),
        "type CustomTransformer",
    ),
    "attentional pooling": (
        lambda: clip({"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}),
        "attentional_pool",
    ),
    "image tokens": (lambda: clip({"pool_type": "none"}), "pool_type 'none'"),
    "tokens put out": (lambda: clip({"output_tokens": True}), "output_tokens"),
    "text tokens": (lambda: clip(text={"pool_type": "none"}), "pool_type 'none'"),
    "text tokens put out": (
        lambda: clip(text={"output_tokens": True}, custom=True),
        "output_tokens",
    ),
    "class token of texts": (lambda: clip(text={"embed_cls": True}, custom=True), "embed_cls"),
    "class token of texts in CLIP": (lambda: clip(text={"embed_cls": True}), "embed_cls"),
    "padding mask": (
        lambda: changed_model(set_attribute("text", "use_pad_mask", True), custom=True),
        "use_pad_mask",
    ),
    "Hugging Face": (lambda: changed_model(hugging_face, custom=True), "type HFTextEncoder"),
    "cross attention": (lambda: changed_model(cross_attention), "cross attention"),
    "attention of several widths": (
        lambda: changed_model(set_attribute("transformer.resblocks.0", "attn", other_widths())),
        "several widths",
    ),
    "keys of its own": (
        lambda: changed_model(
            set_attribute(
                "transformer.resblocks.0", "attn", nn.MultiheadAttention(32, 2, add_bias_kv=True)
            )
        ),
        "keys of its own",
    ),
    "MLP without linear layers": (
        lambda: changed_model(
            set_attribute("visual.transformer.resblocks.1.mlp", "c_fc", nn.Identity())
        ),
        "two linear layers",
    ),
    "no projection behind a token": (
        lambda: clip(text={"proj_type": "none"}, custom=True),
        "without projection",
    ),
    "ConvNeXt": (lambda: timm_trunk("test_convnext", "avg"), "type ConvNeXt"),
    "distilled": (
        lambda: timm_trunk("deit_tiny_distilled_patch16_224", "token"),
        "type VisionTransformerDistilled",
    ),
    "no pooling": (lambda: timm_clip("test_vit", "", None), "does not pool"),
    "pooling in the head": (
        lambda: changed_head(nn.Sequential(nn.AdaptiveAvgPool1d(1))),
        "AdaptiveAvgPool1d in its head",
    ),
}


def timm_trunk(name: str, pool: str) -> nn.Module:
    return CustomTextCLIP(
        24, {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear"}, TEXT
    )


def changed_head(head: nn.Module) -> nn.Module:
    model = timm_clip("test_vit", "token", "linear")
    model.visual.head = head
    return model


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_named(name: str) -> None:
    make, words = UNSUPPORTED[name]
    model = make()
    with pytest.raises(ModelError, match=words) as caught:
        both(model, quick())
    assert "not supported" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "ViT-B-32",
        "ViT-B-32-quickgelu",
        "ViT-B-16",
        "ViT-L-14",
        "ViT-H-14",
        "ViT-B-16-SigLIP",
        "ViT-B-16-SigLIP2",
    ],
)
def test_published_architectures_are_supported(name: str) -> None:
    config = open_clip.get_model_config(name)
    made = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    with torch.device("meta"):  # shapes and types only
        model = made(**config)
        counted = sum(
            isinstance(module, nn.Linear | nn.MultiheadAttention) for module in model.modules()
        )
        chains = both(model, make_recipe("fimaq"))
    layers = [layer for chain in chains.values() for _, layer in quant_layers(chain)]
    linears = sum(isinstance(layer, QuantLinear) for layer in layers)
    # An nn.MultiheadAttention counts with its output layer. Projections that are parameters become
    # layers; SigLIP's pooling loses the layer of its queries.
    assert linears == counted + (-1 if made is CustomTextCLIP else 2)
    assert sum(isinstance(layer, QuantConv2d) for layer in layers) == 1
