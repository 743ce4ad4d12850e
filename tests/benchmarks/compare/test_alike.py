"""Refusal of unlike numbers by name: against published numbers, between seeds."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from benchmark_fakes import IMAGENET
from diff_fakes import PREPROCESSING, calibrated, published_record

from benchmarks.compare import alike, diff
from benchmarks.grid.names import load_names
from fimaq_core.recipe import Recipe, make_recipe
from tasks.common.preprocessing import Preprocessing
from tasks.common.record import Metric, ResultRecord

VIT_S = "vit_small_patch16_224.augreg_in21k_ft_in1k"
FIMAQ = 76.68
Change = dict[str, Any]


def recipe_of(**changes: Any) -> Recipe:
    return make_recipe("fimaq", {"w_bits": 4, "a_bits": 4, **changes})


def record(seed: int = 1, **changes: Any) -> ResultRecord:
    recipe = changes.pop("recipe", recipe_of(seed=seed))
    usual = {"value": FIMAQ, "stderr": 0.2, "identity": "1" * 64}
    return published_record(recipe, VIT_S, **{**usual, **changes})


def beside_fimaq(*records: ResultRecord) -> pd.DataFrame:
    """The rows beside FIMA-Q's own number."""
    table = diff.diff(records)
    return table[(table["published"] == FIMAQ) & (table["evidence"] == "primary")]


def reasons(*records: ResultRecord) -> set[str]:
    """Reasons of the rows beside FIMA-Q's own number; their verdict must be "not comparable"."""
    table = beside_fimaq(*records)
    assert set(table["verdict"]) == {"not comparable"}
    assert table["difference"].isna().all()
    return set(table["reason"])


def test_the_published_protocol_is_compared():
    assert beside_fimaq(record())["verdict"].tolist() == ["reproduced"]


def weights(**changes: Any) -> Callable[[ResultRecord], Change]:
    return lambda found: {"weights": found.weights.model_copy(update=changes)}


def data(**changes: Any) -> Callable[[ResultRecord], Change]:
    return lambda found: {"dataset": found.dataset.model_copy(update=changes)}


def versions(**changes: str) -> Callable[[ResultRecord], Change]:
    def change(found: ResultRecord) -> Change:
        own = {**found.environment.versions, **changes}
        return {"environment": found.environment.model_copy(update={"versions": own})}

    return change


def calibration(**changes: Any) -> Callable[[ResultRecord], Change]:
    return lambda found: {"calibration": found.calibration.model_copy(update=changes)}


def constant(**changes: Any) -> Callable[[ResultRecord], Change]:
    return lambda found: changes


def changed(found: ResultRecord, change: Callable[[ResultRecord], Change]) -> ResultRecord:
    return found.model_copy(update=change(found))


CROPPED = PREPROCESSING["augreg"].model_copy(update={"crop_pct": 0.875})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            calibration(split="val"),
            "calibrated on ImageNet-1k val (part val); published numbers use ImageNet-1k val "
            "(part train)",
        ),
        (
            calibration(dataset="folder-1000-classes"),
            "calibrated on folder-1000-classes (part train); published numbers use",
        ),
        (calibration(dataset=None, listed=True), "the user listed the calibration images"),
        (calibration(ids=["train/mine.jpg"]), "calibration images 1, but the recipe says 1024"),
        (calibration(ids=["train/a.jpg"] * 1024), "calibration images 1, but the recipe says 1024"),
        (calibration(transform="eval"), "calibration transform eval, but the recipe says train"),
        (
            calibration(dataset=None, split=None, listed=None),
            "the record does not say where its calibration images come from",
        ),
        (constant(calibration=None), "the record has no calibration images"),
        (
            constant(fp_metrics={"top1": Metric(value=40.0, stderr=0.2)}),
            "full precision has top1 40.00 here and 81.39 where it is published, more than 1 point",
        ),
        (
            constant(fp_metrics={"top1": Metric(value=82.4, stderr=0.2)}),
            "full precision has top1 82.40 here and 81.39 where it is published",
        ),
        (constant(fp_metrics={}), "the record lacks top1 in full precision"),
        (
            constant(model_args={"img_size": 384}),
            'the model was built with arguments: {"img_size": 384}',
        ),
        (constant(preprocessing=CROPPED), "crop 0.875 (center), mean 0.5"),
        (weights(tag="vit_small_patch16_224.dino"), "weights vit_small_patch16_224.dino"),
        (
            weights(entry="model", entries=["model", "model_ema"]),
            "weights of the entry 'model' of a file with several (model, model_ema)",
        ),
        (data(exif="ignore"), "the user chose to ignore EXIF orientations"),
        (data(class_order="file"), "the labels follow a file of the user"),
        (
            constant(method="qdrop"),
            "the record contradicts itself: method is 'qdrop', and 'fimaq' in its recipe",
        ),
        (constant(a_bit=8), "the record contradicts itself: a_bit is 8, and 4 in its recipe"),
        (constant(seed=7), "the record contradicts itself: seed is 7, and 1 in its recipe"),
        (
            constant(recipe_digest="0" * 64),
            "the record contradicts itself: its recipe has another digest",
        ),
        (constant(recipe=None), "the record contradicts itself: method 'fimaq' and its recipe do"),
        (constant(recipe={"method": "fimaq", "steps": -1}), "the record's recipe is not one of"),
    ],
)
def test_an_unlike_record_is_refused_by_name(change: Callable[[ResultRecord], Change], words: str):
    found = changed(record(), change)
    if found.method == "qdrop" or found.a_bit == 8:  # no row with FIMA-Q's number is looked at
        table = diff.diff([found])
        assert set(table["verdict"]) == {"not comparable"}
        own = table[table["measured"].notna()]
        assert all(words in reason for reason in own["reason"])
    else:
        (reason,) = reasons(found)
        assert words in reason


@pytest.mark.parametrize(("score", "fine"), [(80.45, True), (82.3, True), (80.3, False)])
def test_full_precision_may_differ_by_a_point(score: float, fine: bool):
    full = {"top1": Metric(value=score, stderr=0.2)}
    verdict = beside_fimaq(record(fp_metrics=full))["verdict"].tolist()
    assert verdict == ["reproduced" if fine else "not comparable"]


def test_a_record_in_full_precision_that_quantizes_is_refused():
    plain = published_record(None, VIT_S, value=81.39, stderr=0.2)
    assert "reproduced" in set(diff.diff([plain])["verdict"])
    recipe = recipe_of()
    for changes in (
        {"recipe": recipe.model_dump(mode="json")},
        {"w_bit": 4},
        {"calibration": calibrated(recipe, "ImageNet-1k val", "train")},
    ):
        table = diff.diff([plain.model_copy(update=changes)])
        assert set(table["verdict"]) == {"not comparable"}
        own = table[table["measured"].notna()]
        assert all(why.startswith("the record contradicts itself: ") for why in own["reason"])


def test_different_weights_files_of_one_model_are_refused():
    mine, other = record(1), changed(record(2), weights(sha256="a" * 64))
    expected = (
        "records of this model have different weights (sha256 000000000000; aaaaaaaaaaaa): keep "
        "those of one weights file"
    )
    assert reasons(mine, other) == {expected}
    full = published_record(None, VIT_S, value=81.39, stderr=0.2)
    assert expected in set(diff.diff([mine, changed(full, weights(sha256="a" * 64))])["reason"])
    # Arguments change the weights too, and are refused by their own name.
    built = changed(other, constant(model_args={"img_size": 384}))
    assert sorted(beside_fimaq(mine, built)["verdict"]) == ["not comparable", "reproduced"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (data(fingerprint="a" * 64), "data"),
        (data(exif="apply"), "exif"),
        (data(class_order="natural"), "class order"),
        (data(class_categories=("a", None)), "categories"),
        (data(split="val[:1000]", count=1000), ""),
        (constant(n=49_999), "samples"),
        (constant(model_args={"img_size": 384}), "model arguments"),
        (constant(preprocessing=CROPPED), "preprocessing"),
        (weights(sha256="a" * 64), "weights"),
        (weights(entry="model"), ""),
        (calibration(dataset="other"), "calibration data"),
        (calibration(split="val"), "calibration data"),
        (calibration(listed=True), "calibration list"),
        (calibration(transform="eval"), "calibration transform"),
        (calibration(ids=["train/a.jpg"]), "calibration images"),
        (calibration(batch=16), "calibration batch"),
        (versions(torch="2"), "torch"),
        (versions(timm="3"), "timm"),
        (constant(recipe=recipe_of(seed=2, step_dtype="tf32").model_dump(mode="json")), ""),
        (constant(variant="another"), ""),
    ],
)
def test_seeds_of_different_runs_are_not_averaged(
    change: Callable[[ResultRecord], Change], name: str
):
    common = data(class_order="text", class_categories=("a", "b"))
    base, other = (changed(record(seed), common) for seed in (1, 2))
    other = changed(other, change)
    found = diff.measurements([base, other])
    assert [item.seeds for item in found] == [1, 1]
    # The remark names what differs between seeds of one recipe, if both records hold it.
    said = [item.apart for item in found]
    assert all(text.startswith(f"{name} (") if name else text == "" for text in said), said


def test_what_a_seed_changes_and_what_does_not_matter_is_averaged():
    others = (
        constant(),
        versions(python="3.12", safetensors="9"),
        constant(finished="2025-01-01T00:00:00+00:00", seconds={"evaluate": 9.0}),
        lambda found: {"environment": found.environment.model_copy(update={"threads": 8})},
    )
    for change in others:
        (item,) = diff.measurements([record(1), changed(record(2), change)])
        assert (item.seeds, item.apart, len(item.records)) == (2, "", 2)


def test_a_remark_says_what_kept_seeds_apart():
    rows = beside_fimaq(record(1), changed(record(2), versions(torch="2")))
    assert rows["verdict"].tolist() == ["reproduced"] * 2
    words = "not averaged with other records of this cell, which differ in torch (1; 2)"
    assert all(reason.endswith(words) for reason in rows["reason"])


def test_a_remark_says_that_the_code_was_changed():
    change = {"git_revision": "0123456789+changes"}
    other = record(2)
    other = other.model_copy(update={"environment": other.environment.model_copy(update=change)})
    (row,) = beside_fimaq(record(1), other).to_dict("records")
    assert (row["seeds"], row["verdict"]) == (2, "reproduced")
    assert row["reason"].endswith("; measured by code with changes that are not committed")
    assert "changes" not in beside_fimaq(record(1)).iloc[0]["reason"]


def test_reasons_are_one_line_of_bounded_length():
    odd = "a\nb " * 2000
    (reason,) = reasons(changed(record(), weights(tag=odd)))
    assert reason.startswith("weights a b a b")
    assert len(reason) <= 400
    assert "\n" not in reason


def test_one_unlike_seed_is_not_hidden_by_the_first():
    strange = changed(record(2), constant(fp_metrics={"top1": Metric(value=40.0, stderr=0.2)}))
    assert all("full precision has top1 40.00" in reason for reason in reasons(record(1), strange))


def test_older_recipes_lack_fields_without_being_other_recipes():
    new = record()
    old = dict(new.recipe or {})
    del old["step_dtype"]
    assert alike.facts(changed(new, constant(recipe=old))) == alike.facts(new)


def test_unknown_facts_differ_from_none_and_hashes_are_shortened():
    assert alike.differing([record(), changed(record(), constant(preprocessing=None))]) == ""
    other = changed(record(), data(fingerprint="ab" * 32))
    text = alike.differing([record(), other], ("data", "weights"))
    assert text == (
        "data (ImageNet-1k val val, 50000 images, abababababab; "
        f"ImageNet-1k val val, 50000 images, {IMAGENET.fingerprint[:12]})"
    )


def test_the_preprocessing_in_names_is_that_of_the_checkpoints():
    from open_clip import get_model_config
    from open_clip.pretrained import get_pretrained_cfg
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg as timm_cfg

    names = load_names()
    assert {key: made.text() for key, made in PREPROCESSING.items()} == names.preprocessing
    for entry in names.models.values():
        if entry.preprocessing is None:
            assert "rcnn" in entry.id
            continue
        published = timm_cfg(entry.tag)
        if published is not None:
            made = resolve_data_config({}, pretrained_cfg=published.to_dict())
        else:
            model, _, tag = entry.tag.partition(".")
            own = get_pretrained_cfg(model, tag)
            side = get_model_config(model)["vision_cfg"]["image_size"]
            made = {name: own[name] for name in ("mean", "std", "interpolation")}
            made |= {"input_size": (3, side, side), "crop_mode": own["resize_mode"]}
        text = Preprocessing.model_validate(made).text()
        assert text == names.preprocessing[entry.preprocessing], entry.tag


def test_a_seed_with_several_results_is_named_and_the_latest_counts():
    # In time, not in text: the second one ended 30 minutes before the first.
    first = record(1, finished="2026-01-02T00:30:00+00:00")
    other = record(1, value=10.0, finished="2026-01-02T09:00:00+09:00")
    table = beside_fimaq(first, other)
    assert set(table["verdict"]) == {"reproduced"}
    assert all("seed 1 has several results, of which the" in why for why in table["reason"])
    assert not any("several results" in why for why in beside_fimaq(first, first)["reason"])


@pytest.mark.parametrize(
    ("method", "names"), [("rtn", set()), ("fimaq", {"lr_alpha"}), ("glfq", {"lr_weight"})]
)
def test_the_rate_of_the_weights_depends_on_how_they_are_learned(
    method: str, names: set[str]
) -> None:
    recipe = make_recipe(method)
    assert {name for name in ("lr_alpha", "lr_weight") if alike.has_effect(recipe, name)} == names
