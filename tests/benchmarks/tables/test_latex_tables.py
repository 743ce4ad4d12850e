"""LaTeX tables: columns of rows, escaping, bold and missing values; the command `tables`."""

import re
from dataclasses import replace
from pathlib import Path

import benchmark_fakes as fakes
import pytest
from click.testing import CliRunner

from benchmarks.cli import cli
from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import load_grid, parse_grid
from benchmarks.results import scores
from benchmarks.tables import formats, summary
from benchmarks.tables.write import title, write_tables
from tasks.common.record import SignedMetric, read_record, write_record

GRID = {
    "name": "my_grid",
    "variant": "x",
    "tasks": {
        "classification": {"dataset": "digit-pairs", "models": ["demo_vit", "demo_swin"]},
        "retrieval": {
            "dataset": "digit-scenes",
            "models": ["clip_a"],
            "scopes": ["vision", "both"],
        },
        "detection": {"dataset": "scenes", "models": ["rcnn_a", "rcnn_b"]},
    },
    "methods": ["fp", "rtn", "qdrop", "fimaq"],
    "bits": ["w4a4", "w3a8"],
    "seeds": [1, 2],
}
SCORES = {"fp": 90.0, "rtn": 40.0, "qdrop": 70.126, "fimaq": 70.12}


def value(cell: Cell) -> float:
    seed = 0.0 if cell.seed is None else cell.seed - 1.5
    return (
        SCORES[cell.method]
        - 5 * (cell.bits == "w3a8")
        - 3 * (cell.model == "demo_swin")
        + (cell.method == "rtn") * seed
    )


def measure(tmp_path: Path, grid=GRID, keep=lambda cell: True, score=value):
    parsed = parse_grid(grid)
    cells = expand(parsed, Filters(), RunOptions(results=tmp_path))
    return parsed, cells, fakes.write_cells(filter(keep, cells), score)


def tabular(text: str, label: str) -> tuple[int, list[list[str]]]:
    """Number of columns and rows of the table with a label; wide cells are repeated."""
    start = text.index(rf"\label{{{label}}}")
    body = text[start : text.index(r"\end{tabular}", start)]
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", body)
    assert columns is not None
    rows = []
    for line in body.splitlines():
        if line.endswith(r"\\"):
            row: list[str] = []
            for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\")):
                wide = re.fullmatch(r"\\multicolumn\{(\d+)\}\{[lc]\}\{(.*)\}", cell.strip())
                row += [wide[2]] * int(wide[1]) if wide else [cell.strip()]
            rows.append(row)
    return len(columns[1]), rows


def test_every_row_has_the_tables_columns(tmp_path: Path):
    parsed, cells, measured = measure(
        tmp_path, keep=lambda cell: cell.method != "qdrop" or cell.model != "demo_vit"
    )
    text = summary.grid_latex(parsed.name, measured, cells)
    for section in ("classification", "retrieval", "detection", "detection-Box-mask-AP"):
        for bits in ("w4a4", "w3a8"):
            columns, rows = tabular(text, f"tab:my-grid-{section}-{bits}")
            assert columns == 3
            assert {len(row) for row in rows} == {3}
    for command in (r"\toprule", r"\bottomrule", r"\begin{tabular}", r"\end{tabular}"):
        assert text.count(command) == 10
    assert "|" not in re.sub(r"\\caption.*", "", text)


def test_rows_are_those_of_the_markdown_and_the_best_is_bold(tmp_path: Path):
    parsed, cells, measured = measure(tmp_path)
    text = summary.grid_latex(parsed.name, measured, cells)
    pm = r"\ensuremath{\pm}"
    for bits, lower in (("w4a4", 0), ("w3a8", 5)):
        _, rows = tabular(text, f"tab:my-grid-classification-{bits}")
        assert rows == [
            ["method", r"demo\_vit", r"demo\_swin"],
            ["fp", "90.00", "87.00"],
            ["rtn", *(f"{mean - lower}.00 {pm} 0.71" for mean in (40, 37))],
            ["qdrop", *(f"\\textbf{{{mean - lower}.13 {pm} 0.00}}" for mean in (70, 67))],
            ["fimaq", *(f"{mean - lower}.12 {pm} 0.00" for mean in (70, 67))],
        ]


def test_values_that_print_alike_are_bold_alike_and_a_lone_one_is_not(tmp_path: Path):
    scores = {"fp": 90.0, "rtn": 40.0, "qdrop": 70.118, "fimaq": 70.122}
    parsed, cells, measured = measure(
        tmp_path,
        {**GRID, "seeds": [1]},
        keep=lambda cell: cell.bits != "w3a8" or cell.method == "rtn",
        score=lambda cell: scores[cell.method],
    )
    text = summary.grid_latex(parsed.name, measured, cells)
    _, rows = tabular(text, "tab:my-grid-classification-w4a4")
    assert [row[1] for row in rows[2:]] == ["40.00", r"\textbf{70.12}", r"\textbf{70.12}"]
    _, lone = tabular(text, "tab:my-grid-classification-w3a8")
    assert [row[:2] for row in lone[2:]] == [["rtn", "40.00"]]
    assert r"\textbf{90" not in str(rows)


def test_scopes_and_metrics_have_their_places(tmp_path: Path):
    parsed, cells, measured = measure(tmp_path)
    text = summary.grid_latex(parsed.name, measured, cells)
    _, rows = tabular(text, "tab:my-grid-retrieval-w4a4")
    assert rows[0] == ["method", r"clip\_a [vision]", r"clip\_a [both]"]
    assert [row[0] for row in rows].count("fp") == 1
    _, rows = tabular(text, "tab:my-grid-detection-Box-mask-AP-w4a4")
    assert rows[1] == ["fp", *["90.00 / 86.00"] * 2]


def test_captions_say_what_the_numbers_rest_on(tmp_path: Path):
    parsed, cells, measured = measure(tmp_path)
    text = summary.grid_latex(parsed.name, measured, cells)
    assert (
        r"\caption{classification: top1 (percent), mean \ensuremath{\pm} sd over seeds, w4a4. "
        "Data: digit-pairs, split test, n = 2000 samples. Seeds: 1, 2. "
        "Bold: the best quantized method of a column. Quantization is simulated.}" in text
    )
    assert text.count("Quantization is simulated.") == 10


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b & 50% #1 ${x}", r"a\_b \& 50\% \#1 \$\{x\}"),
        ("~^\\", r"\textasciitilde{}\textasciicircum{}\textbackslash{}"),
        ("log√2", r"log\ensuremath{\surd}2"),
        ("a<b>|c", r"a\textless{}b\textgreater{}\textbar{}c"),
        ("line\nbreak", "line break"),
    ],
)
def test_text_is_escaped(text: str, escaped: str):
    assert formats.escape(text) == escaped


def test_names_from_records_and_grids_are_escaped(tmp_path: Path):
    parsed, cells, measured = measure(
        tmp_path, {**GRID, "tasks": {"classification": GRID["tasks"]["classification"]}}
    )
    data = fakes.DIGITS.model_copy(update={"name": r"50% of A&B_{x} \ #1"})
    odd = [
        replace(item, record=item.record.model_copy(update={"dataset": data})) for item in measured
    ]
    text = summary.grid_latex(parsed.name, odd, cells)
    assert r"Data: 50\% of A\&B\_\{x\} \textbackslash{} \#1, split test" in text


def test_a_wide_table_spans_both_columns_of_a_page(tmp_path: Path):
    models = [f"a_model_with_a_long_name_{number}" for number in range(6)]
    grid = {**GRID, "tasks": {"classification": {"dataset": "d", "models": models}}, "seeds": [1]}
    parsed, cells, measured = measure(tmp_path, grid)
    text = summary.grid_latex(parsed.name, measured, cells)
    assert text.count(r"\begin{table*}[t]") == text.count(r"\end{table*}") == 2
    columns, rows = tabular(text, "tab:my-grid-classification-w4a4")
    assert columns == 1 + len(models)
    assert rows[0][1:] == [formats.escape(model) for model in models]
    _, cells, few = measure(
        tmp_path / "few",
        {**grid, "tasks": {"classification": {"dataset": "d", "models": models[:1]}}},
    )
    assert r"\begin{table}[t]" in summary.grid_latex(parsed.name, few, cells)


def test_axes_have_tables_of_their_points(tmp_path: Path):
    grid = {
        **GRID,
        "tasks": {"classification": GRID["tasks"]["classification"]},
        "methods": ["fp", "fimaq"],
        "axes": {"p1:p2": {"1:0": {"fisher_p1": 2.0, "fisher_p2": 0.0}, "1:1": {}}},
    }
    parsed, cells, measured = measure(
        tmp_path,
        grid,
        score=lambda cell: 50.0 + 10 * bool(cell.point) + (cell.model == "demo_swin"),
    )
    text = summary.grid_latex(parsed.name, measured, cells, parsed.axes)
    _, rows = tabular(text, "tab:my-grid-classification-p1-p2-fimaq")
    assert rows[0][:3] == ["p1:p2", r"demo\_vit w4a4", r"demo\_vit w3a8"]
    assert [row[1][:5] for row in rows[1:]] == ["60.00", "50.00"]
    _, main = tabular(text, "tab:my-grid-classification-w4a4")
    assert [row[1][:5] for row in main[1:]] == ["50.00", "50.00"]


def test_a_run_writes_them_beside_the_other_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    parsed, cells, measured = measure(tmp_path)
    write_tables(parsed, Filters(), RunOptions(results=tmp_path), fakes.ADAPTER, cells)
    assert (tmp_path / "tables" / "my_grid.tex").read_text() == summary.grid_latex(
        parsed.name, measured, cells
    )


def test_tables_are_made_anew_from_records(tmp_path: Path):
    grid = load_grid("demo")
    cells = expand(grid, Filters(methods=("fp", "rtn")), RunOptions(results=tmp_path))
    fakes.write_cells(cells, lambda cell: 50.0)

    def run(*arguments: str):
        return CliRunner().invoke(
            cli,
            ["tables", "--profile", "demo", "--results", str(tmp_path), *arguments],
            obj=fakes.ADAPTER,
        )

    everything = expand(grid, Filters(), RunOptions(results=tmp_path))
    measured = scores.collect(everything, fakes.ADAPTER).measured
    texts = {
        "md": summary.grid_markdown(title(grid), measured, everything, axes=grid.axes),
        "csv": scores.csv_text(scores.scores(measured)[scores.COLUMNS]),
        "latex": summary.grid_latex("demo", measured, everything, grid.axes),
    }
    for name, text in texts.items():
        assert run("--format", name).stdout == text
    assert not (tmp_path / "tables").exists()
    assert run("--format", "all", "--output", str(tmp_path / "out")).exit_code == 0
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written == {"demo.md": texts["md"], "demo.csv": texts["csv"], "demo.tex": texts["latex"]}
    assert run("--format", "all").exit_code == 0
    assert (tmp_path / "tables" / "demo.tex").is_file()
    assert run("--format", "latex", "--output", str(tmp_path / "one")).exit_code == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["demo.tex"]


def test_a_table_of_another_metric_is_printed(tmp_path: Path):
    chosen = Filters(tasks=("classification",), methods=("fp", "rtn", "qdrop"))
    cells = expand(load_grid("demo"), chosen, RunOptions(results=tmp_path))
    fakes.write_cells(cells, lambda cell: 50.0)
    for path in tmp_path.rglob("result.json"):
        record = read_record(path)
        if record.method == "rtn":
            kl = {"kl": SignedMetric(value=0.125, stderr=0.01)}
            write_record(record.model_copy(update={"fidelity": kl}), path.parent)

    def run(*arguments: str):
        given = ["tables", "--profile", "demo", "--results", str(tmp_path), *arguments]
        return CliRunner().invoke(cli, given, obj=fakes.ADAPTER)

    text = run("--metric", "kl").stdout
    assert "classification: kl (nats), mean ± sd over seeds" in text
    assert "0.125" in text
    assert "finite number of samples: 0.01 to 0.01 nats." in text
    # Expected orders are those of accuracy, of which less is worse.
    assert "Expected order" in run().stdout
    assert "Expected order" not in text
    assert "points" not in text
    assert "kl" not in run().stdout
    assert ",kl,0.1250,0.0100," in run("--format", "csv").stdout
    unknown = run("--metric", "kll")
    assert (unknown.exit_code, "Did you mean 'kl'" in unknown.stderr) == (2, True)
    assert run("--metric", "kl", "--format", "csv").exit_code == 2


def test_no_records_is_said(tmp_path: Path):
    result = CliRunner().invoke(
        cli, ["tables", "--profile", "demo", "--results", str(tmp_path)], obj=fakes.ADAPTER
    )
    assert result.exit_code == 2
    assert "Nothing of the profile 'demo' is measured" in result.stderr
