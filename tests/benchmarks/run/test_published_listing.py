"""The listing of published tables: what is done, what is here, and what the rest will cost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark_fakes as fakes
import pytest

from benchmarks.grid.cell import Cell, Places, RunOptions, default_adapter
from benchmarks.grid.expand import Filters, expand
from benchmarks.published.table import load_table, table_names
from tasks.common.record import Environment, write_record

CPU = Environment(versions={}, git_revision="x", device="cpu Here", threads=2)
VIT_SMALL = "vit_small_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    """ImageNet's folders, ViT-S with weights and measured full precision, a rehearsed Swin-B."""
    for part in ("train", "val"):
        (tmp_path / "imagenet" / part).mkdir(parents=True)
    weights = tmp_path / "weights" / f"{VIT_SMALL}.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"x")
    places = Places(imagenet=tmp_path / "imagenet")
    options = RunOptions(tmp_path / "results", places, tmp_path / "weights")
    cells = expand(load_table("fimaq").grid(), Filters(), options)
    measured = next(cell for cell in cells if (cell.model, cell.method) == ("vit_small", "fp"))
    changes = {"seconds": {"evaluate": 100.0}, "peak_memory_bytes": 2 * 10**9, "environment": CPU}
    record = fakes.placed_record(measured.request, 81.0).model_copy(update=changes)
    write_record(record, default_adapter().planned_folder(measured.request))
    swin = [cell for cell in cells if (cell.model, cell.method) == ("swin_base", "fimaq")]
    path = tmp_path / "results" / "rehearsal" / "rehearsal.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"cells": [rehearsed(cell) for cell in swin]}))
    return options


def rehearsed(cell: Cell) -> dict[str, object]:
    return {
        **cell.name._asdict(),
        "seed": cell.seed,
        "seconds": 3600.0,
        "peak_memory_bytes": 30 * 10**9,
        "device": "NVIDIA H200",
        "threads": 4,
        "disk_bytes": 2 * 10**9,
        "rehearsed": {"steps": 20},
    }


def published(options: RunOptions, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command without the hub; its last line says whether PyTorch was imported."""
    # What is committed changes, so it is left out here.
    code = "import functools, pathlib, sys\nfrom benchmarks import cli\n"
    code += "from benchmarks.run import plan, published\n"
    code += "nothing = functools.partial(published.gather, reference=pathlib.Path('none'))\n"
    code += "published.gather = nothing\n"
    code += "plan.gather = lambda *given: nothing(*given[:4])\n"
    code += "try: cli.cli()\nfinally: print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[3]
    assert options.weights is not None
    empty = options.weights.parent / "hub"
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(empty)}
    environment = {**os.environ, **hub, "PYTHONPATH": str(root)}
    places = ["--imagenet", str(options.data.imagenet), "--weights", str(options.weights)]
    command = [sys.executable, "-c", code, "published", *places, *arguments]
    command += ["--results", str(options.results)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def columns(line: str) -> list[str]:
    return [part.strip() for part in line.split("  ") if part.strip()]


def test_all_tables_are_listed_with_what_they_need_and_cost(options: RunOptions):
    done = published(options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    cut = [columns(line) for line in lines]
    rows = {row[0]: row for row in cut if row and row[0] in table_names()}
    assert list(rows) == table_names()
    # 2 x (48 + 87 + 44 + 49 + 88 + 115) published minutes, 2 rehearsed hours; 6 x 100 s on the CPU
    assert rows["fimaq"] == [
        "fimaq",
        "FIMA-Q: ImageNet-1k top-1 accuracy",
        "21",
        "1",
        "IMAGENET: yes",
        "1 of 7",
        "16 h 22 min",
        "10 min",
        "30.0 GB",
        "4.0 GB",
        "6 from finished cells; 2 rehearsed; 12 published",
    ]
    # Full precision of the same models is shared by the tables.
    assert rows["aphq"][3:6] == ["1", "IMAGENET: yes", "1 of 7"]
    assert rows["aphq-coco"][3:6] == ["0", "COCO: no", "0 of 4"]
    assert "Missing: the data set COCO 2017." in done.stdout
    assert "Missing: the data set ImageNet." not in done.stdout
    missing = lines[next(i for i, line in enumerate(lines) if line.startswith("Missing weights")) :]
    deit = "deit_tiny_patch16_224.fb_in1k"
    assert f"  {deit}: hf download timm/{deit} model.safetensors" in missing
    detector = (
        "  mask_rcnn_swin_tiny.coco_3x: no hub has them, put the file into the WEIGHTS folder"
    )
    assert detector in missing
    assert not any(VIT_SMALL in line for line in missing)
    assert lines[-1] == "False"


def test_a_table_is_shown_cell_by_cell(options: RunOptions):
    done = published(options, "--table", "fimaq")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("fimaq: FIMA-Q: ImageNet-1k top-1 accuracy (FIMA-Q (CVPR 2025), ")
    assert lines[1] == "All cells: task classification."
    rows = [" ".join(line.split()[1:]) for line in lines]
    assert "vit_small fp fp - - - - - - yes 2 min 2.0 GB" in rows
    assert "vit_base fp fp - - - - - - no ~2 min (CPU) ~2.0 GB" in rows
    settings = "3407 20000 fisher_dplr 1024 32 train no"
    for bits in ("w4a4", "w3a3"):
        assert f"vit_base fimaq {bits} {settings} ~87 min -" in rows
        assert f"swin_base fimaq {bits} {settings} ~60 min ~30.0 GB" in rows
    assert "21 cells, 1 done, 20 to run." in lines
    assert any(line.startswith("GPU time: about 16 h 22 min with --jobs 1 ") for line in lines)
    assert any(line.startswith("CPU time: about 10 min with --jobs 1 ") for line in lines)
    assert "    12  published, an H800 (GLF-Q Table 7)" in lines
    commands = [line for line in lines if "hf download" in line]
    assert len(commands) == 6
    deit = "deit_tiny_patch16_224.fb_in1k"
    assert f"  {deit}: hf download timm/{deit} model.safetensors" in commands


def test_an_unknown_table_is_one_line_with_a_suggestion(options: RunOptions):
    done = published(options, "--table", "fima")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Unknown table 'fima'. Did you mean 'fimaq'?")
    assert done.stderr.count("\n") == 1
