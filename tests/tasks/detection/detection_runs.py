"""Cells of the demo detector with few images and few steps."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fimaq_core.checkpoint import load_checkpoint
from fimaq_core.layers import set_quantized
from fimaq_core.progress import OnProgress, silent
from fimaq_core.recipe import make_recipe
from tasks.common.cell.prepare import whole_module
from tasks.common.cell.run import run_cell
from tasks.common.cli.commands import build_group, main
from tasks.common.record import ResultRecord, read_record, recipe_of
from tasks.common.registry import defaults
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.common.task import Chains, LoadedModel
from tasks.detection.command import OPTIONS
from tasks.detection.detector import QuantizedDetector
from tasks.detection.task import TASK

BACKBONE = [
    "patch_embed",
    *(
        f"stages.{stage}.{name}"
        for stage in range(3)
        for name in ("blocks.0", "blocks.1", "downsample")
    ),
    "stages.3.blocks.0",
]
SEGMENTS = [*(f"detector.backbone.{name}" for name in BACKBONE), "detector.neck"]
#: Layers of a Swin block with what multiplies activations.
BLOCK = ["attn.qkv", "attn.query_key", "attn.attention_value", "attn.proj", "mlp.fc1", "mlp.fc2"]
LAYERS = {
    "backbone": {
        "detector.backbone.patch_embed.projection",
        *(
            f"detector.backbone.{name}.{layer}"
            for name in BACKBONE
            if "blocks" in name
            for layer in BLOCK
        ),
        *(f"detector.backbone.{name}.reduction" for name in BACKBONE if "downsample" in name),
    },
    "fpn": {
        f"detector.neck.{kind}_convs.{level}.conv"
        for kind in ("lateral", "fpn")
        for level in range(4)
    },
    "rpn": {f"detector.rpn_head.rpn_{name}" for name in ("conv", "cls", "reg")},
    "roi": {
        *(f"bbox.head.{name}" for name in ("shared_fcs.0", "shared_fcs.1", "fc_cls", "fc_reg")),
        *(
            f"mask.head.{name}"
            for name in ("convs.0.conv", "convs.1.conv", "convs.2.conv", "upsample", "conv_logits")
        ),
    },
}

MODEL = ModelRequest("demo_mask_rcnn")
LIMIT = 8
QUICK: dict[str, Any] = {
    "calibration_images": 2,
    "range_images": 2,
    "range_search": "minmax",
    "range_candidates": 16,
    "steps": 2,
    "fisher_k": 1,
    "mlp_steps": 2,
}
#: The same for the command line.
FLAGS = [
    text for name, value in QUICK.items() for text in (f"--{name.replace('_', '-')}", str(value))
]


def cell(folder: Path, method: str = "fimaq", **changes: Any) -> CellRequest:
    """Request of a cell: records in ``folder/runs``, files that cells share in ``folder``."""
    recipe = make_recipe(method, defaults("detection"), QUICK, changes)
    return CellRequest(
        "detection", MODEL, DataRequest(limit=LIMIT), recipe, results=folder / "runs"
    )


@dataclass(frozen=True)
class Done:
    """A finished cell."""

    record: ResultRecord
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "quantized.safetensors"

    @property
    def state(self) -> dict[str, Tensor]:
        return load_file(self.checkpoint)

    @property
    def bits(self) -> dict[str, tuple[int, int]]:
        """Bits of every quantized layer: weight and input, or the operands of a product."""
        assert self.record.modules is not None
        return {
            entry.name: (
                entry.weight_bits if entry.other_bits is None else entry.other_bits,
                entry.input_bits,
            )
            for entry in self.record.modules.quantized
        }


def done(request: CellRequest, on_progress: OnProgress = silent) -> Done:
    path = run_cell(request, on_progress)
    return Done(read_record(path), path.parent)


def restored(cell: Done) -> tuple[LoadedModel, Chains, QuantizedDetector]:
    """The model that was measured, again."""
    recipe = recipe_of(cell.record)
    assert recipe is not None
    loaded = TASK.load(MODEL)
    chains = TASK.chains(loaded, recipe)
    load_checkpoint(cell.checkpoint, whole_module(chains), None)
    set_quantized(whole_module(chains), True)
    model = TASK.assemble(loaded, chains)
    assert isinstance(model, QuantizedDetector)
    return loaded, chains, model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in one.items()
    )


def command(*arguments: object, fails: bool = False) -> str:
    """Run the command line in this process; return what it says."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(
                build_group("detection", "test", OPTIONS), [str(argument) for argument in arguments]
            )
        except SystemExit as stop:
            code = int(stop.code or 0)
    assert code == (2 if fails else 0), err.getvalue()
    return err.getvalue() if fails else out.getvalue()


def record_of(said: str) -> Done:
    """The cell that a ``run`` names."""
    path = Path(said.strip().splitlines()[-1].removeprefix("record: "))
    return Done(read_record(path), path.parent)


run = partial(command, "run", "--model", MODEL.name)
