"""Metrics of frames and videos, against scikit-learn and slow loops."""

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from tasks.deepfake.metrics import Curve, measures

RNG = np.random.default_rng(0)
VIDEO = np.sort(np.concatenate([np.arange(20), RNG.integers(0, 20, 140)]))
FAKE = np.isin(VIDEO, np.arange(0, 20, 3))
SCORES = np.round(np.clip(RNG.normal(0.4 + 0.2 * FAKE, 0.2), 0, 1), 2)  # with equal scores


def test_metrics_are_those_of_scikit_learn() -> None:
    found = {name: one.value / 100 for name, one in measures(SCORES, FAKE, VIDEO).items()}
    assert found["frame_auc"] == pytest.approx(roc_auc_score(FAKE, SCORES))
    assert found["frame_ap"] == pytest.approx(average_precision_score(FAKE, SCORES))
    assert found["frame_accuracy"] == pytest.approx(np.mean((SCORES > 0.5) == FAKE))
    accused, found_fake, _ = roc_curve(FAKE, SCORES, drop_intermediate=False)
    rate = brentq(lambda x: 1 - x - np.interp(x, accused, found_fake), 0, 1)
    assert found["frame_eer"] == pytest.approx(rate, abs=1e-6)
    means = [SCORES[one == VIDEO].mean() for one in range(20)]
    truth = [FAKE[one == VIDEO].any() for one in range(20)]
    assert found["video_auc"] == pytest.approx(roc_auc_score(truth, means))


def test_weights_count_as_repeated_samples() -> None:
    weights = RNG.integers(0, 4, len(SCORES))
    rows = np.repeat(np.arange(len(SCORES)), weights)
    curve, repeated = Curve(SCORES, FAKE), Curve(SCORES[rows], FAKE[rows])
    ones = np.ones(len(rows))
    for name in ("auc", "eer", "precision"):
        found = getattr(curve, name)(weights.astype(float))
        assert found == pytest.approx(getattr(repeated, name)(ones))


def test_errors_are_those_of_drawing_videos() -> None:
    found, rng = measures(SCORES, FAKE, VIDEO), np.random.default_rng(1)
    drawn = []
    while len(drawn) < 400:
        rows = np.concatenate([np.flatnonzero(one == VIDEO) for one in rng.integers(0, 20, 20)])
        if FAKE[rows].any() and not FAKE[rows].all():
            drawn.append(100 * roc_auc_score(FAKE[rows], SCORES[rows]))
    assert found["frame_auc"].stderr == pytest.approx(np.std(drawn), rel=0.2)
    # Frames of a video are alike: drawn one by one, they would seem more certain.
    alone = measures(np.repeat(SCORES[::8], 8), np.repeat(FAKE[::8], 8), np.arange(160) // 8)
    assert alone["frame_auc"].stderr > 0


def test_perfect_and_constant_detectors() -> None:
    perfect = measures(FAKE.astype(float), FAKE, VIDEO)
    assert {name: one.value for name, one in perfect.items()} == {
        "frame_auc": 100, "frame_accuracy": 100, "frame_eer": 0, "frame_ap": 100, "video_auc": 100,
    }  # fmt: skip
    constant = measures(np.full(len(FAKE), 0.5), FAKE, VIDEO)
    assert (constant["frame_auc"].value, constant["frame_eer"].value) == (50, 50)


def test_contributions_have_the_area_as_mean_and_its_error() -> None:
    each = Curve(SCORES, FAKE).auc_by_sample()
    assert each.mean() == pytest.approx(roc_auc_score(FAKE, SCORES))
    rng, drawn = np.random.default_rng(3), []
    for _ in range(2000):
        rows = rng.integers(0, len(FAKE), len(FAKE))
        drawn.append(roc_auc_score(FAKE[rows], SCORES[rows]))
    assert each.std() / np.sqrt(len(each)) == pytest.approx(np.std(drawn), rel=0.1)
