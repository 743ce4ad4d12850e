"""Numbers of the report equal the records: tables, provenance, best, counts."""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path

import benchmark_fakes as fakes
import numpy as np
import pytest
import report_fakes
from click.testing import CliRunner, Result
from diff_fakes import published_record

from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import Grid
from benchmarks.results import scores
from tasks.common.record import Metric, ResultRecord, read_record, write_record

GRID = report_fakes.report_grid()


def write(tmp_path: Path, grid: Grid = GRID) -> report_fakes.Node:
    return report_fakes.read_page(report_fakes.write_page(tmp_path, grid))


def invoke(tmp_path: Path, *args: str) -> Result:
    from benchmarks.cli import cli

    return CliRunner().invoke(
        cli, ["report", "--profile", "demo", "--results", str(tmp_path), *args], obj=fakes.ADAPTER
    )


def with_metrics(values: Callable[[Cell], dict[str, float]]) -> Callable[[Cell], ResultRecord]:
    def record(cell: Cell) -> ResultRecord:
        metrics = {name: Metric(value=value, stderr=0.5) for name, value in values(cell).items()}
        return report_fakes.full_record(cell, metrics=metrics)

    return record


def main_cells(
    page: report_fakes.Node, section: str
) -> dict[tuple[str, str, str], report_fakes.Node]:
    """Cells of a section's main table by method, subject and bits."""
    table = page.one(id="results").one("section", data_task=section).one("table", css="main-table")
    heads = [
        (head.attrs["data-model"], head.attrs["data-bits"])
        for head in table.all("th")
        if "data-bits" in head.attrs
    ]
    found = {}
    for row in table.one("tbody").all("tr"):
        for (model, bits), cell in zip(heads, row.all("td")[: len(heads)], strict=True):
            found[row.attrs["data-method"], model, bits] = cell
    return found


def number(node: report_fakes.Node) -> str:
    return node.text.replace("≈", "").strip()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, report_fakes.Node]:
    """The report of a finished grid, for tests that only read it."""
    folder = tmp_path_factory.mktemp("report")
    report_fakes.write_results(folder, GRID)
    return folder, write(folder)


def test_tables_have_the_means_and_spreads_of_the_csv(whole: tuple[Path, report_fakes.Node]):
    folder, page = whole
    measured = scores.collect(
        expand(GRID, Filters(), RunOptions(results=folder)), fakes.ADAPTER
    ).measured
    table = scores.scores(measured)
    table["model"] = table["subject"]
    compared = 0
    for section, metric in (
        ("classification", "top1"),
        ("retrieval", "R@1"),
        ("detection", "AP_box"),
    ):
        cells = main_cells(page, section)
        rows = table[(table["task"] == section) & (table["metric"] == metric)]
        for row in scores.over_seeds(rows).to_dict("records"):
            text = scores.value_text(row["mean"], row["sd"])
            mine = [
                cell
                for (method, subject, bits), cell in cells.items()
                if method == row["method"]
                and (bits == row["bits"] or row["bits"] == "fp")
                and (
                    subject == row["model"] or (method == "fp" and subject.startswith(row["model"]))
                )
            ]
            assert mine, row
            assert {number(cell) for cell in mine} == {text}
            assert all(
                float(cell.attrs["data-value"]) == pytest.approx(row["mean"], abs=1e-9)
                for cell in mine
            )
            compared += 1
    assert compared == len(measured) - 40  # two seeds of each quantized cell are one


def test_provenance_has_every_value_of_the_csv_with_its_decimals(
    whole: tuple[Path, report_fakes.Node],
):
    folder, page = whole
    measured = scores.collect(
        expand(GRID, Filters(), RunOptions(results=folder)), fakes.ADAPTER
    ).measured
    lines = list(csv.DictReader(io.StringIO(scores.csv_text(scores.scores(measured)))))
    wanted = sorted((line["metric"], f"{line['value']} ± {line['stderr']}") for line in lines)
    found = sorted(
        (row.one("th").text, cell.text)
        for table in page.all("table", css="metrics")
        for row in table.one("tbody").all("tr")
        for cell in row.all("td", css="exact")
    )
    assert found == wanted
    assert len(found) > 100


def test_every_number_leads_to_its_own_provenance(whole: tuple[Path, report_fakes.Node]):
    folder, page = whole
    link = main_cells(page, "retrieval")["fimaq", "demo_clip [both]", "w3a3"].one("a", css="origin")
    body = page.one(id=link.attrs["href"].removeprefix("#"))
    assert body.attrs["data-title"] == "demo_clip [both] fimaq w3a3"
    text = body.text
    paths = [node.text for node in body.all("code") if node.text.endswith("result.json")]
    assert len(paths) == 2
    for seed, path in enumerate(paths, 1):
        assert not path.startswith("/")
        record = read_record(folder / path)
        assert (record.method, record.seed, record.w_bit) == ("fimaq", seed, 3)
        assert record.fingerprint in text
    for words in (
        "0" * 64,
        "e" * 64,
        "digit-scenes, test",
        "1000 images, 1000 captions",
        "torch 1, timm 2",
        "34 s",
        "17",
        "eval",
    ):
        assert words in text, words
    assert re.search(r"^loss: fisher_dplr$", body.one("pre").text, re.MULTILINE)
    assert "seed:" not in body.one("pre").text


def test_all_links_lead_somewhere_and_ids_are_unique(whole: tuple[Path, report_fakes.Node]):
    _, page = whole
    ids = [node.attrs["id"] for node in page.all() if "id" in node.attrs]
    assert len(ids) == len(set(ids))
    links = [node.attrs["href"] for node in page.all() if node.tag in ("a", "use")]
    assert len(links) > 90
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    labels = [
        label for node in page.all() for label in node.attrs.get("aria-labelledby", "").split()
    ]
    assert labels
    assert set(labels) <= set(ids)


def test_the_best_of_a_column_and_equal_looking_numbers_are_bold(tmp_path: Path):
    grid = fakes.plain_demo(seeds=(1,))
    scores = {"fp": 95.0, "rtn": 60.0, "brecq": 70.0, "qdrop": 80.001, "fimaq": 80.004}
    report_fakes.write_results(
        tmp_path, grid, with_metrics(lambda cell: {"top1": scores[cell.method]})
    )
    cells = main_cells(write(tmp_path, grid), "classification")
    bold = {
        method for (method, _, _), cell in cells.items() if "best" in cell.attrs.get("class", "")
    }
    assert bold == {"qdrop", "fimaq"}  # full precision is no competitor


def test_the_lowest_rank_is_best(tmp_path: Path):
    demo = fakes.load_grid("demo").tasks["retrieval"]
    part = demo.model_copy(update={"methods": None, "seeds": None, "scopes": ("vision",)})
    grid = fakes.plain_demo(seeds=(1,), tasks={"retrieval": part})
    ranks = {"fp": 1.0, "rtn": 9.0, "brecq": 3.0, "qdrop": 2.0, "fimaq": 4.0}
    report_fakes.write_results(
        tmp_path,
        grid,
        with_metrics(lambda cell: {"R@1": 80.0, "i2t_median_rank": ranks[cell.method]}),
        keep=lambda c: True,
    )
    page = write(tmp_path, grid)
    table = next(
        t for t in page.all("table", css="wide") if t.one("caption").text == "i2t_median_rank"
    )
    assert {
        row.attrs["data-method"]
        for row in table.one("tbody").all("tr")
        if row.all("td", css="best")
    } == {"qdrop"}


def test_methods_equal_to_the_best_on_the_same_samples_are_marked(tmp_path: Path):
    grid = fakes.plain_demo(seeds=(1,), bits=("w3a3",))
    rng = np.random.default_rng(0)
    best = rng.random(400) < 0.8
    outcomes = {
        "fp": best,
        "fimaq": best.copy(),
        "qdrop": best.copy(),
        "brecq": best & (rng.random(400) < 0.8),
        "rtn": best & False,
    }
    outcomes["qdrop"][:2] = ~best[:2]
    outcomes["fimaq"][np.flatnonzero(~best)[3]] = True  # the best by a little
    shares = {name: 100 * float(found.mean()) for name, found in outcomes.items()}
    fakes.write_cells(
        expand(grid, Filters(), RunOptions(results=tmp_path)),
        lambda cell: shares[cell.method],
        lambda cell: outcomes[cell.method],
    )
    cells = main_cells(write(tmp_path, grid), "classification")
    near = {method for (method, _, _), cell in cells.items() if cell.all(css="near")}
    assert near == {"qdrop"}


def test_cells_are_counted_as_done_failed_and_not_measured(tmp_path: Path):
    cells = report_fakes.write_results(
        tmp_path, GRID, keep=lambda cell: cell.method in ("fp", "rtn")
    )
    broken = next(cell for cell in cells if cell.method == "fimaq")
    folder = fakes.planned_folder(broken.request)
    folder.mkdir(parents=True)
    (folder / "error.log").write_text("Traceback\n  somewhere\nValueError: it <broke>\n\n")
    page = write(tmp_path)
    counts = {
        node.one("dt").text: node.one("dd").text for node in page.one("dl", css="counts").all("div")
    }
    done = sum(cell.method in ("fp", "rtn") for cell in cells)
    assert counts["cells measured"] == f"{done} of {len(cells)}"
    assert counts["failed"] == "1"
    assert counts["not measured"] == str(len(cells) - done - 1)
    assert f"{broken.label} ValueError: it <broke>" in page.one(id="problems").text


def test_damaged_records_are_listed_with_their_message(tmp_path: Path):
    cells = report_fakes.write_results(tmp_path, GRID)
    folder = fakes.planned_folder(cells[3].request)
    (folder / "result.json").write_text('{"schema_version": 2, <b>')
    page = write(tmp_path)
    problems = page.one(id="problems")
    assert problems.one("code").text == folder.relative_to(tmp_path).as_posix() + "/result.json"
    assert "damaged" in problems.text
    assert str(tmp_path) not in problems.text
    assert page.one("dl", css="counts").all("dd")[0].text == f"{len(cells) - 1} of {len(cells)}"


def test_records_of_filters_beyond_the_grid_are_shown_and_foreign_ones_counted(tmp_path: Path):
    report_fakes.write_results(tmp_path, GRID)
    more = expand(
        GRID,
        Filters(methods=("rtn",), bits=("w2a8",), seeds=(7,), models=("demo_vit",)),
        RunOptions(results=tmp_path),
    )
    assert len(more) == 1
    write_record(report_fakes.full_record(more[0]), fakes.planned_folder(more[0].request))
    recipe = more[0].request.recipe
    assert recipe is not None
    recipe = recipe.model_copy(update={"method": "elsewhere"})
    own = {"recipe": recipe.model_dump(mode="json"), "recipe_digest": recipe.digest()}
    foreign = report_fakes.full_record(more[0], method="elsewhere", **own)
    write_record(foreign, tmp_path / "runs" / "classification" / "other")
    page = write(tmp_path)
    assert ("rtn", "demo_vit", "w2a8") in main_cells(page, "classification")
    about = page.one("details", css="about").text
    assert "1 of the cells are not in the profile's own grid" in about
    assert "1 more records" in about


def test_fidelity_has_a_table_per_subject_and_bits(tmp_path: Path):
    grid = fakes.plain_demo(methods=("fp", "rtn"), bits=("w3a3",))
    report_fakes.write_results(tmp_path, grid)
    heads = ["method", "kl (nats)", "snr_db (dB)"]
    found = [
        table
        for table in write(tmp_path, grid).one(id="results").all("table")
        if [head.text for head in table.one("thead").all("th")] == heads
    ]
    assert found
    for table in found:
        (row,) = table.one("tbody").all("tr")
        assert row.one("th").text == "rtn"
        assert [cell.text.split(" ±")[0] for cell in row.all("td")] == ["0.25", "-1.5"]


def test_axes_have_rows_of_their_own_and_tables(tmp_path: Path):
    grid = fakes.plain_demo(
        methods=("fp", "fimaq"), bits=("w3a3",), axes={"k": {"5": {}, "15": {"fisher_k": 15}}}
    )
    report_fakes.write_results(tmp_path, grid)
    page = write(tmp_path, grid)
    methods = {method for method, _, _ in main_cells(page, "classification")}
    assert methods == {"fp", "fimaq", "fimaq k=15"}
    tables = page.one(id="axes").all("table")
    assert "w3a3 - base" in tables[-1].one("thead").text
    heads = [[head.text for head in table.one("thead").all("th")] for table in tables]
    drawn = page.one(id="axes").all("g", data_method="fimaq")
    assert len(drawn) == heads.count(["method", "5", "15"]) == len(page.one(id="bits").all("svg"))
    assert page.one(id="bits").all("g", data_method="fimaq")
    assert not page.one(id="bits").all("g", data_method="fimaq k=15")


def test_published_numbers_have_verdicts(tmp_path: Path):
    from fimaq_core.recipe import make_recipe

    model = "vit_small_patch16_224.augreg_in21k_ft_in1k"
    demo = fakes.load_grid("demo").tasks["classification"]
    part = demo.model_copy(update={"models": (model,)})
    grid = fakes.plain_demo(seeds=(3407,), tasks={"classification": part})
    report_fakes.write_results(tmp_path, grid)
    assert "no verdict" in write(tmp_path, grid).one(id="published").text

    def record(cell: Cell) -> ResultRecord:
        recipe = cell.request.recipe
        released = (
            None
            if recipe is None
            else make_recipe(recipe.method, {"w_bits": recipe.w_bits, "a_bits": recipe.a_bits})
        )
        identity = fakes.identity_of(cell.request)
        return published_record(released, model, identity=identity, value=64.1, stderr=0.2)

    report_fakes.write_results(tmp_path, grid, record, examples=None)
    rows = write(tmp_path, grid).one("table", css="verdicts").one("tbody").all("tr")
    mine = [
        row
        for row in rows
        if (row.attrs["data-method"], row.attrs["data-bits"]) == ("fimaq", "w3a3")
    ]
    assert "reproduced" in {row.one(css="verdict").text for row in mine}
    found = {
        tuple(cell.text for cell in row.all("td")[3:6])
        for row in mine
        if row.one(css="verdict").text == "reproduced"
    }
    assert ("64.10 ± 0.20", "64.09", "+0.01") in found
    others = [
        row
        for row in rows
        if row.attrs["data-method"] == "rtn" and row.one(css="verdict").text == "reproduced"
    ]
    assert not others


def test_the_command_writes_the_page_beside_the_results(tmp_path: Path):
    grid = tmp_path / "small.yaml"
    text = (Path(fakes.__file__).parents[2] / "benchmarks/grids/quantizers.yaml").read_text(
        encoding="utf-8"
    )
    grid.write_text(
        text.replace("name: quantizers", "name: small")
        .replace("[fp, repq]", "[fp, rtn]")
        .split("axes:")[0]
    )
    missing = invoke(tmp_path, "--profile", str(grid))
    assert missing.exit_code == 2
    assert "Nothing of profile 'small' is measured" in missing.output
    from benchmarks.grid.schema import load_grid

    cells = report_fakes.write_results(tmp_path, load_grid(str(grid)), examples=None)
    (tmp_path / "runs" / "x").mkdir()
    (tmp_path / "runs" / "x" / "result.json").write_text("no")
    result = invoke(
        tmp_path, "--profile", str(grid), "--output", str(tmp_path / "deep" / "page.html")
    )
    assert result.exit_code == 2, result.output  # since a record cannot be read
    assert f"{len(cells)} of {len(cells)} cells, 0 failed." in result.output
    assert "runs/x/result.json" in result.output
    assert (tmp_path / "deep" / "page.html").stat().st_size > 10_000
