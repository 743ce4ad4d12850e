"""Comparison with published numbers: verdicts in both directions, refusal of unlike numbers."""

import pandas as pd
import pytest
from benchmark_fakes import DIGITS, IMAGENET, make_record

from benchmarks.compare import diff
from benchmarks.grid.names import PUBLISHED, load_names
from fimaq_core.recipe import Recipe, make_recipe

VIT_S = "vit_small_patch16_224.augreg_in21k_ft_in1k"
BITS = {"w_bits": 3, "a_bits": 3}
FIMAQ_VIT_S_W3A3 = 64.09


def imagenet(start: str | None, value: float, **changes):
    settings = {"seed": changes.pop("seed", 3407), **changes.pop("settings", {})}
    recipe = None if start is None else make_recipe(start, BITS, settings)
    return make_record(
        **{
            "recipe": recipe,
            "model": VIT_S,
            "value": value,
            "stderr": 0.2,
            "dataset": IMAGENET,
            **changes,
        }
    )


def compared(records) -> pd.DataFrame:
    """The rows with something measured in them."""
    table = diff.diff(records)
    return table[table["measured"].notna()]


def own_row(records) -> pd.Series:
    table = diff.diff(records)
    rows = table[(table["variant"] == "") & (table["evidence"] == "primary")]
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.mark.parametrize(
    ("offset", "verdict"),
    [
        (0.0, "reproduced"),
        (0.39, "reproduced"),
        (-0.39, "reproduced"),
        (0.5, "above"),
        (-0.5, "below"),
    ],
)
def test_verdicts_are_two_sided(offset: float, verdict: str):
    row = own_row([imagenet("fimaq", FIMAQ_VIT_S_W3A3 + offset)])
    assert row["verdict"] == verdict
    assert row["difference"] == pytest.approx(offset)
    assert row["model"] == "vit_small"
    assert "0.40 (2 standard errors)" in row["reason"]
    assert "one seed" in row["reason"]


def test_standard_error_holds_sampling_and_seeds():
    row = own_row(
        [
            imagenet("fimaq", FIMAQ_VIT_S_W3A3 + gap, seed=seed)
            for seed, gap in enumerate((0.0, 0.8))
        ]
    )
    assert row["seeds"] == 2
    assert row["measured"] == pytest.approx(FIMAQ_VIT_S_W3A3 + 0.4)
    assert row["se"] == pytest.approx((0.2**2 + 0.32 / 2) ** 0.5)
    assert row["verdict"] == "reproduced"


@pytest.mark.parametrize(
    ("offset", "verdict"), [(0.9, "too uncertain"), (1.3, "above"), (-1.3, "below")]
)
def test_agreement_within_more_than_a_point_is_none(offset: float, verdict: str):
    row = own_row([imagenet("fimaq", FIMAQ_VIT_S_W3A3 + offset, stderr=0.6)])
    assert row["verdict"] == verdict
    assert row["difference"] == pytest.approx(offset)
    assert ("which is too wide to tell" in row["reason"]) == (verdict == "too uncertain")
    assert "±1.20 (2 standard errors)" in row["reason"]


def test_small_errors_keep_the_smallest_tolerance():
    assert (
        "0.30 (0.3 points)" in own_row([imagenet("fimaq", FIMAQ_VIT_S_W3A3, stderr=0.01)])["reason"]
    )


def test_full_precision_checks_the_checkpoint():
    assert own_row([imagenet(None, 81.39)])["verdict"] == "reproduced"
    assert own_row([imagenet(None, 74.0)])["verdict"] == "below"


def test_weak_evidence_and_other_frameworks_are_context():
    table = diff.diff([imagenet("fimaq", 64.0), imagenet("qdrop", 41.0)])
    secondary = table[table["evidence"] == "secondary"]
    assert len(secondary) == 1
    assert set(secondary["verdict"]) == {"not comparable"}
    qdrop = table[table["method"] == "qdrop"].set_index("variant")
    assert qdrop.at["rerun in FIMA-Q framework", "verdict"] == "reproduced"
    for variant in ("rerun by I&S", "rerun in APHQ framework"):
        assert qdrop.at[variant, "verdict"] == "not comparable"
        assert variant in qdrop.at[variant, "reason"]
    table = diff.diff([imagenet("qdrop-aphq", 38.4)]).set_index("variant")
    assert table.at["rerun in APHQ framework", "verdict"] == "reproduced"
    for variant in ("rerun by I&S", "rerun in FIMA-Q framework"):
        assert table.at[variant, "verdict"] == "not comparable"
    # The same settings under the other name are a change of QDrop's own.
    (changed,) = set(compared([imagenet("qdrop", 38.4, settings={"loss_start": 2.0})])["reason"])
    assert changed == "settings changed from the released ones: loss_start 2.0"


def test_numbers_of_an_older_loss_under_the_same_name_are_not_compared():
    now = make_recipe("adalog-recon", BITS, {"seed": 3407})
    fields = now.model_dump(exclude={"revision", "loss_start", "prediction_lambda"})
    old = imagenet("adalog-recon", 62.5, recipe=Recipe.model_validate(fields | {"loss": "mse"}))
    table = compared([old])
    assert set(table["verdict"]) == {"not comparable"}
    assert table["reason"].str.contains("loss mse", regex=False).all()
    table = compared([imagenet("adalog-recon", 62.5)]).set_index("variant")
    assert table.at["retrain=BRECQ-style optim", "verdict"] == "reproduced"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": DIGITS}, "digit-pairs"),
        (
            {"dataset": IMAGENET.model_copy(update={"split": "val[:1000]", "count": 1000})},
            "a part of ImageNet-1k val",
        ),
        ({"dataset": IMAGENET.model_copy(update={"count": 49_999})}, "a part of"),
        ({"settings": {"steps": 300}}, "steps 300"),
        ({"skipped_images": ["x.jpg"]}, "damaged"),
        ({"model": "vit_small_patch16_224.local-0123"}, "no published name"),
        ({"method": "ours"}, "not known"),
    ],
)
def test_only_like_is_compared_with_like(changes: dict[str, object], words: str):
    table = compared([imagenet("fimaq", FIMAQ_VIT_S_W3A3, **changes)])
    assert len(table) >= 1
    assert set(table["verdict"]) == {"not comparable"}
    assert table["difference"].isna().all()
    assert table["reason"].str.contains(words, regex=False).all()


def test_weights_under_a_published_name_must_be_the_published_ones():
    record = imagenet("fimaq", FIMAQ_VIT_S_W3A3)
    other = record.model_copy(
        update={"weights": record.weights.model_copy(update={"tag": "vit_small_patch16_224.dino"})}
    )
    table = compared([other])
    assert len(table) >= 1
    assert set(table["verdict"]) == {"not comparable"}
    assert table["reason"].str.contains("dino").all()


def test_settings_that_do_not_bear_on_the_method_are_no_change():
    assert (
        diff.changed_settings(make_recipe("rtn", {"steps": 300, "lr_alpha": 0.1}), "classification")
        == {}
    )
    assert diff.changed_settings(
        make_recipe("rtn", {"calibration_transform": "eval"}), "classification"
    ) == {"calibration_transform": "eval"}
    assert diff.changed_settings(make_recipe("fimaq", {"steps": 300}), "classification") == {
        "steps": 300
    }


def test_runs_of_different_settings_are_not_averaged():
    found = diff.measurements(
        [
            imagenet("fimaq", 60.0),
            imagenet("fimaq", 50.0, settings={"steps": 3}),
            imagenet("fimaq", 62.0, seed=1),
        ]
    )
    assert sorted((item.mean, item.seeds) for item in found) == [(50.0, 1), (61.0, 2)]


def test_every_strong_classification_row_has_its_names_mapped_or_listed():
    rows, names = diff.published_rows(), load_names()
    strong = rows[(rows["task"] == "classification") & rows["evidence"].isin(["primary", "cited"])]
    assert set(strong["method"]) <= set(names.methods) | set(names.unmapped_methods)
    assert set(strong["model"]) <= set(names.models) | set(names.unmapped_models)
    assert set(strong["dataset"]) <= set(names.datasets["classification"])
    assert not set(names.methods) & set(names.unmapped_methods)
    assert not set(names.models) & set(names.unmapped_models)


def test_comparable_variants_exist_in_the_published_rows():
    rows = diff.published_rows()
    for name, entry in load_names().methods.items():
        variants = set(rows.loc[rows["method"] == name, "variant"])
        assert set(entry.comparable) <= variants, name


@pytest.mark.parametrize("name", ["accuracy", "ablation", "cost"])
def test_published_files_parse(name: str):
    table = pd.read_csv(PUBLISHED / f"{name}.csv", dtype=str, keep_default_na=False)
    assert {
        "model",
        "method",
        "variant",
        "w_bit",
        "a_bit",
        "metric",
        "value",
        "source",
        "evidence",
    } <= set(table.columns)
    assert set(table["evidence"]) <= {
        "primary",
        "cited",
        "user-reported",
        "secondary",
        "aggregator",
    }
    assert pd.to_numeric(table["value"], errors="coerce").notna().mean() > 0.9
