"""Published tables: numbers are the CSV files', cells the profile's, and mistakes are named."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from published_fakes import finished, row, written

from benchmarks.grid.cell import Cell, Places, RunOptions
from benchmarks.grid.expand import Filters, expand, parse_filters
from benchmarks.grid.names import PUBLISHED
from benchmarks.grid.schema import GridError, load_grid
from benchmarks.published.table import TABLES, TableError, load_table, table_names
from benchmarks.tables.reproduction import Reproduction
from fimaq_core.errors import FimaqError
from fimaq_core.recipe import METHODS
from tasks.common.cell.identity import planned_folder

NAMES = yaml.safe_load((PUBLISHED / "names.yaml").read_text(encoding="utf-8"))
#: Measured cells by method, of each table.
COUNTS = {
    "fimaq": {"fp": 7, "fimaq": 14},
    "fimaq-ablation": {"fp": 3, "fimaq": 30},
    "aphq": {"fp": 7, "mlp-recon": 7, "qdrop-aphq": 14, "aphq": 14},
    "aphq-coco": {"fp": 4, "mlp-recon": 4, "qdrop-aphq": 4, "aphq": 4},
    "adalog": {"fp": 7, "adalog": 21, "adalog-recon": 14},
    "repq": {"fp": 7, "repq": 14},
    "erq": {"fp": 7, "erq": 7},
    "lsvit": {"fp": 7, "lsvit": 19},
    "glfq": {"fp": 7, "glfq": 14},
    "glfq-ablation": {"fp": 7, "glfq": 49, "fimaq": 7},
    "clip-retrieval": {"fp": 1, "repq": 4},
}
#: Rows and columns, and how many of the cells have a published number.
SIZES = {
    "fimaq": (23, 7, 161),
    "fimaq-ablation": (20, 3, 29),
    "aphq": (20, 7, 140),
    "aphq-coco": (9, 8, 72),
    "adalog": (6, 7, 42),
    "repq": (10, 7, 63),
    "erq": (23, 7, 161),
    "lsvit": (11, 7, 50),
    "glfq": (12, 7, 84),
    "glfq-ablation": (11, 7, 77),
    "clip-retrieval": (15, 8, 27),
}


def rows(name: str) -> list[dict[str, str]]:
    with (PUBLISHED / f"{name}.csv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def cells_of(name: str, tmp_path: Path) -> list[Cell]:
    return expand(load_table(name).grid(), Filters(), options(tmp_path))


def options(tmp_path: Path) -> RunOptions:
    places = Places(tmp_path / "imagenet", tmp_path / "coco", tmp_path / "flickr")
    return RunOptions(tmp_path, places)


def glfq(method: str, point: str | None) -> list[dict[str, Any]]:
    """Rows of a table with one part of GLF-Q's ablation."""
    place = {"study": "glfq_components", "source": "GLF-Q paper full text (2026) Table 4"}
    protocol = {"steps": 3000}
    return row(head="GLF-Q", method=method, measure="glfq", point=point, protocol=protocol, **place)


def test_the_tables_are_those_that_are_tested():
    assert table_names() == sorted(COUNTS) == sorted(SIZES)


@pytest.mark.parametrize("name", COUNTS)
def test_a_table_has_its_cells_and_measures_some(name: str):
    table = load_table(name)
    numbers = sum(1 for cell in table.cells if cell.published is not None)
    assert (len(table.lines), len(table.columns), numbers) == SIZES[name]
    methods = [cell.method for cell in table.measured]
    assert {method: methods.count(method) for method in methods} == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_every_number_is_the_value_of_one_row(name: str):
    table = load_table(name)
    stated_once = yaml.safe_load((TABLES / f"{name}.yaml").read_text(encoding="utf-8"))
    csv_rows = {False: rows("accuracy"), True: rows("ablation")}
    for cell in table.cells:
        line, column = table.lines[cell.row], table.columns[cell.column]
        if cell.published is None:
            assert cell.unpublished
            continue
        parts = (part.model_dump(exclude_none=True) for part in (line.row, column))
        stated = {**stated_once, **next(parts), **next(parts)}
        sources = stated["source"]
        widths = {"fp": ("32", "32"), "unstated": ("", "")}.get(line.bits)
        widths = widths or tuple(line.bits[1:].split("a"))
        scope = stated.get("scope")
        models = {
            model
            for model, entry in NAMES["models"].items()
            if entry["tag"] == stated["model"]
            and (stated["method"] == "FP" or scope in (None, entry.get("scope")))
        } or {"unstated"}
        keys = ("study",) if "study" in stated else ("task", "dataset")
        found = [
            entry
            for entry in csv_rows["study" in stated]
            if all(entry[key] == stated[key] for key in (*keys, "method", "metric"))
            and entry["variant"] == stated.get("variant", "")
            and entry["model"] in models
            and (entry["w_bit"], entry["a_bit"]) == widths
            and entry["source"] in (sources if isinstance(sources, list | tuple) else [sources])
        ]
        assert [{**cell.published, **entry} for entry in found] == [cell.published]


@pytest.mark.parametrize("name", COUNTS)
def test_weights_have_full_names_which_are_those_of_the_measured_models(name: str):
    tags = {entry["tag"]: entry["id"] for entry in NAMES["models"].values()}
    for cell in load_table(name).cells:
        if cell.weights != "unstated":
            assert "." in cell.weights
            assert cell.name is None or cell.name.model == tags[cell.weights]


@pytest.mark.parametrize("name", COUNTS)
def test_measured_cells_are_the_profile_s_own(name: str, tmp_path: Path):
    table = load_table(name)
    mine = cells_of(name, tmp_path)
    assert [cell.name for cell in mine] != []
    assert {cell.name for cell in mine} == set(table.measured)
    assert len(mine) == len(table.measured)
    profile = load_grid(table.profile)
    models = [m for part in profile.tasks.values() for m in (*part.models, *part.available)]
    theirs = expand(profile, Filters(models=tuple(models)), options(tmp_path))
    by_key = {cell.key: cell for cell in theirs}
    for cell in mine:
        assert by_key[cell.key].request == cell.request
        assert set(cell.axis_points) <= set(by_key[cell.key].axis_points)


@pytest.mark.parametrize("name", ["fimaq", "fimaq-ablation", "aphq-coco", "clip-retrieval"])
def test_folders_are_those_of_the_profile(name: str, tmp_path: Path):
    profile = load_grid(load_table(name).profile)
    theirs = {cell.key: cell for cell in expand(profile, Filters(), options(tmp_path))}
    mine = cells_of(name, tmp_path)
    folders = {planned_folder(cell.request) for cell in mine}
    assert len(folders) == len(mine)
    assert folders == {planned_folder(theirs[cell.key].request) for cell in mine}


def test_released_settings_on_an_axis_are_one_cell(tmp_path: Path):
    cells = [cell for cell in cells_of("fimaq-ablation", tmp_path) if not cell.point]
    places = [cell.axis_points for cell in cells if cell.method == "fimaq"]
    assert places == [(("loss", "fisher_dplr"), ("k", "5"))] * 3


def test_an_ablation_has_the_recipe_fields_of_its_rows(tmp_path: Path):
    cells = [cell for cell in cells_of("glfq-ablation", tmp_path) if cell.model == "vit_small"]
    shown = {}
    for cell in cells[1:]:
        recipe = cell.request.recipe
        assert recipe is not None
        shown[f"{cell.method} {cell.point}".strip()] = recipe.changes()
    assert shown == {
        "fimaq parts=both": {"rotate": "hadamard", "reconstruct_mlp": True},
        "glfq": {},
        "glfq parts=none": {"rotate": "none", "reconstruct_mlp": False},
        "glfq parts=mlp": {"rotate": "none"},
        "glfq parts=rotation": {"reconstruct_mlp": False},
        "glfq loss=mse": {"loss": "mse"},
        "glfq loss=fisher_dplr": {"loss": "fisher_dplr"},
        "glfq loss=global": {"glf_weight": 0.0},
    }
    main = {planned_folder(cell.request) for cell in cells_of("glfq", tmp_path)}
    assert [planned_folder(cell.request) in main for cell in cells] == [
        cell.method == "fp" or (cell.method == "glfq" and not cell.point) for cell in cells
    ]


def test_an_ablation_s_measured_cell_gets_a_verdict(tmp_path: Path):
    cells = {(c.model, c.point): c for c in cells_of("glfq-ablation", tmp_path)}
    measured = [
        finished(cells["vit_small", "parts=mlp"], 63.6),
        finished(cells["vit_small", "loss=mse"], 70.0),
        finished(cells["deit_tiny", "parts=both"], 55.3),
    ]
    found = Reproduction(load_table("glfq-ablation"), measured).judged
    assert [tuple(values) for values in found[["row", "published", "verdict"]].values] == [
        ("Parts MR", 63.53, "reproduced"),
        ("Loss local MSE", 60.48, "above"),
        ("FIMA-Q with both parts", 55.29, "reproduced"),
    ]


def test_filters_narrow_a_table_and_may_add_seeds(tmp_path: Path):
    grid = load_table("aphq").grid()
    chosen = parse_filters(grid, models="vit_small", methods="aphq", bits="w3a3", seeds="1,2")
    found = expand(grid, chosen, options(tmp_path))
    assert [cell.label for cell in found] == [
        "vit_small aphq w3a3 seed 1",
        "vit_small aphq w3a3 seed 2",
    ]
    # What the table does not have at these bits does not come with them.
    assert len(expand(grid, parse_filters(grid, bits="w3a3"), options(tmp_path))) == 4 * 7


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"models": "vit_smal"}, "model 'vit_smal' in table 'fimaq'. Did you mean 'vit_small'?"),
        ({"models": "swin_tiny"}, "Unknown model 'swin_tiny' in table 'fimaq'."),
        ({"methods": "qdrop"}, "Table 'fimaq' has no method 'qdrop'. It has: fimaq, fp."),
        ({"bits": "w6a6"}, "Table 'fimaq' has no bits 'w6a6'. It has: fp, w3a3, w4a4."),
    ],
)
def test_filters_that_the_table_does_not_have_are_named(filters: dict[str, str], words: str):
    with pytest.raises(GridError) as caught:
        parse_filters(load_table("fimaq").grid(), **filters)
    assert words in str(caught.value)


def test_a_file_of_ones_own_is_a_table(tmp_path: Path):
    table = load_table(written(tmp_path))
    assert (table.name, table.profile, len(table.cells)) == ("mine", "paper", 4)
    assert len(expand(table.grid(), Filters(), options(tmp_path))) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocoll": {}}, "Unknown key 'protocoll'. Did you mean 'protocol'?"),
        ({"rows": row(methood="x")}, "Unknown key 'rows.1.methood'. Did you mean 'method'?"),
        ({"columns": [{"head": "A", "modl": "x"}]}, "Unknown key 'columns.0.modl'. Did you mean"),
        ({"seeds": []}, "seeds: "),
        ({"profile": "papr"}, "Unknown profile 'papr'. Did you mean 'paper'?"),
        ({"section": "clasification"}, "no section 'clasification'. Did you mean"),
        ({"bits": ["w4b4"]}, "'w4b4' is no bit-width"),
        (
            {"columns": [{"head": "ViT-S", "model": "vit_small_patch16_224"}]},
            "Full precision fp, ViT-S: unknown model 'vit_small_patch16_224' (full names only). "
            "Did you mean 'vit_small_patch16_224.augreg_in21k_ft_in1k'?",
        ),
        ({"columns": [{"head": "A"}]}, "neither table, row nor column states 'model'"),
        ({"source": "GLF-Q paper"}, "unknown source 'GLF-Q paper'."),
        ({"rows": row(method="FIMAQ")}, "no published number for method 'FIMAQ'"),
        ({"rows": row(variant="other")}, "number for method 'FIMA-Q', variant 'other'"),
        (
            {
                "rows": row(
                    source=[
                        "github:ShiheWang/FIMA-Q:README.md@64c4b00a",
                        "GLF-Q paper full text (2026) Table 1",
                    ]
                )
            },
            "FIMA-Q w4a4, ViT-S: 2 published numbers for method 'FIMA-Q'",
        ),
        ({"rows": row(measure="fimqa")}, "Unknown method 'fimqa'. Did you mean 'fimaq'?"),
        (
            {"rows": row(measure="qdrop")},
            "'qdrop' cannot be measured for FIMA-Q (variant ''). "
            "names.yaml lets it compare with fimaq",
        ),
        (
            {
                "rows": row(
                    method="QDrop",
                    measure="qdrop",
                    variant="rerun by ERQ",
                    source="github:zysxmu/ERQ:img.png (results image in README)@2f5b4cee",
                )
            },
            "lets it compare with no method here",
        ),
        ({"rows": row(unpublished="no text")}, "is said to be unpublished (no text), but github:"),
        ({"rows": row(unpublished={"ViT-X": "no"})}, "FIMA-Q: unknown column 'ViT-X'."),
        (
            {"protocol": {"calibration_images": 512}},
            "the protocol says calibration_images 512, but the recipe of fimaq has 1024",
        ),
        ({"protocol": {"stepps": 1}}, "field 'stepps' in protocol. Did you mean 'steps'?"),
        ({"protocol": None}, "no 'protocol'"),
        ({"rows": row(point="loss=mse")}, "profile 'paper' has no axis 'loss'"),
        (
            {"profile": "paper-ablation", "rows": row(point="loss=mse")},
            "its published number is not of loss=mse",
        ),
        (
            {"profile": "paper-ablation", "rows": row(point="loss=mze")},
            "axis 'loss' has no point 'mze'.",
        ),
        (
            {"profile": "paper-parts", "bits": ["w3a3"], "rows": glfq("GLF+MR", "parts=both")},
            "GLF-Q w3a3, ViT-S: its published number is not of parts=both: add 'unpublished'",
        ),
        (
            {"profile": "paper-parts", "bits": ["w3a3"], "rows": glfq("GLF+MR", None)},
            "its published number is not of the released settings",
        ),
        ({"metric": "top5"}, "no published number for method 'FP', metric 'top5'"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(TableError) as caught:
        load_table(written(tmp_path, **changes))
    assert words in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_scopes_are_asked_for_where_there_are_several(tmp_path: Path):
    column = {
        "head": "B/32",
        "model": "ViT-B-32-quickgelu.openai",
        "task": "zero-shot classification",
        "source": "github:CipherEnigma/qwt-ml:QwT-mm-RepQ-ViT/README.md@6a31ee05",
    }
    changes = {
        "section": "zero-shot",
        "columns": [column],
        "bits": ["w6a6"],
        "protocol": {"calibration_images": 32},
        "rows": [{"head": "RepQ-ViT", "method": "RepQ-ViT", "measure": "repq"}],
    }
    with pytest.raises(TableError, match=r"needs one scope of vision, both \(given: None\)"):
        load_table(written(tmp_path, **changes))
    column["scope"] = "both"
    (cell,) = load_table(written(tmp_path, **changes)).cells
    assert cell.name is not None
    assert cell.name.scope == "both"


def test_names_and_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(TableError, match=r"Unknown table 'fimqa'. Did you mean 'fimaq'\?"):
        load_table("fimqa")
    with pytest.raises(TableError, match="Cannot read the table"):
        load_table(str(tmp_path / "none.yaml"))
    for text, words in (("a: [", "is not YAML"), ("- a", "must hold 'key: value' lines")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(TableError, match=words):
            load_table(str(tmp_path / "bad.yaml"))


def test_a_changed_default_is_no_other_protocol(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "fimaq", {"steps": 5000})
    words = "protocol says steps 20000, but the recipe of fimaq has 5000"
    with pytest.raises(FimaqError, match=words):
        load_table("fimaq")


def test_files_hold_no_number_that_a_csv_file_has():
    values = {entry["value"] for entry in rows("accuracy") if "." in entry["value"]}
    for path in TABLES.glob("*.yaml"):
        words = path.read_text(encoding="utf-8").replace(",", " ").replace("]", " ").split()
        assert not values & set(words)
