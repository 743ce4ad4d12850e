"""Orders known from the literature: judged with numbers if the methods are measured."""

from dataclasses import replace

import benchmark_fakes as fakes
import numpy as np
import pytest

from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import parse_grid
from benchmarks.results.scores import Measured, scores
from benchmarks.tables.expected_orders import order_lines
from fimaq_core.recipe import METHODS

CALIBRATION = "Calibration alone below every reconstruction at"
ROUNDING = "No method below rtn at w4a4 by more than two paired standard errors"
N = 400


@pytest.fixture(autouse=True)
def _methods(monkeypatch: pytest.MonkeyPatch):
    """Methods that need only be there, not do anything."""
    for name in ("repq", "aphq"):
        monkeypatch.setitem(METHODS, name, {"reconstruct": name == "aphq"})


def measure(
    tmp_path,
    scores: dict[str, float],
    bits=("w4a4", "w3a3"),
    with_outcomes: bool = True,
    keep=lambda cell: True,
):
    """Records with these ``scores``, 10 points less at 3 bits; the first samples are right."""
    grid = parse_grid(
        {
            "name": "t",
            "tasks": {"classification": {"dataset": "d", "models": ["a", "b"]}},
            "methods": list(scores),
            "bits": list(bits),
            "seeds": [1, 2],
            "variant": "x",
        }
    )
    cells = [cell for cell in expand(grid, Filters(), RunOptions(results=tmp_path)) if keep(cell)]

    def value(cell) -> float:
        return scores[cell.method] - (10 if cell.bits == "w3a3" else 0)

    def correct(cell):
        return np.arange(N) < value(cell) * N / 100

    return fakes.write_cells(cells, value, correct if with_outcomes else None)


def lines(measured: list[Measured], start: str) -> list[str]:
    return [line for line in order_lines(scores(measured), measured) if line.startswith(start)]


def test_calibration_alone_is_set_against_reconstruction_at_the_lowest_bits(tmp_path):
    (line,) = lines(
        measure(tmp_path, {"rtn": 60.0, "repq": 70.0, "qdrop": 75.0, "aphq": 80.0}), CALIBRATION
    )
    assert line == (
        f"{CALIBRATION} w3a3 (mean over models): yes: best of rtn, repq: repq 60.00; "
        "worst of qdrop, aphq: qdrop 65.00 (2 models)."
    )


def test_calibration_above_a_reconstruction_is_said(tmp_path):
    (line,) = lines(measure(tmp_path, {"repq": 76.0, "qdrop": 75.0, "aphq": 80.0}), CALIBRATION)
    assert "NO: best of repq: repq 66.00; worst of qdrop, aphq: qdrop 65.00" in line


def test_only_models_with_all_methods_are_averaged(tmp_path):
    scores = {"repq": 70.0, "qdrop": 75.0}
    (line,) = lines(
        measure(tmp_path, scores, keep=lambda cell: cell.model == "a" or cell.method == "repq"),
        CALIBRATION,
    )
    assert "(1 model)" in line
    apart = measure(
        tmp_path / "apart", scores, keep=lambda cell: (cell.model == "a") == (cell.method == "repq")
    )
    (line,) = lines(apart, CALIBRATION)
    assert line.endswith("not judged, since no model has all of repq, qdrop.")


@pytest.mark.parametrize(
    "scores", [{"rtn": 60.0, "repq": 70.0}, {"qdrop": 75.0, "fimaq": 80.0}, {"fimaq": 80.0}]
)
def test_an_order_without_its_methods_is_left_out(tmp_path, scores: dict[str, float]):
    assert lines(measure(tmp_path, scores), CALIBRATION) == []


def test_the_order_of_fimaq_is_left_out_where_only_one_of_its_methods_is_measured(tmp_path):
    assert lines(measure(tmp_path / "one", {"fimaq": 80.0, "aphq": 70.0}), "Expected order") == []
    assert (
        len(lines(measure(tmp_path / "two", {"fimaq": 80.0, "qdrop": 70.0}), "Expected order")) == 1
    )


def test_methods_not_below_rounding_name_the_lowest(tmp_path):
    (line,) = lines(measure(tmp_path, {"rtn": 80.0, "repq": 79.75, "qdrop": 85.0}), ROUNDING)
    # One sample of 400 is lost on each model: its standard error, 100/n, equals the difference.
    assert (
        line == f"{ROUNDING}, on any model: yes: lowest is repq on a -0.25 ± 0.25 points "
        "(4 comparisons)."
    )


def test_methods_below_rounding_are_all_named(tmp_path):
    (line,) = lines(measure(tmp_path, {"rtn": 80.0, "repq": 70.0, "qdrop": 85.0}), ROUNDING)
    lost, n = 40, N
    se = 100 * np.sqrt((lost - lost**2 / n) / (n - 1) / n)
    assert (
        f"NO: repq on a -10.00 ± {se:.2f}, repq on b -10.00 ± {se:.2f} points (4 comparisons)."
        in line
    )


def test_rounding_is_not_judged_without_outcomes_or_bits_or_rtn(tmp_path):
    scores = {"rtn": 80.0, "repq": 70.0}
    (line,) = lines(measure(tmp_path / "a", scores, with_outcomes=False), ROUNDING)
    assert line.endswith(": not judged (outcomes missing: repq on a, repq on b).")
    assert lines(measure(tmp_path / "b", scores, bits=("w3a3",)), ROUNDING) == []
    assert lines(measure(tmp_path / "c", {"repq": 70.0, "qdrop": 80.0}), ROUNDING) == []


def test_comparisons_without_outcomes_are_counted(tmp_path):
    measured = measure(tmp_path, {"rtn": 80.0, "repq": 90.0})
    for item in measured:
        if item.cell.model == "b":
            assert item.folder is not None
            (item.folder / "outcomes.npz").unlink()
    (line,) = lines(measured, ROUNDING)
    assert line.endswith("(1 comparison; not compared: outcomes missing: repq on b).")


def test_the_reason_why_outcomes_are_not_used_is_that_of_each_file(tmp_path):
    measured = measure(tmp_path, {"rtn": 80.0, "repq": 90.0, "qdrop": 85.0}, ("w4a4",))
    folders = {(it.cell.model, it.cell.method, it.cell.seed): it.folder for it in measured}
    files = {key: folder / "outcomes.npz" for key, folder in folders.items()}
    for seed in (1, 2):  # swapped, missing, cut
        swapped = files["a", "repq", seed], files["a", "qdrop", seed]
        contents = [path.read_bytes() for path in swapped]
        for path, content in zip(swapped, reversed(contents), strict=True):
            path.write_bytes(content)
        files["b", "repq", seed].unlink()
    cut = files["b", "qdrop", 2]
    cut.write_bytes(cut.read_bytes()[:100])
    (line,) = lines(measured, ROUNDING)
    assert line.endswith(
        "(1 comparison; not compared: outcomes of another record: repq on a, qdrop on a; "
        "outcomes missing: repq on b; outcomes damaged for some seeds: qdrop on b)."
    )


def test_a_model_whose_records_are_unlike_is_left_out_by_name(tmp_path):
    measured = measure(tmp_path, {"rtn": 60.0, "repq": 70.0, "qdrop": 75.0, "aphq": 80.0})
    odd = next(
        place
        for place, item in enumerate(measured)
        if (item.cell.model, item.cell.method) == ("b", "aphq")
    )
    for change, words in (
        ({"dataset": fakes.DIGITS.model_copy(update={"fingerprint": "e" * 64})}, "data ("),
        ({"weights": fakes.make_record(model="b").weights.model_copy(
            update={"sha256": "a" * 64})}, "weights (b 000000000000; b aaaaaaaaaaaa)"),
    ):  # fmt: skip
        item = measured[odd]
        strange = replace(item, record=item.record.model_copy(update=change))
        mixed = [*measured[:odd], strange, *measured[odd + 1 :]]
        (line,) = lines(mixed, "Expected orders leave out b: its records differ in ")
        assert words in line
        (line,) = lines(mixed, CALIBRATION)
        assert "(1 model)" in line
        only = [item for item in mixed if item.cell.model == "b"]
        assert [line[:26] for line in order_lines(scores(only), only)] == [
            "Expected orders leave out "
        ]
