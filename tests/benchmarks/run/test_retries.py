"""Cells that fail: grids with real processes, and the rules of attempts and of the queue."""

import json
from dataclasses import replace
from pathlib import Path

import benchmark_fakes as fakes
import engine_fakes
import pytest
from benchmark_fakes import small_grid
from click.testing import CliRunner, Result

from benchmarks.cli import cli
from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.run.executor import Failed, Kind
from benchmarks.run.order import CellQueue
from benchmarks.run.runner import Attempts
from fimaq_core.progress import Progress
from tasks.common.record import read_record, write_record
from tasks.common.request import CellRequest

pytestmark = pytest.mark.slow


def run(tmp_path: Path, plan: dict[str, list[str]], *args: str) -> Result:
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = ["run", "--profile", small_grid(tmp_path), "--results", str(tmp_path)]
    return CliRunner().invoke(cli, [*command, "--jobs", "2", *args], obj=engine_fakes.ADAPTER)


def test_a_grid_finishes_whatever_happens_to_its_processes(tmp_path: Path):
    plan = {
        "demo_vit fp": ["kill"],
        "demo_vit rtn w3a3": ["kill", "kill"],
        "demo_vit fimaq w3a3": ["error"],
        "demo_swin rtn w3a3": ["further kill"] * 4,
    }
    result = run(tmp_path, plan)
    assert result.exit_code == 0, result.output
    assert "[6/6]" in result.output
    assert [engine_fakes.tries(tmp_path, name) for name in plan] == [2, 3, 2, 5]
    assert engine_fakes.tries(tmp_path, "demo_swin fimaq w3a3") == 1
    assert not (tmp_path / "runs/.logs").exists() or not list((tmp_path / "runs/.logs").iterdir())


def test_cells_that_always_fail_are_listed_and_the_others_are_measured(tmp_path: Path):
    plan = {
        "demo_vit rtn w3a3": ["further kill"] + ["kill"] * 9,
        "demo_vit fimaq w3a3": ["error"] * 9,
    }
    result = run(tmp_path, plan)
    assert result.exit_code == 1
    assert "2 of 6 cells failed" in result.output
    assert "try fewer jobs), 3 times without progress (details: " in result.output
    assert "ValueError: it broke (details: " in result.output
    assert [engine_fakes.tries(tmp_path, name) for name in plan] == [4, 2]
    assert len(list(tmp_path.rglob("result.json"))) == 4


def test_without_retries_nothing_is_tried_again(tmp_path: Path):
    plan = {"demo_vit rtn w3a3": ["kill"], "demo_vit fimaq w3a3": ["error"]}
    result = run(tmp_path, plan, "--retries", "0")
    assert "2 of 6 cells failed" in result.output
    assert [engine_fakes.tries(tmp_path, name) for name in plan] == [1, 1]


def test_cells_without_memory_are_tried_again_with_smaller_batches(tmp_path: Path):
    result = run(tmp_path, {"demo_vit fimaq w3a3": ["memory", "memory"]})
    assert result.exit_code == 0, result.output
    batches = [
        words[-2]
        for words in engine_fakes.attempts(tmp_path)
        if words[2:5] == ["demo_vit", "fimaq", "w3a3"]
    ]
    assert batches == ["32", "16", "8"]


def test_a_cell_with_a_damaged_record_is_left_alone_until_it_is_forced(tmp_path: Path):
    (cell,) = [cell for cell in expand_small(tmp_path) if cell.label == "demo_vit rtn w3a3 seed 1"]
    path = fakes.planned_folder(cell.request) / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"schema_version": 1')
    result = run(tmp_path, {})
    assert result.exit_code == 2
    assert "1 of 6 cells were not measured, since their records cannot be read" in result.stderr
    assert f"warning: Not shown: {cell.label}, whose record cannot be used." in result.stderr
    assert "is damaged" in result.stderr
    assert "delete it to measure that cell again" in result.stderr
    assert path.read_text() == '{"schema_version": 1'
    assert engine_fakes.tries(tmp_path, "demo_vit rtn w3a3") == 0
    again = run(tmp_path, {})
    assert again.exit_code == 2
    assert "All 6 cells" not in again.output
    assert len(engine_fakes.attempts(tmp_path)) == 5
    forced = run(tmp_path, {}, "--force")
    assert (forced.exit_code, "cannot be" in forced.output) == (0, False)
    assert read_record(path).method == "rtn"


def expand_small(tmp_path: Path) -> list[Cell]:
    from benchmarks.grid.schema import load_grid

    return expand(load_grid(small_grid(tmp_path)), Filters(), RunOptions(tmp_path))


def test_cells_that_others_measure_are_put_aside_and_done_last(tmp_path: Path):
    """Both cells are free when the runner looks at them again."""
    result = run(tmp_path, {"demo_vit fp": ["busy"], "demo_vit rtn w3a3": ["busy"]}, "--jobs", "1")
    assert result.exit_code == 0, result.output
    order = [" ".join(words[2:-2]) for words in engine_fakes.attempts(tmp_path)]
    assert order[0] == "demo_vit fp"
    assert (
        order.index("demo_swin fimaq w3a3")
        < order.index("demo_vit fp", 1)
        < order.index("demo_vit rtn w3a3")
    )
    assert order[-1] == "demo_vit rtn w3a3"
    assert "FAILED" not in result.output


def measured_by_another(request: CellRequest, report: object) -> Path:
    """Measure a cell. During the full-precision cell, another runner writes a record."""
    path = engine_fakes.run_cell(request, lambda _: None)
    if request.recipe is None:
        for cell in expand_small(request.results.parent):
            if cell.label == "demo_vit rtn w3a3 seed 1":
                write_record(
                    fakes.record_of(cell.request, 77.0), fakes.planned_folder(cell.request)
                )
    return path


def test_a_cell_that_another_measured_meanwhile_is_not_measured_again(tmp_path: Path):
    adapter = replace(engine_fakes.ADAPTER, run_cell=measured_by_another)
    command = ["run", "--profile", small_grid(tmp_path), "--models", "demo_vit"]
    result = CliRunner().invoke(cli, [*command, "--results", str(tmp_path)], obj=adapter)
    assert result.exit_code == 0, result.output
    assert "demo_vit rtn w3a3 seed 1: measured elsewhere: top1 77.0" in result.output
    assert engine_fakes.tries(tmp_path, "demo_vit rtn w3a3") == 0


def attempts(cell: Cell, retries: int = 3, **changes: object) -> Attempts:
    return Attempts(cell, retries, replace(cell.request, **changes))


def after(rules: Attempts, kind: Kind, *places: Progress) -> tuple[bool, str]:
    rules.begin()
    for place in places:
        rules.note(place)
    return rules.after(Failed(kind, "the words", None))


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    return expand_small(tmp_path)[-1]


def test_memory_is_saved_in_steps_that_change_no_result(cell: Cell):
    rules = attempts(cell, device="cuda", eval_batch=4)
    step = Progress("reconstruct", 3, 9, "block 1", 0.5)
    assert after(rules, "memory", step)[0]
    assert (rules.request.placement, rules.request.eval_batch) == ("host", 4)
    for batch in (2, 1):
        assert after(rules, "memory", Progress("calibrate", 0, 1))[0]
        assert rules.request.eval_batch == batch
    assert rules.request.notes == (
        "memory ran out: inputs and outputs of blocks are kept in host memory",
        "memory ran out: the batch of forward passes is reduced to 2",
        "memory ran out: the batch of forward passes is reduced to 1",
    )
    again, message = after(rules, "memory", Progress("calibrate", 0, 1))
    assert not again
    assert "even for one image" in message
    assert rules.request.recipe == cell.request.recipe


def test_a_fisher_pass_between_steps_takes_fewer_images_at_a_time(cell: Cell):
    rules = attempts(cell, eval_batch=8)
    events = [Progress("reconstruct", 3, 9, "a", 0.5), Progress("Fisher pass", 3, 9, "a")]
    assert after(rules, "memory", *events)[0]
    assert rules.request.eval_batch == 4


def test_the_batch_of_a_recipe_is_never_made_smaller(cell: Cell):
    rules = attempts(cell, device="cuda", placement="host")
    places = Progress("calibrate", 0, 1), Progress("reconstruct", 3, 9, "block 1", 0.5)
    again, message = after(rules, "memory", *places)
    assert not again
    assert "in an optimisation step (reconstruct block 1)" in message
    assert "PLACEMENT=disk or --placement disk" in message
    assert "another recipe" in message
    # Before the first step of a block, its inputs and targets are computed: this batch may shrink.
    places = Progress("reconstruct", 3, 9, "block 1", 0.5), Progress("reconstruct", 9, 9, "block 2")
    assert after(attempts(cell), "memory", *places)[0]


def test_only_attempts_without_progress_count(cell: Cell):
    rules = attempts(cell, retries=2)
    first, second = (
        Progress("reconstruct", 0, 9, "block 1"),
        Progress("reconstruct", 3, 9, "block 2", 0.5),
    )
    waits = Progress("wait for process 3 on a far machine", 0, 1)
    given = [(first,), (first,), (first, second), (first, second), (first, waits)]
    assert [after(rules, "died", *places)[0] for places in given] == [True, True, True, True, False]


def test_errors_of_the_user_are_not_tried_again(cell: Cell):
    assert after(attempts(cell), "user") == (False, "the words")


def chain_cells(**changes: object) -> list[Cell]:
    return expand(
        fakes.plain_demo(**changes),
        Filters(models=("demo_vit",), bits=("w3a3",), seeds=(1,)),
        RunOptions(),
    )


def test_idle_slots_help_with_a_chain_that_is_past_its_first_cell():
    queue = CellQueue(chain_cells())
    full = queue.take("a")
    assert full is not None
    assert full.method == "fp"
    assert queue.take("b") is None
    queue.remove(full)
    first = queue.take("a")
    assert first is not None
    assert queue.take("b") is None  # the first makes what they share
    queue.remove(first)
    order = [
        cell.method
        for cell in (first, queue.take("b"), queue.take("a"), queue.take("b"))
        if cell is not None
    ]
    assert order == ["rtn", "brecq", "qdrop", "fimaq"]
    assert not queue


def test_a_chain_goes_on_where_its_first_cell_died_or_its_slot_went_away():
    queue = CellQueue([cell for cell in chain_cells() if cell.method != "fp"])
    first = queue.take("a")
    assert first is not None
    queue.put_back(first)
    assert queue.take("b") is first
    second = queue.take("a")
    assert second is not None
    queue.put_back(first)
    queue.keep_slots(["b"])
    assert queue.take("b") is first
    assert len(list(queue.waiting())) == 2
