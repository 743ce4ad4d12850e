"""LaTeX tables: columns of rows, escaping, bold and missing values; the command `tables`."""

import re
from dataclasses import replace
from pathlib import Path

import benchmark_fakes as fakes
import pytest
from click.testing import CliRunner

from benchmarks.cli import cli
from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand, load_grid, parse_grid
from benchmarks.results import scores
from benchmarks.tables import latex, layout, summary
from benchmarks.tables.write import title, write_tables
from tasks.common.record import Metric

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
    text = latex.grid_latex(parsed.name, measured, cells)
    for section, width in (("classification", 4), ("retrieval", 5), ("detection", 6)):
        columns, rows = tabular(text, f"tab:my-grid-{section}")
        assert columns == width
        assert {len(row) for row in rows} == {width}
    for command in (
        r"\toprule",
        r"\bottomrule",
        r"\begin{tabular}",
        r"\end{tabular}",
        r"\begin{table}",
        r"\end{table}",
    ):
        assert text.count(command) == 3
    assert "|" not in re.sub(r"\\caption.*", "", text)


def test_rows_are_full_precision_then_methods_by_bits_and_values_are_means(tmp_path: Path):
    parsed, cells, measured = measure(tmp_path)
    _, rows = tabular(latex.grid_latex(parsed.name, measured, cells), "tab:my-grid-classification")
    assert rows == [
        ["Bits (W/A)", "Method", r"demo\_vit", r"demo\_swin"],
        ["32/32", "Full precision", "90.00", "87.00"],
        ["4/4", "rtn", "40.00", "37.00"],
        ["", "qdrop", r"\textbf{70.13}", r"\textbf{67.13}"],
        ["", "fimaq", "70.12", "67.12"],
        ["3/8", "rtn", "35.00", "32.00"],
        ["", "qdrop", r"\textbf{65.13}", r"\textbf{62.13}"],
        ["", "fimaq", "65.12", "62.12"],
    ]


def test_values_that_print_alike_are_bold_alike_and_a_lone_one_is_not(tmp_path: Path):
    scores = {"fp": 90.0, "rtn": 40.0, "qdrop": 70.118, "fimaq": 70.122}
    parsed, cells, measured = measure(
        tmp_path,
        keep=lambda cell: cell.bits != "w3a8" or cell.method == "rtn",
        score=lambda cell: scores[cell.method],
    )
    _, rows = tabular(latex.grid_latex(parsed.name, measured, cells), "tab:my-grid-classification")
    assert [row[2] for row in rows[2:5]] == ["40.00", r"\textbf{70.12}", r"\textbf{70.12}"]
    assert [row[2] for row in rows[5:]] == ["40.00", "--", "--"]
    assert r"\textbf{90" not in str(rows)


def test_scopes_and_metrics_have_their_places(tmp_path: Path):
    parsed, cells, measured = measure(tmp_path)
    text = latex.grid_latex(parsed.name, measured, cells)
    _, rows = tabular(text, "tab:my-grid-retrieval")
    assert rows[0] == ["", "", *[r"clip\_a"] * 3]
    assert rows[1][2:] == ["R@1", r"I\ensuremath{\to}T", r"T\ensuremath{\to}I"]
    assert (
        [row[0] for row in rows].count(r"\emph{vision}")
        == [row[0] for row in rows].count(r"\emph{both}")
        == 1
    )
    assert [row[1] for row in rows].count("Full precision") == 1
    rtn = [row for row in rows if row[1] == "rtn"]
    assert len(rtn) == 4
    assert rtn[0] == ["4/4", "rtn", "40.00", "42.50", "37.50"]
    _, rows = tabular(text, "tab:my-grid-detection")
    assert rows[0] == ["", "", *[r"rcnn\_a"] * 2, *[r"rcnn\_b"] * 2]
    assert rows[1][2:] == ["AP box", "AP mask"] * 2
    assert rows[2] == ["32/32", "Full precision", "90.00", "86.00", "90.00", "86.00"]
    assert r"\cmidrule(lr){3-4}\cmidrule(lr){5-6}" in text


def test_captions_say_what_the_numbers_rest_on(tmp_path: Path):
    parsed, cells, measured = measure(tmp_path)
    text = latex.grid_latex(parsed.name, measured, cells)
    assert (
        r"\caption{classification: Top-1 in percent on digit-pairs, split test (2000 samples). "
        r"Mean over seeds 1, 2" in text
    )
    assert text.count("Quantization is simulated.") == 3
    _, cells, one = measure(tmp_path / "one", {**GRID, "seeds": [7]})
    assert "Seed 7." in latex.grid_latex(parsed.name, one, cells)


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
    assert layout.escape(text) == escaped


def test_names_from_records_and_grids_are_escaped(tmp_path: Path):
    parsed, cells, measured = measure(
        tmp_path, {**GRID, "tasks": {"classification": GRID["tasks"]["classification"]}}
    )
    data = fakes.DIGITS.model_copy(update={"name": r"50% of A&B_{x} \ #1"})
    odd = [
        replace(item, record=item.record.model_copy(update={"dataset": data})) for item in measured
    ]
    text = latex.grid_latex(parsed.name, odd, cells)
    assert r"on 50\% of A\&B\_\{x\} \textbackslash{} \#1, split test" in text


def test_a_wide_table_spans_both_columns_of_a_page(tmp_path: Path):
    models = [f"a_model_with_a_long_name_{number}" for number in range(6)]
    grid = {**GRID, "tasks": {"classification": {"dataset": "d", "models": models}}, "seeds": [1]}
    parsed, cells, measured = measure(tmp_path, grid)
    text = latex.grid_latex(parsed.name, measured, cells)
    assert text.count(r"\begin{table*}[t]") == text.count(r"\end{table*}") == 1
    columns, rows = tabular(text, "tab:my-grid-classification")
    assert columns == 2 + len(models)
    assert rows[0][2:] == [layout.escape(model) for model in models]
    _, cells, few = measure(
        tmp_path / "few",
        {**grid, "tasks": {"classification": {"dataset": "d", "models": models[:1]}}},
    )
    assert r"\begin{table}[t]" in latex.grid_latex(parsed.name, few, cells)


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
    text = latex.grid_latex(parsed.name, measured, cells, parsed.axes)
    _, rows = tabular(text, "tab:my-grid-classification-p1-p2-fimaq")
    assert rows[0][:2] == ["Bits (W/A)", "p1:p2"]
    assert rows[1:3] == [
        ["4/4", "1:0", r"\textbf{60.00}", r"\textbf{61.00}"],
        ["", "1:1", "50.00", "51.00"],
    ]
    _, main = tabular(text, "tab:my-grid-classification")
    assert [row[2] for row in main[1:]] == ["50.00", "50.00", "50.00"]


def test_a_run_writes_them_beside_the_other_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    parsed, cells, measured = measure(tmp_path)
    write_tables(parsed, Filters(), RunOptions(results=tmp_path), fakes.ADAPTER, cells)
    assert (tmp_path / "tables" / "my_grid.tex").read_text() == latex.grid_latex(
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
    measured = scores.collect(everything, fakes.ADAPTER)
    texts = {
        "md": summary.grid_markdown(title(grid), measured, everything, axes=grid.axes),
        "csv": scores.csv_text(scores.scores(measured)[scores.COLUMNS]),
        "latex": latex.grid_latex("demo", measured, everything, grid.axes),
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


def test_no_records_is_said(tmp_path: Path):
    result = CliRunner().invoke(
        cli, ["tables", "--profile", "demo", "--results", str(tmp_path)], obj=fakes.ADAPTER
    )
    assert result.exit_code == 2
    assert "Nothing of the profile 'demo' is measured" in result.stderr


def test_missing_metrics_are_dashes(tmp_path: Path):
    parsed, cells, measured = measure(
        tmp_path, {**GRID, "tasks": {"detection": GRID["tasks"]["detection"]}}
    )
    only = {"AP_box": Metric(value=50.0, stderr=1.0)}
    bare = [
        replace(item, record=item.record.model_copy(update={"metrics": only}))
        if item.cell.model == "rcnn_b"
        else item
        for item in measured
    ]
    _, rows = tabular(latex.grid_latex(parsed.name, bare, cells), "tab:my-grid-detection")
    assert rows[2][2:] == ["90.00", "86.00", "50.00", "--"]
