"""Names of classifiers, and weights from files."""

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from small_models import images, randomise
from torch import nn

from fimaq_core.errors import ModelError, NumericsError
from fimaq_core.recipe import make_recipe
from tasks.classification import tags
from tasks.classification.models import load_model
from tasks.classification.tags import DEMO_NAMES, SHORT_NAMES, full_name, model_tag
from tasks.classification.task import TASK
from tasks.common.cli.commands import build_group
from tasks.common.models import hub, timm_names
from tasks.common.request import DataRequest, ModelRequest, describe_missing

ARGUMENTS: dict[str, Any] = {"img_size": 32, "num_classes": 5, "depth": 2}
VIT = "vit_tiny_patch16_224"
PUBLISHED = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def tiny() -> nn.Module:
    """The architecture behind VIT, cut down."""
    return randomise(timm.create_model(VIT, pretrained=False, **ARGUMENTS))


def write(model: nn.Module, path: Path) -> Path:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither network nor cache."""
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.setattr(hub, "cached_file", lambda repository: None)


def test_short_names_are_tagged_and_known_to_timm() -> None:
    for short, full in SHORT_NAMES.items():
        architecture, _, tag = full.partition(".")
        assert timm.is_model(architecture), short
        assert tag in timm_names.timm_tags(full), short
        assert full_name(short) == full
    assert SHORT_NAMES["vit_small"] == "vit_small_patch16_224.augreg_in21k_ft_in1k"
    assert SHORT_NAMES["deit_base"] == "deit_base_patch16_224.fb_in1k"
    assert SHORT_NAMES["swin_base"] == "swin_base_patch4_window7_224.ms_in22k_ft_in1k"
    listed = CliRunner().invoke(build_group("classification", ""), ["models"]).output.splitlines()
    assert {line.split()[0] for line in listed} == {*SHORT_NAMES, *DEMO_NAMES}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit_smal", "vit_small"),
        ("demo_vitt", "demo_vit"),
        ("deit_tiny_patch16_22", "deit_tiny_patch16_224"),
        ("swin_tiny_patch4_window7_224.ms_in1kk", "ms_in1k"),
    ],
)
def test_unknown_names_come_with_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(ModelError, match=rf"Did you mean '{hint}'\?"):
        model_tag(ModelRequest(name))


def test_names_that_resemble_nothing_are_refused_briefly() -> None:
    with pytest.raises(ModelError, match="Unknown model 'qqqqqqqq'") as caught:
        model_tag(ModelRequest("qqqqqqqq"))
    assert len(str(caught.value)) < 300


def test_untagged_names_are_refused_with_the_choices() -> None:
    with pytest.raises(
        ModelError, match=r"names no weights.*vit_small_patch16_224.augreg_in21k_ft_in1k"
    ):
        model_tag(ModelRequest("vit_small_patch16_224"))
    with pytest.raises(ModelError, match="names no weights"):
        load_model(ModelRequest("swin_tiny_patch4_window7_224"))


def test_tags(tmp_path: Path) -> None:
    assert model_tag(ModelRequest("vit_tiny")) == PUBLISHED
    assert model_tag(ModelRequest(PUBLISHED)) == PUBLISHED
    assert model_tag(ModelRequest("demo_vit")).startswith("demo_vit.")
    model = tiny()
    local = write(model, tmp_path / "mine.safetensors")
    tag = model_tag(ModelRequest(VIT, ARGUMENTS, weights=local))
    assert tag.startswith(f"{VIT}.local-")
    assert tag == model_tag(ModelRequest("vit_tiny", ARGUMENTS, weights=local))
    other = write(randomise(model, 1), tmp_path / "other.safetensors")
    assert model_tag(ModelRequest(VIT, ARGUMENTS, weights=other)) != tag
    untagged = write(
        model, tmp_path / f"{VIT}.safetensors"
    )  # the file's name says no more than the model's
    assert model_tag(ModelRequest(VIT, ARGUMENTS, weights=untagged)).startswith(f"{VIT}.local-")
    for ending in (".ckpt", ".pth.tar"):
        named = write(model, tmp_path / f"{PUBLISHED}{ending}")
        assert model_tag(ModelRequest("vit_tiny", weights=named)) == PUBLISHED
    published = write(model, tmp_path / f"{PUBLISHED}.safetensors")
    assert model_tag(ModelRequest("vit_tiny", weights=published)) == PUBLISHED
    assert model_tag(ModelRequest("vit_tiny", weights_folder=tmp_path)) == PUBLISHED


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_files_of_every_kind_give_the_same_logits(tmp_path: Path, suffix: str) -> None:
    model, x = tiny(), images(3)
    request = ModelRequest(VIT, ARGUMENTS, weights=write(model, tmp_path / f"weights{suffix}"))
    loaded = load_model(request)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model(x))
        chain = TASK.build(loaded, make_recipe("rtn"))
        assert torch.allclose(chain(x), model(x), atol=1e-5)
    assert not loaded.model.training
    assert loaded.classes == 5
    assert loaded.source == f"file weights{suffix}"
    assert loaded.data is None
    assert loaded.input_shape == (3, 32, 32)  # as the arguments say, not as published


def test_identity_of_weights_does_not_depend_on_the_file_format(tmp_path: Path) -> None:
    """With model arguments the hash is of the values; the tag still names the file."""
    model = tiny()
    hashes = {
        load_model(
            ModelRequest(VIT, ARGUMENTS, weights=write(model, tmp_path / f"a{suffix}"))
        ).sha256
        for suffix in (".safetensors", ".pth")
    }
    assert len(hashes) == 1
    changed = write(randomise(model, 1), tmp_path / "b.pth")
    assert load_model(ModelRequest(VIT, ARGUMENTS, weights=changed)).sha256 not in hashes


def test_weights_folder_is_searched_by_tag(tmp_path: Path, no_hub: None) -> None:
    request = ModelRequest("vit_tiny", ARGUMENTS, weights_folder=tmp_path)
    with pytest.raises(ModelError, match=rf"weights of {PUBLISHED}.* in the folder {tmp_path}"):
        load_model(request)
    model, x = tiny(), images(2)
    write(model, tmp_path / f"{PUBLISHED}.pth")
    with torch.no_grad():
        assert torch.equal(load_model(request).model(x), model(x))


def test_missing_weights_say_where_and_how(no_hub: None, tmp_path: Path) -> None:
    message = describe_missing(tags.preflight(ModelRequest("vit_small"), DataRequest()))
    assert message is not None
    for part in (
        "vit_small_patch16_224.augreg_in21k_ft_in1k",
        "Hugging Face cache",
        "--weights-folder",
        "WEIGHTS=",
        "ImageNet",
    ):
        assert part in message
    with pytest.raises(ModelError, match="There is no weights file"):
        load_model(ModelRequest(VIT, ARGUMENTS, weights=tmp_path / "none.pth"))
    assert tags.preflight(ModelRequest("demo_vit"), DataRequest()) == []


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = write(tiny(), tmp_path / "weights.safetensors")
    for name, arguments in (
        (VIT, {**ARGUMENTS, "num_classes": 6}),
        (VIT, {**ARGUMENTS, "depth": 3}),
        (VIT, {**ARGUMENTS, "embed_dim": 96}),
        ("deit_tiny_distilled_patch16_224", ARGUMENTS),
        ("swin_tiny_patch4_window7_224", {"num_classes": 5}),
        ("demo_vit", {}),
    ):
        with pytest.raises(ModelError, match="fit"):
            load_model(ModelRequest(name, arguments, weights=path))


def test_weights_with_nothing_in_them(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    for name, arguments in ((VIT, ARGUMENTS), ("swin_tiny_patch4_window7_224", {})):
        with pytest.raises(ModelError, match="fit"):
            load_model(ModelRequest(name, arguments, weights=path))


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"weights.pth have NaN .*blocks.1.mlp.fc1.weight"):
        load_model(ModelRequest(VIT, ARGUMENTS, weights=write(model, tmp_path / "weights.pth")))


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.trace,)


def test_code_in_weights_does_not_run(tmp_path: Path) -> None:
    trace, path = tmp_path / "it ran", tmp_path / "weights.pth"
    torch.save({**tiny().state_dict(), "extra": Payload(str(trace))}, path)
    with pytest.raises(ModelError, match="more than tensors"):
        load_model(ModelRequest(VIT, ARGUMENTS, weights=path))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"no_such_argument": 1}, "Unknown key 'no_such_argument'"),
        ({"num_heads": 5}, "timm cannot build"),
        ({"depths": [2, 2]}, "timm cannot build"),
        ({"img_size": "big"}, "img_size.0: Input should be a valid integer"),
        ({"img_size": True}, "img_size.0: Input should be a valid integer"),
        ({"depth": 10_000_000}, "depth: Input should be less than or equal to 200"),
        ({"embed_dim": 10**30}, "embed_dim: "),
        ({"embed_dim": 2**20, "num_heads": 1}, r"would have [\d,]+ values.*do not fit"),
        ({"img_size": 8192, "patch_size": 1}, r"would have [\d,]+ values.*do not fit"),
        ({"norm_layer": "os.system"}, "norm_layer: String should match"),
        ({"act_layer": "no_such_layer"}, "timm cannot build"),
        ({"cache_dir": "/x"}, "Unknown key 'cache_dir'"),
        ({"pretrained": True}, "Unknown key 'pretrained'"),
    ],
)
def test_arguments_the_model_does_not_take(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    path = write(tiny(), tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=message):
        load_model(ModelRequest(VIT, {**ARGUMENTS, **arguments}, weights=path))


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_demo_models_say_what_images_they_take(name: str) -> None:
    loaded = load_model(ModelRequest(name))
    assert loaded.input_shape == (1, 32, 64)
    with torch.no_grad():
        assert loaded.model(torch.zeros(1, *loaded.input_shape)).shape == (1, 100)


def test_demo_models_take_no_arguments() -> None:
    with pytest.raises(ModelError, match="no --model-args"):
        load_model(ModelRequest("demo_vit", {"depth": 2}))
