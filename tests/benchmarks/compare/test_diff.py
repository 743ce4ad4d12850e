"""Comparison with published numbers: verdicts in both directions, refusal of unlike numbers."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from benchmark_fakes import DIGITS, IMAGENET
from diff_fakes import published_record
from scipy import stats

from benchmarks.compare import alike, diff
from benchmarks.grid.names import PUBLISHED, load_names
from fimaq_core.recipe import Recipe, make_recipe

VIT_S = "vit_small_patch16_224.augreg_in21k_ft_in1k"
BITS = {"w_bits": 3, "a_bits": 3}
FIMAQ_VIT_S_W3A3 = 64.09
OURS = make_recipe("fimaq", BITS).model_copy(update={"method": "ours"})


def imagenet(start: str | None, value: float, **changes):
    settings = {"seed": changes.pop("seed", 3407), **changes.pop("settings", {})}
    recipe = None if start is None else make_recipe(start, BITS, settings)
    recipe, model = changes.pop("recipe", recipe), changes.pop("model", VIT_S)
    return published_record(recipe, model, **{"value": value, "stderr": 0.2, **changes})


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
    ("offset", "stderr", "verdict"),
    [
        (0.0, 0.2, "reproduced"),
        (0.3, 0.2, "reproduced"),
        (-0.67, 0.2, "reproduced"),  # to -1.00 with the half width 1.645 x 0.2
        (-0.68, 0.2, "below"),
        (0.68, 0.2, "above"),
        (0.95, 0.05, "above"),
        (0.9, 0.05, "reproduced"),
        (0.0, 0.6, "reproduced"),
        (0.0, 0.61, "too uncertain"),  # 1.645 x 0.61 = 1.003
        (0.6, 0.3, "too uncertain"),
        (1.3, 0.6, "above"),
        (-1.3, 0.6, "below"),
        (1.3, 0.61, "too uncertain"),  # from 0.297
        (5.0, 4.0, "too uncertain"),
    ],
)
def test_a_verdict_follows_from_the_interval_of_the_difference(
    offset: float, stderr: float, verdict: str
):
    row = own_row([imagenet("fimaq", FIMAQ_VIT_S_W3A3 + offset, stderr=stderr)])
    half = stats.norm.ppf(0.95) * stderr
    assert row["verdict"] == verdict
    assert row["difference"] == pytest.approx(offset)
    assert row["model"] == "vit_small"
    interval = f"difference of {offset - half:+.2f} to {offset + half:+.2f} (90% interval), "
    assert row["reason"].startswith(interval)
    assert "one seed, so the spread over seeds is not counted" in row["reason"]


def test_one_seed_of_fifty_thousand_images_near_the_published_number_reproduces_it():
    share = (FIMAQ_VIT_S_W3A3 + 0.3) / 100
    stderr = 100 * (share * (1 - share) / 50_000) ** 0.5
    assert own_row([imagenet("fimaq", 100 * share, stderr=stderr)])["verdict"] == "reproduced"


def seeds(values: Sequence[float], stderr: float) -> pd.Series:
    """The verdict on seeds with these values."""
    return own_row([
        imagenet("fimaq", value, seed=seed, stderr=stderr) for seed, value in enumerate(values)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((64.0, 64.1, 64.3), "reproduced"),
        ((63.5, 64.0, 65.2), "too uncertain"),
        ((62.0, 62.1, 62.2), "below"),
        ((66.2, 66.1), "above"),
        ((76.6, 10.0), "too uncertain"),
    ],
)
def test_without_an_error_from_samples_the_verdict_is_that_of_two_one_sided_t_tests(
    values: tuple[float, ...], verdict: str
):
    row = seeds(values, 0.0)
    p = [
        stats.ttest_1samp(values, FIMAQ_VIT_S_W3A3 + edge, alternative=way).pvalue
        for edge, way in ((-diff.MARGIN, "greater"), (diff.MARGIN, "less"))
    ]
    assert row["verdict"] == verdict
    assert (max(p) <= 0.05) == (verdict == "reproduced")
    ends = stats.t.interval(0.9, len(values) - 1, np.mean(values), stats.sem(values))
    low, high = (end - FIMAQ_VIT_S_W3A3 for end in ends)
    assert f"difference of {low:+.2f} to {high:+.2f} (90% interval)" in row["reason"]
    assert "one seed" not in row["reason"]


def test_the_interval_holds_samples_and_seeds():
    row = seeds((FIMAQ_VIT_S_W3A3, FIMAQ_VIT_S_W3A3 + 0.8, FIMAQ_VIT_S_W3A3 + 0.1), 0.2)
    assert row["seeds"] == 3
    assert row["measured"] == pytest.approx(FIMAQ_VIT_S_W3A3 + 0.3)
    # The seeds have the variance (0.3² + 0.5² + 0.2²) / 2 = 0.19.
    assert row["se"] == pytest.approx((0.2**2 + 0.19 / 3) ** 0.5)
    half = ((1.6449 * 0.2) ** 2 + (2.91999 * (0.19 / 3) ** 0.5) ** 2) ** 0.5
    assert f"difference of {0.3 - half:+.2f} to {0.3 + half:+.2f}" in row["reason"]
    assert row["verdict"] == "too uncertain"


def test_noise_makes_a_reproduction_less_likely():
    order = ["reproduced", "too uncertain"]
    for gap in (0.0, 0.2, 0.5):
        found = [
            seeds((FIMAQ_VIT_S_W3A3 + gap - spread, FIMAQ_VIT_S_W3A3 + gap + spread), 0.1)[
                "verdict"
            ]
            for spread in (0.0, 0.02, 0.1, 0.3, 1.0, 10.0, 35.0)
        ]
        assert found == sorted(found, key=order.index)
        assert set(found) == set(order)


def test_the_issues_noisy_seeds_are_no_reproduction():
    qdrop = [
        imagenet("qdrop", value, seed=seed, settings={"w_bits": 4, "a_bits": 4})
        for seed, value in enumerate((76.6, 10.0))
    ]
    table = compared(qdrop)
    table = table[table["verdict"] != diff.NOT_COMPARABLE]
    assert set(table["verdict"]) == {"too uncertain"}


def test_full_precision_checks_the_checkpoint():
    assert own_row([imagenet(None, 81.39)])["verdict"] == "reproduced"
    assert own_row([imagenet(None, 74.0)])["verdict"] == "below"


def test_weak_evidence_and_other_frameworks_are_context():
    table = diff.diff([imagenet("fimaq", 64.0), imagenet("qdrop", 41.05)])
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
    ("method", "settings", "published", "value"),
    [
        ("glfq", {}, "GLF-Q paper full text (2026) Table 1", 67.4),
        ("glfq", {"rotate": "none"}, "GLF-Q paper full text (2026) Table 4", 63.53),
        ("glfq", {"reconstruct_mlp": False}, "GLF-Q paper full text (2026) Table 4", 65.04),
        (
            "glfq",
            {"rotate": "none", "reconstruct_mlp": False},
            "GLF-Q paper full text (2026) Table 4",
            60.37,
        ),
        ("glfq", {"loss": "mse"}, "GLF-Q paper full text (2026) Table 3", 60.48),
        ("glfq", {"loss": "fisher_dplr"}, "GLF-Q paper full text (2026) Table 3", 63.83),
        ("glfq", {"glf_weight": 0}, "GLF-Q paper full text (2026) Table 3", 66.09),
        (
            "fimaq",
            {"rotate": "hadamard", "reconstruct_mlp": True},
            "GLF-Q paper full text (2026) Table 3",
            66.88,
        ),
    ],
)
def test_an_ablation_is_compared_with_the_record_that_has_its_changes(
    method: str, settings: dict[str, object], published: str, value: float
):
    table = compared([imagenet(method, value, settings=settings)])
    same = table[table["verdict"] != diff.NOT_COMPARABLE].to_dict("records")
    assert [(row["source"], row["published"], row["verdict"]) for row in same] == [
        (published, value, "reproduced")
    ]
    # The main number of the method is shown, and refused for the changes.
    others = table.loc[table["verdict"] == diff.NOT_COMPARABLE, "reason"]
    assert all(name in reason for reason in others for name in settings)
    assert bool(settings) == bool(len(others))


def test_other_changes_than_those_of_an_ablation_are_named():
    table = compared([imagenet("glfq", 63.5, settings={"rotate": "none", "steps": 300})])
    assert list(table["source"]) == ["GLF-Q paper full text (2026) Table 1"]
    assert table["reason"].item() == (
        "settings changed from the released ones: rotate none, steps 300"
    )


def test_closed_forms_compare_with_no_published_protocol():
    four = {"w_bits": 4, "a_bits": 4}
    tag = "deit_small_patch16_224.fb_in1k"
    for method in ("gptq", "gptaq"):
        table = compared([imagenet(method, 76.0, model=tag, settings=four)])
        assert set(table["verdict"]) == {diff.NOT_COMPARABLE}
        assert {"no rotation, GPTAQ paper protocol", "+rotation, MARR protocol"} <= {
            *table["variant"]
        }
        assert table["reason"].str.contains("run with another framework or recipe").all()


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
        ({"recipe": OURS, "method": "ours"}, "not known"),
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
        alike.changed_settings(
            make_recipe("rtn", {"steps": 300, "lr_alpha": 0.1}), "classification"
        )
        == {}
    )
    assert alike.changed_settings(
        make_recipe("rtn", {"calibration_transform": "eval"}), "classification"
    ) == {"calibration_transform": "eval"}
    assert alike.changed_settings(make_recipe("fimaq", {"steps": 300}), "classification") == {
        "steps": 300
    }
    # A closed form acts without reconstruction too; settings of parts that do not run do not.
    for settings, effect in (
        ({"start": "gptq", "start_damp": 0.1}, {"start": "gptq", "start_damp": 0.1}),
        ({"start_damp": 0.1, "finish_lr": 0.1}, {}),
        ({"finish_steps": 9, "finish_lr": 0.1}, {"finish_steps": 9, "finish_lr": 0.1}),
    ):
        assert alike.changed_settings(make_recipe("rtn", settings), "classification") == effect


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


def test_spreads_are_those_of_sources_that_disagree():
    table = diff.diff([imagenet(name, 60.0) for name in ("qdrop", "fimaq", "aphq", "brecq")])
    found = {
        (row.method, row.metric): (row.sources, row.lowest, row.highest, row.spread)
        for row in diff.spreads(table).itertuples()
    }
    expected = {}
    for row in table[table["bits"] == "w3a3"].itertuples():
        same = table[(table["method"] == row.method) & (table["bits"] == row.bits)]
        values = [v for v in same["published"] if v == v]
        sources = {s for s, v in zip(same["source"], same["published"], strict=True) if v == v}
        if len(sources) > 1 and max(values) > min(values):
            ends = min(values), max(values)
            expected[row.method, row.metric] = (len(sources), *ends, ends[1] - ends[0])
    assert found == expected
    assert expected
