"""Published tables of a test's own, and records of their cells."""

from pathlib import Path
from typing import Any

import yaml
from diff_fakes import published_record

from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.names import load_names
from benchmarks.published.table import PublishedTable
from benchmarks.results.scores import Measured
from tasks.common.record import Metric


def content(**changes: Any) -> dict[str, Any]:
    """A table with a measured row, a context row and full precision."""
    vit_s, deit_t = "vit_small_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_patch16_224.fb_in1k"
    usual: dict[str, Any] = {
        "title": "A table",
        "caption": "Its caption.",
        "paper": "A paper",
        "profile": "paper",
        "section": "classification",
        "seeds": [3407],
        "bits": ["w4a4"],
        "task": "classification",
        "dataset": "ImageNet-1k val",
        "metric": "top1",
        "source": "github:ShiheWang/FIMA-Q:README.md@64c4b00a",
        "protocol": {"calibration_images": 1024, "steps": 20000},
        "columns": [{"head": "ViT-S", "model": vit_s}, {"head": "DeiT-T", "model": deit_t}],
        "rows": [
            {"head": "Full precision", "bits": ["fp"], "method": "FP", "measure": "fp"},
            {"head": "FIMA-Q", "method": "FIMA-Q", "measure": "fimaq"},
        ],
    }
    return {**usual, **changes}


def written(folder: Path, **changes: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content(**changes)), encoding="utf-8")
    return str(path)


def row(**changes: Any) -> list[dict[str, Any]]:
    """Rows of :func:`content` with the last one changed; None takes a key away."""
    changed = {**content()["rows"][1], **changes}
    return [
        content()["rows"][0],
        {name: value for name, value in changed.items() if value is not None},
    ]


def cells_of(
    table: PublishedTable, seeds: tuple[int, ...] | None = None, results: Path = Path("results")
) -> list[Cell]:
    """The cells of a table's grid."""
    return expand(table.grid(), Filters(seeds=seeds), RunOptions(results))


def finished(cell: Cell, value: float, stderr: float = 0.1, **changes: Any) -> Measured:
    """A cell measured on ImageNet with the published weights; ``value`` of all its metrics."""
    (tag,) = {entry.tag for entry in load_names().models.values() if entry.id == cell.model}
    recipe = cell.request.recipe
    names = ("AP_box", "AP_mask") if cell.task == "detection" else ("top1",)
    metrics = {name: Metric(value=value, stderr=stderr) for name in names}
    record = published_record(recipe, tag, task=cell.task, metrics=metrics, **changes)
    return Measured(cell, record)
