"""Bits of single layers: in recipes, in files, and in the layers of a model."""

import json
from pathlib import Path

import pytest
import torch
from small_models import chain_of, images, quick, vit

from fimaq_core import load, quantize
from fimaq_core.bits_map import BitsMap, read_bits_map
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.errors import RecipeError
from fimaq_core.mixed_bits import apply_bits_map
from fimaq_core.quantizers.affine import AffineQuantizer, WeightQuantizer
from fimaq_core.recipe import Recipe, make_recipe

MAP = {
    "blocks.0.attn.qkv": {"w": 3, "a": 3},
    "blocks.0.attn.query_key": {"a": 5, "b": 6},
    "blocks.1.mlp.fc2": {"a": 8},
    "head": {"w": 2},
}


def test_a_recipe_with_a_map_is_hashable_and_survives_json() -> None:
    recipe = make_recipe("fimaq", {"bits_map": MAP})
    assert recipe.bits_map is not None
    assert recipe.bits_map.widths() == MAP
    assert hash(recipe) == hash(make_recipe("fimaq", {"bits_map": dict(reversed(MAP.items()))}))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert json.loads(recipe.model_dump_json())["bits_map"] == MAP


def test_only_a_map_with_entries_enters_a_digest() -> None:
    plain = make_recipe()
    assert make_recipe("fimaq", {"bits_map": {}}) == plain
    mixed = make_recipe("fimaq", {"bits_map": MAP})
    other = make_recipe("fimaq", {"bits_map": {"head": {"w": 2}}})
    for fields in ("all", "ranges"):
        assert len({recipe.digest(fields) for recipe in (plain, mixed, other)}) == 3
    assert mixed.digest("mlp") == plain.digest("mlp")


def test_a_map_is_short_where_settings_are_listed() -> None:
    changes = make_recipe("fimaq", {"bits_map": MAP}).changes()
    text = f"{changes['bits_map']}"
    assert list(changes) == ["bits_map"]
    assert text == repr(changes["bits_map"]) == str(BitsMap.of(MAP))
    assert text.startswith("mixed ")
    assert len(text) == 14
    assert str(BitsMap.of({"head": {"w": 3}})) != text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"head": {"w": 9}}, "head.w has 9 bits, outside 2 to 8"),
        ({"head": {"w": 2.5}}, "head.w has 2.5 bits"),
        ({"head": {"q": 4}}, "head needs bits by operand"),
        ({"head": 4}, "head needs bits by operand"),
        (["head"], "give a mapping"),
        ({3: {"w": 4}}, "3 is no name of a layer"),
    ],
)
def test_wrong_maps_are_refused_with_the_place(content: object, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe("fimaq", {"bits_map": content})


def test_files_of_maps(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text("head: {w: 2}\nblocks.1.mlp.fc2: {a: 8}\n")
    assert read_bits_map(path) == {"head": {"w": 2}, "blocks.1.mlp.fc2": {"a": 8}}
    path.write_text("head: {w: 1}\n")
    with pytest.raises(RecipeError, match=r"map\.yaml does not make sense: head\.w has 1 bits"):
        read_bits_map(path)
    with pytest.raises(RecipeError, match="Cannot read the bits map"):
        read_bits_map(tmp_path / "none.yaml")


def test_a_map_equals_bits_set_by_hand() -> None:
    mixed = quick("rtn", bits_map=MAP)
    found, expected = chain_of(vit(), mixed), chain_of(vit(), quick("rtn"))
    apply_bits_map({"": found}, mixed.bits_map)
    blocks = [segment.block for segment in expected]
    blocks[1].attn.qkv.weight_quantizer = WeightQuantizer(3)
    blocks[1].attn.qkv.input_quantizer = AffineQuantizer(3)
    blocks[1].attn.query_key.a_quantizer = AffineQuantizer(5)
    blocks[1].attn.query_key.b_quantizer = AffineQuantizer(6)
    blocks[2].mlp.fc2.input_quantizer = AffineQuantizer(8)
    blocks[3].weight_quantizer = WeightQuantizer(2)
    x = images(8)
    for chain in (found, expected):
        calibrate(chain, x, mixed)
    torch.testing.assert_close(found(x), expected(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["logsqrt2", "adalog", "twin"])
def test_operands_keep_the_kind_of_their_quantizer(kind: str) -> None:
    recipe = quick("fimaq", softmax_quantizer=kind, gelu_quantizer=kind)
    chain = chain_of(vit(), recipe)
    product, fc2 = chain.segment(1).block.attn.attention_value, chain.segment(1).block.mlp.fc2
    before = product.a_quantizer, fc2.input_quantizer
    bits = {"blocks.0.attn.attention_value": {"a": 6}, "blocks.0.mlp.fc2": {"a": 5}}
    apply_bits_map({"": chain}, BitsMap.of(bits))
    after = product.a_quantizer, fc2.input_quantizer
    assert [one.kind for one in after] == [kind, kind]
    assert [type(one) for one in after] == [type(one) for one in before]
    assert [one.bits for one in after] == [6, 5]


def test_names_have_the_part_of_the_model_in_front() -> None:
    chains = {"vision": chain_of(vit(), quick("rtn")), "text": chain_of(vit(), quick("rtn"))}
    apply_bits_map(chains, BitsMap.of({"text.head": {"w": 7}}))
    assert [chain.segment(3).block.weight_quantizer.bits for chain in chains.values()] == [4, 7]


def test_unknown_layers_and_operands_are_one_error_with_advice() -> None:
    chain = chain_of(vit(), quick("rtn"))
    with pytest.raises(RecipeError) as caught:
        apply_bits_map({"": chain}, BitsMap.of({"blocks.0.attn.qvk": {"w": 3}, "x": {"w": 4}}))
    assert str(caught.value) == (
        "bits_map names 'blocks.0.attn.qvk' and 1 other layers, which this model does not have. "
        "Did you mean 'blocks.0.attn.qkv'?"
    )
    with pytest.raises(RecipeError, match=r"'w' of .*query_key, which has only a"):
        apply_bits_map({"": chain}, BitsMap.of({"blocks.0.attn.query_key": {"w": 3}}))


def test_quantize_save_and_load_mixed_bits(tmp_path: Path) -> None:
    model, x = vit(), images(8)
    with pytest.raises(RecipeError, match="Did you mean 'head'"):
        quantize(model, x, method="rtn", bits_map={"hed": {"w": 3}}, progress=False)
    few = {"calibration_images": 8, "range_images": 8, "progress": False}
    q = quantize(model, x, method="rtn", bits_map=MAP, **few)
    path = tmp_path / "q.safetensors"
    q.save(path)
    again = load(path, model)
    assert again.recipe.bits_map == BitsMap.of(MAP)
    torch.testing.assert_close(again(x), q(x), rtol=0, atol=0)
