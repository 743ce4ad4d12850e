"""Mean corruption errors against a loop, and their place in the tables."""

import benchmark_fakes as fakes
import pytest

from benchmarks.grid.cell import RunOptions
from benchmarks.grid.datasets import with_datasets
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import Grid
from benchmarks.results.scores import Collected, Measured
from benchmarks.tables.corruption import NOTE, TITLE, corruption_tables
from benchmarks.tables.write import texts

PARTS = ("fog:1", "fog:4", "snow:2")


def measured(grid: Grid) -> list[Measured]:
    """Return records of all cells with different accuracies."""
    found = []
    for cell in expand(grid, Filters(), RunOptions()):
        record = fakes.record_of(cell.request, 50.0)
        number = (len(cell.method) * 7 + sum(map(ord, cell.section)) * 3) % 50
        value, full = (
            record.metrics["top1"].model_copy(update={"value": 30.0 + shift})
            for shift in (0 if cell.method == "fp" else number, sum(map(ord, cell.section)) % 40)
        )
        value = full if cell.method == "fp" else value
        changes = {
            "metrics": {"top1": value},
            "fp_metrics": {"top1": full},
            "dataset": record.dataset.model_copy(update={"name": grid.tasks[cell.section].dataset}),
        }
        found.append(Measured(cell, record.model_copy(update=changes)))
    return found


@pytest.fixture(scope="module")
def grid() -> Grid:
    plain = fakes.plain_demo(methods=["fp", "rtn", "repq"], bits=["w4a4"], seeds=[1])
    return with_datasets(plain, ",".join(PARTS))


def test_the_mean_corruption_error_against_a_loop(grid: Grid) -> None:
    items = measured(grid)
    cells = [item.cell for item in items]
    ((name, (content, table)),) = corruption_tables(items, cells).items()
    assert name == grid.tasks["classification"].dataset
    assert content == "2 corruptions, 3 data sets"
    for model in {cell.model for cell in cells}:
        for method in ("fp", "rtn", "repq"):
            ratios = []
            for corruption in ("fog", "snow"):
                sums = [0.0, 0.0]
                for item in items:
                    _, _, text = item.cell.section.partition("-")
                    cell = item.cell.model, item.cell.method
                    if text.startswith(corruption) and cell == (model, method):
                        sums[0] += 100 - item.record.metrics["top1"].value
                        sums[1] += 100 - item.record.fp_metrics["top1"].value
                ratios.append(100 * sums[0] / sums[1])
            shown = table.loc[method, f"{model} w4a4"]
            assert float(shown) == pytest.approx(sum(ratios) / 2, abs=0.006)
    assert set(table.loc["fp"]) == {"100.00"}
    text = texts(grid, Collected(items, []), cells)["md"]
    assert text.count(TITLE) == text.count(NOTE) == 1


def test_a_model_without_all_corruptions_has_no_mean(grid: Grid) -> None:
    items = [
        item
        for item in measured(grid)
        if (item.cell.section, item.cell.method) != ("classification-snow-2", "rtn")
    ]
    ((_, table),) = corruption_tables(items, [item.cell for item in items]).values()
    assert set(table.loc["rtn"]) == {"-"}
    assert "-" not in set(table.loc["repq"])


def test_data_without_corruptions_has_no_such_table() -> None:
    items = measured(fakes.plain_demo())
    assert corruption_tables(items, [item.cell for item in items]) == {}
