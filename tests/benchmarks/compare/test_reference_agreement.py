"""Agreement with a reference: closed form, error rates, known answers, several processors."""

import math
from dataclasses import replace
from pathlib import Path

import benchmark_fakes as fakes
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from benchmarks.compare import known_answers, reference
from benchmarks.compare.agreement import ALPHA, compared, observations
from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import load_grid
from benchmarks.results import scores
from fimaq_core.errors import FimaqError
from fimaq_core.fisher.passes import mean_gradient_and_error
from fimaq_core.reconstruction import objective
from fimaq_core.reconstruction.objective import BlockObjective
from tasks.common.record import BlockFigures, Environment

GRID = fakes.plain_demo(seeds=(1,))
PROCESSORS = ("a", "b", "c", "d")


def measured_on(
    tmp_path: Path, processor: str, noise: float = 0.0, shift: float = 0.0, seed: int = 0
) -> list[scores.Measured]:
    """Cells of the grid on a processor: noise on quantized cells, and a shift of FIMA-Q's."""
    draw = np.random.default_rng([seed, *processor.encode()])
    cells = expand(GRID, Filters(), RunOptions(results=tmp_path))

    def value(cell) -> float:
        score = fakes.fake_value(cell.request)
        return (
            score
            if cell.method == "fp"
            else score + draw.normal(0, noise) + shift * (cell.method == "fimaq")
        )

    where = Environment(
        versions={"torch": "1"}, git_revision="x", device="cpu", instructions=processor, threads=1
    )
    found = []
    for cell in cells:
        record = fakes.record_of(cell.request, value(cell)).model_copy(
            update={"environment": where}
        )
        if cell.method == "fimaq":
            figures = {name: BlockFigures(error=0.1, fisher=0.01) for name in ("one", "two")}
            record = record.model_copy(
                update={"blocks": figures, "fisher_passes": {"one": 15, "two": 15}}
            )
        found.append(scores.Measured(cell, record))
    return found


def table_of(tmp_path: Path, noise: float, seed: int = 0) -> pd.DataFrame:
    return pd.concat(
        [observations(measured_on(tmp_path, name, noise, seed=seed)) for name in PROCESSORS]
    )


def test_the_statistic_is_students(tmp_path: Path) -> None:
    theirs, mine = table_of(tmp_path, 0.5), observations(measured_on(tmp_path, "new", 0.5))
    both = compared(theirs, mine)
    rows = theirs[theirs["metric"] == "top1"]
    kind = rows[rows["method"].isin(["brecq", "qdrop", "fimaq"]) & (rows["bits"] == "w3a3")]
    within = kind.groupby(["model", "method"])["value"]
    freedom = 3 * 9  # three models, three methods, four processors
    between = (within.var(ddof=1) * 3).sum() / freedom
    one = 100 / 2000
    variance = between + one**2
    freedom *= (variance / between) ** 2
    row = both[
        (both["model"] == "demo_vit") & (both["method"] == "qdrop") & (both["bits"] == "w3a3")
    ].iloc[0]
    cell = within.get_group(("demo_vit", "qdrop"))
    value = mine[
        (mine["model"] == "demo_vit") & (mine["method"] == "qdrop") & (mine["w_bit"] == 3)
    ]["value"].item()
    assert row["difference"] == pytest.approx(value - cell.mean())
    scale = math.sqrt(variance * (1 + 1 / 4))
    p = 2 * stats.t.sf(abs(row["difference"]) / scale, freedom)
    assert p <= row["p"] <= min(1, p * len(both)) * (1 + 1e-9)


def test_full_precision_may_differ_by_few_samples(tmp_path: Path) -> None:
    theirs, mine = table_of(tmp_path, 0.5), observations(measured_on(tmp_path, "new"))
    full = mine["method"] == "fp"
    for samples, off in ((2, False), (10, True)):
        changed = mine.assign(
            value=mine["value"].where(~full, mine["value"] + samples * 100 / 2000)
        )
        both = compared(theirs, changed)
        assert bool((both[both["method"] == "fp"]["p"] < ALPHA).all()) == off


@pytest.mark.parametrize(("shift", "least", "most"), [(0.0, 0, 4), (4.0, 60, 60)])
def test_intact_installations_pass_and_faulty_ones_do_not(
    tmp_path: Path, shift: float, least: int, most: int
) -> None:
    # 60 references with a new processor each: at an error of 1 % five alarms among intact ones have
    # a chance of 0.03 %.
    exact, found = observations(measured_on(tmp_path, "exact")), 0
    quantized, drawn = exact["method"] != "fp", np.random.default_rng(0)
    faulty = exact["method"] == "fimaq"
    for _ in range(60):
        *theirs, mine = (
            exact.assign(
                value=exact["value"] * np.exp(drawn.normal(0, 0.004, len(exact)) * quantized),
                processor=name,
            )
            for name in (*PROCESSORS, "new")
        )
        both = compared(
            pd.concat(theirs),
            mine.assign(value=mine["value"] + shift * (faulty & (mine["metric"] == "top1"))),
        )
        found += bool((both["p"] < ALPHA).any())
    assert least <= found <= most


def test_one_skipped_fisher_pass_is_found(tmp_path: Path) -> None:
    theirs, mine = table_of(tmp_path, 0.4), measured_on(tmp_path, "new", 0.4)
    skipped = [
        replace(
            item, record=item.record.model_copy(update={"fisher_passes": {"one": 14, "two": 15}})
        )
        if item.cell.method == "fimaq"
        and item.cell.model == "demo_vit"
        and item.cell.bits == "w3a3"
        else item
        for item in mine
    ]
    both = compared(theirs, observations(skipped))
    off = both[both["p"] < ALPHA]
    assert off["metric"].tolist() == ["fisher_passes"]
    assert off["difference"].item() == -1


def test_missing_passes_are_found(tmp_path: Path) -> None:
    theirs, mine = table_of(tmp_path, 0.4), measured_on(tmp_path, "new", 0.4)
    none = {
        "fisher_passes": {"one": 0, "two": 0},
        "blocks": {name: BlockFigures(error=0.1) for name in ("one", "two")},
    }
    without = [
        replace(item, record=item.record.model_copy(update=none))
        if item.cell.method == "fimaq"
        else item
        for item in mine
    ]
    both = compared(theirs, observations(without))
    assert set(both[both["p"] < ALPHA]["metric"]) == {"fisher_passes"}


def test_a_reference_grows_by_processors(tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    with pytest.raises(FimaqError, match="has no reference yet"):
        reference.add_processor(GRID, measured_on(tmp_path, "a"), folder)
    reference.write_reference(GRID, measured_on(tmp_path, "a", 0.4), "# T\n\nx", folder)
    for name in (*PROCESSORS[1:], "b"):  # one of them twice
        path = reference.add_processor(GRID, measured_on(tmp_path, name, 0.4), folder)
    table = reference.read_csv(path)
    assert sorted(table["processor"].unique()) == [f"cpu, {name}" for name in PROCESSORS]
    assert len(table) == 4 * len(observations(measured_on(tmp_path, "a")))
    (line,) = reference.compare(GRID, measured_on(tmp_path, "new", 0.4), folder)
    assert line.startswith("Agrees with the reference (")
    assert "4 processors in the reference" in line
    lines = reference.compare(GRID, measured_on(tmp_path, "new", 0.4, shift=-9), folder)
    assert lines[0].startswith("DIFFERS from the reference in 6 of ")
    assert all(" fimaq " in line for line in lines[1:])
    other = GRID.model_copy(update={"overrides": {**GRID.overrides, "steps": 7}})
    with pytest.raises(FimaqError, match="other settings"):
        reference.add_processor(other, measured_on(tmp_path, "e"), folder)


@pytest.mark.parametrize(
    "kind", ["round half up", "shifted zero point", "skipped pass", "unseen skipped pass"]
)
def test_known_answers_tell_changed_quantizers(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert known_answers.wrong() == []
    if kind == "round half up":
        monkeypatch.setattr(torch, "round", lambda x: torch.floor(x + 0.5))
        assert len(known_answers.wrong()) == 4
        assert (
            "-0.75, 0.25, 1.25 became -0.5, 0.5, 1.5, right is -1, 0, 1" in known_answers.wrong()[0]
        )
    elif kind == "skipped pass":
        steps = BlockObjective._fisher_steps
        monkeypatch.setattr(
            BlockObjective, "_fisher_steps", lambda self: frozenset(sorted(steps(self))[:-1])
        )
        assert known_answers.wrong() == ["  Fisher passes: [0, 3], right is [0, 3, 6]"]
    elif kind == "unseen skipped pass":
        found: list[tuple[torch.Tensor, torch.Tensor]] = []

        def stale(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
            found.append(mean_gradient_and_error(*arguments) if len(found) < 2 else found[-1])
            return found[-1]

        monkeypatch.setattr(objective, "mean_gradient_and_error", stale)
        assert (
            "  diagonal Fisher weight: [1.6667, 1.6667], right is [2.3333, 2.3333]"
            in known_answers.wrong()
        )
    else:
        clamp = torch.Tensor.clamp_
        monkeypatch.setattr(
            torch.Tensor, "clamp_", lambda x, low, high: clamp(x.add_(1), low, high).sub_(1)
        )
        assert len(known_answers.wrong()) >= 1


def test_the_quickstarts_cells_are_the_demos(tmp_path: Path) -> None:
    options = RunOptions(results=tmp_path)
    quick = expand(load_grid("quickstart"), Filters(), options)
    demo = {cell.key: cell for cell in expand(load_grid("demo"), Filters(), options)}
    simulated = [cell for cell in quick if not cell.request.export]
    assert (len(quick), len(simulated)) == (15, 12)
    assert [demo[cell.key] for cell in simulated] == simulated
