"""Merging and validating recipes."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from fimaq_core.errors import RecipeError
from fimaq_core.recipe import (
    _LATER,
    METHODS,
    Recipe,
    make_recipe,
    read_recipe_file,
    register_method,
)


def test_defaults_are_the_released_settings() -> None:
    recipe = make_recipe()
    assert recipe.method == "fimaq"
    assert (recipe.calibration_images, recipe.batch_size, recipe.steps, recipe.seed) == (
        1024,
        32,
        20_000,
        3407,
    )
    assert (recipe.range_images, recipe.range_candidates, recipe.range_rounds) == (128, 128, 3)
    assert (recipe.lr_alpha, recipe.lr_scale, recipe.round_weight, recipe.round_warmup) == (
        1e-3,
        4e-5,
        0.01,
        0.2,
    )
    assert (recipe.beta_start, recipe.beta_end) == (20, 2)
    assert (
        recipe.loss,
        recipe.fisher_k,
        recipe.fisher_p1,
        recipe.fisher_p2,
        recipe.temperature,
    ) == ("fisher_dplr", 5, 1, 1, 20)
    assert (recipe.prefix_prob, recipe.activation_prob, recipe.per_token) == (0.5, 0.5, True)


def test_methods() -> None:
    names = "mlp-recon rtn repq ptq4vit adalog erq gptq gptaq brecq qdrop pdquant adalog-recon aphq"
    assert list(METHODS) == [
        *names.split(),
        "qdrop-aphq",
        "fimaq",
        "fimaq-mlp",
        "lsvit",
        "glfq",
        "mlp-finish",
    ]
    assert all(make_recipe(name).changes() == {} for name in METHODS)
    brecq, qdrop, rtn = make_recipe("brecq"), make_recipe("qdrop"), make_recipe("rtn")
    assert (brecq.loss, brecq.prefix_prob, brecq.activation_prob, brecq.per_token) == (
        "mse",
        0,
        1,
        False,
    )
    assert (qdrop.loss, qdrop.prefix_prob, qdrop.activation_prob, qdrop.per_token) == (
        "mse",
        0.5,
        0.5,
        False,
    )
    assert (rtn.reconstruct, rtn.range_search, rtn.reparameterize) == (False, "minmax", False)


def test_losses_are_those_of_the_released_code() -> None:
    aphq, qdrop = make_recipe("qdrop-aphq"), make_recipe("qdrop")
    assert aphq.changes() == {} == qdrop.changes()
    assert (make_recipe("aphq").loss_start, aphq.loss_start, qdrop.loss_start) == (2, 2, None)
    assert make_recipe("qdrop", {"loss_start": 2}).model_dump(exclude={"method"}) == (
        aphq.model_dump(exclude={"method"})
    )
    adalog, brecq = make_recipe("adalog-recon"), make_recipe("brecq")
    assert (adalog.loss, brecq.loss) == ("mse_adalog", "mse")
    pd = make_recipe("pdquant")
    assert (pd.loss, pd.lr_alpha, pd.temperature) == ("prediction_pdquant", 3e-3, 4)
    assert (pd.prediction_lambda, pd.loss_start) == (0.1, None)


@pytest.mark.parametrize(
    ("method", "old"),
    [
        ("pdquant", {"loss": "prediction", "lr_alpha": 1e-3, "temperature": 20.0}),
        ("adalog-recon", {"loss": "mse", "revision": 1}),
        ("aphq", {"loss_start": None, "revision": 1}),
    ],
)
def test_a_record_from_before_the_released_losses_is_another_variant(
    method: str, old: dict[str, object]
) -> None:
    now = make_recipe(method).model_dump(mode="json") | old
    fields = {name: value for name, value in now.items() if name not in _LATER}
    read = Recipe.model_validate(fields)
    assert read.changes() == old
    assert read.digest() != make_recipe(method).digest()
    assert "loss_start" not in fields


def test_later_fields_leave_the_digests_of_other_methods_alone() -> None:
    for method in ("brecq", "qdrop", "fimaq", "lsvit", "rtn"):
        recipe = make_recipe(method)
        dump = {name: value for name, value in recipe.model_dump().items() if name not in _LATER}
        assert recipe.digest() == _sha256(dump)


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        ("fimaq", {"w_bits": 3, "a_bits": 3}, "8198b354595a d752d759e5b3 64284408cbe1"),
        ("aphq", {}, "1d3e7386ecc4 ade85e690606 20cc460da3c4"),
        ("repq", {"w_bits": 6, "a_bits": 6}, "28d72d421cd9 d81c22671b8b fb71e2cebccf"),
        ("lsvit", {"w_bits": 2}, "f451f1d55bee eca32c45d830 64284408cbe1"),
        ("mlp-recon", {}, "2c096bd74585 ce72080b4422 1481170bb9c2"),
    ],
)
def test_digests_are_those_from_before_the_later_fields(
    method: str, changes: dict[str, object], expected: str
) -> None:
    recipe = make_recipe(method, changes)
    found = [recipe.digest(fields)[:12] for fields in ("all", "ranges", "mlp")]
    assert found == expected.split()


def test_a_rotated_model_has_mlps_and_ranges_of_its_own() -> None:
    plain, rotated = make_recipe("fimaq-mlp"), make_recipe("fimaq-mlp", {"rotate": "hadamard"})
    assert all(plain.digest(f) != rotated.digest(f) for f in ("all", "ranges", "mlp"))
    assert make_recipe("fimaq-mlp", {"rotate": "none"}).digest() == plain.digest()
    assert make_recipe("glfq").digest("mlp") == rotated.digest("mlp")


def test_a_closed_form_is_part_of_the_calibration_where_nothing_is_reconstructed() -> None:
    def ranges(**changes: object) -> str:
        return make_recipe("fimaq", changes).digest("ranges")

    closed = [ranges(reconstruct=False, start=start) for start in ("gptq", "gptaq")]
    closed.append(ranges(reconstruct=False, start="gptq", start_damp=0.1))
    assert len({*closed, ranges()}) == 4
    assert ranges(reconstruct=False) == ranges(start="gptq") == ranges()


def test_the_range_grid_is_extended_from_7_bits_on() -> None:
    def grid(method: str, **changes: object) -> str:
        return make_recipe(method, changes).range_grid

    for method in ("fimaq", "ptq4vit", "glfq"):
        assert [grid(method, w_bits=bits, a_bits=bits) for bits in (2, 3, 4, 6, 32)] == (
            ["released"] * 5
        )
        for bits in ({"w_bits": 7}, {"a_bits": 8}, {"w_bits": 8, "a_bits": 8}):
            assert grid(method, **bits) == "extended"
            assert make_recipe(method, bits).changes() == {}
    assert grid("fimaq", w_bits=8, a_bits=8, range_grid="released") == "released"
    assert make_recipe("fimaq", {"a_bits": 8, "range_grid": "released"}).changes() == {
        "range_grid": "released"
    }


def _sha256(fields: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def test_released_settings_that_depend_on_the_bits() -> None:
    found = {bits: make_recipe("aphq", {"w_bits": bits}) for bits in (2, 3, 4, 6)}
    assert {bits: recipe.mlp_percentile for bits, recipe in found.items()} == {
        2: 0.98,
        3: 0.99,
        4: 0.98,
        6: 0.99,
    }
    assert [bits for bits, recipe in found.items() if recipe.per_token] == [2]
    assert all(recipe.changes() == {} for recipe in found.values())
    assert make_recipe("aphq", {"w_bits": 4, "mlp_percentile": 0.9}).changes() == {
        "mlp_percentile": 0.9
    }


def test_later_overrides_win_over_the_method_and_the_defaults() -> None:
    assert make_recipe("qdrop", {"loss": "mae", "steps": 10}, {"steps": 20}).model_dump() == {
        **make_recipe("qdrop").model_dump(), "loss": "mae", "steps": 20,
    }  # fmt: skip
    assert make_recipe("brecq", {"prefix_prob": 0.5}).prefix_prob == 0.5


def test_unknown_names_come_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"Unknown method 'fimq'. Did you mean 'fimaq'\?"):
        make_recipe("fimq")
    with pytest.raises(RecipeError, match=r"Unknown method 'xyz'. Known: adalog, .*, rtn"):
        make_recipe("xyz")
    with pytest.raises(
        RecipeError, match=r"Unknown key 'w_bit' in the recipe. Did you mean 'w_bits'\?"
    ):
        make_recipe("fimaq", {"w_bit": 3})
    with pytest.raises(RecipeError, match=r"Did you mean 'activation_prob'\?"):
        make_recipe("fimaq", {"activation_probs": 0.5})


@pytest.mark.parametrize("field", ["w_bits", "a_bits", "s_bits", "head_bits", "patch_input_bits"])
@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16, 31, 33])
def test_bits_outside_are_refused(field: str, bits: int) -> None:
    with pytest.raises(
        RecipeError, match=rf"{field}: {bits} bits is outside 2 to 8 \(or 32 for off\)"
    ):
        make_recipe("fimaq", {field: bits})


@pytest.mark.parametrize("bits", [2, 3, 8, 32])
def test_bits_inside_are_taken(bits: int) -> None:
    recipe = make_recipe("fimaq", {"w_bits": bits, "a_bits": bits})
    assert recipe.bits_name == f"w{bits}a{bits}"
    assert recipe.classifier_bits == bits
    assert make_recipe("fimaq", {"a_bits": bits, "head_bits": 8}).classifier_bits == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0}, {"steps": "many"}, {"prefix_prob": 1.5}, {"activation_prob": -0.1},
        {"lr_alpha": 0}, {"lr_scale": -1},
        {"loss": "hessian"}, {"fisher_mode": "z"}, {"round_warmup": 1.0}, {"seed": -1},
        {"temperature": 0},
        {"lr_alpha": float("nan")}, {"lr_alpha": float("inf")}, {"calibration_transform": "test"},
        {"w_bits": 3.5}, {"w_bits": "four"}, {"a_bits": None},
        {"rotate": "random"}, {"range_grid": "wide"}, {"start": "rtn"}, {"start_damp": 0},
        {"weight_learning": "none"}, {"lr_weight": 0}, {"glf_weight": -1}, {"finish_steps": -1},
        {"finish_lr": 0}, {"finish_lr_scale": 0}, {"finish_batch": 0}, {"finish_held_out": 0},
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_named(changes: dict[str, object]) -> None:
    (name,) = changes
    with pytest.raises(RecipeError, match=rf"does not make sense: .*{name}"):
        make_recipe("fimaq", changes)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(RecipeError, match=r"w_bits.*\. steps"):
        make_recipe("fimaq", {"w_bits": 1, "steps": 0})


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_recipe().steps = 3  # type: ignore[misc]


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"w_bits": 3, "loss": "mae"}))
    assert make_recipe("qdrop", read_recipe_file(path)) == make_recipe(
        "qdrop", {"w_bits": 3, "loss": "mae"}
    )
    path.write_text("# nothing but a comment\n")
    assert read_recipe_file(path) == {}
    path.write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match=r"must hold 'key: value' lines"):
        read_recipe_file(path)
    path.write_text("w_bits: [3\n")
    with pytest.raises(RecipeError, match="is not YAML"):
        read_recipe_file(path)
    path.write_bytes(b"\xff\xfe\x00w_bits")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        read_recipe_file(path)
    path.write_text("steps: 3\nloss: mse\nsteps: 4\n")
    with pytest.raises(RecipeError, match=r"is not YAML: the key 'steps' stands twice"):
        read_recipe_file(path)
    path.write_text("stepz: 3\n")
    with pytest.raises(
        RecipeError, match=r"Unknown key 'stepz' in .*recipe.yaml. Did you mean 'steps'\?"
    ):
        read_recipe_file(path)
    path.write_text("3: 4\n")
    with pytest.raises(RecipeError, match="Unknown key '3'"):
        read_recipe_file(path)
    path.write_text("object: !!python/object/apply:os.system [echo]\n")
    with pytest.raises(RecipeError, match="is not YAML"):
        read_recipe_file(path)
    with pytest.raises(RecipeError, match="Cannot read the recipe file"):
        read_recipe_file(tmp_path / "none.yaml")


def test_changes_say_what_differs_from_the_method() -> None:
    assert make_recipe("qdrop").changes() == {}
    assert make_recipe("qdrop", {"w_bits": 3, "a_bits": 3, "seed": 7}).changes() == {}
    assert make_recipe("qdrop", {"steps": 5, "loss": "mae"}).changes() == {
        "loss": "mae",
        "steps": 5,
    }
    assert make_recipe("brecq", {"prefix_prob": 0.0}).changes() == {}


def test_digests() -> None:
    recipe = make_recipe("fimaq", {"w_bits": 3})
    assert recipe.digest() == Recipe.model_validate(recipe.model_dump(mode="json")).digest()
    assert recipe.digest() == make_recipe("fimaq", {"w_bits": 3}).digest()
    seen = {recipe.digest()}
    for changes in ({"w_bits": 4}, {"w_bits": 3, "seed": 1}, {"w_bits": 3, "lr_alpha": 0.01}):
        seen.add(make_recipe("fimaq", changes).digest())
    assert len(seen) == 4


def test_methods_that_differ_behind_calibration_share_its_digest() -> None:
    shared = {make_recipe(method).digest("ranges") for method in ("qdrop", "brecq", "fimaq")}
    assert len(shared) == 1
    assert make_recipe("rtn").digest("ranges") not in shared
    behind = {
        "steps": 7,
        "loss": "mae",
        "per_token": False,
        "fisher_k": 2,
        "prefix_prob": 0.1,
        "frozen_dtype": "bfloat16",
        "start": "gptq",
        "start_damp": 0.1,
        "weight_learning": "straight-through",
        "lr_weight": 1e-4,
        "glf_weight": 1.0,
        "finish_steps": 9,
        "finish_held_out": 8,
    }
    for name, value in behind.items():
        assert make_recipe("fimaq", {name: value}).digest("ranges") in shared, name
    before = {
        "w_bits": 3, "a_bits": 3, "s_bits": 8, "head_bits": 8, "patch_input_bits": 8,
        "softmax_quantizer": "log2",
        "gelu_quantizer": "twin", "range_search": "minmax", "range_images": 64,
        "range_candidates": 64, "range_rounds": 1,
        "reparameterize": False, "refit": True, "refit_ridge": 1.0, "refit_flips": 3,
        "range_inputs": "quantized", "reparameterize_merges": False,
        "refit_rule": "gradient", "rotate": "hadamard", "range_grid": "extended",
        "bits_map": {"blocks.0.attn.qkv": {"w": 3}},
        "calibration_images": 256,
        "calibration_transform": "eval", "reconstruct_mlp": True, "seed": 1,
    }  # fmt: skip
    follows = {"revision"}
    assert {*before, *follows} == set(make_recipe("fimaq").names_of("ranges"))
    together = {"refit": {"reconstruct": False, "range_search": "percentile"}}
    for name, value in before.items():
        assert (
            make_recipe("fimaq", {name: value}, together.get(name, {})).digest("ranges")
            not in shared
        ), name


def test_recipes_of_an_older_revision_can_be_read_but_not_run() -> None:
    changed = {"softmax_quantizer": "twin", "reconstruct": False}
    now = make_recipe("ptq4vit")
    assert now.revision == 2
    assert make_recipe("fimaq").revision == make_recipe("repq").revision == 1
    assert make_recipe("fimaq", changed).changes() == changed  # the revision follows from these
    assert make_recipe("ptq4vit", now.model_dump()) == now

    fields = {name: value for name, value in now.model_dump().items() if name != "revision"}
    old = Recipe.model_validate(fields)
    assert old.changes() == {"revision": 1}
    assert old.digest() != now.digest()
    assert old.digest("ranges") != now.digest("ranges")
    with pytest.raises(RecipeError, match=r"has revision 1 of .* version runs revision 2: leave"):
        make_recipe("ptq4vit", old.model_dump())
    with pytest.raises(RecipeError, match="has revision 3 of"):
        make_recipe("ptq4vit", {"revision": 3})

    reconstructed = make_recipe("aphq").model_copy(update={"revision": 1})
    assert reconstructed.digest("mlp") != make_recipe("aphq").digest("mlp")


def test_older_recipes_of_the_percentile_methods_are_variants() -> None:
    later = {"revision", "range_inputs", "reparameterize_merges", "refit_rule"}
    before = {"calibration_transform": "train", "patch_input_bits": 32}
    for method, more in (("repq", {}), ("erq", {"refit_rule": "error"})):
        now = make_recipe(method)
        fields = {name: value for name, value in now.model_dump().items() if name not in later}
        old, merges = Recipe.model_validate({**fields, **before}), {"reparameterize_merges": True}
        expected = {**before, "range_inputs": "float", **more, **(merges if more else {})}
        assert old.changes() == expected
        assert old.digest("ranges") != now.digest("ranges")
        assert make_recipe(method, old.model_dump()) == old  # the old behaviour can be run


def test_mlp_reconstruction_determines_ranges_where_it_is_done() -> None:
    plain, done = make_recipe("fimaq"), make_recipe("fimaq-mlp")
    assert make_recipe("fimaq", {"mlp_steps": 3}).digest("ranges") == plain.digest("ranges")
    assert make_recipe("fimaq-mlp", {"mlp_steps": 3}).digest("ranges") != done.digest("ranges")
    assert make_recipe("fimaq-mlp", {"mlp_steps": 3}).digest("mlp") != done.digest("mlp")
    for behind in ({"w_bits": 3, "a_bits": 3}, {"steps": 7}, {"loss": "mse"}, {"range_images": 3}):
        assert make_recipe("fimaq-mlp", behind).digest("mlp") == make_recipe(
            "aphq", {"w_bits": 3}
        ).digest("mlp"), behind


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"refit": True}, "refit decides all roundings"),
        ({"refit": True, "reconstruct": False}, "refit needs range_search percentile"),
        (
            {"refit": True, "reconstruct": False, "range_search": "percentile", "w_bits": 32},
            "w_bits must not be 32",
        ),
        (
            {"range_search": "percentile", "softmax_quantizer": "adalog"},
            "no range for softmax_quantizer adalog",
        ),
        (
            {"range_search": "percentile", "gelu_quantizer": "twin"},
            "no range for gelu_quantizer twin",
        ),
        ({"reconstruct_mlp": True, "gelu_quantizer": "adalog"}, "gelu_quantizer must be uniform"),
        ({"s_bits": 9}, "s_bits: 9 bits is outside 2 to 8"),
        ({"loss": "mse_adalog", "loss_start": 2.0}, "mse_adalog is not divided, so loss_start"),
        ({"loss": "prediction_pdquant", "loss_start": 1.0}, "prediction_pdquant is not divided"),
        ({"loss_start": 2.0, "fisher_p1": 0, "fisher_p2": 0}, "positive fisher_p1 or fisher_p2"),
        ({"loss_start": 0.0}, "loss_start: .*greater than 0"),
        ({"prediction_lambda": 0.0}, "prediction_lambda: .*greater than 0"),
        (
            {"refit": True, "reconstruct": False, "range_search": "percentile", "start": "gptq"},
            "choose one of refit, start",
        ),
        ({"weight_learning": "straight-through", "start": "gptaq"}, "start needs weight_learning"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe("fimaq", fields)


def test_every_field_says_what_it_is() -> None:
    for name, field in Recipe.model_fields.items():
        assert field.description, name
        assert field.json_schema_extra, name


def test_registering_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fimaq_core.recipe.METHODS", dict(METHODS))
    register_method("qdrop-mae", {"loss": "mae", "per_token": False})
    assert make_recipe("qdrop-mae").loss == "mae"
    assert make_recipe("qdrop-mae").changes() == {}
    with pytest.raises(RecipeError, match="exists already"):
        register_method("fimaq", {})
    with pytest.raises(
        RecipeError, match=r"Unknown key 'los' in method 'other'. Did you mean 'loss'\?"
    ):
        register_method("other", {"los": "mae"})


def test_the_label_cannot_be_swapped_without_its_settings() -> None:
    """An override must not swap the method's name and leave the first method's settings."""
    with pytest.raises(RecipeError, match="method"):
        make_recipe("fimaq", {"method": "qdrop"})
    assert make_recipe("fimaq", {"method": "fimaq"}) == make_recipe("fimaq")


@pytest.mark.parametrize("method", METHODS)
def test_budget_sets_the_steps_and_rates_of_the_stages_that_run(method: str) -> None:
    own, fast = make_recipe(method), make_recipe(method, {"budget": "fast"})
    changed = {name for name in Recipe.model_fields if getattr(own, name) != getattr(fast, name)}
    learned = "lr_weight" if own.weight_learning == "straight-through" else "lr_alpha"
    blocks = {"steps", learned, "lr_scale"} if own.reconstruct else set()
    finish = {"finish_steps"} if own.finish_steps else set()
    mlps = {"mlp_steps", "mlp_lr"} if own.reconstruct_mlp else set()
    assert changed == blocks | mlps | finish
    assert fast.finish_steps == (200 if own.finish_steps else 0)
    assert fast.reconstruct is False or fast.steps == 500
    assert make_recipe(method, {"budget": "released"}) == own


def test_rates_of_a_budget_follow_the_steps() -> None:
    fast = make_recipe("fimaq-mlp", {"budget": "fast"})
    assert (fast.lr_alpha, fast.lr_scale, fast.mlp_lr) == (0.0132, 0.000366, 0.0016)
    # 250 of 20,000 steps have about the rates of the demo, which were chosen by hand.
    demo = make_recipe("fimaq-mlp", {"budget": "fast", "steps": 250, "mlp_steps": 250})
    rates = {"lr_alpha": 0.024, "lr_scale": 0.0006, "mlp_lr": 0.003}
    assert (demo.steps, demo.mlp_steps) == (250, 250)
    for name, rate in rates.items():
        assert getattr(demo, name) == pytest.approx(rate, rel=0.15)
    # A method with fewer steps of its own needs a smaller change: GLF-Q has 3,000.
    glfq = make_recipe("glfq", {"budget": "standard"})
    assert (glfq.steps, glfq.lr_weight) == (2000, float(f"{2e-5 * 1.5**0.7:.3g}"))


def test_fields_win_over_a_budget_and_later_mappings_over_earlier_ones() -> None:
    first, second = {"steps": 9, "lr_alpha": 0.5}, {"budget": "fast", "lr_scale": 0.25}
    before, after = make_recipe("fimaq", first, second), make_recipe("fimaq", second, first)
    assert (before.steps, before.lr_alpha, before.lr_scale) == (500, 0.0132, 0.25)
    assert (after.steps, after.lr_alpha, after.lr_scale) == (9, 0.5, 0.25)
    with pytest.raises(RecipeError, match="'quick': choose fast, standard, released"):
        make_recipe("fimaq", {"budget": "quick"})
    with pytest.raises(RecipeError, match="Did you mean 'budget'"):
        make_recipe("fimaq", {"budgt": "fast"})


def test_a_recipe_file_may_name_a_budget(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("budget: standard\nsteps: 1000\n")
    recipe = make_recipe("qdrop", read_recipe_file(file))
    assert (recipe.steps, recipe.lr_alpha) == (1000, float(f"{1e-3 * 20**0.7:.3g}"))
