"""Plans: order, costs and finished work of cells, in terminals of several sizes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_fakes as fakes
import pytest

from benchmarks.compare.reference import write_reference
from benchmarks.console import duration
from benchmarks.costs.estimate import expected_cost
from benchmarks.costs.sources import cost_row, costs_path, costs_text, read_costs
from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import Grid, load_grid
from benchmarks.published.table import load_table
from benchmarks.run.options import RunRequest
from benchmarks.run.order import make_chains
from benchmarks.run.plan import make_plan
from fimaq_core.errors import FimaqError
from tasks.common.record import Environment, write_record
from tasks.common.request import CellRequest

HERE = Environment(versions={}, git_revision="x", device="cpu Here", threads=2)


def plan(
    grid: Grid,
    tmp_path: Path,
    filters: Filters = Filters(),
    jobs: int = 1,
    width: int | None = None,
    **more: Any,
) -> str:
    adapter, options = replace(fakes.ADAPTER, **more), RunOptions(results=tmp_path, jobs=jobs)
    request = RunRequest(grid, filters, options, adapter)
    return make_plan(request, width=width, reference=tmp_path / "reference").text


def cells_of(grid: Grid, tmp_path: Path) -> dict[str, Cell]:
    return {cell.label: cell for cell in expand(grid, Filters(), RunOptions(results=tmp_path))}


def measure(
    cell: Cell, seconds: float, memory: int = 10**9, environment: Environment = HERE
) -> None:
    record = fakes.record_of(cell.request, 50.0).model_copy(
        update={
            "seconds": {"a": seconds / 4, "b": 3 * seconds / 4},
            "peak_memory_bytes": memory,
            "environment": environment,
        }
    )
    write_record(record, fakes.planned_folder(cell.request))


def rows(text: str) -> list[dict[str, str]]:
    """The table's rows; its columns are as wide as the rules below their names."""
    lines = text.split("\n")
    rule = next(index for index, line in enumerate(lines) if line.startswith("--"))
    ends: list[tuple[int, int]] = []
    start = 0
    for part in lines[rule].split("  "):
        ends.append((start, start + len(part)))
        start += len(part) + 2
    names = [lines[rule - 1][a:b].strip() for a, b in ends]
    body = lines[rule + 1 : lines.index("", rule)]
    return [dict(zip(names, (line[a:b].strip() for a, b in ends), strict=True)) for line in body]


def row(text: str, **wanted: str) -> dict[str, str]:
    (found,) = [
        item for item in rows(text) if all(item[name] == value for name, value in wanted.items())
    ]
    return found


def test_cells_are_numbered_as_they_start(tmp_path: Path):
    grid = fakes.plain_demo()
    cells = cells_of(grid, tmp_path)
    measure(cells["demo_vit fp"], 1.0)
    found = rows(plan(grid, tmp_path))
    wanted = [
        cell
        for chain in make_chains([c for c in cells.values() if c.label != "demo_vit fp"])
        for cell in chain
    ]
    numbered = sorted((item for item in found if item["#"] != "-"), key=lambda item: int(item["#"]))
    assert [(i["model"], i["method"], i["bits"], i["seed"]) for i in numbered] == [
        (cell.model, cell.method, cell.bits, "-" if cell.seed is None else str(cell.seed))
        for cell in wanted
    ]
    assert [item["method"] for item in found if item["#"] == "-"] == ["fp"]


def test_costs_are_measured_or_estimated_from_cells_of_the_method(tmp_path: Path):
    grid = fakes.plain_demo(bits=("w3a3",), seeds=(1, 2))
    cells = cells_of(grid, tmp_path)
    measure(cells["demo_vit fp"], 8.0, 10**9)
    measure(cells["demo_vit rtn w3a3 seed 1"], 4.0, 2 * 10**9)
    measure(cells["demo_vit fimaq w3a3 seed 1"], 600.0, 3 * 10**9)
    text = plan(grid, tmp_path, jobs=2)
    assert row(text, model="demo_vit", method="fimaq", seed="1") | {
        "time": "10 min",
        "memory": "3.0 GB",
        "done": "yes",
    } == row(text, model="demo_vit", method="fimaq", seed="1")
    other = row(text, model="demo_swin", method="fimaq", seed="2")
    assert (other["time"], other["memory"], other["done"]) == ("~10 min", "~3.0 GB", "no")
    # Nothing of their method is measured, but they too reconstruct blocks, without Fisher passes.
    qdrop, fimaq = (cells[f"demo_deit {name} w3a3 seed 1"] for name in ("qdrop", "fimaq"))
    seconds = 600 * expected_cost(qdrop) / expected_cost(fimaq)
    time = row(text, model="demo_deit", method="qdrop", seed="1")["time"]
    assert time == f"~{duration(seconds)}"
    assert "    24  from finished cells, cpu Here, 2 threads" in text
    # full precision of two models, and chains of a model and seed with 4 cells, one of them begun
    work = 2 * 8 + 5 * 4 + 5 * 600 + 12 * seconds
    time = f"CPU time: about {duration(work / 2)} with --jobs 2 ({duration(work)} of work)."
    assert f"{time} Largest memory of a cell: 3.0 GB." in text
    # The longest of 6 chains, on many processes.
    longest = f"CPU time: about {duration(4 + 600 + 2 * seconds)} with --jobs 9"
    assert longest in plan(grid, tmp_path, jobs=9)


def test_what_was_never_measured_has_no_costs(tmp_path: Path):
    grid = fakes.plain_demo(methods=("fp", "rtn", "fimaq"))
    text = plan(grid, tmp_path)
    assert "time" not in rows(text)[0]
    assert "27 cells are not in these times: nothing similar was measured or published." in text
    measure(cells_of(grid, tmp_path)["demo_vit fp"], 5.0)
    text = plan(grid, tmp_path)
    assert {item["time"] for item in rows(text) if item["method"] == "fimaq"} == {"-"}
    assert "24 cells are not in these times: nothing similar was measured or published." in text


def test_costs_come_from_the_reference_where_nothing_here_tells(tmp_path: Path):
    grid = fakes.plain_demo(bits=("w3a3",), seeds=(1,))
    elsewhere = tmp_path / "elsewhere"
    other = Environment(versions={}, git_revision="x", device="cpu There", threads=1)
    theirs = list(cells_of(grid, elsewhere).values())
    for number, cell in enumerate(theirs):
        measure(cell, 100.0 + number, (number + 1) * 10**8, other)
    from benchmarks.results.scores import collect

    files = write_reference(
        grid, collect(theirs, fakes.ADAPTER).measured, "# Title\n\nbody", tmp_path / "reference"
    )
    assert costs_path("demo", tmp_path / "reference") in files
    kept = read_costs(costs_path("demo", tmp_path / "reference"))
    assert [(r.model, r.method, r.seconds, r.device, r.threads) for r in kept[:2]] == [
        ("demo_vit", "fp", 100.0, "cpu There", 1),
        ("demo_vit", "rtn", 101.0, "cpu There", 1),
    ]

    text = plan(grid, tmp_path)
    assert row(text, model="demo_vit", method="rtn")["time"] == "~2 min"
    assert row(text, model="demo_vit", method="fp")["memory"] == "~100.0 MB"
    assert "    15  from the reference, cpu There, 1 thread" in text
    # bits that the reference does not have: as its method took there
    wider = plan(grid, tmp_path, Filters(bits=("w4a4",), methods=("rtn",)))
    assert {item["time"] for item in rows(wider)} == {"~2 min"}
    # what is measured here says more
    measure(cells_of(grid, tmp_path)["demo_deit rtn w3a3 seed 1"], 7.0)
    text = plan(grid, tmp_path)
    assert row(text, model="demo_vit", method="rtn")["time"] == "~7 s"
    assert row(text, model="demo_vit", method="fimaq")["time"] == "~2 min"
    assert "     2  from finished cells, cpu Here, 2 threads" in text
    # and is found where the filter leaves it out
    assert {
        item["time"]
        for item in rows(plan(grid, tmp_path, Filters(models=("demo_vit",), methods=("rtn",))))
    } == {"~7 s"}


def test_costs_survive_their_file(tmp_path: Path):
    cells = expand(load_grid("demo"), Filters(), RunOptions(results=tmp_path))
    found = [
        cost_row(cell, fakes.record_of(cell.request, 50.0))
        for cell in (cells[0], cells[1], cells[-1])
    ]
    path = tmp_path / "x.costs.csv"
    path.write_text(costs_text(found))
    assert read_costs(path) == found
    assert read_costs(tmp_path / "none.csv") == []


@pytest.mark.parametrize(
    "content",
    [
        b"section,model\na,b\n",
        b"\xff\xfe\x00",
        b'section\n"x',
        costs_text([]).encode() + b"a,b,,fp,fp,,,nan,1,cpu,1\n",
        costs_text([]).encode() + b"a,b,,fp,fp,,,1,1,cpu,1,more\n",
    ],
    ids=range(5),
)
def test_damaged_reference_costs_are_one_line_and_the_plan_goes_on(tmp_path: Path, content: bytes):
    path = costs_path("demo", tmp_path / "reference")
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(FimaqError, match="reference costs"):
        read_costs(path)
    lines = plan(fakes.plain_demo(), tmp_path).split("\n")
    assert lines[-1].startswith("warning: ")
    assert "reference costs" in lines[-1]
    assert "51 cells, 0 done, 51 to run." in lines


def test_what_is_there_of_unfinished_cells_is_listed(tmp_path: Path):
    def cached(request: CellRequest, folder: Path) -> list[str]:
        assert folder == fakes.planned_folder(request)
        return (
            ["blocks 3", "calibration"]
            if request.recipe is not None and request.recipe.method == "fimaq"
            else []
        )

    grid = fakes.plain_demo(seeds=(1,), bits=("w3a3",))
    measure(cells_of(grid, tmp_path)["demo_vit fimaq w3a3 seed 1"], 5.0)
    text = plan(grid, tmp_path, cached=cached)
    assert [item["cached"] for item in rows(text) if item["model"] == "demo_vit"] == ["-"] * 5
    assert row(text, model="demo_swin", method="fimaq")["cached"] == "blocks 3, calibration"


def test_cells_whose_identity_is_not_known_are_planned_all_the_same(tmp_path: Path):
    def unknown(request: CellRequest) -> Path:
        raise FimaqError("no weights")

    text = plan(fakes.plain_demo(), tmp_path, planned_folder=unknown)
    assert {item["done"] for item in rows(text)} == {"no"}
    assert "51 cells, 0 done, 51 to run." in text


def test_the_real_adapter_knows_what_is_there(tmp_path: Path):
    filters = Filters(("classification",), ("demo_vit",), ("fimaq",), ("w3a3",))
    request = RunRequest(load_grid("demo"), filters, RunOptions(tmp_path))
    cell = request.cells()[0]
    blocks = request.adapter.planned_folder(cell.request) / "blocks"
    blocks.mkdir(parents=True)
    (blocks / "block-000.safetensors").touch()
    assert rows(make_plan(request).text)[0]["cached"] == "blocks 1"


@pytest.mark.parametrize("width", [40, 80, 120, 200, None])
@pytest.mark.parametrize("profile", ["demo", "paper-ablation"])
def test_plans_fit_their_terminal_and_say_which_cell_is_meant(
    tmp_path: Path, profile: str, width: int | None
):
    grid = load_grid(profile)
    cells = expand(grid, Filters(), RunOptions(results=tmp_path))
    measure(cells[0], 3.0)
    text = plan(grid, tmp_path, jobs=4, width=width)
    table = rows(text)
    assert len(table) == len(cells)
    start = text.split("\n").index(next(line for line in text.split("\n") if line.startswith("--")))
    if width in (None, 80, 120, 200):
        assert width is None or all(
            len(line) <= width for line in text.split("\n")[start - 1 : start + len(cells) + 1]
        )
    assert all({"model", "method", "bits"} <= set(item) for item in table)
    if width is None:
        assert {"images", "batch", "transform", "done"} <= set(table[0])
        assert "task" in table[0] or "All cells: task" in text
        assert "Not shown" not in text
    if width == 40:
        assert "Not shown for lack of width: " in text


def test_columns_that_are_alike_are_said_once_before_any_is_left_out(tmp_path: Path):
    grid = load_grid("paper")
    filters = Filters(models=("vit_small",), tasks=("classification",))
    text = plan(grid, tmp_path, filters, width=100)
    first = text.split("\n")[0]
    assert first.startswith("All cells: ")
    assert "task classification" in first


def test_published_minutes_and_two_kinds_of_device(tmp_path: Path):
    grid = load_table("fimaq").grid()
    text = plan(grid, tmp_path, jobs=2)
    # two bits: 2 x (48 + 87 + 44 + 49 + 88 + 115 + 135) minutes, in one chain per model and bits
    assert "21 cells, 0 done, 21 to run." in text
    assert "GPU time: about 9 h 26 min with --jobs 2 (18 h 52 min of work)." in text
    assert "7 cells are not in these times: nothing similar was measured or published." in text
    assert "    14  published, an H800 (GLF-Q Table 7)" in text
    assert row(text, model="vit_base", bits="w4a4")["time"] == "~87 min"
    # full precision of one model, measured on a CPU, tells of the others, but of no GPU time
    measure(cells_of(grid, tmp_path)["vit_small fp"], 100.0)
    text = plan(grid, tmp_path)
    assert "GPU time: about 18 h 52 min with --jobs 1 (18 h 52 min of work)." in text
    time = "CPU time: about 10 min with --jobs 1 (10 min of work)."
    assert f"{time} Largest memory of a cell: 1.0 GB." in text
    assert "not in these times" not in text
    assert row(text, model="vit_base", method="fp")["time"] == "~2 min (CPU)"
    # cells that are to run on a CPU have only a GPU's times, which is said
    text = plan(
        grid.model_copy(update={"device": "cpu"}),
        tmp_path,
        Filters(methods=("fimaq",), models=("vit_small",)),
    )
    assert "(1 h 36 min of work)" in text
    assert {item["time"] for item in rows(text)} == {"~48 min (GPU)"}
    assert "CPU time" not in text
