"""Comparison of detectors: boxes and masks against published rows of the same cell."""

import math
from typing import Any

import pandas as pd
import pytest
from diff_fakes import published_record
from pydantic import ValidationError

from benchmarks.compare import alike, diff
from benchmarks.grid.names import Names, load_names
from fimaq_core.recipe import make_recipe
from tasks.common.record import Dataset, Metric, ResultRecord
from tasks.detection import tags

COCO = Dataset(name="COCO 2017", split="val2017", count=5000, classes=80, fingerprint="c" * 64)
WHOLE = "backbone+fpn+rpn+roi"
TINY, SMALL = "mask_rcnn_swin_tiny.coco_3x", "mask_rcnn_swin_small.coco_3x"


def measured(
    method: str | None, box: float, mask: float, bits: int = 4, scope: str = WHOLE, **changes: Any
) -> ResultRecord:
    settings = changes.pop("settings", {})
    own = {"w_bits": bits, "a_bits": bits, "scope": scope}
    recipe = None if method is None else make_recipe(method, tags.DEFAULTS, own, settings)
    values = {"AP_box": box, "AP50_box": 70.0, "AP_mask": mask}
    metrics = {name: Metric(value=value, stderr=0.1) for name, value in values.items()}
    model = changes.pop("model", TINY)
    usual = {"task": "detection", "dataset": COCO, "metrics": metrics}
    return published_record(recipe, model, **{**usual, **changes})


def judged(*records: ResultRecord) -> pd.DataFrame:
    table = diff.diff(records)
    return table[table["verdict"] != diff.NOT_COMPARABLE]


@pytest.mark.parametrize(
    ("method", "bits", "model", "box", "mask"),
    [
        (None, 32, TINY, 46.0, 41.6),
        ("mlp-recon", 32, TINY, 45.8, 41.5),
        ("aphq", 4, TINY, 38.9, 38.1),
        ("aphq", 4, "cascade_mask_rcnn_swin_small.coco_3x", 50.3, 43.7),
        ("erq", 4, SMALL, 43.4, 40.7),
        ("fimaq", 4, SMALL, 44.2, 41.1),
        ("repq", 6, TINY, 45.1, 41.2),
    ],
)
def test_boxes_and_masks_have_their_own_verdicts(
    method: str | None, bits: int, model: str, box: float, mask: float
):
    table = judged(measured(method, box + 0.2, mask - 1.0, bits, model=model)).set_index("metric")
    assert table.loc[["AP_box", "AP_mask"], "published"].tolist() == [box, mask]
    assert table.loc[["AP_box", "AP_mask"], "verdict"].tolist() == ["reproduced", "below"]
    assert table["difference"].tolist() == pytest.approx([0.2, -1.0])
    assert set(table["dataset"]) == {"COCO 2017"}
    name = model.partition(".")[0]
    assert set(table["model"]) == {name if method is None else f"{name} [{WHOLE}]"}


def test_notes_say_whose_number_it_is():
    for method, words in (
        ("erq", "APHQ-ViT's report"),
        ("fimaq", "GLF-Q's report"),
        ("repq", "one image of val2017"),
    ):
        reasons = judged(measured(method, 36.0, 36.0))["reason"]
        assert len(reasons) >= 2
        assert reasons.str.contains(words, regex=False).all()


def test_reruns_by_others_are_context():
    table = diff.diff([measured("qdrop", 36.2, 35.4), measured("repq", 42.7, 40.1, model=SMALL)])
    reruns = table[table["variant"] != ""].dropna(subset="published")
    assert {
        "rerun in APHQ framework",
        "rerun by I&S",
        "reproduced by official code",
        "user reproduction",
    } <= set(reruns["variant"])
    assert set(reruns["verdict"]) == {diff.NOT_COMPARABLE}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scope": "backbone"}, "no published number for this model, method and bits"),
        (
            {"dataset": COCO.model_copy(update={"split": "val2017[:100]", "count": 100})},
            "a part of COCO 2017",
        ),
        ({"n": 4999, "skipped_images": ["x.jpg"]}, "a part of COCO 2017"),
        (
            {"dataset": COCO.model_copy(update={"name": "instances_mine"})},
            "on which nothing is published",
        ),
        ({"model": "mask_rcnn_swin_tiny.coco_1x"}, "no published name is mapped"),
        (
            {"settings": {"calibration_images": 64}},
            "settings changed from the released ones: calibration_images 64",
        ),
        # What every other task has is a change here.
        (
            {"settings": {"batch_size": 32}},
            "settings changed from the released ones: batch_size 32",
        ),
    ],
)
def test_only_like_is_compared_with_like(changes: dict[str, Any], words: str):
    table = diff.diff([measured("aphq", 38.9, 38.1, **changes)])
    assert set(table["verdict"]) == {diff.NOT_COMPARABLE}
    assert table["difference"].isna().all()
    assert table["reason"].str.contains(words, regex=False).all()


def test_settings_of_the_task_are_no_change():
    recipe = make_recipe("fimaq", tags.DEFAULTS)
    assert alike.changed_settings(recipe, "detection") == {}
    assert alike.changed_settings(recipe, "classification")["batch_size"] == 1


def test_other_metrics_have_no_published_number():
    (row,) = (
        diff.diff([measured("aphq", 38.9, 38.1)]).query("metric == 'AP50_box'").to_dict("records")
    )
    assert math.isnan(row["published"])


def test_every_row_of_detection_has_its_names_mapped_or_listed():
    rows, names = diff.published_rows(), load_names()
    own = rows[rows["task"] == "detection"]
    assert len(own) > 0
    assert set(own["method"]) <= set(names.methods) | set(names.unmapped_methods)
    assert set(own["model"]) <= set(names.models)
    assert set(own["dataset"]) == set(names.datasets["detection"])
    assert set(own["metric"]) == set(names.datasets["detection"]["COCO val2017"].metrics)
    assert set(names.datasets["detection"]["COCO val2017"].notes) <= set(names.methods)


def test_published_detectors_are_models_here():
    names = load_names()
    found = {name: entry for name, entry in names.models.items() if entry.scope in tags.SCOPES}
    assert {entry.id: entry.tag for entry in found.values()}.items() <= tags.SHORT_NAMES.items()
    assert {entry.scope for entry in found.values()} == {tags.SCOPES[0]} == {WHOLE}
    assert len(found) == 4


def test_a_scope_that_no_task_has_is_refused():
    content = load_names().model_dump()
    content["models"][TINY.partition(".")[0]]["scope"] = "backbone+neck"
    with pytest.raises(
        ValidationError,
        match=r"scopes that no task has: \{'mask_rcnn_swin_tiny': 'backbone\+neck'\}",
    ):
        Names.model_validate(content)


def test_published_data_are_what_records_state():
    from tasks.detection.coco import COCO_NAME, COUNTS
    from tasks.detection.tags import SPLITS

    entry = load_names().datasets["detection"]["COCO val2017"]
    assert (entry.task, entry.name, entry.split, entry.count) == (
        "detection",
        COCO_NAME,
        SPLITS["val"],
        COUNTS["val"],
    )
