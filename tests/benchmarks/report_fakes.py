"""Results for reports, with all fields that records can have, and a small reader of pages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import benchmark_fakes as fakes

from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import Grid, load_grid
from tasks.common.record import (
    BlockFigures,
    Calibration,
    LayerEntry,
    ModuleMap,
    ResultRecord,
    SignedMetric,
    write_record,
)

if TYPE_CHECKING:
    from PIL.Image import Image

METHODS = ("fp", "rtn", "brecq", "qdrop", "fimaq")
BLOCKS = ("patch_embed", "blocks.0", "blocks.1", "head")
SAMPLES = ("test/0", "test/1")


def report_grid(**changes: Any) -> Grid:
    """Return a grid of all three tasks: a few models, four methods, two bits, two seeds."""
    demo = load_grid("demo")
    models = {
        "classification": ("demo_vit", "demo_swin"),
        "retrieval": ("demo_clip",),
        "detection": ("demo_mask_rcnn",),
    }
    tasks = {
        name: demo.tasks[name].model_copy(
            update={"models": found, "methods": None, "seeds": None, "overrides": {}}
        )
        for name, found in models.items()
    }
    return demo.model_copy(
        update={"tasks": tasks, "methods": METHODS, "seeds": (1, 2), "extra": (), **changes}
    )


def full_record(cell: Cell, **changes: Any) -> ResultRecord:
    """Return a cell's record with module map, calibration, values per block, memory of stages."""
    request = cell.request
    record = fakes.record_of(request, fakes.fake_value(request))
    full = {
        name: metric.model_copy(update={"value": metric.value + 1})
        for name, metric in record.metrics.items()
    }
    update: dict[str, Any] = {"finished": "2025-03-04T05:06:07+00:00", "examples": "examples.json"}
    recipe = request.recipe
    if recipe is not None:
        update |= {
            "fp_metrics": record.fp_metrics or full,
            "calibration": Calibration(
                ids=[f"c{i}" for i in range(17)], transform="eval", fingerprint="a" * 64
            ),
            "modules": modules(recipe.w_bits, recipe.a_bits, recipe.per_token),
            "seconds": {"load": 0.5, "calibrate": 2.0, "evaluate": 1.0}
            | ({"reconstruct": 30.0} if recipe.reconstruct else {}),
            "stage_memory_bytes": {"load": 10**8, "calibrate": 2 * 10**9, "evaluate": 10**9},
        }
        update["fidelity"] = {
            "kl": SignedMetric(value=0.25, stderr=0.01),
            "snr_db": SignedMetric(value=-1.5, stderr=0.1),
        }
        if recipe.reconstruct:
            weight = 0.25 if recipe.method == "fimaq" else None
            update["blocks"] = {
                name: BlockFigures(error=0.01 * (i + 1), fisher=weight)
                for i, name in enumerate(BLOCKS)
            }
    return record.model_copy(update={**update, **changes})


def modules(w_bit: int, a_bit: int, tokens: bool) -> ModuleMap:
    """Return a map of two layers with ranges per tensor, or per token (``tokens``)."""
    ranges = "33 scales (1, 33, 1)" if tokens else "per tensor"
    shared: dict[str, Any] = {"kind": "linear", "input_bits": a_bit, "input_ranges": ranges}
    weights = {"weight_bits": w_bit, "weight_ranges": "80 scales (80, 1)"}
    head = {"weight_bits": 8, "weight_ranges": "per tensor"}
    layers = [
        LayerEntry(name="blocks.0.qkv", **shared, **weights),
        LayerEntry(name="head", **shared, **head),
    ]
    return ModuleMap(quantized=layers, full_precision=["blocks.0.norm (LayerNorm)"])


def examples_of(cell: Cell) -> dict[str, Any]:
    """Return examples of two samples; quantized models miss the second sample."""
    miss = cell.request.recipe is not None
    if cell.task == "detection":
        box = {
            "name": "seven",
            "box": [4.0, 5.0, 20.0, 30.0],
            "polygons": [[4.0, 5.0, 24.0, 5.0, 24.0, 35.0]],
        }
        samples: list[dict[str, Any]] = [
            {
                "sample": name,
                "size": [64, 48],
                "truth": [box],
                "found": [] if miss and i else [box | {"score": 0.9}],
            }
            for i, name in enumerate(SAMPLES)
        ]
    elif cell.task == "retrieval":
        right, wrong = (
            {"caption": words, "score": 0.5, "correct": ok}
            for words, ok in (("a seven", True), ("a one", False))
        )
        samples = [
            {
                "sample": name,
                "truth": ["a seven"],
                "top": [wrong, right] if miss and i else [right, wrong],
            }
            for i, name in enumerate(SAMPLES)
        ]
    else:
        right, wrong = (
            {"name": name, "share": share} for name, share in (("07", 0.75), ("01", 0.25))
        )
        samples = [
            {"sample": name, "truth": "07", "top": [wrong, right] if miss and i else [right, wrong]}
            for i, name in enumerate(SAMPLES)
        ]
    return {"task": cell.task, "samples": samples}


def write_results(
    tmp_path: Path,
    grid: Grid,
    record: Callable[[Cell], ResultRecord] = full_record,
    examples: Callable[[Cell], Any] | None = examples_of,
    keep: Callable[[Cell], bool] = lambda cell: True,
) -> list[Cell]:
    """Write records, and examples beside them; return all cells of the grid."""
    cells = expand(grid, Filters(), RunOptions(results=tmp_path))
    for cell in filter(keep, cells):
        folder = fakes.planned_folder(cell.request)
        write_record(record(cell), folder)
        if examples is not None:
            (folder / "examples.json").write_text(json.dumps(examples(cell)), encoding="utf-8")
    return cells


def pictures(cell: Cell, ids: Sequence[str]) -> Mapping[str, Image]:
    """Return a grey picture of each sample."""
    from PIL import Image

    return {name: Image.new("RGB", (64, 48), (90, 90, 90)) for name in ids}


def write_page(folder: Path, grid: Grid, get: Any = pictures) -> Path:
    """Write the report of the results in a folder and return its path."""
    from benchmarks.report.page import write_report

    path, options = folder / "report.html", RunOptions(results=folder)
    write_report(grid, options, fakes.ADAPTER, path, get=get)
    return path


@dataclass
class Node:
    """An element of a page."""

    tag: str
    attrs: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Text of the element and of all elements below."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str = "", css: str = "", **attrs: str) -> list[Node]:
        """Return elements below by tag, class and attributes (``data_method``: ``data-method``)."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attrs.items()}
        return [
            node
            for node in self._below()
            if (not tag or node.tag == tag)
            and (not css or css in node.attrs.get("class", "").split())
            and all(node.attrs.get(name) == value for name, value in wanted.items())
        ]

    def one(self, tag: str = "", css: str = "", **attrs: str) -> Node:
        """Return the only element of this kind."""
        (found,) = self.all(tag, css, **attrs)
        return found

    def _below(self) -> Iterator[Node]:
        for child in self.children:
            if isinstance(child, Node):
                yield child
                yield from child._below()


class _Reader(HTMLParser):
    _VOID = ("meta", "link", "input", "br", "hr", "img")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("document", {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(node)
        if tag not in self._VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def read_page(path: Path) -> Node:
    """Read a page; elements must be closed in order."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert len(reader._open) == 1
    return reader.root
