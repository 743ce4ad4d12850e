"""Average precision of detections with those in full precision as the truth."""

from dataclasses import replace

import numpy as np
import pytest
from test_precision import setting

from tasks.common.task import Evaluation
from tasks.detection.annotations import Detections
from tasks.detection.evaluate import measure
from tasks.detection.fidelity import LEAST_SCORE, NAME, detection_fidelity, raw_detections


def test_the_truth_are_the_sure_detections_of_full_precision() -> None:
    source, full = setting(1, categories=3)
    _, own = setting(2, categories=3)
    raw = raw_detections(full)
    assert len(raw["score"]) == len(full.results)
    evaluation = replace(measure(source, own), outputs=raw_detections(own))
    found = detection_fidelity(raw, evaluation, source)
    # The same by hand: annotations are replaced, and the usual evaluation measures box AP.
    sure = [entry for entry in full.results if entry["score"] >= LEAST_SCORE]
    truth = [
        {**entry, "iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], "id": number}
        for number, entry in enumerate(sure, 1)
    ]
    objects = replace(source, coco={**source.coco, "annotations": truth})
    expected = measure(objects, own).metrics["AP_box"]
    assert found.metrics[NAME].value == pytest.approx(expected.value, abs=0.05)
    assert found.metrics[NAME].stderr == pytest.approx(expected.stderr, rel=0.05)
    assert 100 * found.outcomes[NAME].mean() == pytest.approx(found.metrics[NAME].value, abs=1e-3)


def test_equal_detections_are_perfect_and_none_are_nothing() -> None:
    source, full = setting(3, categories=2)
    sure = [entry for entry in full.results if entry["score"] >= LEAST_SCORE]
    same = Detections(sure, full.kept)
    raw = raw_detections(same)
    evaluation = replace(measure(source, same), outputs=raw)
    assert detection_fidelity(raw, evaluation, source).metrics[NAME].value == pytest.approx(100)
    nothing = {name: values[:0] for name, values in raw.items()}
    assert detection_fidelity(nothing, evaluation, source).metrics == {}
    none: Evaluation = replace(evaluation, outputs=nothing)
    assert detection_fidelity(raw, none, source).metrics[NAME].value == 0
    assert raw_detections(Detections([], [])).keys() == raw.keys()
    assert raw_detections(Detections([], []))["bbox"].shape == (0, 4)
    assert np.isfinite(raw["bbox"]).all()
