"""Comparison of runs on disk: pairing of records, refusals, and printed texts."""

import json
from pathlib import Path

import benchmark_fakes as fakes
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.cli import cli
from benchmarks.compare.pair_tests import compare_pairs
from benchmarks.compare.pairs import CompareError, alone, pair_up, read_side
from fimaq_core.recipe import make_recipe
from tasks.common.preprocessing import Preprocessing
from tasks.common.record import (
    Calibration,
    Metric,
    ResultRecord,
    SignedMetric,
    Weights,
    bits_name,
    write_record,
)

IDS = np.array([f"val/{i}.png" for i in range(200)])
RNG = np.random.default_rng(0)
EASY = RNG.random(200)


def right(share: float, seed: int = 0) -> np.ndarray:
    """Which of 200 samples are right: mostly the easy ones, so that methods agree on many."""
    noise = np.random.default_rng([seed, int(1000 * share)]).normal(0, 0.1, 200)
    return EASY + noise < share


def save(
    root: Path,
    method: str,
    seed: int = 1,
    correct: np.ndarray | None = None,
    bits: str = "w3a3",
    **changes,
) -> Path:
    """Write a record and outcomes; return its folder."""
    outcomes = changes.pop("outcomes_content", None)
    if outcomes is None:
        chosen = right(0.7, seed) if correct is None else correct
        outcomes = {"sample": IDS[: len(chosen)], "correct": chosen}
        changes = {
            "metrics": {"top1": Metric(value=100 * float(chosen.mean()), stderr=1.0)},
            **changes,
        }
    recipe = None
    if method != "fp":
        recipe = make_recipe(
            method,
            {
                "w_bits": int(bits[1]),
                "a_bits": int(bits[3]),
                "seed": seed,
                "scope": changes.pop("scope", None),
            },
        )
    n = changes.pop("n", len(outcomes["sample"]))
    dataset = changes.pop("dataset", fakes.DIGITS).model_copy(update={"count": n})
    record = fakes.make_record(recipe=recipe, n=n, dataset=dataset, **changes)
    folder = (
        root
        / record.model
        / method
        / bits_name(record.w_bit, record.a_bit)
        / f"seed{seed}-{record.variant}-{recipe and recipe.scope}"
    )
    write_record(record, folder)
    np.savez(folder / "outcomes.npz", **outcomes)
    return folder


def labels(a: Path, b: Path) -> list[tuple[str, list[int | None]]]:
    return [(pair.label, list(pair.a)) for pair in pair_up(read_side(a), read_side(b))]


def run(*arguments: object):
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)])


def test_a_folder_a_file_and_a_tree_are_the_same_run(tmp_path: Path):
    a, b = save(tmp_path, "fimaq"), save(tmp_path, "qdrop")
    for one in (a, a / "result.json", a.parent.parent):
        assert labels(one, b) == [("demo_vit w3a3", [1])]


def test_records_are_paired_by_what_they_share(tmp_path: Path):
    for method in ("fimaq", "qdrop"):
        for model in ("demo_vit", "demo_swin"):
            for bits in ("w3a3", "w4a4"):
                for seed in (1, 2):
                    save(tmp_path / method, method, seed, bits=bits, model=model)
    save(tmp_path / "fimaq", "fimaq", 3)
    save(tmp_path / "fimaq", "fimaq", 1, bits="w6a6")
    a, b = read_side(tmp_path / "fimaq"), read_side(tmp_path / "qdrop")
    pairs = pair_up(a, b)
    assert {(pair.label, tuple(pair.a)) for pair in pairs} == {
        (f"{model} {bits}", (1, 2))
        for model in ("demo_vit", "demo_swin")
        for bits in ("w3a3", "w4a4")
    }
    assert sorted(run.label for run in alone(a, pairs)) == [
        "classification demo_vit fimaq (released) w3a3 seed 3",
        "classification demo_vit fimaq (released) w6a6 seed 1",
    ]
    assert not alone(b, pairs)
    for pair in pairs:
        for seed, mine in pair.a.items():
            assert (mine.record.seed, pair.b[seed].record.seed) == (seed, seed)
            assert (mine.record.method, pair.b[seed].record.method) == ("fimaq", "qdrop")


def test_the_method_tells_records_apart_only_where_a_side_has_several(tmp_path: Path):
    for tree in ("old", "new"):
        for method in ("fp", "rtn", "fimaq"):
            save(tmp_path / tree, method)
    assert sorted(label for label, _ in labels(tmp_path / "old", tmp_path / "new")) == [
        "demo_vit fimaq w3a3",
        "demo_vit fp full precision",
        "demo_vit rtn w3a3",
    ]
    assert labels(
        tmp_path / "old" / "demo_vit" / "fimaq", tmp_path / "new" / "demo_vit" / "rtn"
    ) == [("demo_vit w3a3", [1])]


def test_the_variant_and_the_scope_do_so_too(tmp_path: Path):
    for tree in ("old", "new"):
        for variant in ("demo", "demo k=15"):
            for scope in ("vision", "both"):
                save(tmp_path / tree, "fimaq", variant=f"{variant} [{scope}]", scope=scope)
    save(tmp_path / "other", "qdrop", variant="demo [both]", scope="both")
    assert sorted(label for label, _ in labels(tmp_path / "old", tmp_path / "new")) == sorted(
        f"demo_vit [{scope}] {variant} w3a3"
        for variant in ("demo", "demo k=15")
        for scope in ("vision", "both")
    )
    a, b = read_side(tmp_path / "old"), read_side(tmp_path / "other")
    pairs = pair_up(a, b)
    assert [pair.label for pair in pairs] == ["demo_vit [both] demo w3a3"]
    assert len(alone(a, pairs)) == 3


def test_full_precision_stands_beside_everything_of_its_model(tmp_path: Path):
    full = save(tmp_path, "fp", correct=right(0.9))
    for method in ("rtn", "fimaq"):
        for seed in (1, 2):
            save(tmp_path, method, seed)
    a, b = read_side(tmp_path), read_side(full)
    pairs = pair_up(a, b)
    assert sorted((pair.label, tuple(pair.a)) for pair in pairs) == [
        ("demo_vit fimaq w3a3", (1, 2)),
        ("demo_vit rtn w3a3", (1, 2)),
    ]
    assert not alone(a, pairs)
    assert not alone(b, pairs)
    assert [pair.label for pair in pair_up(read_side(full), read_side(tmp_path))] == [
        p.label for p in pairs
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 2}, "differ in seed (1; 2)"),
        ({"bits": "w4a4"}, "differ in bits (w3a3; w4a4)"),
        ({"model": "demo_swin"}, "differ in model (demo_vit; demo_swin)"),
        (
            {"dataset": fakes.DIGITS.model_copy(update={"fingerprint": "a" * 64})},
            "digit-pairs test (aaaaaaaaaaaa)",
        ),
    ],
)
def test_unlike_runs_are_refused_with_what_differs(tmp_path: Path, changes: dict, words: str):
    a, b = save(tmp_path / "a", "fimaq"), save(tmp_path / "b", "qdrop", **changes)
    result = run(a, b)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


CALIBRATION = Calibration(
    ids=["train/1.png"], transform="train", fingerprint="c", dataset="d", split="train",
    listed=False,
)  # fmt: skip
PREPROCESSING = Preprocessing(
    input_size=(3, 8, 8), crop_mode="center", mean=(0.5,), std=(0.5,), interpolation="bicubic"
)
ZEROS = "0" * 12


@pytest.mark.parametrize(
    ("mine", "theirs", "words"),
    [
        (
            {},
            {"weights": Weights(tag="demo_vit", source="test", sha256="a" * 64)},
            f"weights (demo_vit {ZEROS}; demo_vit aaaaaaaaaaaa)",
        ),
        (
            {"identity": "1" * 64},
            {"identity": "2" * 64, "model_args": {"depth": 3}},
            'model arguments ({"depth": 3}; {})',
        ),
        (
            {"preprocessing": PREPROCESSING},
            {"preprocessing": PREPROCESSING.model_copy(update={"crop_pct": 0.5})},
            "preprocessing (3 x 8 x 8, bicubic, center, mean 0.5, std 0.5; 3 x 8 x 8, bicubic, "
            "crop 0.5 (center)",
        ),
        (
            {"dataset": fakes.DIGITS},
            {"dataset": fakes.DIGITS.model_copy(update={"exif": "ignore"})},
            "exif (by annotated sizes; ignore)",
        ),
        (
            {"calibration": CALIBRATION},
            {"calibration": CALIBRATION.model_copy(update={"split": "val"})},
            "calibration data (d train; d val)",
        ),
    ],
)
def test_pairs_of_unlike_records_are_refused_by_the_fact_that_differs(
    tmp_path: Path, mine: dict, theirs: dict, words: str
):
    a, b = save(tmp_path, "fimaq", **mine), save(tmp_path, "qdrop", **theirs)
    result = run(a, b)
    assert result.exit_code == 2
    assert "The records of demo_vit w3a3 are unlike: they differ in " in result.stderr
    assert words in result.stderr
    # Other pairs are compared.
    save(tmp_path, "fimaq", model="demo_swin")
    save(tmp_path, "qdrop", model="demo_swin")
    sides = [tmp_path / "demo_vit", tmp_path / "demo_swin"]
    assert run(*(side / "fimaq" for side in sides)).exit_code == 2
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for side in sides:
        (side / "fimaq").rename(tmp_path / "a" / side.name)
        (side / "qdrop").rename(tmp_path / "b" / side.name)
    result = run(tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 0
    assert "Not compared: demo_vit w3a3: The records of demo_vit w3a3 are unlike" in result.stdout


def test_methods_may_differ_in_number_and_transform_of_calibration_images(tmp_path: Path):
    more = CALIBRATION.model_copy(update={"ids": ["train/1.png", "train/2.png"]})
    a = save(tmp_path, "fimaq", calibration=CALIBRATION)
    b = save(tmp_path, "qdrop", calibration=more.model_copy(update={"transform": "eval"}))
    assert run(a, b).exit_code == 0


def test_a_record_that_contradicts_its_recipe_is_not_compared(tmp_path: Path):
    a, b = save(tmp_path, "fimaq"), save(tmp_path, "qdrop")
    record = ResultRecord.model_validate_json((a / "result.json").read_text())
    write_record(record.model_copy(update={"recipe_digest": "0" * 64}), a)
    result = run(a, b)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_other_libraries_are_noted(tmp_path: Path):
    other = fakes.make_record().environment.model_copy(update={"versions": {"torch": "2"}})
    a, b = save(tmp_path, "fimaq"), save(tmp_path, "qdrop", environment=other)
    result = run(a, b)
    assert result.exit_code == 0
    assert "Note: demo_vit w3a3: the records differ in torch (1; 2)." in result.stdout


def test_a_list_of_calibration_images_is_noted(tmp_path: Path):
    listed = CALIBRATION.model_copy(update={"listed": True})
    a, b = (
        save(tmp_path, "fimaq", calibration=CALIBRATION),
        save(tmp_path, "qdrop", calibration=listed),
    )
    result = run(a, b)
    assert result.exit_code == 0
    assert "the records differ in calibration list (" in result.stdout


def test_ambiguous_and_empty_sides_are_refused(tmp_path: Path):
    a, b = save(tmp_path / "a", "fimaq"), save(tmp_path / "b", "qdrop")
    again = tmp_path / "a" / "again"
    write_record(ResultRecord.model_validate_json((a / "result.json").read_text()), again)
    with pytest.raises(CompareError, match="several records of classification demo_vit fimaq"):
        pair_up(read_side(tmp_path / "a"), read_side(b))
    with pytest.raises(CompareError, match="on both sides"):
        pair_up(read_side(a), read_side(a))
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "empty", "no record below"),
        (tmp_path / "nowhere", "There is no"),
    ):
        result = run(path, b)
        assert (result.exit_code, words in result.stderr) == (2, True)


def test_a_damaged_record_among_several_is_told(tmp_path: Path):
    a, b = save(tmp_path / "a", "fimaq"), save(tmp_path / "b", "qdrop")
    save(tmp_path / "a", "fimaq", bits="w4a4")
    (
        tmp_path / "a" / "demo_vit" / "fimaq" / "w4a4" / "seed1-released-None" / "result.json"
    ).write_text("{")
    result = run(tmp_path / "a", b)
    assert result.exit_code == 2
    assert "Not read in A" in result.stdout
    assert result.stderr.startswith("warning: The record ")
    assert "is damaged" in result.stderr
    (a / "result.json").write_text("{")
    assert run(a, b).exit_code == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"sample": IDS[:150], "correct": right(0.7)[:150]},
            "have 150 samples, but the record has 200",
        ),
        ({"sample": IDS, "correct": right(0.7)[:150]}, "different sizes"),
        ({"sample": IDS, "correct": right(0.2)}, "they belong to another run"),
        ({"sample": np.repeat(IDS[:100], 2), "correct": right(0.7)}, "name a sample twice"),
        ({"correct": right(0.7)}, "no 'sample'"),
        ({"sample": IDS}, "nothing that can be compared"),
        ({"sample": np.array([{}] * 200, dtype=object), "correct": right(0.7)}, "damaged"),
        (None, "There are no outcomes"),
    ],
)
def test_outcomes_that_do_not_fit_their_record_are_refused(
    tmp_path: Path, content: dict | None, words: str
):
    a, b = save(tmp_path, "fimaq", correct=right(0.7)), save(tmp_path, "qdrop")
    (a / "outcomes.npz").unlink()
    if content is not None:
        np.savez(a / "outcomes.npz", **content)
    result = run(a, b)
    assert result.exit_code == 2
    assert words in result.stderr


def test_other_samples_are_refused(tmp_path: Path):
    # The same data set, but each run left out another damaged image.
    correct = right(0.7)
    sides = []
    for method, gone in (("fimaq", 3), ("qdrop", 4)):
        kept = np.delete(np.arange(200), gone)
        value = Metric(value=100 * float(correct[kept].mean()), stderr=1.0)
        sides.append(
            save(
                tmp_path,
                method,
                outcomes_content={"sample": IDS[kept], "correct": correct[kept]},
                metrics={"top1": value},
            )
        )
    result = run(*sides)
    assert result.exit_code == 2
    assert "do not share all samples: only one of them has val/3.png" in result.stderr
    whole = save(tmp_path, "brecq")
    assert "has 199" in run(sides[0], whole).stderr


def test_a_clear_difference_is_said_and_an_unclear_one_too(tmp_path: Path):
    a, b, near = (
        save(tmp_path, m, correct=right(s))
        for m, s in (("fimaq", 0.9), ("rtn", 0.5), ("qdrop", 0.89))
    )
    result = run(a, b)
    assert result.exit_code == 0
    assert "top1: A is better by " in result.stdout
    assert "B is better by " in run(b, a).stdout
    text = run(a, near).stdout
    assert "no difference shown" in text
    table = json.loads(run(a, b, "--json").stdout)["pairs"][0]["metrics"][0]
    mine, theirs = right(0.9), right(0.5)
    assert table["test"] == "McNemar"
    assert table["effect"]["only_a"] == (mine & ~theirs).sum()
    assert table["difference"] == pytest.approx(100 * (mine.mean() - theirs.mean()))
    assert table["better"] == "A"


def test_the_order_of_samples_does_not_matter(tmp_path: Path):
    correct, order = right(0.7), np.random.default_rng(9).permutation(200)
    a = save(tmp_path, "fimaq", correct=correct)
    b = save(
        tmp_path,
        "qdrop",
        outcomes_content={"sample": IDS[order], "correct": correct[order]},
        metrics={"top1": Metric(value=100 * float(correct.mean()), stderr=1.0)},
    )
    found = json.loads(run(a, b, "--json").stdout)["pairs"][0]["metrics"][0]
    assert (found["effect"]["only_a"], found["effect"]["only_b"], found["p"]) == (0, 0, 1)


def test_several_seeds_are_averaged_and_bootstrapped(tmp_path: Path):
    correct = {
        (m, s): right(share, s) for m, share in (("fimaq", 0.8), ("qdrop", 0.7)) for s in (1, 2)
    }
    for (method, seed), own in correct.items():
        save(tmp_path, method, seed, own)
    pairs = pair_up(
        read_side(tmp_path / "demo_vit" / "fimaq"), read_side(tmp_path / "demo_vit" / "qdrop")
    )
    (compared,) = compare_pairs(pairs, 0.95)
    (found,) = compared.metrics
    gaps = 100 * np.mean(
        [correct["fimaq", s].astype(float) - correct["qdrop", s] for s in (1, 2)], axis=0
    )
    assert found.test == "bootstrap"
    assert found.difference == pytest.approx(gaps.mean())
    assert found.se == pytest.approx(gaps.std() / np.sqrt(200), rel=0.03)


def test_holm_stands_beside_p_where_there_are_several_pairs_and_decides(tmp_path: Path):
    # One pair that differs just so, among others that do not.
    base = right(0.6)
    for number in range(6):
        other = base.copy()
        if number == 0:
            other[np.flatnonzero(~base)[:7]] = True
            other[np.flatnonzero(base)[0]] = False
        else:
            other[np.flatnonzero(base)[number]] = False
            other[np.flatnonzero(~base)[number]] = True
        save(tmp_path / "a", "fimaq", correct=other, model=f"m{number}")
        save(tmp_path / "b", "qdrop", correct=base, model=f"m{number}")
    alone = run(tmp_path / "a" / "m0", tmp_path / "b" / "m0").stdout
    assert "Holm" not in alone
    found = json.loads(run(tmp_path / "a", tmp_path / "b", "--json").stdout)["pairs"]
    first = next(pair for pair in found if pair["label"].startswith("m0"))["metrics"][0]
    assert first["p"] == pytest.approx(2 * 9 / 2**8)
    assert first["holm"] == pytest.approx(6 * first["p"])
    assert first["better"] is None
    text = run(tmp_path / "a", tmp_path / "b", "--level", "0.9").stdout
    assert "m0 w3a3, top1: no difference shown among so many pairs (A ahead by 3.00 points" in text
    assert (
        "top1: A is better by 3.00 points"
        in run(tmp_path / "a" / "m0", tmp_path / "b" / "m0", "--level", "0.9").stdout
    )


def retrieval(
    root: Path, method: str, i2t: np.ndarray, t2i: np.ndarray, image_of: np.ndarray
) -> Path:
    n, m = len(i2t), len(t2i)
    rank = np.concatenate([i2t, t2i])
    content = {
        "sample": np.array([f"image:{i}" for i in range(n)] + [f"caption:{i}" for i in range(m)]),
        "direction": np.repeat(np.array([0, 1], dtype=np.int8), [n, m]),
        "rank": rank,
        "correct": rank < 1,
        "weight": np.repeat([(n + m) / (2 * n), (n + m) / (2 * m)], [n, m]).astype(np.float32),
        "cluster": np.concatenate([np.arange(n), image_of]).astype(np.int32),
    }
    value = 50 * ((i2t < 1).mean() + (t2i < 1).mean())
    return save(
        root,
        method,
        outcomes_content=content,
        n=n,
        task="retrieval",
        dataset=fakes.SCENES,
        metrics={"R@1": Metric(value=float(value), stderr=1.0)},
    )


def test_recalls_of_both_directions_are_compared_by_images(tmp_path: Path):
    rng = np.random.default_rng(5)
    image_of = np.sort(np.concatenate([np.arange(80), rng.integers(0, 80, 120)]))
    ranks = {
        m: (rng.integers(0, top, 80), rng.integers(0, top, 200))
        for m, top in (("fimaq", 8), ("rtn", 20))
    }
    a, b = (retrieval(tmp_path, method, *own, image_of) for method, own in ranks.items())
    result = run(a, b, "--json")
    assert result.exit_code == 0, result.output
    found = {item["metric"]: item for item in json.loads(result.stdout)["pairs"][0]["metrics"]}
    assert list(found) == [
        "R@1",
        "R@5",
        "R@10",
        "mean_recall",
        *(f"{side}_R@{k}" for side in ("i2t", "t2i") for k in (1, 5, 10)),
    ]
    for k in (1, 5, 10):
        sides = [
            100 * ((ranks["fimaq"][side] < k).mean() - (ranks["rtn"][side] < k).mean())
            for side in (0, 1)
        ]
        assert found[f"i2t_R@{k}"]["difference"] == pytest.approx(sides[0])
        assert found[f"t2i_R@{k}"]["difference"] == pytest.approx(sides[1])
        assert found[f"R@{k}"]["difference"] == pytest.approx(np.mean(sides))
    assert {item["test"] for item in found.values()} == {"bootstrap"}
    assert (found["R@1"]["samples"], found["R@1"]["clusters"], found["t2i_R@1"]["samples"]) == (
        280,
        80,
        200,
    )
    assert "280 (80 images)" in run(a, b).stdout
    assert list(
        json.loads(run(a, b, "--json", "--metric", "R@5,t2i_R@1").stdout)["pairs"][0]["metrics"][0][
            "metric"
        ]
    ) == list("R@5")
    missing = run(a, b, "--metric", "R@7")
    assert (missing.exit_code, "Did you mean" in missing.stderr) == (2, True)


def test_fidelity_is_compared_if_it_is_asked_for(tmp_path: Path):
    values = {name: np.random.default_rng(i).exponential(1 + i, 200) for i, name in enumerate("ab")}
    folders = []
    for name, kl in values.items():
        chosen = right(0.7)
        folders.append(
            save(
                tmp_path / name,
                "fimaq",
                outcomes_content={"sample": IDS, "correct": chosen, "kl": kl.astype(np.float32)},
                metrics={"top1": Metric(value=100 * float(chosen.mean()), stderr=1.0)},
                fidelity={"kl": SignedMetric(value=float(kl.mean()), stderr=0.1)},
            )
        )
    assert "kl" not in run(*folders).stdout
    found = json.loads(run(*folders, "--json", "--metric", "kl").stdout)["pairs"][0]["metrics"][0]
    assert found["difference"] == pytest.approx(values["a"].mean() - values["b"].mean(), abs=1e-4)
    text = run(*folders, "--metric", "kl").stdout
    assert "kl: A is better by" in text  # lower is better
    assert "nats [" in text
    assert f"{found['difference']:+.3g}" in text


def test_average_precisions_are_compared_by_what_images_contribute(tmp_path: Path):
    rng = np.random.default_rng(6)
    scene = rng.normal(0.5, 0.4, 150)
    folders, shares = [], {}
    for method, shift in (("fimaq", 0.05), ("rtn", 0.0)):
        shares[method] = own = {
            "AP_box": scene + shift + rng.normal(0, 0.1, 150),
            "AP_mask": scene + rng.normal(0, 0.1, 150),
        }
        content = {
            "sample": np.array([str(i) for i in range(150)]),
            "objects": np.ones(150, dtype=np.int32),
            **own,
        }
        metrics = {
            name: Metric(value=100 * float(values.mean()), stderr=1.0)
            for name, values in own.items()
        }
        folders.append(
            save(
                tmp_path,
                method,
                outcomes_content=content,
                task="detection",
                dataset=fakes.OBJECTS,
                metrics=metrics,
                fp_metrics={},
            )
        )
    found = {
        item["metric"]: item
        for item in json.loads(run(*folders, "--json").stdout)["pairs"][0]["metrics"]
    }
    assert list(found) == ["AP_box", "AP_mask"]
    gaps = 100 * (shares["fimaq"]["AP_box"] - shares["rtn"]["AP_box"])
    assert found["AP_box"]["difference"] == pytest.approx(gaps.mean())
    assert found["AP_box"]["se"] == pytest.approx(gaps.std() / np.sqrt(150), rel=0.03)
    assert found["AP_box"]["better"] == "A"
    # Paired: what scenes have in common does not count.
    assert found["AP_box"]["se"] < 0.5 * 100 * scene.std() / np.sqrt(150)


def test_outcomes_that_were_swapped_are_refused(tmp_path: Path):
    a, b = save(tmp_path, "fimaq", outcomes_sha256="0" * 64), save(tmp_path, "qdrop")
    result = run(a, b)
    assert (result.exit_code, "does not belong to the record beside it" in result.stderr) == (
        2,
        True,
    )
