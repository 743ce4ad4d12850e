"""Preprocessing follows the model that was built, options replace it, and the record says it."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import randomise
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from fimaq_core.errors import ModelError, RecipeError
from tasks.classification.models import load_model
from tasks.common.cell import identity
from tasks.common.cell.identity import planned_folder
from tasks.common.cli.commands import build_group, main
from tasks.common.preprocessing import parse_preprocessing
from tasks.common.record import ResultRecord, read_record
from tasks.common.request import CellRequest, DataRequest, ModelRequest

VIT, DEIT = "vit_tiny_patch16_224", "deit_tiny_patch16_224"
SMALL: dict[str, Any] = {"depth": 1, "num_classes": 2}


def command(*arguments: object) -> tuple[int, str, str]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(build_group("classification", "test"), [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def built(name: str = VIT, seed: int = 0, **arguments: Any) -> nn.Module:
    return randomise(timm.create_model(name, pretrained=False, **SMALL, **arguments), seed)


def weights(folder: Path, name: str = VIT, **arguments: Any) -> Path:
    path = folder / f"{name}-{len(list(folder.iterdir()))}.pth"
    torch.save(built(name, **arguments).state_dict(), path)
    return path


def load(
    folder: Path, name: str = VIT, given: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    path = weights(folder, name, **arguments)
    return load_model(ModelRequest(name, {**SMALL, **arguments}, path, preprocessing=given or {}))


def picture(width: int = 150, height: int = 120) -> Image.Image:
    values = np.random.default_rng(3).integers(0, 255, (12, 15, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; in val three images of the first and one of the second."""
    root = tmp_path_factory.mktemp("data")
    for part, counts in (("train", (2, 2)), ("val", (3, 1))):
        for name, count in zip(("ant", "bee"), counts, strict=True):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                picture(60 + number, 50).save(root / part / name / f"{number}.png")
    return root


def run(
    data: Path, results: Path, name: str, path: Path, arguments: dict[str, Any], *more: object
) -> tuple[ResultRecord, str]:
    code, out, err = command(
        *(
            "run",
            "--model",
            name,
            "--model-args",
            json.dumps(arguments),
            "--weights",
            path,
            "--data",
            data,
        ),
        *("--results", results, "--threads", 1, *more),
    )
    assert code == 0, err
    return read_record(Path(out.strip().splitlines()[-1].removeprefix("record: "))), out


# Following the model


@pytest.mark.parametrize(
    "name", [VIT, DEIT, "swin_tiny_patch4_window7_224", "vit_small_patch14_dinov2"]
)
def test_a_model_as_published_has_exactly_timms_transform(tmp_path: Path, name: str) -> None:
    arguments = {"depths": (1, 1, 1, 1)} if name.startswith("swin") else {"depth": 1}
    model = timm.create_model(name, pretrained=False, num_classes=2, **arguments)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load_model(ModelRequest(name, {"num_classes": 2, **arguments}, tmp_path / "a.pth"))
    config = resolve_model_data_config(model)
    assert repr(loaded.eval_transform) == repr(create_transform(**config, is_training=False))
    assert repr(loaded.train_transform) == repr(create_transform(**config, is_training=True))
    assert loaded.preprocessing.model_dump() == config
    image = picture(700, 600)
    assert torch.equal(
        loaded.eval_transform(image), create_transform(**config, is_training=False)(image)
    )


@pytest.mark.parametrize(
    ("size", "shape"), [(96, (3, 96, 96)), ([64, 96], (3, 64, 96)), ((96, 64), (3, 96, 64))]
)
def test_transforms_have_the_size_that_the_model_was_built_for(
    tmp_path: Path, size: Any, shape: tuple[int, ...]
) -> None:
    loaded = load(tmp_path, img_size=size)
    for transform in (loaded.eval_transform, loaded.train_transform):
        assert transform(picture()).shape == shape == loaded.input_shape
    published = resolve_model_data_config(loaded.model)
    wanted = create_transform(**{**published, "input_size": shape}, is_training=False)
    assert torch.equal(loaded.eval_transform(picture()), wanted(picture()))
    assert loaded.preprocessing.model_dump() == {**published, "input_size": shape}


def test_swin_of_another_size(tmp_path: Path) -> None:
    arguments = {"img_size": (64, 128), "window_size": 4, "depths": (1, 1, 1, 1), "num_classes": 2}
    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, **arguments)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load_model(ModelRequest("swin_tiny_patch4_window7_224", arguments, tmp_path / "a.pth"))
    with torch.no_grad():
        assert loaded.model(loaded.eval_transform(picture())[None]).shape == (1, 2)


def test_a_dinov2_of_another_size_is_evaluated_and_quantized(data: Path, tmp_path: Path) -> None:
    name, arguments = "vit_small_patch14_dinov2", {"img_size": 98, **SMALL}
    path = weights(tmp_path, name, img_size=98)
    record, out = run(
        data,
        tmp_path / "runs",
        name,
        path,
        arguments,
        "--method",
        "rtn",
        "--calibration-images",
        4,
        "--range-search",
        "minmax",
    )
    assert record.n == 4
    assert record.preprocessing is not None
    assert record.preprocessing.input_size == (3, 98, 98)
    assert "preprocessing: 3 x 98 x 98, bicubic, crop 1 (center), mean 0.485, 0.456, 0.406" in out


def test_models_of_one_channel_get_grey_images(data: Path, tmp_path: Path) -> None:
    loaded = load(tmp_path, in_chans=1, img_size=64)
    found = loaded.eval_transform(picture())
    assert found.shape == loaded.input_shape == (1, 64, 64)
    colour = create_transform(
        **resolve_model_data_config(loaded.model) | {"input_size": (3, 64, 64)}, is_training=False
    )
    grey = picture().convert("L").convert("RGB")
    assert torch.allclose(
        found, colour(grey)[:1], atol=0.02
    )  # resized after or before rounding to grey
    assert (loaded.preprocessing.mean, loaded.preprocessing.std) == (
        (0.5,),
        (0.5,),
    )  # the three are equal
    record, _ = run(
        data,
        tmp_path / "runs",
        VIT,
        weights(tmp_path, in_chans=1),
        {**SMALL, "in_chans": 1},
        "--method",
        "fp",
    )
    assert record.preprocessing is not None
    assert record.preprocessing.input_size == (1, 224, 224)


def test_channels_that_images_or_normalisation_do_not_have(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"images of 4 channels.*in_chans in --model-args"):
        load(tmp_path, in_chans=4)
    with pytest.raises(
        ModelError, match=r"has 3 values, but the model takes 1 channel: give --mean with 1 value"
    ):
        load(tmp_path, DEIT, in_chans=1)
    loaded = load(tmp_path, DEIT, {"mean": [0.45], "std": [0.25]}, in_chans=1)
    white = loaded.eval_transform(Image.new("RGB", (300, 300), "white"))
    assert torch.allclose(white, torch.full((1, 224, 224), (1 - 0.45) / 0.25))


# Options


def test_given_preprocessing_replaces_the_models(tmp_path: Path) -> None:
    given = {"crop_pct": 1.0, "mean": [0.1, 0.2, 0.3], "std": [0.5], "interpolation": "bilinear"}
    loaded = load(tmp_path, given=given)
    wanted = create_transform(
        (3, 224, 224),
        crop_pct=1.0,
        mean=(0.1, 0.2, 0.3),
        std=(0.5,) * 3,
        interpolation="bilinear",
        is_training=False,
    )
    assert torch.equal(loaded.eval_transform(picture()), wanted(picture()))
    assert loaded.preprocessing.std == (0.5, 0.5, 0.5)
    for wrong in ({"mean": [0.1, 0.2]}, {"std": [0.1, 0.2, 0.3, 0.4]}):
        with pytest.raises(ModelError, match=r"has \d values, but the model takes 3 channels"):
            load(tmp_path, given=wrong)


def test_input_sizes_that_the_model_takes_or_not(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"takes inputs .* \(3, 224, 224\), .*--model-args '\{\"img_size\": \[96, 96\]\}'",
    ):
        load(tmp_path, given={"input_size": [96, 96]})
    with pytest.raises(ModelError, match=r"not of \(1, 224, 224\).*in_chans"):
        load(tmp_path, given={"input_size": [1, 224, 224]})
    loaded = load(tmp_path, given={"input_size": [96, 64]}, dynamic_img_size=True)
    assert loaded.eval_transform(picture()).shape == loaded.input_shape == (3, 96, 64)
    assert load(tmp_path, given={"input_size": [3, 224, 224]}).input_shape == (3, 224, 224)


@pytest.mark.parametrize("text", ["96,64", "96x64", "96 64", "(96, 64)"])
def test_sizes_as_users_write_them(text: str) -> None:
    assert parse_preprocessing({"input_size": text}) == {"input_size": [96, 64]}
    assert parse_preprocessing({"input_size": "96", "mean": None}) == {"input_size": [96, 96]}
    assert parse_preprocessing({"mean": "0.5, 0.4,0.3", "std": ".5"}) == {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.5],
    }


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("input-size", "big"),
        ("input-size", "0"),
        ("input-size", "1,2,3,4"),
        ("input-size", ""),
        ("crop-pct", "0"),
        ("crop-pct", "90"),
        ("crop-pct", "nan"),
        ("mean", "a,b,c"),
        ("std", "0"),
        ("mean", "inf"),
        ("interpolation", "cubic"),
        ("mean", "-0.1"),
        ("std", "1e-300"),
    ],
)
def test_impossible_values_are_explained(tmp_path: Path, option: str, text: str) -> None:
    with pytest.raises(RecipeError, match=f"--{option} '{text}' is not possible: .*Give: "):
        parse_preprocessing({option.replace("-", "_"): text})
    code, _, err = command("run", "--model", "demo_vit", f"--{option}", text, "--results", tmp_path)
    assert (code, err.startswith("error: --")) == (2, True)


@pytest.mark.parametrize(
    ("option", "text"), [("mean", "123.675,116.28,103.53"), ("std", "58.395,57.12,57.375")]
)
def test_values_of_0_to_255_are_to_be_divided(option: str, text: str) -> None:
    with pytest.raises(
        RecipeError,
        match=rf"--{option} '{text}' is not possible: .*Divide values of 0\.\.255 by 255\.",
    ):
        parse_preprocessing({option: text})


def test_demo_models_take_no_other_preprocessing(tmp_path: Path) -> None:
    code, _, err = command(
        "run", "--model", "demo_vit", "--mean", "0.5", "--crop-pct", "0.9", "--results", tmp_path
    )
    assert code == 2
    assert "Demo models take no --crop-pct, --mean" in err


def test_identity_has_what_was_given_and_nothing_else(tmp_path: Path) -> None:
    def request(**changes: Any) -> CellRequest:
        model = ModelRequest("demo_vit", **changes)
        return CellRequest("classification", model, DataRequest(), None, results=tmp_path)

    def folder(**changes: Any) -> Path:
        return planned_folder(request(**changes))

    # runs from before these options keep their folders
    assert not {"entry", "preprocessing"} & identity._basis(request()).keys()
    assert identity._basis(request(weights_entry="model"))["entry"] == "model"
    assert folder(weights_entry=None, preprocessing={}) == folder()
    others = [
        folder(weights_entry="model"),
        folder(weights_entry="state_dict"),
        folder(preprocessing={"crop_pct": 1.0}),
        folder(preprocessing={"crop_pct": 0.9}),
        folder(preprocessing={"mean": [0.9]}),
    ]
    assert len({folder(), *others}) == 6


def test_stages_keep_what_was_given(data: Path, tmp_path: Path) -> None:
    """The checkpoint tells later stages; what is given there replaces it."""
    path, out = weights(tmp_path, img_size=32), tmp_path / "a.safetensors"
    given = ["--weights", path, "--data", data, "--threads", 1]
    quick = [
        "--method",
        "qdrop",
        "--range-search",
        "minmax",
        "--calibration-images",
        4,
        "--calibration-transform",
        "eval",
    ]
    arguments = json.dumps({**SMALL, "img_size": 32})
    code, said, err = command(
        *(
            "calibrate",
            "--model",
            VIT,
            "--model-args",
            arguments,
            *given,
            *quick,
            "--steps",
            1,
            "--batch-size",
            4,
        ),
        *("--crop-pct", 0.5, "--mean", 0.25, "--out", out),
    )
    assert code == 0, err
    assert (
        "note: preprocessing: 3 x 32 x 32, bicubic, crop 0.5 (center), mean 0.25, 0.25, 0.25"
        in said
    )
    code, text, err = command("inspect", out, "--weights", path)
    assert (
        "preprocessing: 3 x 32 x 32, bicubic, crop 0.5 (center), mean 0.25, 0.25, 0.25, "
        "std 0.5, 0.5, 0.5" in text
    ), err
    content = json.loads(command("inspect", out, "--weights", path, "--json")[1])
    assert content["preprocessing"]["crop_pct"] == 0.5
    whole = tmp_path / "b.safetensors"
    code, _, err = command("reconstruct", out, *given, "--out", whole)
    assert code == 0, err
    code, _, err = command(
        "reconstruct", out, *given, "--mean", 0.75, "--out", tmp_path / "c.safetensors"
    )
    assert code == 2, "other calibration images"
    code, said, err = command("evaluate", whole, *given)
    assert code == 0, err
    assert (
        "note: preprocessing: 3 x 32 x 32, bicubic, crop 0.5 (center), mean 0.25, 0.25, 0.25"
        in said
    )
    assert "replaces" not in said
    code, said, err = command(
        "evaluate", whole, *given, "--mean", 0.75, "--std", 0.25, "--crop-pct", 0.5
    )
    assert code == 0, err
    assert "crop 0.5 (center), mean 0.75, 0.75, 0.75, std 0.25, 0.25, 0.25" in said
    notes = [line.split(", which")[0] for line in said.splitlines() if "replaces" in line]
    assert notes == ["note: --mean 0.75 replaces 0.25", "note: --std 0.25 replaces the model's own"]
    code, _, err = command("evaluate", whole, *given, "--input-size", 64)
    assert (code, "not of (3, 64, 64)" in err) == (2, True)


# Entries


def test_averaged_weights_are_evaluated_unless_said_otherwise(data: Path, tmp_path: Path) -> None:
    """Averaged weights see the first class everywhere (3 of 4 are), plain ones the second."""
    states = {}
    for name, favoured in (("state_dict", 1), ("state_dict_ema", 0)):
        model = built(img_size=32)
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.copy_(torch.eye(2)[favoured])
        states[name] = model.state_dict()
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"arch": VIT, **states, "epoch": 3}, path)
    arguments, found = {**SMALL, "img_size": 32}, {}
    quick = ["--method", "rtn", "--calibration-images", 4, "--range-search", "minmax"]
    for entry, options in {
        "state_dict_ema": [],
        "state_dict": ["--weights-entry", "state_dict"],
    }.items():
        record, out = run(data, tmp_path / "runs", VIT, path, arguments, *quick, *options)
        assert record.weights.entry == entry
        assert set(record.weights.entries) == set(states)
        assert f"weights: entry '{entry}' of state_dict, state_dict_ema" in out
        found[entry] = record
    tops = {
        entry: (record.fp_metrics["top1"].value, record.metrics["top1"].value)
        for entry, record in found.items()
    }
    assert tops == {"state_dict_ema": (75, 75), "state_dict": (25, 25)}
    assert found["state_dict"].weights.sha256 != found["state_dict_ema"].weights.sha256
    assert len(list((tmp_path / "calibration").glob("*.safetensors"))) == 2
    assert len(list((tmp_path / "runs").rglob("result.json"))) == 4


def test_stages_take_the_entry_of_the_checkpoint(data: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "a.pth", tmp_path / "a.safetensors"
    torch.save(
        {
            "net": built(img_size=32).state_dict(),
            "ema_net": built(seed=1, img_size=32).state_dict(),
        },
        path,
    )
    given = ["--weights", path, "--data", data, "--threads", 1]
    start = [
        "calibrate",
        "--model",
        VIT,
        "--model-args",
        json.dumps({**SMALL, "img_size": 32}),
        *given,
        "--method",
        "rtn",
    ]
    start += ["--range-search", "minmax", "--calibration-images", 4, "--out", out]
    code, _, err = command(*start)
    assert (code, "'net', 'ema_net'" in err) == (2, True)
    code, said, err = command(*start, "--weights-entry", "ema_net")
    assert code == 0, err
    assert "weights: entry 'ema_net' of net, ema_net" in said
    code, said, err = command("evaluate", out, *given)
    assert code == 0, err
    assert "note: weights: entry 'ema_net' of net, ema_net" in said
    assert "entry of the weights file: ema_net" in command("inspect", out, "--weights", path)[1]
    code, _, err = command("evaluate", out, *given, "--weights-entry", "net")
    assert (code, "was made from other weights" in err) == (2, True)


def test_names_of_classes_come_with_the_model(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": built().state_dict(), "class_to_idx": {"bee": 1, "ant": 0}}, path)
    assert load_model(ModelRequest(VIT, SMALL, path)).class_names == ("ant", "bee")
