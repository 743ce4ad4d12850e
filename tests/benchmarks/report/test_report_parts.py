"""Parts of the report: charts, Pareto fronts, blocks, stages, module maps, examples.

All texts of records are escaped.
"""

import base64
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmark_fakes as fakes
import numpy as np
import pandas as pd
import pytest
import report_fakes

from benchmarks.grid.cell import Cell
from benchmarks.grid.schema import Grid
from benchmarks.report.charts import block_chart
from benchmarks.report.figures import kind_of, pareto
from benchmarks.report.groups import make_groups
from benchmarks.report.provenance import module_maps
from benchmarks.results.scores import collect
from fimaq_core.errors import DataError
from fimaq_core.terminal import printable
from tasks.common.record import ResultRecord, write_record

GRID = report_fakes.report_grid()
SMALL = fakes.plain_demo(seeds=(1,), bits=("w3a3",))
HOSTILE = (
    "</title></style></script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"
    "\"'`{{ 7*7 }}{% raw %}&amp;\u2028"
)


def write(tmp_path: Path, grid: Grid = GRID, get: Any = report_fakes.pictures) -> report_fakes.Node:
    return report_fakes.read_page(report_fakes.write_page(tmp_path, grid, get))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> report_fakes.Node:
    """The report of a finished grid, for tests that only read it."""
    folder = tmp_path_factory.mktemp("report")
    report_fakes.write_results(folder, GRID)
    return write(folder)


def test_the_pareto_front_holds_the_rows_that_no_other_beats():
    spots = [("dear", 9, 80), ("cheap", 1, 50), ("beaten", 5, 60), ("good", 4, 80), ("mid", 2, 70)]
    rows = pd.DataFrame(spots, columns=["name", "cost", "value"])
    assert pareto(rows) == ["cheap", "mid", "good"]
    assert pareto(rows, higher=False) == ["cheap"]
    many = pd.DataFrame(np.random.default_rng(1).integers(1, 20, (200, 2)))
    many = many.set_axis(["cost", "value"], axis="columns").assign(name=many.index.map(str))
    kept = set(pareto(many))
    for row in many.itertuples():
        no_dearer, no_worse = many["cost"] <= row.cost, many["value"] >= row.value
        better = (many["cost"] < row.cost) | (many["value"] > row.value)
        assert (no_dearer & no_worse & better).any() != (row.name in kept), row


def test_charts_hold_any_text():
    row = {
        "name": "a\0\ud800",
        "block": "b\x1b\\u0001",
        "value": 1.0,
        "look": "c0 circle",
        "title": "<t>\a",
    }
    chart = block_chart(pd.DataFrame([row]), "all")
    assert 'data-method="a��"' in chart
    assert "<title>&lt;t&gt;�</title>" in chart
    assert ">b�\\u0001<" in chart


def test_a_small_address_space_is_an_error_for_the_user():
    """Without the check, the library for charts would end the process."""
    code = (
        "import resource\nimport pandas as pd\nfrom benchmarks.report.charts import _draw\n"
        "from fimaq_core.errors import FimaqError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))\n"
        "try:\n    _draw(pd.DataFrame(), [], '')\nexcept FimaqError as error:\n    print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "and this process is limited to 8.6 GB: run `ulimit -v unlimited` first" in done.stdout


def test_error_bars_are_the_spread_of_seeds_or_the_sampling_error(tmp_path: Path):
    grid = fakes.plain_demo(seeds=(1, 2))
    cells = report_fakes.write_results(
        tmp_path, grid, examples=None, keep=lambda c: not (c.method == "rtn" and c.seed == 2)
    )
    groups = make_groups(collect(cells, fakes.ADAPTER).measured)
    two = next(group for group in groups if group.method == "fimaq")
    one = next(group for group in groups if group.method == "rtn")
    values = [item.record.metrics["top1"].value for item in two.items]
    score, single = two.scores["top1"], one.scores["top1"]
    assert (score.value, score.error) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert single.error == 0.5
    page = write(tmp_path, grid)
    titles = [title.text for title in page.one(id="bits").all("title")]
    assert (
        f"fimaq, w4a4: {score.value:.2f} ± {np.std(values, ddof=1):.2f} sd over 2 seeds" in titles
    )
    assert f"rtn, w4a4: {single.value:.2f} ± 0.50 standard error over samples, one seed" in titles


def test_charts_have_a_description_and_their_data(page: report_fakes.Node):
    charts = page.all("svg", css="chart")
    assert len(charts) > 30
    assert all(
        chart.attrs["role"] == "img" and len(chart.attrs["aria-label"]) > 20 for chart in charts
    )
    for figure in page.all("figure"):
        assert figure.one("figcaption").text
        assert figure.one("details", css="data").one("table").one("tbody").all("tr")
    lines = page.one(id="bits").all("g", css="series", data_method="fimaq")
    assert len(lines) == 5  # two classifiers, a CLIP of two scopes, a detector
    for node in (node for chart in charts for node in chart.all()):
        assert not re.search("NaN|null|undefined|Infinity", "".join(node.attrs.values()))


def test_blocks_are_shown(page: report_fakes.Node):
    blocks = page.one(id="blocks")
    titles = [title.text for title in blocks.all("title")]
    assert titles.count("fimaq, blocks.1: 0.03") == 10  # a subject and bits each
    assert titles.count("fimaq, head: 0.25") == 10  # the Fisher weight
    assert not any(title.startswith("rtn") for title in titles)
    assert "no values per block" not in blocks.text


def test_records_without_values_per_block_are_counted(tmp_path: Path):
    grid = fakes.plain_demo(seeds=(1,))
    report_fakes.write_results(
        tmp_path, grid, lambda cell: report_fakes.full_record(cell, blocks={}), examples=None
    )
    blocks = write(tmp_path, grid).one(id="blocks")
    assert not blocks.all("svg")
    assert "18 records of reconstructed cells have no values per block" in blocks.text


def test_stages_of_parts_are_of_one_kind():
    assert kind_of("calibrate vision (reused)") == "calibrate"
    assert kind_of("reconstruct text") == "reconstruct"
    assert kind_of("reconstruct MLPs (reused)") == "reconstruct MLPs"
    assert kind_of("<odd>") == "<odd>"


def test_time_and_memory_of_stages(page: report_fakes.Node):
    time = page.one(id="time")
    titles = [title.text for title in time.all("title")]
    assert "fimaq, reconstruct: 30 s" in titles
    assert "rtn, calibrate: 2.0 GB" in titles
    table = time.all("figure")[0].one("table")
    assert [cell.text for cell in table.one("thead").all("th")] == [
        "method",
        "evaluate",
        "load",
        "calibrate",
        "reconstruct",
        "all",
    ]
    row = table.one("tr", data_method="fimaq")
    assert [cell.text for cell in row.all("td")] == ["1 s", "0.5 s", "2 s", "30 s", "34 s"]


def test_module_maps_are_shared_by_cells_that_differ_in_bits_only(tmp_path: Path):
    grid = fakes.plain_demo(seeds=(1,))
    cells = report_fakes.write_results(tmp_path, grid, examples=None)
    maps = [
        found
        for found in module_maps(make_groups(collect(cells, fakes.ADAPTER).measured))
        if found["subject"] == "demo_vit"
    ]
    assert [found["used_by"] for found in maps] == [["rtn", "brecq", "qdrop"], ["fimaq"]]
    layers = maps[0]["layers"]
    texts = ["linear", "W, uniform, 80 scales (80, 1)", "A, uniform, per tensor", "–"]
    assert list(layers.loc["blocks.0.qkv"]) == texts
    assert layers["weights"].iat[1] == "8 bits, uniform, per tensor"
    assert maps[0]["full_precision"] == ("blocks.0.norm (LayerNorm)",)
    text = write(tmp_path, grid).one(id="modules").text
    assert "rtn, brecq, qdrop 2 layers quantized (2 linear), 1 modules in full precision" in text


def test_examples_stand_beside_full_precision(page: report_fakes.Node):
    boards = page.one(id="examples").all("details", css="board")
    assert [(b.attrs["data-model"], b.attrs["data-bits"]) for b in boards[:2]] == [
        ("demo_vit", "w4a4"),
        ("demo_vit", "w3a3"),
    ]
    table = boards[0].one("table")
    assert [cell.text for cell in table.one("thead").all("th")] == [
        "sample",
        "full precision",
        "rtn",
        "brecq",
        "qdrop",
        "fimaq",
    ]
    rows = table.one("tbody").all("tr")
    assert [len(row.all(css="wrong")) for row in rows] == [0, 4]
    assert "wrong: 01" in rows[1].all("td")[1].text
    assert [cell.text for cell in table.one("tfoot").all("td")] == ["", *["1 of 2"] * 4]
    detection = next(b for b in boards if b.attrs["data-model"] == "demo_mask_rcnn").one("table")
    drawings = detection.one("tbody").all("tr")[1].all("svg", css="drawing")
    # The truth, full precision, four methods.
    assert [len(found.all("polygon")) for found in drawings] == [1, 1, 0, 0, 0, 0]
    assert drawings[0].attrs["aria-label"] == "truth: seven"
    assert drawings[1].attrs["aria-label"] == "found: seven 90%"
    assert drawings[2].attrs["aria-label"] == "found: nothing"


def test_each_picture_is_on_the_page_once(page: report_fakes.Node):
    images = page.all("image")
    assert len(images) == 3 * len(report_fakes.SAMPLES)  # three data sets
    assert all(image.attrs["href"].startswith("data:image/png;base64,") for image in images)
    assert len(page.all("use")) == 2 * 4 + 2 * 4 + 2 * 2 * 6
    assert not page.all("img")


def test_predictions_are_shown_without_data(tmp_path: Path):
    def missing(cell: Cell, ids: Any) -> Any:
        raise DataError(f"No images of {ids[0]}: give --coco.")

    report_fakes.write_results(tmp_path, SMALL)
    page = write(tmp_path, SMALL, get=missing)
    assert not page.all("image")
    assert page.one(id="examples").all("details", css="board")
    assert page.one(id="problems").text.count("give --coco") == 1


def test_one_unknown_sample_does_not_remove_the_other_pictures(tmp_path: Path):
    def known(cell: Cell, ids: Any) -> Any:
        if "test/1" in ids:
            raise DataError("There is no sample test/1.")
        return report_fakes.pictures(cell, ids)

    report_fakes.write_results(tmp_path, SMALL)
    page = write(tmp_path, SMALL, get=known)
    assert len(page.all("image")) == 1
    assert "There is no sample test/1." in page.one(id="problems").text


@pytest.mark.parametrize(
    "content", ["{", '{"samples": 3}', '{"task": "x", "samples": [{"sample": "a", "truth": "b"}]}']
)
def test_damaged_examples_are_listed(tmp_path: Path, content: str):
    cells = report_fakes.write_results(tmp_path, SMALL)
    (fakes.planned_folder(cells[0].request) / "examples.json").write_text(content)
    page = write(tmp_path, SMALL)
    assert "examples.json" in page.one(id="problems").text
    assert page.one(id="examples").all("details", css="board")


def test_examples_outside_the_record_s_folder_are_not_read(tmp_path: Path):
    cells = report_fakes.write_results(tmp_path, SMALL)
    folder = fakes.planned_folder(cells[0].request)
    secret = report_fakes.examples_of(cells[0])
    secret["samples"][0]["truth"] = "a secret"
    (tmp_path / "secret.json").write_text(json.dumps(secret))
    (folder / "examples.json").unlink()
    (folder / "examples.json").symlink_to(tmp_path / "secret.json")
    page = write(tmp_path, SMALL)
    assert "It is a link, so it is not read." in page.one(id="problems").text
    assert "a secret" not in page.text


def hostile_record(cell: Cell) -> ResultRecord:
    """Record with an attack in every text."""
    record = report_fakes.full_record(cell)
    layers = None
    if record.modules is not None:
        layers = record.modules.model_copy(
            update={
                "quantized": [
                    layer.model_copy(update={"name": HOSTILE, "kind": HOSTILE})
                    for layer in record.modules.quantized
                ],
                "full_precision": [HOSTILE],
            }
        )
    return record.model_copy(
        update={
            "variant": f"{HOSTILE}{cell.mark}",
            "notes": [HOSTILE, "javascript:alert(1)"],
            "dataset": record.dataset.model_copy(update={"name": HOSTILE, "split": HOSTILE}),
            "weights": record.weights.model_copy(
                update={"source": HOSTILE, "tag": HOSTILE, "sha256": HOSTILE}
            ),
            "environment": record.environment.model_copy(
                update={"device": HOSTILE, "git_revision": HOSTILE, "versions": {HOSTILE: HOSTILE}}
            ),
            "seconds": {**record.seconds, HOSTILE: 1.0},
            "stage_memory_bytes": {HOSTILE: 5},
            "blocks": {f"{HOSTILE}{name}": figures for name, figures in record.blocks.items()},
            "modules": layers,
        }
    )


def hostile_examples(cell: Cell) -> Any:
    """Examples with an attack in every text."""
    text = json.dumps(report_fakes.examples_of(cell))
    words = json.dumps(HOSTILE)[1:-1]
    for word in ("test/0", "test/1", "seven", "07", "a one"):
        text = text.replace(f'"{word}"', f'"{words}{word}"')
    return json.loads(text)


def write_hostile(folder: Path) -> Path:
    """Write the page of records with attacks and return its path."""
    report_fakes.write_results(folder, GRID, hostile_record, hostile_examples)
    cells = report_fakes.write_results(
        folder, GRID, hostile_record, hostile_examples, keep=lambda cell: cell.seed != 2
    )
    (fakes.planned_folder(cells[-1].request) / "result.json").unlink()
    (fakes.planned_folder(cells[-1].request) / "error.log").write_text(
        HOSTILE.replace("\u2028", "")
    )
    # A folder's name may be no text at all.
    bad = Path(os.fsdecode(os.fsencode(folder / "runs" / "<script>window.hacked=3<") + b"\xff"))
    write_record(hostile_record(cells[0]), bad)
    content = json.loads((bad / "result.json").read_text())
    (bad / "result.json").write_text(json.dumps(content | {HOSTILE: 1}))
    return report_fakes.write_page(folder, GRID)


def test_texts_of_records_are_escaped(tmp_path: Path):
    page = report_fakes.read_page(write_hostile(tmp_path))
    assert len(page.all("script")) == 1
    assert len(page.all("style")) == 1
    assert not page.all("img")
    assert printable(HOSTILE) in page.text
    for node in page.all():
        assert not any(name.startswith("on") or name == "style" for name in node.attrs), node.attrs
        for name in ("href", "src", "action", "formaction"):
            assert node.attrs.get(name, "#").startswith(
                ("#", "data:image/png", "data:image/jpeg", "data:,")
            )
    labels = [node.attrs["aria-label"] for node in page.all("svg", css="drawing")]
    assert any(printable(HOSTILE) in label for label in labels)


def test_the_policy_allows_this_script_and_style_alone(tmp_path: Path):
    report_fakes.write_results(tmp_path, SMALL)
    page = write(tmp_path, SMALL)
    policy = page.one("meta", http_equiv="Content-Security-Policy").attrs["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        digest = base64.b64encode(hashlib.sha256(page.one(tag).text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert "connect-src" not in rules
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://", text)


def test_headings_are_in_order_and_parts_are_named(page: report_fakes.Node):
    levels = [int(node.tag[1]) for node in page.all() if re.fullmatch(r"h[1-6]", node.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    for tag in ("header", "nav", "main", "footer"):
        page.one(tag)
    links = [link.attrs["href"] for link in page.one("nav").all("a")]
    assert links == [f"#{part.attrs['id']}" for part in page.all("section", css="part")]
    assert page.one("a", css="skip").attrs["href"] == "#content"
    for table in page.all("table"):
        assert all(head.attrs.get("scope") for head in table.all("th"))
