"""Commands of the retrieval task, on a small CLIP model with random weights and a small folder."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import images, randomise

from fimaq_core.checkpoint import read_header
from fimaq_core.errors import RecipeError
from tasks.common.cell.identity import planned_folder
from tasks.common.cli.commands import build_group, main
from tasks.common.record import ResultRecord, read_record
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.retrieval.command import OPTIONS

pytestmark = pytest.mark.slow

ARGUMENTS: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "image_size": 64},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2, "context_length": 12},
    "quick_gelu": False,
}
QUICK = [
    "--w-bits", "4", "--a-bits", "4", "--range-search", "minmax", "--calibration-images", "16",
    "--range-images", "8", "--batch-size", "8", "--divergence-batch", "8",
    "--calibration-transform", "eval", "--steps", "3", "--fisher-k", "2",
    "--seed", "5",
]  # fmt: skip
WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen"
)
NUMBERS = WORDS.split()


def command(*arguments: object, fails: bool = False) -> str:
    """Run the command line in this process; return what it says."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(
                build_group("retrieval", "test", OPTIONS), [str(argument) for argument in arguments]
            )
        except SystemExit as stop:
            code = int(stop.code or 0)
    assert code == (2 if fails else 0), err.getvalue()
    return err.getvalue() if fails else out.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, 24 training and 10 test images with two captions each, and labelled images."""
    root = tmp_path_factory.mktemp("place")
    model = randomise(open_clip.create_model("ViT-B-32", pretrained=None, **_whole()))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        root / "small.safetensors",
    )
    pixels = ((images(34, 64) * 0.2 + 0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    rows = ["image,caption,split"]
    for index, one in enumerate(pixels):
        Image.fromarray(one).save(_made(root / "captions" / f"{index}.png"))
        split = "train" if index < 24 else "test"
        name = f"{NUMBERS[index % 16]} {NUMBERS[index // 16]}"
        long = " and more" * (8 if index == 30 else 0)
        rows += [
            f"{index}.png,a photo of {name}{long},{split}",
            f"{index}.png,{name} on a table,{split}",
        ]
    (root / "captions" / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    for part in ("train", "val"):
        for label in range(4):
            for number in range(6):
                file = root / "labelled" / part / f"class{label}" / f"{number}.png"
                Image.fromarray(pixels[(6 * label + number + 3 * (part == "val")) % 34]).save(
                    _made(file)
                )
    (root / "labelled" / "classnames.txt").write_text("cat\ndog\nbus\ntree\n", encoding="utf-8")
    return root


def _whole() -> dict[str, Any]:
    """open_clip replaces the settings of a tower by those given, so all are given."""
    config = open_clip.get_model_config("ViT-B-32")
    return {
        name: {**config[name], **value} if isinstance(value, dict) else value
        for name, value in ARGUMENTS.items()
    }


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def model(place: Path) -> list[object]:
    return [
        "--model",
        "ViT-B-32",
        "--model-args",
        json.dumps(ARGUMENTS),
        "--weights",
        place / "small.safetensors",
    ]


def run(
    place: Path, results: Path, *arguments: object, data: str = "captions"
) -> tuple[ResultRecord, Path]:
    """Run a cell; return its record and folder."""
    said = command(
        "run",
        *model(place),
        "--data",
        place / data,
        "--threads",
        1,
        "--results",
        results,
        *arguments,
    )
    path = Path(said.strip().splitlines()[-1].removeprefix("record: "))
    return read_record(path), path.parent


def test_both_towers_are_the_two_single_ones(place: Path, tmp_path: Path) -> None:
    results = tmp_path / "runs"
    found = {
        towers: run(place, results, *QUICK, "--towers", towers)
        for towers in ("vision", "text", "both")
    }
    states = {
        towers: load_file(folder / "quantized.safetensors") for towers, (_, folder) in found.items()
    }
    assert set(states["both"]) == set(states["vision"]) | set(states["text"])
    assert {name.split(".")[0] for name in states["both"]} == {"vision", "text"}
    for towers in ("vision", "text"):
        assert all(
            torch.equal(states["both"][name], value) for name, value in states[towers].items()
        )
    seconds = found["both"][0].seconds
    assert {
        "reconstruct vision (reused)",
        "reconstruct text (reused)",
        "calibrate text (reused)",
    } <= set(seconds)
    assert {"reconstruct vision", "calibrate vision"} <= set(found["vision"][0].seconds)
    alone, _ = run(place, tmp_path / "alone" / "runs", *QUICK)
    assert alone.variant.endswith("[both]")
    assert alone.metrics == found["both"][0].metrics
    assert alone.last_loss == found["both"][0].last_loss


def test_a_name_that_leaves_the_activation_open_is_asked_for(place: Path, tmp_path: Path) -> None:
    open_ended = {name: value for name, value in ARGUMENTS.items() if name != "quick_gelu"}
    given = [
        "--model-args",
        json.dumps(open_ended),
        "--data",
        place / "captions",
        "--results",
        tmp_path / "runs",
    ]
    said = command("run", *model(place), *given, "--method", "fp", fails=True)
    assert said.startswith("error: ")
    assert "--model ViT-B-32-quickgelu" in said
    assert not list(tmp_path.rglob("result.json"))


def test_the_record_says_what_was_measured(place: Path, tmp_path: Path) -> None:
    record, folder = run(place, tmp_path / "runs", *QUICK, "--towers", "vision")
    data, calibration = record.dataset, record.calibration
    assert (data.name, data.split, data.count, data.captions, data.truncated_captions) == (
        "captions-10-images",
        "test",
        10,
        20,
        1,
    )
    assert calibration is not None
    assert calibration.captions is not None
    assert len(set(calibration.ids)) == len(set(calibration.captions)) == 16
    assert calibration.batch == 8
    for name, caption in zip(calibration.ids, calibration.captions, strict=True):
        index = int(Path(name).stem)
        assert index < 24
        assert f"{NUMBERS[index % 16]} {NUMBERS[index // 16]}" in caption
    assert record.variant.endswith("[vision]")
    assert record.recipe is not None
    assert record.recipe["scope"] == "vision"
    modules = record.modules
    assert modules is not None
    assert all(entry.name.startswith("vision.") for entry in modules.quantized)
    assert any(
        name.startswith("text.") and "MultiheadAttention" not in name
        for name in modules.full_precision
    )
    assert any("token_embedding" in name for name in modules.full_precision)
    assert set(record.last_loss) == {
        "vision.visual.conv1",
        "vision.visual.transformer.resblocks.0",
        "vision.visual.transformer.resblocks.1",
        "vision.visual.proj",
    }
    assert set(record.fisher_passes.values()) == {2}
    assert (
        {"R@1", "i2t_R@1", "t2i_R@10", "mean_recall", "i2t_median_rank"}
        <= set(record.metrics)
        == set(record.fp_metrics)
    )
    with np.load(folder / record.outcomes) as outcomes:
        weighted = 100 * np.average(outcomes["correct"], weights=outcomes["weight"])
    assert record.metrics["R@1"].value == pytest.approx(weighted, abs=1e-4)


def test_run_and_stages_agree_bit_for_bit(place: Path, tmp_path: Path) -> None:
    record, folder = run(
        place, tmp_path / "runs", "--method", "aphq", *QUICK, "--mlp-steps", 3, "--mlp-batch", 8
    )
    common = ["--data", place / "captions", "--threads", 1]
    recipe = ["--method", "aphq", *QUICK, "--mlp-steps", 3, "--mlp-batch", 8]
    mlps, ranges, whole = (tmp_path / f"{name}.safetensors" for name in ("mlps", "ranges", "whole"))
    command("reconstruct-mlp", *model(place), *common, *recipe, "--out", mlps)
    command("calibrate", *model(place), *common, *recipe, "--mlp-checkpoint", mlps, "--out", ranges)
    assert read_header(ranges)[1]["stage"] == "calibrated"
    kept = ranges.stat().st_mtime_ns
    command("calibrate", *model(place), *common, *recipe, "--mlp-checkpoint", mlps, "--out", ranges)
    assert ranges.stat().st_mtime_ns == kept
    weights = ["--weights", place / "small.safetensors"]
    command("reconstruct", ranges, *common, *weights, "--out", whole)
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {"mlps.safetensors", "ranges.safetensors", "whole.safetensors"}
    assert not list(tmp_path.glob("*.blocks"))
    mine, theirs = load_file(folder / "quantized.safetensors"), load_file(whole)
    assert all(torch.equal(theirs[name], value) for name, value in mine.items())
    said = command("evaluate", whole, *common, *weights)
    assert f"R@1 {record.metrics['R@1'].value:.2f}" in said
    cut = "1 of 20 captions are longer than the model's context and were cut off"
    assert f"note: {cut}" in said
    assert cut in record.notes
    shown = json.loads(command("inspect", whole, *weights, "--json"))
    assert shown["scope"] == "both"
    assert {layer["name"].split(".")[0] for layer in shown["layers"]} == {"vision", "text"}
    assert shown["totals"]["macs"] == sum(layer["macs"] for layer in shown["layers"]) > 0
    said = command(
        "reconstruct", ranges, *common, *weights, "--towers", "text", "--out", whole, fails=True
    )
    assert "scope is 'both', not 'text'" in said


def test_a_tower_that_stays_as_it_is(place: Path, tmp_path: Path) -> None:
    """Values of an untouched tower count, and are those of the float model."""
    ranges = tmp_path / "ranges.safetensors"
    common = ["--data", place / "captions", "--threads", 1]
    command("calibrate", *model(place), *common, *QUICK, "--towers", "text", "--out", ranges)
    shown = json.loads(
        command("inspect", ranges, "--weights", place / "small.safetensors", "--json")
    )
    assert shown["untouched"] == ["vision"]
    visual = {
        name: value
        for name, value in load_file(place / "small.safetensors").items()
        if name.startswith("visual.")
    }
    counted = sum(
        part["values"] for part in shown["full_precision"] if part["name"].startswith("vision")
    )
    assert counted == sum(value.numel() for value in visual.values())


def test_a_run_that_was_stopped_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fimaq_core import checkpoint

    whole, _ = run(place, tmp_path / "a" / "runs", *QUICK)
    real, saved = checkpoint.save_checkpoint, []

    def breaks(path: Path, *rest: Any) -> None:
        real(path, *rest)
        saved.append(path)
        if len([one for one in saved if one.name.startswith("block")]) == 6:  # in the second tower
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_checkpoint", breaks)
    results = tmp_path / "b" / "runs"
    arguments = [
        "run",
        *model(place),
        "--data",
        place / "captions",
        "--threads",
        1,
        "--results",
        results,
        *QUICK,
    ]
    with redirect_stderr(io.StringIO()), pytest.raises(SystemExit):
        main(build_group("retrieval", "test", OPTIONS), [str(argument) for argument in arguments])
    monkeypatch.undo()
    before = len(saved)
    resumed, folder = run(place, results, *QUICK)
    assert before >= 6
    assert "reconstruct vision (reused)" in resumed.seconds
    assert "reconstruct text" in resumed.seconds
    assert resumed.metrics == whole.metrics
    assert resumed.last_loss == whole.last_loss
    assert not list(tmp_path.rglob("*.blocks"))
    assert not (folder / "blocks").exists()


def test_zero_shot(place: Path, tmp_path: Path) -> None:
    """Accuracy on labelled images; captions for calibration are made of class names."""
    record, _ = run(
        place,
        tmp_path / "runs",
        *QUICK,
        "--method",
        "rtn",
        "--eval",
        "zero-shot",
        "--calibration-images",
        16,
        data="labelled",
    )
    assert set(record.metrics) == {"top1"}
    assert (record.n, record.dataset.classes) == (24, 4)
    assert record.calibration is not None
    assert record.calibration.captions is not None
    assert set(record.calibration.captions) == {
        f"a photo of a {name}." for name in ("cat", "dog", "bus", "tree")
    }
    assert record.calibration.batch is None
    other, _ = run(
        place, tmp_path / "runs", *QUICK, "--method", "rtn", "--eval", "zero-shot",
        "--calibration-data", place / "captions",
        data="labelled",
    )  # fmt: skip
    assert other.calibration is not None
    assert other.calibration.fingerprint != record.calibration.fingerprint


def test_one_file_in_two_architectures_is_two_models(place: Path, tmp_path: Path) -> None:
    """Equal weights with another activation: the two models share no files."""
    results = tmp_path / "runs"
    first, _ = run(place, results, *QUICK, "--method", "qdrop")
    quick = json.dumps(ARGUMENTS | {"quick_gelu": True})
    second, _ = run(place, results, *QUICK, "--method", "qdrop", "--model-args", quick)
    assert not any("reused" in stage for stage in second.seconds)
    assert first.last_loss != second.last_loss
    ranges = tmp_path / "ranges.safetensors"
    common = ["--data", place / "captions", "--threads", 1, *QUICK, "--out", ranges]
    command("calibrate", *model(place), *common)
    assert "another model" in command(
        "calibrate", *model(place), *common, "--model-args", quick, fails=True
    )


def test_the_usual_evaluation_has_one_name(place: Path, tmp_path: Path) -> None:
    first, folder = run(place, tmp_path / "runs", "--method", "fp")
    again, same = run(place, tmp_path / "runs", "--method", "fp", "--eval", "retrieval")
    assert folder == same
    assert first == again
    request = CellRequest(
        "retrieval", ModelRequest("demo_clip"), DataRequest(evaluation="zeroshot"), None
    )
    with pytest.raises(RecipeError, match=r"no evaluation 'zeroshot'.*zero-shot"):
        planned_folder(request)
    request = CellRequest(
        "classification", ModelRequest("demo_vit"), DataRequest(evaluation="retrieval"), None
    )
    with pytest.raises(RecipeError, match="has only one"):
        planned_folder(request)


def test_mlps_of_one_tower_are_not_the_others(place: Path, tmp_path: Path) -> None:
    mlps = tmp_path / "mlps.safetensors"
    recipe = [
        "--method",
        "aphq",
        *QUICK,
        "--mlp-steps",
        1,
        "--mlp-batch",
        8,
        "--data",
        place / "captions",
        "--threads",
        1,
    ]
    command("reconstruct-mlp", *model(place), *recipe, "--towers", "vision", "--out", mlps)
    said = command(
        "run",
        *model(place),
        *recipe,
        "--towers",
        "text",
        "--mlp-checkpoint",
        mlps,
        "--results",
        tmp_path / "runs",
        fails=True,
    )
    assert "scope ('vision', here 'text')" in said


def test_other_class_names_are_other_data(place: Path, tmp_path: Path) -> None:
    def fingerprint() -> str:
        record, _ = run(
            place,
            tmp_path / "runs",
            "--method",
            "fp",
            "--eval",
            "zero-shot",
            "--force",
            data="labelled",
        )
        return record.dataset.fingerprint

    names = place / "labelled" / "classnames.txt"
    before, first = names.read_text(encoding="utf-8"), fingerprint()
    names.write_text("cat\ndog\nbus\nflower\n", encoding="utf-8")
    second = fingerprint()
    names.write_text(before, encoding="utf-8")
    assert first != second
    assert fingerprint() == first


@pytest.mark.parametrize("method", ["rtn", "brecq", "qdrop", "pdquant", "lsvit", "fimaq-mlp"])
def test_methods(place: Path, tmp_path: Path, method: str) -> None:
    extra = ["--mlp-steps", 3, "--mlp-batch", 8] if method == "fimaq-mlp" else []
    record, _ = run(place, tmp_path / "runs", "--method", method, *QUICK, *extra)
    assert record.method == method
    assert record.modules is not None
    assert {entry.weight_bits for entry in record.modules.quantized if entry.kind != "product"} == {
        4
    }
    assert record.calibration is not None
    assert record.calibration.batch == (8 if method in ("lsvit", "fimaq-mlp") else None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "10"], "leave temperature out"),
        (["--towers", "left"], "Invalid value for '--towers'"),
        (["--gelu-quantizer", "adalog"], "ViT-B-32"),
        (["--divergence-batch", "1"], "--divergence-batch"),
    ],
)
def test_what_does_not_fit_is_refused(
    place: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    said = command(
        "run", *model(place), "--data", place / "captions", "--results", tmp_path, *QUICK,
        *arguments,
        fails=arguments[0] != "--gelu-quantizer",
    )  # fmt: skip
    assert words in said


def test_classification_has_no_towers() -> None:
    err = io.StringIO()
    with redirect_stderr(err), redirect_stdout(io.StringIO()), pytest.raises(SystemExit):
        main(
            build_group("classification", "test"),
            ["run", "--model", "demo_vit", "--towers", "vision"],
        )
    assert "No such option" in err.getvalue()
