"""Published tables with measured numbers: printing, files and conclusion."""

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path

import benchmark_fakes as fakes
import pytest
import report_fakes
from click.testing import CliRunner, Result
from PIL import Image
from published_fakes import cells_of, finished, row, written

from benchmarks.cli import cli
from benchmarks.grid.cell import RunOptions
from benchmarks.published.table import PublishedTable, load_table
from benchmarks.report.page import write_report
from benchmarks.results.scores import Measured
from benchmarks.tables.reproduction import COLUMNS, Reproduction
from benchmarks.tables.write import write_published
from tasks.common.data.folders import open_folder
from tasks.common.data.imagenet import wordnet_ids
from tasks.common.record import Dataset

VIT_S, DEIT_T = "vit_small_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_patch16_224.fb_in1k"
MODELS = {
    "ViT-S": VIT_S,
    "ViT-B": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "DeiT-T": DEIT_T,
    "DeiT-S": "deit_small_patch16_224.fb_in1k",
    "DeiT-B": "deit_base_patch16_224.fb_in1k",
    "Swin-S": "swin_small_patch4_window7_224.ms_in1k",
}

#: Every verdict once, beside numbers that are FIMA-Q's and QDrop's published ones.
EXPECTED = """\
# A table

Its caption. Source: A paper.

| method             |        ViT-S |        ViT-B |       DeiT-T |       DeiT-S |   DeiT-B \
|   Swin-S |
|:-------------------|-------------:|-------------:|-------------:|-------------:|---------:\
|---------:|
| QDrop W4/A4        |        71.84 |        82.63 |        65.27 |        72.64 |    79.96 \
|    81.21 |
| FIMA-Q W4/A4       |      76.78 = |      84.54 ↑ |      65.34 ↓ |      77.57 ? |  80.33 × \
|  81.82 ° |
| published          |        76.68 |        83.04 |        66.84 |        76.87 |    80.33 \
|    81.82 |
| difference ± error | +0.10 ± 0.10 | +1.50 ± 0.10 | -1.50 ± 0.10 | +0.70 ± 0.60 |          \
|          |

- = reproduced: 90% interval within ±1 point; ↑ above the published number; \
↓ below the published number; ? too uncertain, for the reason below; \
× not comparable, for the reason below; ° published number, not measured yet; \
rows without marks: published numbers, for context.
- Data: ImageNet-1k val, split val, n = 50000 samples.
- Data: digit-pairs, split test, n = 2000 samples.
- Seeds: 3407.
- × measured on digit-pairs (test, 2000 samples), on which nothing is published: \
FIMA-Q W4/A4 (DeiT-B).
- ? difference of -0.29 to +1.69 (90% interval), neither within ±1 point nor beyond ±0.3 points: \
FIMA-Q W4/A4 (DeiT-S).
- one seed, so the spread over seeds is not counted: \
FIMA-Q W4/A4 (ViT-S, ViT-B, DeiT-T, DeiT-S).
- A footnote.
"""


def invoke(tmp_path: Path, *args: str) -> Result:
    return CliRunner().invoke(cli, [*args, "--results", str(tmp_path)], obj=fakes.ADAPTER)


def every_verdict(tmp_path: Path) -> Reproduction:
    context = {
        "head": "QDrop",
        "method": "QDrop",
        "variant": "rerun in FIMA-Q framework",
        "source": "GLF-Q paper full text (2026) Table 1",
    }
    columns = [{"head": head, "model": model} for head, model in MODELS.items()]
    rows = [context, row()[1]]
    table = load_table(written(tmp_path, columns=columns, rows=rows, footnotes=["A footnote."]))
    cells = cells_of(table)
    return Reproduction(
        table,
        [
            finished(cells[0], 76.78),
            finished(cells[1], 84.54),
            finished(cells[2], 65.34),
            finished(cells[3], 77.57, stderr=0.6),
            finished(cells[4], 80.33, dataset=fakes.DIGITS),
        ],
    )


def own(table: PublishedTable, gap: float = 0.0, **changes: object) -> list[Measured]:
    """All cells of a table, ``gap`` points from what is published; 50 where nothing is."""
    values = {
        cell.name: float(cell.published["value"])
        for cell in reversed(table.cells)
        if cell.published is not None
    }
    return [finished(c, values.get(c.name, 50.0) + gap, **changes) for c in cells_of(table)]


def test_the_printed_table_is_the_published_one_with_every_verdict(tmp_path: Path):
    found = every_verdict(tmp_path)
    assert found.markdown() == EXPECTED
    sentence = (
        "Compared 4 numbers: 1 reproduced, 1 above, 1 below, 1 too uncertain (1 not comparable, "
        "1 not measured)."
    )
    assert found.conclusion() == (sentence, 1)


def test_csv_has_a_line_for_each_number(tmp_path: Path):
    lines = list(csv.DictReader(io.StringIO(every_verdict(tmp_path).csv())))
    assert list(lines[0]) == COLUMNS
    verdicts = [line["verdict"] for line in lines]
    own_ones = ["reproduced", "above", "below", "too uncertain", "not comparable", "not measured"]
    assert verdicts == ["context"] * 6 + own_ones
    assert lines[6] == {
        "row": "FIMA-Q",
        "column": "ViT-S",
        "model": "vit_small",
        "weights": VIT_S,
        "method": "fimaq",
        "bits": "w4a4",
        "metric": "top1",
        "measured": "76.7800",
        "se": "0.1000",
        "seeds": "1",
        "n": "50000",
        "published": "76.6800",
        "source": "github:ShiheWang/FIMA-Q:README.md@64c4b00a",
        "variant": "",
        "evidence": "primary",
        "difference": "0.1000",
        "verdict": "reproduced",
        "reason": "difference of -0.06 to +0.26 (90% interval), within ±1 point; one seed, so the "
        "spread over seeds is not counted",
    }
    assert (lines[10]["difference"], lines[11]["measured"]) == ("", "")


def test_latex_has_every_row_and_needs_booktabs_only(tmp_path: Path):
    found = every_verdict(tmp_path)
    found = found.tex()
    body = found[found.index(r"\midrule") : found.index(r"\bottomrule")]
    rows = [line.removesuffix(r"\\").split("&") for line in body.splitlines()[1:]]
    assert [len(cells) for cells in rows] == [2 + len(MODELS)] * 4
    measured = [cell.strip() for cell in rows[1]]
    assert measured[:4] == ["", "FIMA-Q", "76.78 =", r"84.54 \ensuremath{\uparrow}"]
    assert r"65.34 \ensuremath{\downarrow}" in measured
    assert r"\multirow" not in found
    assert found.isascii()
    wide = Reproduction(load_table("aphq-coco"), []).tex()
    assert r"\multicolumn{2}{c}{Mask R-CNN Swin-T}" in wide
    assert "I\\&S-ViT" in wide


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
@pytest.mark.parametrize("name", ["fimaq", "fimaq-ablation", "aphq-coco", "clip-retrieval"])
def test_latex_compiles(name: str, tmp_path: Path):
    table = load_table(name)
    head = "\\documentclass[twocolumn]{article}\\usepackage{booktabs}\\begin{document}\n"
    body = Reproduction(table, own(table, 0.1)).tex()
    (tmp_path / "a.tex").write_text(f"{head}{body}\\end{{document}}\n", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("changes", "sentence", "code"),
    [
        ({}, "Compared 21 numbers: 21 reproduced.", 0),
        ({"gap": 2.0}, "Compared 21 numbers: 21 above.", 1),
        ({"stderr": 0.7}, "Compared 21 numbers: 21 too uncertain.", 1),
        (
            {"dataset": fakes.DIGITS},
            "Nothing is comparable with the published table: 21 numbers measured, but measured on "
            "digit-pairs (test, 2000 samples), on which nothing is published.",
            2,
        ),
    ],
)
def test_the_conclusion_and_its_exit_code(changes: dict[str, object], sentence: str, code: int):
    table = load_table("fimaq")
    assert Reproduction(table, own(table, **changes)).conclusion() == (sentence, code)


def test_nothing_measured_is_nothing_comparable():
    found = Reproduction(load_table("fimaq"), [])
    sentence = "Nothing is comparable with the published table: nothing is measured."
    assert found.conclusion() == (sentence, 2)
    assert "published" not in [shown.label for shown in found.shown]


def test_all_cells_of_a_verdict_s_reason_have_one_line():
    table = load_table("fimaq")
    notes = Reproduction(table, own(table, dataset=fakes.DIGITS)).notes
    reason = "measured on digit-pairs (test, 2000 samples), on which nothing is published"
    assert notes[0] == f"× {reason}: all compared numbers."
    assert notes[1:] == list(table.footnotes)
    remark = "one seed, so the spread over seeds is not counted"
    assert Reproduction(table, own(table)).notes[0] == f"{remark}: all quantized numbers."


def test_seeds_are_averaged_and_counted(tmp_path: Path):
    table = load_table(written(tmp_path))
    cells = [c for c in cells_of(table, (1, 2)) if c.model == "vit_small" and c.method != "fp"]
    found = Reproduction(table, [finished(cells[0], 76.66), finished(cells[1], 76.74)])
    (entry,) = found.judged.to_dict("records")
    assert (entry["text"], entry["seeds"]) == ("76.70 =", 2)
    assert entry["difference text"] == "+0.02 ± 0.11"
    assert found.notes == []
    assert "- Seeds: 1, 2." in found.markdown()


def test_one_cell_in_two_places_is_one_number():
    table = load_table("fimaq-ablation")
    found = Reproduction(table, own(table))
    assert found.conclusion() == ("Compared 6 numbers: 6 reproduced.", 0)
    shown = {" ".join(found.label.split()): found.texts for found in found.shown}
    assert shown["Loss fisher_dplr"] == shown["Rank k = 5"] == ["64.09 =", "55.55 =", "77.26 ="]
    assert shown["Loss mse"] == ["50.00", "50.00", "50.00"]
    assert "a measured number without a mark: no number is published" in found.legend


def test_other_losses_alone_compare_with_nothing():
    table = load_table("fimaq-ablation")
    found = [item for item in own(table) if item.cell.point == "loss=mse"]
    sentence, code = Reproduction(table, found, {item.cell.name for item in found}).conclusion()
    assert code == 2
    assert sentence.endswith("3 numbers measured, but no number in text.")


def test_weak_evidence_is_measured_and_has_no_verdict():
    table = load_table("lsvit")
    found = Reproduction(table, own(table))
    assert found.conclusion() == ("Compared 21 numbers: 21 reproduced (5 not comparable).", 0)
    assert any("secondary evidence" in note for note in found.notes)


def test_boxes_and_masks_are_two_numbers_of_a_cell():
    table = load_table("aphq-coco")
    cell = next(c for c in cells_of(table) if c.method == "aphq")
    coco = Dataset(name="COCO 2017", split="val2017", count=5000, classes=80, fingerprint="c" * 64)
    item = finished(cell, 39.5, dataset=coco)
    found = Reproduction(table, [item], {cell.name})
    assert found.judged["text"].tolist() == ["39.50 =", "39.50 ↑"]
    assert found.conclusion()[0] == "Compared 2 numbers: 1 reproduced, 1 above."


def test_full_precision_stands_in_the_columns_of_both_towers():
    table = load_table("clip-retrieval")
    cell = next(c for c in cells_of(table) if c.method == "fp")
    found = Reproduction(table, [finished(cell, 63.4)])
    assert found.judged["text"].tolist() == ["63.40 =", "63.40 ="]
    assert found.conclusion()[0].startswith("Compared 1 number: 1 reproduced")


def test_a_terminal_s_parts_leave_out_rows_without_numbers():
    found = Reproduction(load_table("clip-retrieval"), [])
    parts = found.markdown(120).split("\n\n")[2:-1]
    assert len(parts) > 1
    assert all(len(line) <= 120 for part in parts for line in part.splitlines())
    assert "FIMA-Q" not in parts[0]
    assert "FIMA-Q bits unstated" in parts[-1]


def test_a_folder_that_is_not_imagenet_yields_no_verdict(tmp_path: Path):
    picture = tmp_path / "one.png"
    Image.new("RGB", (8, 8)).save(picture)
    for name in wordnet_ids():
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        for number in range(2):
            (folder / f"{number}.png").hardlink_to(picture)
    source = open_folder(tmp_path, "val", None, (), True)
    data = Dataset(
        name=source.name,
        split=source.split,
        count=len(source.ids),
        classes=source.classes,
        fingerprint="a" * 64,
    )
    table = load_table("fimaq")
    found = Reproduction(table, own(table, dataset=data))
    assert set(found.judged["mark"]) == {"×"}
    assert set(found.judged["difference text"]) == {""}
    sentence, code = found.conclusion()
    assert code == 2
    assert "2000 samples" in sentence


def test_a_run_prints_and_writes_the_table(tmp_path: Path):
    chosen = ("--models", "vit_small", "--bits", "w3a3", "--jobs", "1")
    found = invoke(tmp_path, "run", "--table", "fimaq", *chosen, "--report")
    assert found.exit_code == 2, found.output
    assert "# FIMA-Q: ImageNet-1k top-1 accuracy" in found.output
    # The columns and lines of the cells that the filters leave, with context of the same bits.
    printed = found.output[found.output.index("| method") :]
    assert printed.splitlines()[0].split() == ["|", "method", "|", "ViT-S", "|"]
    assert "PD-Quant W3/A3" in printed
    assert "W4/A4" not in printed
    last = found.output.strip().splitlines()[-1]
    assert last.startswith("Nothing is comparable with the published table: 2 numbers measured")
    for ending in ("md", "csv", "tex"):
        assert (tmp_path / "tables" / f"fimaq.{ending}").is_file()
    # The files cover the whole table.
    assert "W4/A4" in (tmp_path / "tables/fimaq.md").read_text(encoding="utf-8")
    assert "Table fimaq" in (tmp_path / "report.html").read_text(encoding="utf-8")
    same = ("--tasks", "classification", "--methods", "fp,fimaq", *chosen)
    again = invoke(tmp_path, "run", "--profile", "paper", *same)
    assert "All 2 cells are done already." in again.output


def test_a_table_takes_no_profile(tmp_path: Path):
    found = invoke(tmp_path, "run", "--table", "fimaq", "--profile", "paper")
    assert found.exit_code == 2
    assert "--table has a grid of its own: leave --profile out." in found.output
    unknown = invoke(tmp_path, "run", "--table", "fimqa")
    assert unknown.exit_code == 2
    assert "Did you mean 'fimaq'?" in unknown.output


def test_make_hands_the_table_on():
    command = ["make", "-n", "-o", ".venv/.setup-done", "reproduce-table"]
    found = subprocess.run(
        [*command, "TABLE=fimaq", "BITS=w3a3"], capture_output=True, text=True, check=True
    ).stdout
    assert "run --report --table fimaq --bits w3a3" in " ".join(found.split())
    assert "--profile" not in found


def test_a_cell_with_an_unreadable_record_has_a_mark_of_its_own(tmp_path: Path):
    table = load_table(written(tmp_path))
    cells = [c for c in cells_of(table, results=tmp_path) if c.model == "vit_small"]
    fakes.write_cells(cells, lambda cell: 64.0)
    (cell,) = (cell for cell in cells if cell.method == "fimaq")
    (fakes.planned_folder(cell.request) / "result.json").write_text("{")
    part = write_published(table, table.grid(), RunOptions(results=tmp_path), fakes.ADAPTER, cells)
    assert part.conclusion()[1] == 2
    text = part.markdown()
    assert "76.68 !" in text
    assert "! published number, measured, but the record cannot be read" in text
    assert f"\n- Not shown: {cell.label}, whose record cannot be used. The record " in text
    for ending in ("md", "tex", "unreadable.txt"):
        assert "Not shown: " in (tmp_path / "tables" / f"mine.{ending}").read_text()


def test_the_report_shows_the_table_and_escapes_it(tmp_path: Path):
    hostile = "<script>x</script>&{{ 7*7 }}"
    table = load_table(written(tmp_path, title=hostile, caption=hostile, footnotes=[hostile]))
    fakes.write_cells(
        [c for c in cells_of(table, results=tmp_path) if c.model == "vit_small"], lambda cell: 64.0
    )
    path = tmp_path / "report.html"
    write_report(
        table.grid(),
        RunOptions(results=tmp_path),
        fakes.ADAPTER,
        path,
        get=report_fakes.pictures,
        table=table,
    )
    page = report_fakes.read_page(path)
    section = page.one("section", id="table")
    assert section.text.count(hostile) == 3
    rows = [
        [cell.text for cell in line.children if not isinstance(cell, str)]
        for line in section.all("tr")
    ]
    assert rows[0] == ["bits", "method", "ViT-S", "DeiT-T"]
    assert ["W4/A4", "FIMA-Q", "64.00 ×", "66.84 °"] in rows
    assert section.all("span", "verdict") != []
    assert re.search(r"Nothing is comparable", section.text)
