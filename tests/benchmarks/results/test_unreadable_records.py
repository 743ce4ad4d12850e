"""Unreadable records are not unmeasured cells: all commands name them and exit with 2."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import benchmark_fakes as fakes
import pytest
from click.testing import CliRunner, Result

from benchmarks.cli import cli
from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import load_grid
from benchmarks.report.gather import gather
from benchmarks.results.scores import collect, read_records
from benchmarks.tables.formats import escape
from fimaq_core.recipe import make_recipe
from tasks.common.record import fingerprint, read_record


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """Grid of one model with full precision, rtn and fimaq at 3 bits and two seeds, all measured.

    Seed 1 of a method scores 85.40, seed 2 scores 5.40.
    """
    path = Path(fakes.small_grid(tmp_path))
    text = path.read_text().replace("seeds:\n- 1", "seeds: [1, 2]")
    path.write_text(text.replace("    - demo_swin\n", ""))
    fakes.write_cells(cells_of(str(path), tmp_path), lambda it: 5.4 if it.seed == 2 else 85.4)
    return str(path)


def cells_of(profile: str, results: Path) -> list[Cell]:
    return expand(load_grid(profile), Filters(), RunOptions(results=results))


def record_of(profile: str, results: Path, label: str) -> Path:
    (cell,) = (cell for cell in cells_of(profile, results) if cell.label == label)
    return fakes.planned_folder(cell.request) / "result.json"


def command(name: str, profile: str, results: Path, *more: str) -> Result:
    own = ["--profile", profile, "--results", str(results)]
    return CliRunner().invoke(cli, [name, *own, *more], obj=fakes.ADAPTER)


def change_a_digit(path: Path) -> None:
    path.write_text(path.read_text().replace("85.4", "95.4", 1))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def replace_by_another(path: Path) -> None:
    """Copy the record of fimaq over that of rtn."""
    (other,) = path.parents[3].glob("fimaq/w3a3/seed1-*/result.json")
    shutil.copy(other, path)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def contradict(path: Path) -> None:
    content = {**json.loads(path.read_text()), "w_bit": 4}
    path.write_text(json.dumps({**content, "fingerprint": fingerprint(content)}))


def of_an_older_version(path: Path) -> None:
    """Put a record of other settings there that has no identity."""
    recipe = make_recipe("rtn", {"w_bits": 3, "a_bits": 3, "seed": 1, "range_images": 7})
    record = read_record(path)
    changes = {"recipe": recipe.model_dump(mode="json"), "recipe_digest": recipe.digest()}
    content = record.model_copy(update={**changes, "identity": ""}).model_dump(mode="json")
    path.write_text(json.dumps({**content, "fingerprint": fingerprint(content)}))


DAMAGES = {
    change_a_digit: "it was changed after it was written",
    cut: "is damaged",
    replace_by_another: "is of another cell: it is of classification/demo_vit/fimaq/w3a3/seed1-",
    make_folder: "it is a folder",
    contradict: "w_bit is 4, and 3 in its recipe",
    of_an_older_version: "with other settings than the cell of this folder",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tables_name_the_record_below_each_table_and_exit_with_2(
    profile: str, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    label, words = "demo_vit rtn w3a3 seed 1", DAMAGES[damage]
    whole = command("tables", profile, tmp_path, "--format", "all")
    assert (whole.exit_code, whole.stderr) == (0, "")
    assert not (tmp_path / "tables" / "small.unreadable.txt").exists()
    assert "45.40 ± 56.57" in (tmp_path / "tables" / "small.md").read_text()
    damage(record_of(profile, tmp_path, label))
    found = command("tables", profile, tmp_path, "--format", "all")
    assert found.exit_code == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"warning: Not shown: {label}, whose record cannot be used. ")
    assert words in line
    texts = {path.suffix: path.read_text() for path in (tmp_path / "tables").iterdir()}
    assert set(texts) == {".md", ".csv", ".tex", ".txt"}
    shown = line.removeprefix("warning: ")
    assert texts[".txt"] == f"{shown}\n"
    assert f"\n- {shown}\n" in texts[".md"]
    assert "not measured" not in texts[".md"]
    assert escape(f"Not shown: {label}, whose record cannot be used.") in texts[".tex"]
    printed = command("tables", profile, tmp_path)
    assert (printed.exit_code, shown in printed.stdout) == (2, True)


def test_after_a_forced_run_nothing_is_left_of_the_damage(profile: str, tmp_path: Path) -> None:
    make_folder(record_of(profile, tmp_path, "demo_vit rtn w3a3 seed 1"))
    assert command("tables", profile, tmp_path, "--format", "all").exit_code == 2
    assert (tmp_path / "tables" / "small.unreadable.txt").exists()
    again = command("run", profile, tmp_path, "--force", "--methods", "rtn")
    assert again.exit_code == 0
    assert not (tmp_path / "tables" / "small.unreadable.txt").exists()


def test_a_run_of_other_methods_names_the_record_too(profile: str, tmp_path: Path) -> None:
    change_a_digit(record_of(profile, tmp_path, "demo_vit rtn w3a3 seed 1"))
    other = command("run", profile, tmp_path, "--methods", "fimaq")
    assert other.exit_code == 2
    assert "All 2 cells are done already" in other.stdout
    assert other.stderr.startswith("warning: Not shown: demo_vit rtn w3a3 seed 1, whose record")
    assert "Not shown: demo_vit rtn" in (tmp_path / "tables" / "small.md").read_text()


def test_a_plan_counts_unreadable_records_apart(profile: str, tmp_path: Path) -> None:
    record_of(profile, tmp_path, "demo_vit fimaq w3a3 seed 2").unlink()
    cut(record_of(profile, tmp_path, "demo_vit rtn w3a3 seed 1"))
    plan = command("run", profile, tmp_path, "--plan")
    assert plan.exit_code == 2
    assert "5 cells, 3 done, 1 with unreadable records, 1 to run." in plan.stdout
    assert re.search(r" rtn +w3a3 +1 .* unreadable ", plan.stdout)
    assert plan.stderr.startswith("warning: demo_vit rtn w3a3 seed 1: The record ")
    forced = command("run", profile, tmp_path, "--plan", "--force")
    assert (forced.exit_code, "5 to run" in forced.stdout) == (0, True)


def test_a_run_leaves_the_cell_alone_and_measures_the_others(profile: str, tmp_path: Path) -> None:
    path = record_of(profile, tmp_path, "demo_vit rtn w3a3 seed 1")
    replace_by_another(path)
    before, missing = path.read_bytes(), record_of(profile, tmp_path, "demo_vit fimaq w3a3 seed 2")
    missing.unlink()
    result = command("run", profile, tmp_path, "--jobs", "1")
    assert result.exit_code == 2
    assert path.read_bytes() == before
    assert read_record(missing).method == "fimaq"
    assert "1 of 5 cells were not measured, since their records cannot be read" in result.stderr
    assert "delete it to measure this cell again" in result.stderr


def test_a_report_lists_the_record_below_its_table(profile: str, tmp_path: Path) -> None:
    path = record_of(profile, tmp_path, "demo_vit rtn w3a3 seed 1")
    change_a_digit(path)
    result = command("report", profile, tmp_path)
    assert result.exit_code == 2
    assert "4 of 5 cells, 0 failed" in result.stdout
    page = (tmp_path / "report.html").read_text()
    assert "<li>Not shown: demo_vit rtn w3a3 seed 1, whose record cannot be used." in page
    assert "<dt>with unreadable records</dt>" in page
    assert re.search(r"<dt>not measured</dt><dd>0</dd>", page)
    found = gather(load_grid(profile), RunOptions(results=tmp_path), fakes.ADAPTER)
    assert [one.cell.label for one in found.damaged] == ["demo_vit rtn w3a3 seed 1"]
    assert (found.unreadable, len(found.problems)) == (1, 1)


def test_a_cell_without_a_record_is_not_damaged(profile: str, tmp_path: Path) -> None:
    path = record_of(profile, tmp_path, "demo_vit rtn w3a3 seed 1")
    path.unlink()
    cells = cells_of(profile, tmp_path)
    assert [len(part) for part in collect(cells, fakes.ADAPTER)] == [4, 0]
    result = command("tables", profile, tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "1 of 5 cells are not measured: `-`." in result.stdout


def test_no_table_is_made_of_nothing(profile: str, tmp_path: Path) -> None:
    for cell in cells_of(profile, tmp_path):
        cut(fakes.planned_folder(cell.request) / "result.json")
    result = command("tables", profile, tmp_path, "--format", "all")
    assert result.exit_code == 2
    *warnings, error = result.stderr.splitlines()
    assert len(warnings) == 5
    assert error == "error: No table is made: no record of a cell can be used (see above)."
    assert not (tmp_path / "tables").exists()


def test_a_message_is_one_printable_line(profile: str, tmp_path: Path) -> None:
    path = record_of(profile, tmp_path, "demo_vit rtn w3a3 seed 1")
    content = {**json.loads(path.read_text()), "a\n\x1b[31m\u202e": 1}
    path.write_text(json.dumps({**content, "fingerprint": fingerprint(content)}))
    result = command("tables", profile, tmp_path)
    (line,) = result.stderr.splitlines()
    assert line.isprintable()
    assert "Extra inputs are not permitted" in line


def test_records_behind_links_count_and_links_to_nothing_are_named(
    profile: str, tmp_path: Path
) -> None:
    cells = tmp_path / "runs" / "classification"
    (tmp_path / "elsewhere").mkdir()
    shutil.move(cells, tmp_path / "elsewhere" / "classification")
    cells.symlink_to(tmp_path / "elsewhere" / "classification")
    (tmp_path / "elsewhere" / "classification" / "loop").symlink_to(cells)
    found, problems = read_records(tmp_path / "runs")
    assert (len(found) > 0, problems) == (True, [])
    (tmp_path / "runs" / "detection").symlink_to(tmp_path / "not mounted")
    again, problems = read_records(tmp_path / "runs")
    assert len(again) == len(found)
    assert problems == [f"Cannot read {tmp_path}/runs/detection: it is a link to nothing."]
    cells.unlink()
    cells.symlink_to(tmp_path / "not mounted")
    tables = command("tables", profile, tmp_path)
    assert tables.exit_code == 2
    assert "classification is a link to nothing" in tables.stderr
