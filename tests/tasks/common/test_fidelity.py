"""Fidelity to full precision: figures against slow loops, and the files of cells."""

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import brier_score_loss, cohen_kappa_score, log_loss
from sklearn.metrics.pairwise import cosine_similarity

from fimaq_core.errors import FimaqError
from fimaq_core.progress import silent
from fimaq_core.recipe import make_recipe
from tasks.common import fidelity
from tasks.common.cell.full_precision import FILE, FullPrecision
from tasks.common.cell.identity import planned_folder
from tasks.common.cell.lease import acquire
from tasks.common.cell.outputs import OTHER_SAMPLES, write_outputs
from tasks.common.cell.prepare import prepare
from tasks.common.cell.run import run_cell
from tasks.common.record import ResultRecord, read_record
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.retrieval.fidelity import ranking_fidelity

N, CLASSES = 90, 7


@pytest.fixture(scope="module")
def logits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(1)
    full = rng.normal(size=(N, CLASSES)).astype(np.float32) * 2
    own = (full + 0.8 * rng.normal(size=full.shape) + 3).astype(np.float32)
    labels = np.where(rng.random(N) < 0.7, full.argmax(1), rng.integers(0, CLASSES, N))
    features = rng.normal(size=(2, N, 5)).astype(np.float32)
    return (
        {"logits": full, "feature": features[0]},
        {"logits": own, "feature": features[1]},
        labels,
    )


def test_figures_are_those_of_a_loop_and_of_scikit_learn(logits) -> None:
    full, own, labels = logits
    found = fidelity.classifier_fidelity(full, own, labels).metrics
    kl, signal, noise, agree, worse, better = [], [], [], [], [], []
    for f, q, label in zip(full["logits"], own["logits"], labels, strict=True):
        p = [math.exp(x) for x in f.astype(float)]
        r = [math.exp(x) for x in q.astype(float)]
        kl.append(
            sum(a / sum(p) * math.log(a / sum(p) / (b / sum(r))) for a, b in zip(p, r, strict=True))
        )
        a, b = (x.astype(float) - x.astype(float).mean() for x in (f, q))
        signal.append((a**2).sum())
        noise.append(((a - b) ** 2).sum())
        agree.append(f.argmax() == q.argmax())
        worse.append(f.argmax() == label != q.argmax())
        better.append(f.argmax() != label == q.argmax())
    expected = {
        "kl": np.mean(kl),
        "agreement": 100 * np.mean(agree),
        "right_to_wrong": 100 * np.mean(worse),
        "wrong_to_right": 100 * np.mean(better),
        "snr_db": 10 * math.log10(sum(signal) / sum(noise)),
        "cosine": np.diag(cosine_similarity(full["feature"], own["feature"])).mean(),
    }
    classes = range(CLASSES)
    for start, outputs in (("", own), ("fp_", full)):
        p = np.exp(log_softmax(outputs["logits"].astype(float), axis=1))
        expected[f"{start}nll"] = log_loss(labels, p, labels=classes)
        per_class = (brier_score_loss(labels == c, p[:, c]) for c in classes)
        expected[f"{start}brier"] = sum(per_class)
        order = np.argsort(p.max(1), kind="stable")
        bins = np.array_split(order, fidelity.BINS)
        gaps = (abs((p[b].argmax(1) == labels[b]).mean() - p[b].max(1).mean()) for b in bins)
        expected[f"{start}ece"] = 100 * np.mean([*gaps])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, rel=1e-4), name
    # Agreement is that of two raters, and its error that of a share.
    assert cohen_kappa_score(full["logits"].argmax(1), own["logits"].argmax(1)) < 1
    share = np.mean(agree)
    assert found["agreement"].stderr == pytest.approx(
        100 * math.sqrt(share * (1 - share) / (N - 1))
    )


def test_errors_agree_with_the_bootstrap(logits) -> None:
    full, own, labels = logits
    found, rng = fidelity.classifier_fidelity(full, own, labels).metrics, np.random.default_rng(2)
    drawn: dict[str, list[float]] = {}
    for _ in range(150):
        rows = rng.integers(0, N, N)
        sides = ({k: v[rows] for k, v in side.items()} for side in (full, own))
        for name, one in fidelity.classifier_fidelity(*sides, labels[rows]).metrics.items():
            drawn.setdefault(name, []).append(one.value)
    for name in ("kl", "agreement", "snr_db", "cosine", "nll", "brier"):
        assert found[name].stderr == pytest.approx(np.std(drawn[name]), rel=0.3), name


def test_dependent_samples_have_the_errors_of_drawing_clusters(logits) -> None:
    """Copies of a sample tell nothing new: errors are those of one copy, not √3 smaller."""
    full, own, labels = logits
    once = fidelity.classifier_fidelity(full, own, labels).metrics
    thrice = [{k: v.repeat(3, axis=0) for k, v in side.items()} for side in (full, own)]
    clusters = 7 * np.arange(N).repeat(3)  # numbers with gaps, as if others were skipped
    found = fidelity.classifier_fidelity(*thrice, labels.repeat(3), cluster=clusters).metrics
    for name in ("kl", "agreement", "right_to_wrong", "snr_db", "cosine", "nll", "brier"):
        assert found[name].value == pytest.approx(once[name].value), name
        assert found[name].stderr == pytest.approx(once[name].stderr), name
    assert found["ece"].stderr == pytest.approx(once["ece"].stderr, rel=0.2)
    one = fidelity.classifier_fidelity(full, own, labels, cluster=np.zeros(N, int)).metrics
    for name in ("kl", "ece"):  # the error of one cluster is unknown
        assert one[name].stderr == pytest.approx(0, abs=1e-9)


def test_flips_add_up_to_the_change_of_accuracy_also_with_ties(logits) -> None:
    full, own, labels = logits
    tied = {"logits": np.round(own["logits"])}
    for outputs in (tied, {"logits": np.zeros_like(own["logits"])}):
        found = fidelity.classifier_fidelity(full, outputs, labels)
        shares = []
        for side in (full, outputs):
            others = np.delete(side["logits"].ravel(), np.arange(N) * CLASSES + labels)
            best = others.reshape(N, CLASSES - 1).max(1)
            shares.append(100 * (side["logits"][np.arange(N), labels] > best).mean())
        worse, better = (found.metrics[n].value for n in ("right_to_wrong", "wrong_to_right"))
        assert better - worse == pytest.approx(shares[1] - shares[0])
    assert (shares[1], better) == (0, 0)  # equal logits are no answer


def test_equal_outputs_are_faithful_and_shifted_ones_too(logits) -> None:
    full, _, labels = logits
    shifted = {"logits": full["logits"].astype(np.float64) + 5, "feature": 2 * full["feature"]}
    found = fidelity.classifier_fidelity(full, shifted, labels).metrics
    assert found["kl"].value == pytest.approx(0, abs=1e-12)
    assert (found["agreement"].value, found["right_to_wrong"].value) == (100, 0)
    assert found["snr_db"].value == 200
    assert found["cosine"].value == pytest.approx(1)


def test_rankings_are_compared_as_by_loops() -> None:
    rng = np.random.default_rng(3)

    def unit(count: int) -> np.ndarray:
        values = rng.normal(size=(count, 6)).astype(np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    owner = np.repeat(np.arange(12), 2)
    full, own = ({"image": unit(12), "caption": unit(24)} for _ in range(2))
    found = ranking_fidelity(full, own, np.concatenate([np.arange(12), owner])).metrics
    overlaps, taus = [], []
    for query, other in (("image", "caption"), ("caption", "image")):
        shares, values = [], []
        for f, q in zip(full[query], own[query], strict=True):
            scores = [float(f @ c) for c in full[other]], [float(q @ c) for c in own[other]]
            best = [sorted(range(len(s)), key=lambda i, s=s: -s[i])[:10] for s in scores]
            shares.append(len(set(best[0]) & set(best[1])) / 10)
            signs = [
                np.sign(scores[0][i] - scores[0][j]) * np.sign(scores[1][i] - scores[1][j])
                for i, j in combinations(range(len(scores[0])), 2)
            ]
            values.append(np.mean(signs))
        overlaps.append(np.mean(shares))
        taus.append(np.mean(values))
    assert found["overlap@10"].value == pytest.approx(100 * np.mean(overlaps))
    assert found["kendall"].value == pytest.approx(np.mean(taus))
    same = ranking_fidelity(full, full, np.concatenate([np.arange(12), owner])).metrics
    assert (same["overlap@10"].value, same["kendall"].value) == (100, pytest.approx(1))


def test_the_clustered_error_is_that_of_drawing_images() -> None:
    rng, owner = np.random.default_rng(4), np.repeat(np.arange(40), 3)
    shift = rng.normal(size=40)
    first, second = shift + rng.normal(size=40), shift[owner] + rng.normal(size=120)
    drawn = []
    for _ in range(2000):
        rows = rng.integers(0, 40, 40)
        captions = np.concatenate([np.flatnonzero(owner == row) for row in rows])
        drawn.append((first[rows].mean() + second[captions].mean()) / 2)
    error = fidelity.clustered_error(first, second, owner)
    assert error == pytest.approx(np.std(drawn), rel=0.1)


def cell(results: Path, method: str | None, name: str = "demo_vit", **changes) -> CellRequest:
    few = {"calibration_images": 16, "calibration_transform": "eval", "w_bits": 4, "a_bits": 4}
    recipe = None if method is None else make_recipe(method, few)
    data = DataRequest(limit=64)
    return CellRequest(
        "classification", ModelRequest(name), data, recipe, results=results, threads=1, **changes
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ResultRecord]:
    results = tmp_path_factory.mktemp("fidelity") / "runs"
    return results, read_record(run_cell(cell(results, "rtn")))


def full_precision(results: Path) -> FullPrecision:
    request = cell(results, None)
    folder = planned_folder(request)
    return FullPrecision(read_record(folder / "result.json"), folder, request)


def test_a_cell_takes_the_outputs_of_full_precision(measured) -> None:
    results, record = measured
    full, own = full_precision(results), planned_folder(cell(results, "rtn"))
    outcomes = [np.load(folder / "outcomes.npz") for folder in (full.folder, own)]
    assert full.record.fidelity == {}
    assert list(full.record.artefacts) == [FILE]
    answers = [one["predicted"] for one in outcomes]
    agreement = 100 * (answers[0] == answers[1]).mean()
    assert record.fidelity["agreement"].value == pytest.approx(agreement)
    right = [one["correct"] for one in outcomes]
    flips = 100 * (right[0] & ~right[1]).mean()
    assert record.fidelity["right_to_wrong"].value == pytest.approx(flips)
    for name in ("kl", "agreement", "cosine", "nll", "brier", "right_to_wrong", "wrong_to_right"):
        values = outcomes[1][name].astype(float) * (1 if name in fidelity.UNITS else 100)
        assert values.mean() == pytest.approx(record.fidelity[name].value, rel=1e-5)
    samples = outcomes[0]["sample"].tolist()
    raw = full.outputs(samples, silent)
    assert (raw["logits"].argmax(1) == answers[0]).all()
    assert raw["feature"].shape[0] == 64


@pytest.mark.parametrize("how", ["absent", "damaged", "of an old record", "of other samples"])
def test_outputs_that_do_not_fit_are_measured_again(measured, how: str, tmp_path: Path) -> None:
    results, _ = measured
    full = full_precision(results)
    samples = np.load(full.folder / "outcomes.npz")["sample"].tolist()
    expected = full.outputs(samples, silent)["logits"]
    place = replace(full, folder=tmp_path)
    if how == "damaged":
        (tmp_path / FILE).write_bytes(b"nothing")
    elif how == "of an old record":
        place = replace(full, record=full.record.model_copy(update={"artefacts": {}}))
    found = (full if how == "of other samples" else place).outputs(samples, silent)["logits"]
    assert np.allclose(found, expected, atol=1e-5)
    if how == "of other samples":
        before = (full.folder / FILE).read_bytes()
        assert full.outputs(samples[::-1], silent) == {}
        assert (full.folder / FILE).read_bytes() == before
        return
    # The next cell takes the file, so what was measured again is measured once.
    loads = replace(place, request=replace(full.request, task="no such task"))
    assert (loads.outputs(samples, silent)["logits"] == found).all()
    other = loads.record.model_copy(update={"fingerprint": "f" * 64, "artefacts": {}})
    with pytest.raises(FimaqError, match="no such task"):
        replace(loads, record=other).outputs(samples, silent)


def test_a_record_says_why_it_has_no_fidelity(measured, tmp_path: Path) -> None:
    results, _ = measured
    full = full_precision(results)
    request = cell(tmp_path / "runs", "rtn")
    prepared = prepare(request, silent)
    found = replace(prepared.evaluate(prepared.chains), outputs={"logits": np.zeros((64, 100))})
    found.outcomes["sample"] = found.outcomes["sample"][::-1]
    with acquire(tmp_path / "result.json") as lease:
        write_outputs(prepared, found, full, lease, "")
    record = read_record(tmp_path / "result.json")
    assert (record.fidelity, record.notes[-1]) == ({}, OTHER_SAMPLES)


def test_two_heads_have_one_feature() -> None:
    from fimaq_core.families import find_family
    from fimaq_core.layers import set_quantized
    from tasks.classification.task import TASK
    from tasks.common.penultimate import penultimate

    model = TASK.load(ModelRequest("demo_deit")).model
    x = torch.rand(3, 1, 32, 64)
    with torch.no_grad(), penultimate(model) as feature:
        model(x)
        expected = feature()
    chain = find_family(model).build(model, make_recipe("fimaq"))
    set_quantized(chain, False)
    with torch.no_grad(), penultimate(chain) as feature:
        chain(x)
        assert torch.allclose(feature(), expected, atol=1e-5)
