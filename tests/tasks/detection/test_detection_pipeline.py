"""The whole detection task on the demo detector: records, stages, interrupted runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detection_runs import (
    FLAGS,
    LAYERS,
    LIMIT,
    MODEL,
    QUICK,
    SEGMENTS,
    Done,
    cell,
    command,
    done,
    restored,
    same,
)
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file, save_file

from fimaq_core.checkpoint import read_header, save_checkpoint
from fimaq_core.errors import CheckpointError, DataError, RecipeError
from fimaq_core.progress import Progress, silent
from fimaq_core.recipe import make_recipe
from tasks.common.cell import stages
from tasks.common.cell.identity import planned_folder
from tasks.common.cell.run import run_cell
from tasks.common.record import read_record
from tasks.common.registry import defaults
from tasks.common.request import DataRequest, ModelRequest
from tasks.detection.coco import open_demo
from tasks.detection.demo.models import DEMO
from tasks.detection.task import TASK

pytestmark = pytest.mark.slow
METRICS = {f"{name}_{kind}" for name in ("AP", "AP50", "AP75", "APs") for kind in ("box", "mask")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cells")


@pytest.fixture(scope="module")
def fimaq(place: Path) -> Done:
    return done(cell(place))


@pytest.fixture(scope="module")
def aphq(place: Path) -> Done:
    return done(cell(place, "aphq"))


def test_a_record_says_what_was_measured(fimaq: Done) -> None:
    record = fimaq.record
    assert (record.task, record.method, record.w_bit, record.a_bit, record.n) == (
        "detection",
        "fimaq",
        4,
        4,
        LIMIT,
    )
    assert record.model.startswith("demo_mask_rcnn.")
    assert set(record.metrics) >= METRICS
    assert next(iter(record.metrics)) == "AP_box"
    assert set(record.fp_metrics) == set(record.metrics)
    assert record.fp_metrics["AP_box"].value > record.metrics["AP_box"].value > 0
    assert record.fp_metrics["AP_box"].value > 50
    assert all(
        0 <= metric.value <= 100 and metric.stderr >= 0 for metric in record.metrics.values()
    )
    data, calibration = record.dataset, record.calibration
    assert (data.name, data.split, data.count, data.classes) == (
        "digit scenes for detection",
        f"test[:{LIMIT}]",
        LIMIT,
        10,
    )
    assert calibration is not None
    assert len(set(calibration.ids)) == QUICK["calibration_images"]
    assert all(name.startswith("train/") for name in calibration.ids)
    assert (calibration.transform, calibration.batch) == ("eval", None)
    assert record.variant.endswith(" [backbone+fpn+rpn+roi]")
    assert {part.split("=")[0] for part in record.variant.split(" ")[0].split(",")} == set(QUICK)
    assert record.recipe is not None
    assert record.recipe["scope"] == "backbone+fpn+rpn+roi"
    assert (record.notes, record.skipped_images) == ([], [])


def test_the_module_map_lists_every_layer(fimaq: Done) -> None:
    wanted = {name: (4, 4) for names in LAYERS.values() for name in names}
    wanted["detector.backbone.patch_embed.projection"] = (4, 32)
    assert fimaq.bits == wanted
    assert fimaq.record.modules is not None
    kinds = {entry.name: entry.kind for entry in fimaq.record.modules.quantized}
    assert kinds["mask.head.upsample"] == "transposed convolution"
    assert kinds["detector.rpn_head.rpn_cls"] == "convolution"
    full = fimaq.record.modules.full_precision
    assert {
        f"detector.backbone.stages.{stage}.blocks.{int(stage < 3)}.keep.norm (LayerNorm)"
        for stage in range(4)
    } < set(full)
    assert {
        "detector.backbone.stages.2.downsample.norm (LayerNorm)",
        "detector.backbone.patch_embed.norm (LayerNorm)",
    } < set(full)
    assert not any(kind in name for name in full for kind in ("(Linear", "(Conv", "(MatMul"))


def test_BackboneAndNeck_are_reconstructed_and_heads_are_not(fimaq: Done) -> None:
    record = fimaq.record
    assert list(record.last_loss) == SEGMENTS
    assert all(np.isfinite(value) for value in record.last_loss.values())
    assert record.fisher_passes == {name: int(name != "detector.neck") for name in SEGMENTS}
    assert {
        "calibrate detector",
        "reconstruct detector",
        "calibrate bbox",
        "calibrate mask",
        "evaluate",
    } <= set(record.seconds)


def test_outcomes_add_up(fimaq: Done) -> None:
    with np.load(fimaq.folder / fimaq.record.outcomes) as outcomes:
        assert {len(values) for values in outcomes.values()} == {LIMIT}
        for name in ("AP_box", "AP_mask"):
            assert fimaq.record.metrics[name].value == pytest.approx(100 * outcomes[name].mean())
        assert outcomes["objects"].sum() > LIMIT
        assert [str(name) for name in outcomes["sample"]] == [
            f"test/{index:05d}.png" for index in range(LIMIT)
        ]
    _, _, model = restored(fimaq)
    again = TASK.evaluate(
        model, TASK.load(MODEL), DataRequest(limit=LIMIT), torch.device("cpu"), 1, 0, silent
    )
    assert again.metrics == fimaq.record.metrics


@pytest.mark.parametrize("method", ["fimaq", "aphq"])
def test_run_and_stages_agree_bit_for_bit(
    method: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole: Done = request.getfixturevalue(method)
    mlps, ranges, out = (tmp_path / f"{name}.safetensors" for name in ("mlps", "ranges", "whole"))
    common = ["--model", MODEL.name, "--method", method, *FLAGS]
    given: list[object] = []
    if method == "aphq":
        command("reconstruct-mlp", *common, "--out", mlps)
        given = ["--mlp-checkpoint", mlps]
    command("calibrate", *common, *given, "--out", ranges)
    fingerprint, facts = read_header(ranges)
    assert (facts["stage"], facts["task"]) == ("calibrated", "detection")
    assert fingerprint.recipe.scope == "backbone+fpn+rpn+roi"
    command("reconstruct", ranges, "--out", out)
    assert same(whole.state, load_file(out))
    assert not same(whole.state, load_file(ranges))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"ranges.safetensors", "whole.safetensors"} | (
        {"mlps.safetensors"} if method == "aphq" else set()
    )
    said = command("evaluate", out, "--limit", LIMIT)
    for name, metric in whole.record.metrics.items():
        assert f"{name} {metric.value:.2f} ± {metric.stderr:.2f} (n = {LIMIT})" in said.splitlines()


def test_mlps_alone(place: Path, aphq: Done, tmp_path: Path) -> None:
    """The checkpoint of the MLP stage is the full-precision model of the method mlp-recon."""
    mlps = tmp_path / "mlps.safetensors"
    stages.mlp_stage(cell(place, "aphq"), mlps, silent)
    whole = done(cell(place, "mlp-recon"))
    said = command("evaluate", mlps, "--limit", LIMIT).splitlines()
    assert all(
        any(line.startswith(f"{name} {metric.value:.2f}") for line in said)
        for name, metric in whole.record.metrics.items()
    )
    content = json.loads(command("inspect", mlps, "--json"))
    assert (content["stage"], content["untouched"]) == ("mlp", [])
    assert {(layer["weight_bits"], layer["input_bits"]) for layer in content["layers"]} == {
        (32, 32)
    }
    assert {layer["name"] for layer in content["layers"]} == set().union(*LAYERS.values())
    assert content["totals"]["bops_ratio"] == 1
    assert whole.record.metrics["AP_box"].value != whole.record.fp_metrics["AP_box"].value


def test_a_run_stopped_in_the_backbone_goes_on_to_the_same_bits(
    fimaq: Done, tmp_path: Path
) -> None:
    request = cell(tmp_path)

    def stops(event: Progress) -> None:
        if event.stage == "reconstruct" and event.block == "backbone.stages.1.blocks.1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell(request, stops)
    assert not (planned_folder(request) / "result.json").exists()
    kept = sorted(path.name for path in tmp_path.rglob("block-*.safetensors"))
    assert kept == [f"block-{index:03d}.safetensors" for index in range(5)]
    started: list[str] = []

    def watch(event: Progress) -> None:
        if event.stage == "reconstruct" and event.block and event.block not in started:
            started.append(event.block)

    resumed = done(request, watch)
    assert [f"detector.{name}" for name in started] == SEGMENTS[5:]
    assert "calibrate detector (reused)" in resumed.record.seconds
    assert same(resumed.state, fimaq.state)
    assert resumed.record.metrics == fimaq.record.metrics
    assert resumed.record.last_loss == fimaq.record.last_loss
    assert not list(tmp_path.rglob("block-*"))


@pytest.fixture(scope="module")
def ranges(place: Path) -> Path:
    path = place / "ranges.safetensors"
    stages.calibrate_stage(cell(place, "rtn", w_bits=3), path, silent)
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scope": "backbone+fpn"}, "scope ('backbone+fpn+rpn+roi', here 'backbone+fpn')"),
        ({"a_bits": 8}, "a_bits (4, here 8)"),
        ({"seed": 1}, "other calibration images"),
        ({"weights": True}, "another model (demo_mask_rcnn.digits-v1, here demo_mask_rcnn.local-"),
        (
            {"model": "demo_cascade.digits-v1"},
            "another model (demo_cascade.digits-v1, here demo_mask_rcnn.digits-v1)",
        ),
    ],
    ids=["scope", "bits", "images", "weights", "model"],
)
def test_checkpoints_of_other_runs_are_refused(
    place: Path, ranges: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """The message gives the reason, and nothing is overwritten."""
    request, path = cell(place, "rtn", w_bits=3), tmp_path / "ranges.safetensors"
    shutil.copy(ranges, path)
    assert request.recipe is not None
    if "weights" in changes:
        request = replace(request, model=replace(request.model, weights=other_weights(tmp_path)))
    elif "model" in changes:
        fingerprint, facts = read_header(path)
        save_checkpoint(path, load_file(path), fingerprint.model_copy(update=changes), facts)
    else:
        request = replace(request, recipe=request.recipe.model_copy(update=changes))
    before = path.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        stages.calibrate_stage(request, path, silent)
    assert reason in str(caught.value)
    assert path.read_bytes() == before


def test_later_stages_refuse_what_does_not_fit(ranges: Path, tmp_path: Path) -> None:
    said = command(
        "reconstruct", ranges, "--scope", "roi", "--out", tmp_path / "x.safetensors", fails=True
    )
    assert "scope is 'backbone+fpn+rpn+roi', not 'roi'" in said
    said = command(
        "evaluate", ranges, "--limit", LIMIT, "--weights", other_weights(tmp_path), fails=True
    )
    assert "was made from other weights" in said
    assert said.count("\n") == 1


def other_weights(folder: Path) -> Path:
    state = load_file(DEMO.weights_path(MODEL.name))
    path = folder / "other.safetensors"
    save_file({**state, "rpn_head.rpn_cls.bias": state["rpn_head.rpn_cls.bias"] + 1}, path)
    return path


def test_one_model_calibrates_for_several_methods(place: Path, fimaq: Done) -> None:
    reused = done(cell(place, "brecq"))
    assert {
        "calibrate detector (reused)",
        "calibrate bbox (reused)",
        "calibrate mask (reused)",
    } <= set(reused.record.seconds)
    assert reused.bits == fimaq.bits
    assert set(reused.record.fisher_passes.values()) == {0}


def test_a_detector_is_finished_up_to_its_neck(place: Path, fimaq: Done) -> None:
    own = {"finish_steps": 2, "finish_held_out": 1, "finish_lr": 1e-5}
    finished = done(cell(place, **own))
    (note,) = [one for one in finished.record.notes if "held-out objective" in one]
    assert note.startswith("detector.finishing: held-out objective 2.000 -> ")
    assert finished.record.seconds["reconstruct detector (reused)"]
    before, after = fimaq.state, finished.state
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    heads = [name for name in after if not name.startswith("detector.")]
    assert heads
    assert not changed & set(heads)
    assert not [name for name in changed if name.endswith("codes")]
    # Backbone and neck take part; the region proposals' head stays as calibrated.
    assert any(".norm1." in name for name in changed) == ("step 0" not in note)
    assert not [name for name in changed if name.startswith("detector.segments.12.")]


#: Methods whose ranges are found otherwise.
OWN_RANGES = ("repq", "erq", "adalog", "ptq4vit")


@pytest.mark.parametrize("method", ["rtn", "qdrop", "lsvit", *OWN_RANGES, "mlp-recon"])
def test_methods(place: Path, method: str) -> None:
    request = cell(place, "rtn")
    if method in OWN_RANGES:
        # AdaLog's search takes its time
        scope = {"scope": "backbone"} if method == "adalog" else {}
        quick = {name: value for name, value in QUICK.items() if name != "range_search"} | {
            "range_images": 1,
            "range_rounds": 1,
        }
        request = replace(request, recipe=make_recipe(method, defaults("detection"), quick, scope))
    else:
        request = cell(place, method)
    found = done(request)
    record, modules = found.record, found.record.modules
    assert record.method == method
    assert set(record.metrics) >= METRICS
    assert modules is not None
    if method == "mlp-recon":
        assert found.bits == {}
        assert (
            len([name for name in modules.full_precision if name.endswith("mlp.act (ReLU)")]) == 7
        )
        return
    assert set(found.bits) == (
        LAYERS["backbone"] if method == "adalog" else set().union(*LAYERS.values())
    )
    assert bool(record.last_loss) == (method in ("qdrop", "lsvit"))
    kinds = {entry.name: entry.input_quantizer for entry in modules.quantized}
    softmax = {"repq": "logsqrt2", "erq": "logsqrt2", "adalog": "adalog", "ptq4vit": "twin"}.get(
        method, "uniform"
    )
    assert kinds["detector.backbone.stages.2.blocks.1.attn.attention_value"] == softmax
    gelu = softmax if method in ("adalog", "ptq4vit") else "uniform"
    assert kinds["detector.backbone.stages.2.blocks.1.mlp.fc2"] == gelu
    assert {kinds[name] for name in set(kinds) - LAYERS["backbone"]} <= {"uniform"}


def test_a_cascade(tmp_path: Path) -> None:
    """With random weights, which find nothing: each of six heads is a part."""
    torch.manual_seed(0)
    model, weights = DEMO.build("demo_cascade"), tmp_path / "random.safetensors"
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.startswith("backbone"):
            torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    found = done(
        replace(cell(tmp_path, "qdrop"), model=ModelRequest("demo_cascade", weights=weights))
    )
    assert found.record.metrics["AP_box"].value < 5
    assert list(found.record.last_loss) == SEGMENTS
    parts = {name.split(".")[0] for name in found.bits}
    heads = {f"{kind}{stage}" for kind in ("bbox", "mask") for stage in range(3)}
    assert parts == {"detector"} | heads
    assert {f"calibrate {part}" for part in parts} < set(found.record.seconds)
    layers = ("shared_convs.0.conv", "shared_convs.1.conv", "shared_fcs.0", "fc_cls", "fc_reg")
    assert {name for name in found.bits if name.startswith("bbox2")} == {
        f"bbox2.head.{layer}" for layer in layers
    }
    content = json.loads(command("inspect", found.checkpoint, "--weights", weights, "--json"))
    macs = {layer["name"]: layer["macs"] for layer in content["layers"]}
    assert (
        macs["bbox2.head.fc_cls"]
        == macs["bbox0.head.fc_cls"]
        == model.test_cfg.rpn.max_per_img * 64 * 11
    )


def test_inspect(fimaq: Done) -> None:
    content = json.loads(command("inspect", fimaq.checkpoint, "--json"))
    assert (content["task"], content["stage"], content["scope"]) == (
        "detection",
        "reconstructed",
        "backbone+fpn+rpn+roi",
    )
    assert content["untouched"] == []
    layers = {layer["name"]: layer for layer in content["layers"]}
    assert set(layers) == set().union(*LAYERS.values())
    settings = TASK.load(MODEL).model.test_cfg
    proposals, detections = settings.rpn.max_per_img, settings.rcnn.max_per_img
    # weights of linear layers, and of convolutions on 14 x 14 positions of each region
    for name in ("shared_fcs.0", "shared_fcs.1", "fc_cls", "fc_reg"):
        layer = layers[f"bbox.head.{name}"]
        assert layer["macs"] == proposals * layer["weights"] > 0
    for name in ("convs.0.conv", "convs.2.conv", "upsample"):
        layer = layers[f"mask.head.{name}"]
        assert layer["macs"] == detections * layer["weights"] * 14 * 14
    assert (
        layers["mask.head.conv_logits"]["macs"]
        == detections * layers["mask.head.conv_logits"]["weights"] * 28 * 28
    )
    # the RPN's layers on the maps P2 to P6 of 128 x 128 pixels
    positions = sum(side**2 for side in (32, 16, 8, 4, 2))
    assert (
        layers["detector.rpn_head.rpn_conv"]["macs"]
        == positions * layers["detector.rpn_head.rpn_conv"]["weights"]
    )
    sums = content["totals"]
    assert all(np.isfinite(value) and value > 0 for value in sums.values())
    assert sums["macs"] == sums["quantized_macs"] == sum(layer["macs"] for layer in layers.values())
    assert sums["bops"] == sum(
        layer["macs"] * (16 if name.split(".")[2] != "patch_embed" else 128)
        for name, layer in layers.items()
    )
    text = command("inspect", fimaq.checkpoint)
    assert (
        f"MACs per image: {sums['macs']}; quantized {sums['macs']} (100.00 %)" in text.splitlines()
    )
    assert "scope: backbone+fpn+rpn+roi" in text.splitlines()


def test_inspect_knows_what_is_usual_for_detectors(place: Path, ranges: Path) -> None:
    content = json.loads(command("inspect", ranges, "--json"))
    usual = make_recipe("rtn", defaults("detection")).model_dump()
    assert content["changes"] == {
        name: value for name, value in QUICK.items() if usual[name] != value
    }
    assert "calibration_transform" not in content["changes"]
    (line,) = (
        text for text in command("inspect", ranges).splitlines() if text.startswith("changes: ")
    )
    assert line == "changes: " + ", ".join(
        f"{name}={value}" for name, value in content["changes"].items()
    )
    assert not any(name in line for name in ("batch_size", "mlp_percentile", "scope"))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"calibration_transform": "train"},
            RecipeError,
            "calibration_transform must be eval, not train",
        ),
        ({"batch_size": 2}, RecipeError, r"one at a time: set batch_size 1 \(now 2\)"),
        (
            {"reconstruct_mlp": True, "mlp_batch": 2},
            RecipeError,
            r"one at a time: set mlp_batch 1 \(now 2\)",
        ),
        ({"temperature": 10.0}, RecipeError, "no use for temperature: leave it out"),
        ({"head_bits": 8}, RecipeError, "no use for head_bits"),
        ({"divergence_batch": 4}, RecipeError, "no use for divergence_batch"),
        ({"loss": "prediction"}, RecipeError, "choose another loss"),
        ({"loss": "prediction_pdquant"}, RecipeError, "choose another loss"),
        ({"calibration_images": 5000}, DataError, "1,?024"),
    ],
    ids=[
        "transform",
        "batch",
        "MLP batch",
        "temperature",
        "head bits",
        "divergence batch",
        "prediction",
        "PD-Quant's prediction",
        "images",
    ],
)
def test_what_detectors_have_not(
    place: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run_cell(cell(place, **changes))


def test_a_record_serves_as_calibration_list(fimaq: Done, tmp_path: Path) -> None:
    chosen = fimaq.folder / "result.json"
    found = done(
        replace(
            cell(tmp_path, "rtn", seed=9), data=DataRequest(limit=LIMIT, calibration_list=chosen)
        )
    )
    drawn = read_record(chosen).calibration
    assert drawn is not None
    assert (drawn.split, drawn.listed) == ("train", False)
    assert found.record.calibration == drawn.model_copy(update={"listed": True})


def test_detections_are_kept_where_they_are_asked_for(fimaq: Done, tmp_path: Path) -> None:
    assert not (fimaq.folder / "detections.json").exists()
    data = DataRequest(limit=LIMIT, keep_outputs=True)
    found = done(replace(cell(tmp_path), recipe=None, data=data))
    truth = COCO()
    truth.dataset = dict(open_demo("val").head(LIMIT).coco)
    truth.createIndex()
    judge = COCOeval(truth, truth.loadRes(str(found.folder / "detections.json")), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert found.record.metrics["AP_box"].value == pytest.approx(100 * judge.stats[0], abs=1e-6)
