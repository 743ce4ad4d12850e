"""Quantized pieces of a detector: exactly those of the scope; files that scopes share."""

import json
import re
from pathlib import Path

import pytest
import torch
from detection_runs import (
    FLAGS,
    LAYERS,
    LIMIT,
    MODEL,
    SEGMENTS,
    Done,
    cell,
    command,
    done,
    restored,
    same,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from fimaq_core.errors import RecipeError
from fimaq_core.recipe import make_recipe
from tasks.common.cell.identity import planned_folder
from tasks.common.registry import defaults
from tasks.detection.coco import open_demo
from tasks.detection.detector import DETECTOR
from tasks.detection.neck import pack, unpack_pyramid
from tasks.detection.roi import roi_heads
from tasks.detection.tags import PIECES, SCOPES
from tasks.detection.task import TASK

pytestmark = pytest.mark.slow
FULL = "+".join(PIECES)
#: Of a scope of one piece, its own quantized segments or parts.
ALONE = {"backbone": SEGMENTS[:-1], "fpn": SEGMENTS[-1:], "rpn": [], "roi": []}

ROI_UNTOUCHED = (
    "backbone.patch_embed.projection",
    "backbone.stages.1.blocks.0.attn.w_msa.qkv",
    "neck.fpn_convs.3.conv",
    "rpn_head.rpn_cls",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scopes")


@pytest.fixture(scope="module")
def cells(place: Path) -> dict[str, Done]:
    """Cells of the full scope, then of each piece alone."""
    return {scope: done(cell(place, "qdrop", scope=scope)) for scope in (FULL, *PIECES)}


@pytest.mark.parametrize("scope", PIECES)
def test_a_scope_quantizes_its_own_layers_and_no_others(cells: dict[str, Done], scope: str) -> None:
    found = cells[scope]
    assert set(found.bits) == LAYERS[scope]
    assert list(found.record.last_loss) == ALONE[scope]
    assert found.record.variant.endswith(f" [{scope}]")
    modules = found.record.modules
    assert modules is not None
    full = {name.split(" ")[0] for name in modules.full_precision}
    if scope == "roi":  # there is no other chain: these are mmdet's own names
        assert set(ROI_UNTOUCHED) <= full
        return
    assert set().union(*(LAYERS[other] for other in set(PIECES) - {scope, "roi"})) <= full
    assert {f"roi_head.{name.replace('.head.', '_head.')}" for name in LAYERS["roi"]} <= full


def pyramid(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(1, 32, side, side + side // 2, generator=generator) for side in (16, 8, 4, 2, 1)
    )


@torch.no_grad()
def outputs(
    model: nn.Module, detector: nn.Module | None = None, chain: object = None
) -> dict[str, Tensor]:
    """Output of each piece for one input: of mmdet's ``model``, or of a detector and its chain."""
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    stages = model.backbone(image)
    if chain is None:
        found = {
            "backbone": pack(stages),
            "fpn": torch.cat([one.flatten() for one in model.neck(stages)]),
        }
    else:
        x, kept = image, ()
        *backbone, neck, _ = chain  # type: ignore[misc, attr-defined]
        for segment in backbone:
            x = segment(x, None, kept)
            kept = segment.kept_with(x, kept)
        maps = unpack_pyramid(neck.block(pack(stages)), neck.block.channels)
        found = {"backbone": pack(kept), "fpn": torch.cat([one.flatten() for one in maps])}
    heads = model if detector is None else detector
    scores, boxes = heads.rpn_head(pyramid())
    found["rpn"] = torch.cat([one.flatten() for one in (*scores, *boxes)])
    inputs = {"bbox": (5, 32, 7, 7), "mask": (5, 32, 14, 14)}
    regions = {
        name: torch.randn(inputs[name], generator=torch.Generator().manual_seed(2))
        for name in inputs
    }
    given = [head(regions[name]) for name, head in roi_heads(heads).items()]
    found["roi"] = torch.cat(
        [one.flatten() for each in given for one in (each if isinstance(each, tuple) else (each,))]
    )
    return found


@pytest.mark.parametrize("scope", [FULL, *PIECES])
def test_pieces_out_of_scope_compute_as_the_float_model_does(
    cells: dict[str, Done], scope: str
) -> None:
    float_model = TASK.load(MODEL).model
    expected = outputs(float_model)
    _, chains, detector = restored(cells[scope])
    assert set(chains) == {"roi": {"bbox", "mask"}, FULL: {DETECTOR, "bbox", "mask"}}.get(
        scope, {DETECTOR}
    )
    if DETECTOR in chains:
        found = outputs(float_model, detector, chains[DETECTOR])
    else:
        found = {
            **expected,
            **{name: outputs(float_model, detector)[name] for name in ("rpn", "roi")},
        }
        image = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            maps, own = detector.extract_feat(image), float_model.extract_feat(image)
        assert all(torch.equal(one, other) for one, other in zip(maps, own, strict=True))
    for piece in PIECES:
        error = (found[piece] - expected[piece]).norm() / expected[piece].norm()
        if piece in scope.split("+"):
            assert error > 1e-2, piece
        else:
            assert error < 1e-5, piece


def test_scopes_share_what_is_the_same_in_both(cells: dict[str, Done], place: Path) -> None:
    """The chain is calibrated once per quantized part of it, the RoI heads once for all scopes."""
    kept = {
        kind: len(list((place / kind).glob("*.safetensors")))
        for kind in ("calibration", "reconstruction")
    }
    assert kept == {"calibration": 3 + 3, "reconstruction": 3 + 3}
    shared = done(cell(place, "qdrop", scope="backbone+fpn+rpn"))
    assert {kind: len(list((place / kind).glob("*.safetensors"))) for kind in kept} == kept
    for found, parts in ((cells["roi"], ("bbox", "mask")), (shared, ("detector",))):
        seconds = set(found.record.seconds)
        assert {
            f"{stage} {part} (reused)" for stage in ("calibrate", "reconstruct") for part in parts
        } <= seconds
        assert not any(
            f"{stage} {part}" in seconds
            for stage in ("calibrate", "reconstruct")
            for part in ("detector", "bbox")
        )
        whole = {
            name: value for name, value in cells[FULL].state.items() if name.split(".")[0] in parts
        }
        assert same(found.state, whole)
    assert cells["fpn"].record.metrics != cells["rpn"].record.metrics
    assert (
        len({planned_folder(cell(place, "qdrop", scope=scope)) for scope in SCOPES})
        == len(SCOPES)
        == 15
    )
    assert planned_folder(cell(place, "qdrop")) == planned_folder(cell(place, "qdrop", scope=FULL))


@pytest.mark.parametrize("scope", ["fpn", "roi"])
def test_stages_of_a_scope_give_what_its_run_gives(
    cells: dict[str, Done], tmp_path: Path, scope: str
) -> None:
    ranges, whole = tmp_path / "ranges.safetensors", tmp_path / "whole.safetensors"
    common = ["--model", MODEL.name, "--method", "qdrop", *FLAGS, "--scope", scope]
    command("calibrate", *common, "--out", ranges)
    command("reconstruct", ranges, "--out", whole)
    assert same(load_file(whole), cells[scope].state)
    metric = cells[scope].record.metrics["AP_mask"]
    said = command("evaluate", whole, "--limit", LIMIT)
    assert f"AP_mask {metric.value:.2f} ± {metric.stderr:.2f} (n = {LIMIT})" in said.splitlines()


def test_a_roi_head_out_of_scope_is_the_float_models_own(cells: dict[str, Done]) -> None:
    """No layer is replaced, and with a float backbone the detections are the float model's."""
    loaded, chains, detector = restored(cells["rpn"])
    assert set(TASK.untouched(loaded, chains)) == {"roi_head"}
    assert not any(
        type(module).__name__.startswith("Quant") for module in detector.roi_head.modules()
    )
    source = open_demo("val")
    image, meta = loaded.eval_transform(source.read(3))  # type: ignore[misc]
    float_model = TASK.assemble(TASK.load(MODEL), {})
    expected = float_model.predict(image, meta).pred_instances  # type: ignore[operator]
    found = detector.predict(image, meta).pred_instances
    assert len(found) > 0
    assert found.scores[0] == pytest.approx(float(expected.scores[0]), abs=0.05)


@pytest.mark.parametrize("scope", ["fpn", "rpn", "roi", "fpn+rpn+roi"])
@pytest.mark.parametrize("method", ["aphq", "mlp-recon"])
def test_there_are_no_mlps_without_a_backbone(scope: str, method: str) -> None:
    recipe = make_recipe(method, defaults("detection"), {"scope": scope})
    with pytest.raises(
        RecipeError,
        match=rf"MLPs are in the backbone, which scope '{re.escape(scope)}' does not quantize",
    ):
        TASK.chains(TASK.load(MODEL), recipe)


def test_scopes_that_there_are_not(place: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"no scope 'backbone\+fnp'\. Did you mean 'backbone\+fpn'\?"
    ):
        planned_folder(cell(place, "qdrop", scope="backbone+fnp"))
    said = command(
        "run",
        "--model",
        MODEL.name,
        "--scope",
        "neck",
        "--limit",
        LIMIT,
        "--results",
        place,
        fails=True,
    )
    assert "Invalid value for '--scope': 'neck' is not one of 'backbone+fpn+rpn+roi'" in said


def test_inspect_of_one_piece(cells: dict[str, Done]) -> None:
    """Parts without a chain count as full precision; chain parts out of scope have 32 bits."""
    shown = {
        scope: json.loads(command("inspect", cells[scope].checkpoint, "--json"))
        for scope in (FULL, "fpn", "roi")
    }
    assert shown["fpn"]["untouched"] == ["roi_head"]
    assert shown["roi"]["untouched"] == ["backbone", "neck", "rpn_head"]
    bits = {
        layer["name"]: (layer["weight_bits"], layer["input_bits"])
        for layer in shown["fpn"]["layers"]
    }
    assert {name for name, pair in bits.items() if pair == (4, 4)} == LAYERS["fpn"]
    assert {name for name, pair in bits.items() if pair == (32, 32)} == LAYERS["backbone"] | LAYERS[
        "rpn"
    ]
    assert {layer["name"] for layer in shown["roi"]["layers"]} == LAYERS["roi"]
    macs = {
        scope: {layer["name"]: layer["macs"] for layer in content["layers"]}
        for scope, content in shown.items()
    }
    for scope in ("fpn", "roi"):
        assert all(macs[FULL][name] == value for name, value in macs[scope].items())
    sums = shown["fpn"]["totals"]
    assert sums["quantized_macs"] == sum(macs["fpn"][name] for name in LAYERS["fpn"])
    sizes = {content["totals"]["full_size_bits"] for content in shown.values()}
    assert max(sizes) - min(sizes) < 0.02 * max(sizes)
