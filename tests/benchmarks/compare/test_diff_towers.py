"""Comparison with sources that quantize one tower, both, or do not name the towers."""

import math

import pandas as pd
import pytest
from diff_fakes import published_record

from benchmarks.compare import alike, diff
from benchmarks.grid.names import load_names
from fimaq_core.recipe import make_recipe
from tasks.common.record import Dataset, Metric

COCO = Dataset(
    name="MS-COCO",
    split="Karpathy test",
    count=5000,
    classes=0,
    fingerprint="c" * 64,
    captions=25_010,
)
B32, B16 = "ViT-B-32-quickgelu.openai", "ViT-B-16-quickgelu.openai"


def zero_shot(
    method: str | None, scope: str | None, value: float, bits: int = 6, model: str = B32, **changes
):
    settings = {"w_bits": bits, "a_bits": bits, "scope": scope}
    recipe = None if method is None else make_recipe(method, settings, changes.pop("settings", {}))
    usual = {"task": "retrieval", "value": value, "stderr": 0.2}
    return published_record(recipe, model, **{**usual, **changes})


def coco(method: str, scope: str = "vision", **changes):
    values = {"R@1": 50.0, "i2t_R@1": 60.0, "t2i_R@1": 40.0, "i2t_median_rank": 1.0}
    metrics = {name: Metric(value=value, stderr=0.5) for name, value in values.items()}
    recipe = make_recipe(method, {"w_bits": 4, "a_bits": 4, "scope": scope})
    usual = {"task": "retrieval", "dataset": COCO, "metrics": metrics}
    return published_record(recipe, B32, **{**usual, **changes})


def judged(records) -> pd.DataFrame:
    table = diff.diff(records)
    return table[table["verdict"] != diff.NOT_COMPARABLE]


@pytest.mark.parametrize(
    ("scope", "bits", "value", "published", "verdict"),
    [
        ("vision", 6, 59.3, 59.2, "reproduced"),
        ("both", 6, 59.3, 29.8, "above"),
        ("both", 6, 29.9, 29.8, "reproduced"),
        ("vision", 8, 50.0, 62.9, "below"),
        ("both", 8, 38.5, 38.7, "reproduced"),
    ],
)
def test_a_scope_is_set_against_the_rows_of_its_towers_only(
    scope: str, bits: int, value: float, published: float, verdict: str
):
    (row,) = judged([zero_shot("repq", scope, value, bits)]).to_dict("records")
    assert (row["published"], row["verdict"]) == (published, verdict)
    assert (row["model"], row["metric"], row["dataset"]) == (
        f"clip_vit_b32 [{scope}]",
        "top1",
        "ImageNet-1k val",
    )
    assert row["difference"] == pytest.approx(value - published)
    assert row["reason"].endswith(
        "; the published number is QwT's baseline, run by that repository"
    )


def test_scopes_nothing_is_published_of_compare_with_nothing():
    for scope in ("text", None):
        (row,) = diff.diff([zero_shot("repq", scope, 59.2)]).to_dict("records")
        assert math.isnan(row["published"])
        assert row["reason"] == "no published number for this model, method and bits"


def test_full_precision_has_no_scope_and_checks_the_checkpoint():
    (row,) = judged([zero_shot(None, None, 63.4)]).to_dict("records")
    assert (row["model"], row["published"], row["verdict"]) == ("clip_vit_b32", 63.4, "reproduced")


def test_other_weights_of_the_same_architecture_are_no_comparison():
    laion = zero_shot(None, None, 66.5, model="ViT-B-32.laion2b_s34b_b79k")
    (row,) = diff.diff([laion]).to_dict("records")
    assert (row["verdict"], math.isnan(row["published"])) == ("not comparable", True)
    assert "no published name is mapped to the model ViT-B-32.laion2b_s34b_b79k" in row["reason"]
    record = zero_shot("repq", "vision", 59.2)
    other = record.model_copy(
        update={"weights": record.weights.model_copy(update={"tag": "ViT-B-32.openai"})}
    )
    assert judged([other]).empty


def test_a_source_that_leaves_the_towers_open_is_context():
    for scope in ("vision", "both"):
        table = diff.diff(
            [zero_shot("rtn", scope, 34.01, 8, B16), zero_shot("repq", scope, 1.83, 4, B16)]
        )
        assert table["published"].tolist() == [34.01, 1.83]
        assert set(table["verdict"]) == {"not comparable"}
        assert (
            table["reason"]
            .str.contains(
                "secondary evidence; the source does not name the quantized parts of the model"
            )
            .all()
        )
    strong = diff.published_rows().assign(evidence="primary")
    found = diff.diff([zero_shot("repq", "both", 1.83, 4, B16)], strong)
    assert found["reason"].tolist() == [
        "context only: the source does not name the quantized parts of the model"
    ]
    full = diff.diff([zero_shot(None, None, 68.32, model=B16)], strong)
    assert full["verdict"].tolist() == ["reproduced"]


def test_changed_settings_still_tell_runs_apart_and_a_scope_is_none():
    assert alike.changed_settings(make_recipe("fimaq", {"scope": "vision"}), "retrieval") == {}
    table = diff.diff([zero_shot("repq", "vision", 59.2, settings={"calibration_images": 7})])
    assert table["reason"].tolist() == [
        "settings changed from the released ones: calibration_images 7"
    ]
    means = diff.measurements([zero_shot("repq", scope, 50.0) for scope in ("vision", "both")])
    assert len(means) == 2


def test_sources_without_model_and_bits_are_shown_and_never_compared():
    table = diff.diff([coco("fimaq"), coco("rtn"), coco("fimaq", "both")])
    context = table[table["model"] == "unstated"]
    assert context["metric"].tolist() == ["t2i_R@1", "i2t_R@1", "i2t_R@1"]
    assert context["published"].tolist() == [47.22, 67.7, 40.92]
    assert set(context["dataset"]) == {"MS-COCO"}
    assert set(context["method"]) == {"fimaq"}
    assert set(context["verdict"]) == {"not comparable"}
    assert set(context["reason"]) == {"context only: the source names neither model nor bits"}
    assert context[["measured", "difference"]].isna().all(axis=None)
    rest = table[table["model"] != "unstated"]
    assert len(rest) == 3 * 4
    assert rest["published"].isna().all()
    assert set(rest["reason"]) == {"no published number for this model, method and bits"}


def test_sources_without_model_and_bits_come_with_records_of_their_data_only():
    part = COCO.model_copy(update={"split": "Karpathy test[:100]", "count": 100})
    assert (diff.diff([coco("fimaq", dataset=part, n=100)])["model"] == "unstated").sum() == 3
    flickr = COCO.model_copy(update={"name": "Flickr30k", "count": 1000})
    table = diff.diff([coco("fimaq", dataset=flickr), zero_shot("repq", "vision", 59.2)])
    assert "unstated" not in set(table["model"])
    assert table["reason"].str.contains("measured on Flickr30k").sum() == 4


def test_directions_are_mapped_to_our_metrics():
    names = load_names()
    sets = {
        name: (entry.task, entry.name, entry.split, entry.count, entry.metrics)
        for name, entry in names.datasets["retrieval"].items()
    }
    own = ("retrieval", "MS-COCO", "Karpathy test", 5000)
    assert sets == {
        "MS-COCO text-to-image": (*own, {"R@1": "t2i_R@1"}),
        "MS-COCO image-to-text": (*own, {"R@1": "i2t_R@1"}),
        "MS-COCO (test) image-to-text": (*own, {"R@1": "i2t_R@1"}),
    }
    rows = diff.published_rows()
    stated = rows[rows["dataset"] == "MS-COCO text-to-image"].assign(
        model="clip_vit_b32 (vision tower)", w_bit=4, a_bit=4, evidence="primary", value=40.1
    )
    table = diff.diff([coco("fimaq")], stated)
    assert table.loc[
        table["verdict"] == "reproduced", ["metric", "published"]
    ].to_numpy().tolist() == [["t2i_R@1", 40.1]]


def test_every_row_of_retrieval_and_zero_shot_has_its_names_mapped_or_listed():
    rows, names = diff.published_rows(), load_names()
    for task in ("retrieval", "zero-shot classification"):
        own = rows[rows["task"] == task]
        assert len(own) > 0
        assert set(own["method"]) <= set(names.methods) | set(names.unmapped_methods)
        assert set(own["model"]) <= set(names.models) | set(names.unmapped_models)
        assert set(own["dataset"]) == set(names.datasets[task])
        for name, entry in names.datasets[task].items():
            assert set(own.loc[own["dataset"] == name, "metric"]) <= set(entry.metrics)


def test_published_models_of_towers_are_models_here():
    from tasks.retrieval.tags import SCOPES, SHORT_NAMES

    towers = {
        name: entry
        for name, entry in load_names().models.items()
        if entry.scope in (*SCOPES, "unstated")
    }
    assert len(towers) == 5
    assert {entry.id: entry.tag for entry in towers.values()}.items() <= SHORT_NAMES.items()
