"""Names of CLIP models, their weights from files, their transforms and tokenizers."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import pytest
import tokenizers
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from safetensors.torch import save_file
from small_models import images, randomise
from torch import Tensor, nn
from torchvision.transforms import Normalize

from fimaq_core.errors import ModelError, NumericsError
from tasks.common.models import hub
from tasks.common.request import DataRequest, ModelRequest, describe_missing
from tasks.retrieval import tags
from tasks.retrieval import tokenizers as captions_to_ids
from tasks.retrieval.models import load_model
from tasks.retrieval.tags import SHORT_NAMES, full_name, model_tag

CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 2, "width": 64, "head_width": 32, "image_size": 64},
    "text_cfg": {"layers": 2, "width": 64, "heads": 2},
}
#: Arguments that choose the exact GELU for ``ViT-B-32``.
EXACT: dict[str, Any] = {**CLIP, "quick_gelu": False}
SIGLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"timm_model_name": "test_vit", "image_size": 160},
    "text_cfg": {"layers": 2, "width": 64, "heads": 2, "vocab_size": 60},
}
WORDS = [
    "a photo of a cat",
    "two dogs, on the grass",
    "the man's 3 red buses - in 1984",
    "café menu",
    "quick brown fox",
    "joy z",
]
CAPTION = "A photo of the cat."
LONG = "two red buses and " * 60


def built(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """The model by open_clip alone: its configuration with ``arguments`` written into it."""
    config = open_clip.get_model_config(architecture)
    changed = {
        name: {**config[name], **value} if isinstance(value, dict) else value
        for name, value in arguments.items()
    }
    return open_clip.create_model(architecture, **changed).eval()


def write(state: dict[str, Tensor], path: Path) -> Path:
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return path


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    return randomise(built("ViT-B-32", CLIP))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network and no cache."""
    for module in (hub, tags, captions_to_ids):
        monkeypatch.setattr(module, "hub_answers", lambda: False)
        monkeypatch.setattr(module, "cached_file", lambda repository: None)


def tokenizer_folder(folder: Path, kind: str = "T5Tokenizer") -> Path:
    """A folder with a tokenizer of 50 pieces, in the files that transformers reads."""
    folder.mkdir(parents=True)
    own = tokenizers.Tokenizer(tokenizers.models.Unigram())
    own.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="always"
    )
    special = ["<pad>", "</s>", "<unk>", "<s>", "<class>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=50, special_tokens=special, unk_token="<unk>"
    )
    own.train_from_iterator(WORDS * 5, trainer)
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    own.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": kind,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def siglip_request(folder: Path, arguments: dict[str, Any] = SIGLIP) -> ModelRequest:
    """A small SigLIP with its tokenizer, from one folder."""
    tokenizer_folder(folder / "ViT-B-16-SigLIP-tokenizer")
    write(
        randomise(built("ViT-B-16-SigLIP", SIGLIP)).state_dict(),
        folder / "ViT-B-16-SigLIP.webli.safetensors",
    )
    return ModelRequest("siglip_b16", arguments, weights_folder=folder)


# Names


def test_short_names_are_what_open_clip_has_at_the_hub() -> None:
    for short, full in SHORT_NAMES.items():
        model, _, tag = full.partition(".")
        published = open_clip.get_pretrained_cfg(model, tag)
        config = open_clip.get_model_config(model)
        assert published["hf_hub"] == f"{tags.repository(full).repo}/", short
        assert bool(published.get("quick_gelu")) == bool(config.get("quick_gelu")), short
        assert tags.tokenizer_repository(model) == config["text_cfg"].get("hf_tokenizer_name"), (
            short
        )
        assert full_name(short) == model_tag(ModelRequest(short)) == full_name(full) == full


def test_every_tag_of_open_clip_means_the_model_with_its_activation() -> None:
    """A tag tells the activation; a model with another activation means the name with the tag's."""

    def quick(model: str, tag: str | None = None) -> bool:
        config = (
            open_clip.get_pretrained_cfg(model, tag) if tag else open_clip.get_model_config(model)
        )
        return bool(config.get("quick_gelu"))

    for model, tag in open_clip.list_pretrained():
        if quick(model) == quick(model, tag):
            assert full_name(f"{model}.{tag}") == f"{model}.{tag}"
        elif model == "roberta-ViT-B-32":
            with pytest.raises(ModelError, match="another activation"):
                full_name(f"{model}.{tag}")
        else:
            assert full_name(f"{model}.{tag}") == f"{model}-quickgelu.{tag}"
    assert full_name("ViT-B-32.openai") == SHORT_NAMES["clip_vit_b32"]


def test_repositories_with_files_of_their_own_names() -> None:
    assert tags.repository("ViTamin-S.datacomp1b") == hub.Repository(
        "jienengchen/ViTamin-S", ("pytorch_model.safetensors", "pytorch_model.bin")
    )
    found = tags.repository("ViT-B-16.laion400m_e31")
    assert found == hub.Repository(
        "timm/vit_base_patch16_clip_224.laion400m_e31",
        ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    )


def test_weights_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED["ViT-B-16"],
        "only_url",
        {"url": "https://example.org/a.pt"},
    )
    with pytest.raises(ModelError, match=r"ViT-B-16.only_url.*hub does not have them.*--weights"):
        load_model(ModelRequest("ViT-B-16.only_url"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("clip_vit_b31", "clip_vit_b32"),
        ("demo_clipp", "demo_clip"),
        ("ViT-B/32", "ViT-B-32"),
        ("ViT-B-16-SigLIPP.webli", "ViT-B-16-SigLIP"),
        ("ViT-B-32.laion2B-s34B-b79K", "laion2b_s34b_b79k"),
    ],
)
def test_unknown_names_come_with_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(ModelError, match=rf"Did you mean '{hint}'\?"):
        model_tag(ModelRequest(name))


def test_names_that_resemble_nothing_are_refused_briefly() -> None:
    with pytest.raises(ModelError, match="Unknown model 'qqqqqqqq'") as caught:
        model_tag(ModelRequest("qqqqqqqq"))
    assert len(str(caught.value)) < 300


def test_untagged_names_are_refused_with_all_choices() -> None:
    with pytest.raises(ModelError, match="'ViT-B-32' names no weights") as caught:
        load_model(ModelRequest("ViT-B-32"))
    for tag in open_clip.list_pretrained_tags_by_model("ViT-B-32"):
        assert tag in str(caught.value)
    assert "ViT-B-32-quickgelu.openai" in str(caught.value)
    assert "ViT-B-32.openai" not in str(caught.value)


def test_tags_of_files(tmp_path: Path, clip: nn.Module) -> None:
    def tag(name: str, file: str) -> str:
        return model_tag(
            ModelRequest(name, CLIP, weights=write(clip.state_dict(), tmp_path / file))
        )

    local = tag("ViT-B-32", "mine.safetensors")
    assert local.startswith("ViT-B-32.local-")
    assert (
        tag("ViT-B-32", "ViT-B-32.safetensors") == tag("laion_vit_b32", "mine.safetensors") == local
    )
    assert (
        tag("laion_vit_b32", "ViT-B-32.laion2b_s34b_b79k.safetensors")
        == "ViT-B-32.laion2b_s34b_b79k"
    )
    request = ModelRequest("laion_vit_b32", CLIP, weights_folder=tmp_path)
    assert model_tag(request) == "ViT-B-32.laion2b_s34b_b79k"
    assert tags.weights_digest(request) is not None
    assert tags.weights_digest(ModelRequest("laion_vit_b32")) is None


def test_short_names_import_nothing_heavy() -> None:
    """The plan of a grid needs tags and missing parts only."""
    code = (
        "import sys; from tasks.retrieval import tags\n"
        "from tasks.common.request import DataRequest, ModelRequest\n"
        "for name in tags.SHORT_NAMES:\n"
        "    tags.model_tag(ModelRequest(name))\n"
        "    tags.preflight(ModelRequest(name), DataRequest())\n"
        "heavy = {'torch', 'timm', 'open_clip', 'transformers', 'torchvision'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.strip() == "[]", done.stderr


# What is missing


def test_missing_weights_tokenizer_and_data_say_where_and_how(no_hub: None, tmp_path: Path) -> None:
    message = describe_missing(
        tags.preflight(ModelRequest("siglip_b16", weights_folder=tmp_path), DataRequest())
    )
    assert message is not None
    for part in (
        "weights of ViT-B-16-SigLIP.webli (repository timm/ViT-B-16-SigLIP)",
        f"in the folder {tmp_path}", "--weights-folder",
        "tokenizer of ViT-B-16-SigLIP (repository timm/ViT-B-16-SigLIP)",
        "<model>-tokenizer", "COCO=/path", "FLICKR=/path",
        "dataset_coco.json", "captions.csv",
    ):  # fmt: skip
        assert part in message
    assert [item.what for item in tags.preflight(ModelRequest("clip_vit_b32"), DataRequest())] == [
        "a data set of captions",
        "the weights of ViT-B-32-quickgelu.openai "
        "(repository timm/vit_base_patch32_clip_224.openai)",
    ]
    with pytest.raises(
        ModelError, match=r"weights of ViT-B-16-SigLIP(.|\n)*tokenizer of ViT-B-16-SigLIP"
    ):
        load_model(ModelRequest("siglip_b16"))
    assert tags.missing_data(DataRequest(), True) is None
    assert tags.missing_tokenizer(ModelRequest("demo_clip")) is None


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix else path.mkdir()
    return folder


def test_folders_of_captions(tmp_path: Path) -> None:
    def what(**fields: Any) -> str | None:
        found = tags.missing_data(DataRequest(**fields), True)
        return None if found is None else found.what

    coco = make(tmp_path / "coco", "dataset_coco.json", "val2014")
    assert what(path=coco) == f"the folder {coco / 'train2014'}"
    assert what(path=coco, calibration_data=coco) is None
    assert what(path=coco, calibration_data=tmp_path / "none") == f"the folder {tmp_path / 'none'}"
    make(coco, "train2014")
    assert what(path=coco) is None
    assert what(path=make(tmp_path / "flickr", "dataset_flickr30k.json")) is None
    own = make(tmp_path / "own", "images")
    assert what(path=own) == f"the captions in {own}"
    assert what(path=make(own, "captions.jsonl"), evaluation="retrieval") is None
    assert what(path=tmp_path / "none") == f"the folder {tmp_path / 'none'}"


def test_folders_of_zero_shot_classification(tmp_path: Path) -> None:
    def what(**fields: Any) -> str | None:
        found = tags.missing_data(DataRequest(evaluation="zero-shot", **fields), False)
        return None if found is None else found.what

    folder = make(tmp_path / "imagenet", "n01", "val")
    assert what() == "the data set ImageNet"
    assert tags.missing_data(DataRequest(evaluation="zero-shot"), True) is None
    assert what(path=folder) == f"the folder {folder / 'train'}"
    assert what(path=folder, calibration_data=folder) is None
    assert (
        what(path=folder, calibration_list=tmp_path / "list.txt")
        == f"the folder {folder / 'train'}"
    )
    assert what(path=make(folder, "train")) is None
    assert what(path=tmp_path, calibration_data=folder) == f"the folder {tmp_path / 'val'}"


# Weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_load_as_open_clip_loads_them(tmp_path: Path, clip: nn.Module, suffix: str) -> None:
    path = write(clip.state_dict(), tmp_path / f"weights{suffix}")
    loaded = load_model(ModelRequest("ViT-B-32", EXACT, weights=path))
    reference = built("ViT-B-32", CLIP)
    open_clip.load_checkpoint(reference, str(path))
    pixels, ids = images(3, 64), loaded.tokenizer(WORDS)
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_image(pixels), reference.encode_image(pixels))
        assert torch.equal(
            loaded.model.encode_text(ids),
            reference.encode_text(open_clip.get_tokenizer("ViT-B-32")(WORDS)),
        )
        assert not torch.equal(
            loaded.model.encode_image(pixels), built("ViT-B-32", CLIP).encode_image(pixels)
        )
    assert isinstance(loaded.model, open_clip.CLIP)
    assert not loaded.model.training
    assert (loaded.classes, loaded.input_shape, loaded.context_length) == (0, (3, 64, 64), 77)
    assert loaded.source == f"file weights{suffix}"
    assert loaded.data is None
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_published_weights_come_from_the_cache(
    tmp_path: Path, clip: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    cache = {("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "open_clip_model.safetensors"): str(path)}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, file: cache.get((repo, file))
    )
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    loaded = load_model(ModelRequest("laion_vit_b32", CLIP))
    assert (loaded.tag, loaded.source) == (
        "ViT-B-32.laion2b_s34b_b79k",
        "hub laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    )
    assert torch.equal(loaded.model.visual.proj, clip.visual.proj)
    with pytest.raises(ModelError, match=r"Missing: the weights of ViT-B-16\.laion2b_s34b_b88k"):
        load_model(ModelRequest("laion_vit_b16", CLIP))


def test_towers_keep_the_settings_that_arguments_do_not_name(
    tmp_path: Path, clip: nn.Module
) -> None:
    """open_clip replaces the whole tower by an argument: patches of 16 pixels here, not 32."""
    whole = open_clip.create_model("ViT-B-32", **CLIP)
    assert whole.visual.conv1.kernel_size == (16, 16)
    loaded = load_model(
        ModelRequest("ViT-B-32", EXACT, weights=write(clip.state_dict(), tmp_path / "a.pth"))
    )
    assert loaded.model.visual.conv1.kernel_size == (32, 32)


def activations(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()} & {"GELU", "QuickGELU"}


def test_weights_that_do_not_tell_their_activation_ask_for_it(
    tmp_path: Path, clip: nn.Module
) -> None:
    path = write(clip.state_dict(), tmp_path / "fine_tuned.safetensors")
    for form, wanted in (
        (ModelRequest("ViT-B-32-quickgelu", CLIP, weights=path), "QuickGELU"),
        (ModelRequest("ViT-B-32.openai", CLIP, weights=path), "QuickGELU"),
        (ModelRequest("ViT-B-32", {**CLIP, "quick_gelu": True}, weights=path), "QuickGELU"),
        (ModelRequest("ViT-B-32", EXACT, weights=path), "GELU"),
        (ModelRequest("laion_vit_b32", CLIP, weights=path), "GELU"),
    ):
        assert activations(load_model(form).model) == {wanted}, form.name
    with pytest.raises(ModelError, match=r"do not say which activation") as caught:
        load_model(ModelRequest("ViT-B-32", CLIP, weights=path))
    for answer in ("--model ViT-B-32-quickgelu", """--model-args '{"quick_gelu": false}'"""):
        assert answer in str(caught.value)


@pytest.mark.parametrize("quick", [True, False])
def test_open_clips_own_configuration_tells_the_activation(
    tmp_path: Path, clip: nn.Module, quick: bool
) -> None:
    content = {"model_cfg": {"embed_dim": 32, "quick_gelu": quick}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    path = write(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    found = load_model(ModelRequest("ViT-B-32", CLIP, weights=path))
    assert activations(found.model) == {"QuickGELU" if quick else "GELU"}
    other = write(
        clip.state_dict(), tmp_path / "other.safetensors"
    )  # the configuration is not this file's
    with pytest.raises(ModelError, match="do not say which activation"):
        load_model(ModelRequest("ViT-B-32", CLIP, weights=other))


@pytest.mark.parametrize("quick", ["false", 0, None])
def test_quick_gelu_is_true_or_false(tmp_path: Path, clip: nn.Module, quick: object) -> None:
    """Any text is true in Python, "false" too."""
    path = write(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(
        ModelError, match=rf"quick_gelu: Input should be a valid boolean \(given: {quick!r}\)"
    ):
        load_model(ModelRequest("ViT-B-32", {**CLIP, "quick_gelu": quick}, weights=path))
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"quick_gelu": quick}})
    )
    with pytest.raises(ModelError, match="do not say which activation"):
        load_model(ModelRequest("ViT-B-32", CLIP, weights=path))


def test_quickgelu_is_of_the_name(tmp_path: Path, clip: nn.Module) -> None:
    path, pixels = write(clip.state_dict(), tmp_path / "a.safetensors"), images(2, 64)
    exact, quick = (
        load_model(ModelRequest(name, CLIP, weights=path)).model
        for name in ("laion_vit_b32", "clip_vit_b32")
    )
    names = {type(module).__name__ for module in quick.modules()}
    assert "QuickGELU" in names
    assert "GELU" not in names
    with torch.no_grad():
        assert not torch.allclose(exact.encode_image(pixels), quick.encode_image(pixels))


def test_siglip_from_a_folder(tmp_path: Path, no_hub: None) -> None:
    request = siglip_request(tmp_path)
    loaded = load_model(request)
    reference = built("ViT-B-16-SigLIP", SIGLIP)
    open_clip.load_checkpoint(reference, str(tmp_path / "ViT-B-16-SigLIP.webli.safetensors"))
    pixels, ids = images(2, 160), loaded.tokenizer([CAPTION, LONG])
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_image(pixels), reference.encode_image(pixels))
        assert torch.equal(loaded.model.encode_text(ids), reference.encode_text(ids))
        assert torch.equal(loaded.model.logit_bias, reference.logit_bias)
    assert loaded.tag == "ViT-B-16-SigLIP.webli"
    assert (loaded.input_shape, loaded.context_length) == ((3, 160, 160), 64)


def test_other_image_sizes_resize_position_embeddings_only_if_asked_for(
    tmp_path: Path, clip: nn.Module, no_hub: None
) -> None:
    path = write(clip.state_dict(), tmp_path / "a.safetensors")
    larger = {
        **EXACT,
        "vision_cfg": {**CLIP["vision_cfg"], "image_size": 96},
        "text_cfg": {**CLIP["text_cfg"], "context_length": 9},
    }
    loaded = load_model(ModelRequest("ViT-B-32", larger, weights=path))
    reference = built("ViT-B-32", larger)
    open_clip.load_checkpoint(reference, str(path))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.tokenizer([LONG]).shape == (1, 9)
    assert loaded.eval_transform(Image.new("RGB", (200, 120))).shape == (3, 96, 96)
    silent = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"]}}
    del silent["vision_cfg"]["image_size"]  # 224, as the configuration says
    with pytest.raises(ModelError, match=r"do not fit.*visual.positional_embedding"):
        load_model(ModelRequest("ViT-B-32", silent, weights=path))

    timm = load_model(
        siglip_request(
            tmp_path / "s", {**SIGLIP, "vision_cfg": {**SIGLIP["vision_cfg"], "image_size": 96}}
        )
    )
    assert timm.input_shape == (3, 96, 96)
    tower = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 8192}
    large = {**SIGLIP, "vision_cfg": tower}
    with pytest.raises(ModelError, match=r"would have [\d,]+ values"):
        load_model(siglip_request(tmp_path / "large", large))
    with torch.no_grad():
        assert timm.model.encode_image(images(2, 96)).shape == (2, 64)


def test_older_layouts(tmp_path: Path, clip: nn.Module) -> None:
    """OpenAI's further entries, a prefix of parallel training, half precision, a scale (1,)."""
    state = {f"module.{name}": tensor.half() for name, tensor in clip.state_dict().items()}
    state["module.logit_scale"] = state["module.logit_scale"].reshape(1)
    for name in ("input_resolution", "context_length", "vocab_size"):
        state[f"module.{name}"] = torch.tensor(1)
    path = tmp_path / "weights.pth"
    torch.save({"epoch": 3, "state_dict": state}, path)
    loaded = load_model(ModelRequest("ViT-B-32", CLIP, weights=path))
    for name, tensor in clip.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.half().float()), name
    assert activations(loaded.model) == {"QuickGELU"}  # these entries are OpenAI's
    assert loaded.source == "file weights.pth (QuickGELU, as it says)"


def test_text_towers_without_a_module_of_their_own(tmp_path: Path, no_hub: None) -> None:
    """A checkpoint of ``CLIP`` in a ``CustomTextCLIP``: names get ``text.``; gaps are refused."""
    request = siglip_request(tmp_path)
    state = built("ViT-B-16-SigLIP", SIGLIP).state_dict()
    old = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    path = write({**old, "text_projection": old["text_projection.weight"]}, tmp_path / "old.pth")
    with pytest.raises(ModelError, match=r"do not fit.*text_projection"):
        load_model(ModelRequest("siglip_b16", SIGLIP, weights=path, weights_folder=tmp_path))
    del state["logit_bias"]  # open_clip would put zero
    path = write(state, tmp_path / "biasless.pth")
    with pytest.raises(ModelError, match=r"do not fit.*logit_bias"):
        load_model(ModelRequest("siglip_b16", SIGLIP, weights=path, weights_folder=tmp_path))
    assert load_model(request).model.logit_bias is not None


def test_weights_that_do_not_fit(tmp_path: Path, clip: nn.Module) -> None:
    path = write(clip.state_dict(), tmp_path / "weights.safetensors")
    for changes in (
        {"embed_dim": 48},
        {"vision_cfg": {**CLIP["vision_cfg"], "layers": 3}},
        {"text_cfg": {**CLIP["text_cfg"], "layers": 1}},
        {"init_logit_bias": -10.0},
    ):
        with pytest.raises(ModelError, match="do not fit"):
            load_model(ModelRequest("ViT-B-32", {**CLIP, **changes}, weights=path))
    for state in ({}, {"input_resolution": torch.tensor(224)}):
        with pytest.raises(ModelError, match="do not fit"):
            load_model(
                ModelRequest("ViT-B-32", EXACT, weights=write(state, tmp_path / "empty.pth"))
            )
    with pytest.raises(ModelError, match="There is no weights file"):
        load_model(ModelRequest("ViT-B-32", EXACT, weights=tmp_path / "none.pth"))


def test_weights_that_are_no_numbers(tmp_path: Path, clip: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    state["visual.proj"][1, 2] = math.nan
    with pytest.raises(NumericsError, match=r"NaN .*visual\.proj"):
        load_model(ModelRequest("ViT-B-32", EXACT, weights=write(state, tmp_path / "weights.pth")))


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.trace,)


def test_code_in_weights_does_not_run(tmp_path: Path, clip: nn.Module) -> None:
    trace, path = tmp_path / "it ran", tmp_path / "weights.pth"
    torch.save({**clip.state_dict(), "extra": Payload(str(trace))}, path)
    with pytest.raises(ModelError, match="more than tensors"):
        load_model(ModelRequest("ViT-B-32", EXACT, weights=path))
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_for_the_safetensors_of_the_mirror(tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
    repo = r"timm/vit_base_patch32_clip_224\.openai"
    mirror = rf"TorchScript.*open_clip_model\.safetensors of the Hugging Face repository {repo}"
    with pytest.raises(ModelError, match=mirror):
        load_model(ModelRequest("clip_vit_b32", CLIP, weights=path))
    with pytest.raises(ModelError, match=r"TorchScript.*safetensors"):
        load_model(ModelRequest("ViT-B-32", EXACT, weights=path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"no_such_argument": 1}, "Unknown key 'no_such_argument'"),
        ({"vision_cfg": {"no_such_setting": 1}}, "Unknown key 'vision_cfg.no_such_setting'"),
        ({"vision_cfg": {"width": 32, "head_width": 64}}, "open_clip cannot build ViT-B-32"),
        ({"vision_cfg": 3}, "vision_cfg: Input should be a valid dictionary"),
        ({"pretrained": "openai"}, "Unknown key 'pretrained'"),
        ({"force_image_size": 64, "precision": "fp16"}, r"'force_image_size'.*'precision'"),
        ({"vision_cfg": {"timm_model_pretrained": True}}, "'vision_cfg.timm_model_pretrained'"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "Unknown key 'text_cfg.hf_model_name'"),
        ({"text_cfg": {"hf_tokenizer_name": "gpt2"}}, "Unknown key 'text_cfg.hf_tokenizer_name'"),
        ({"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}, "vision_cfg.timm_model_name: String"),
        ({"text_cfg": {"layers": 10_000_000}}, "text_cfg.layers: Input should be less than"),
        ({"text_cfg": {"width": 2**20, "heads": 1}}, r"would have [\d,]+ values.*do not fit"),
        ({"vision_cfg": {"norm_kwargs": {"device": "x"}}}, "vision_cfg.norm_kwargs.device"),
    ],
)
def test_arguments_the_model_does_not_take(
    tmp_path: Path, clip: nn.Module, arguments: dict[str, Any], message: str
) -> None:
    path = write(clip.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=message):
        load_model(ModelRequest("ViT-B-32", arguments, weights=path))


def test_loading_says_nothing_of_random_weights(
    tmp_path: Path, clip: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    """open_clip warns before the weights are loaded; afterwards the log is unchanged."""
    path, filters = write(clip.state_dict(), tmp_path / "weights.pth"), list(logging.root.filters)
    load_model(ModelRequest("ViT-B-32", EXACT, weights=path))
    assert "random" not in caplog.text
    assert logging.root.filters == filters
    built("ViT-B-32", CLIP)
    assert "initialized randomly" in caplog.text


# Transforms


def normalisation(transform: Any) -> tuple[list[float], list[float]]:
    (found,) = (step for step in transform.transforms if isinstance(step, Normalize))
    return list(found.mean), list(found.std)


def picture() -> Image.Image:
    """An image with changing colours, larger than the inputs of the models."""
    values = np.random.default_rng(3).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((200, 120), Image.Resampling.BILINEAR)


OPENAI = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
HALF = ([0.5] * 3, [0.5] * 3)


def test_transforms_are_of_the_tag(tmp_path: Path, clip: nn.Module, no_hub: None) -> None:
    path, image = write(clip.state_dict(), tmp_path / "weights.pth"), picture()
    cut = image.resize((106, 64), Image.Resampling.BICUBIC).crop(
        (21, 0, 85, 64)
    )  # the shorter side, then the middle
    squashed = image.resize((160, 160), Image.Resampling.BICUBIC)
    for request, wanted, pixels in (
        (ModelRequest("clip_vit_b32", CLIP, weights=path), OPENAI, cut),
        (
            ModelRequest("ViT-B-32", EXACT, weights=path),
            OPENAI,
            cut,
        ),  # all of open_clip's weights of the model agree
        (siglip_request(tmp_path / "s"), HALF, squashed),
    ):
        loaded = load_model(request)
        assert (
            normalisation(loaded.eval_transform) == normalisation(loaded.train_transform) == wanted
        )
        mean, deviation = (torch.tensor(numbers)[:, None, None] for numbers in wanted)
        expected = (torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255 - mean) / deviation
        assert torch.allclose(loaded.eval_transform(image), expected, atol=1e-6)
        assert loaded.train_transform(image).shape == loaded.input_shape


def test_local_weights_of_a_model_whose_trainings_differ_name_their_transforms(
    tmp_path: Path,
) -> None:
    path = write(built("ViT-L-14", CLIP).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"differ in mean.*ViT-L-14\.laion2b_s32b_b82k"):
        load_model(ModelRequest("ViT-L-14", CLIP, weights=path))
    loaded = load_model(ModelRequest("ViT-L-14.laion2b_s32b_b82k", CLIP, weights=path))
    assert normalisation(loaded.eval_transform) == HALF
    assert loaded.tag.startswith("ViT-L-14.local-")
    assert (
        normalisation(load_model(ModelRequest("clip_vit_l14", CLIP, weights=path)).eval_transform)
        == OPENAI
    )


def test_given_preprocessing_replaces_that_of_the_weights(tmp_path: Path, clip: nn.Module) -> None:
    path = write(built("ViT-L-14", CLIP).state_dict(), tmp_path / "weights.pth")
    given = {
        "mean": [0.25, 0.5, 0.75],
        "std": [0.5],
        "input_size": [64, 64],
        "interpolation": "bilinear",
    }
    loaded = load_model(ModelRequest("ViT-L-14-quickgelu", CLIP, weights=path, preprocessing=given))
    assert normalisation(loaded.eval_transform) == ([0.25, 0.5, 0.75], [0.5] * 3)
    found = loaded.preprocessing
    assert found is not None
    assert (found.input_size, found.interpolation, found.crop_mode) == (
        (3, 64, 64),
        "bilinear",
        "shortest",
    )
    assert (found.mean, found.std, found.crop_pct) == ((0.25, 0.5, 0.75), (0.5, 0.5, 0.5), None)
    for wrong, message in (
        ({"input_size": [96, 96]}, r"not \(96, 96\) \(--input-size\).*image_size"),
        ({"input_size": [1, 64, 64]}, r"not \(1, 64, 64\)"),
        ({"crop_pct": 0.9}, "--crop-pct"),
        ({"interpolation": "box"}, "bicubic and bilinear"),
        ({"mean": [0.5, 0.5]}, "--mean has 2 values"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(
                ModelRequest(
                    "ViT-L-14-quickgelu", CLIP, weights=path, preprocessing={**given, **wrong}
                )
            )


# Tokenizers


def test_captions_become_the_tokens_of_open_clip(tmp_path: Path, clip: nn.Module) -> None:
    tokenizer = load_model(
        ModelRequest("ViT-B-32", EXACT, weights=write(clip.state_dict(), tmp_path / "a.pth"))
    ).tokenizer
    captions = [CAPTION, LONG, "", "café &amp; 2 dogs", *WORDS]
    ids = tokenizer(captions)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-32")(captions))
    start, end = 49406, 49407
    lengths = tokenizer.lengths(captions)
    assert lengths[:3] == [8, 242, 2]  # six words and the full stop make 7, and 60 times 4 words
    for row, length in zip(ids, lengths, strict=True):
        kept = min(length, 77)
        assert row[0] == start
        assert row[kept - 1] == end
        assert (row == end).sum() == 1
        assert not row[kept:].any()
    assert tokenizer([]).shape == (0, 77)
    assert tokenizer.lengths([]) == []


def test_tokens_of_a_tokenizer_in_a_folder(tmp_path: Path, no_hub: None) -> None:
    """Tokens equal those of the tokenizers library; the end token is 1, padding 0."""
    tokenizer = load_model(siglip_request(tmp_path)).tokenizer
    folder = tmp_path / "ViT-B-16-SigLIP-tokenizer"
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = "two red buses and " * 60
    whole = [own.encode(text).ids for text in ("a photo of the cat", plain.strip())]
    ids = tokenizer([CAPTION, LONG])  # cleaned: lower case, no punctuation
    assert ids.shape == (2, 64)
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == whole[0] + [0] * (64 - len(whole[0]))
    assert ids[1].tolist() == [*whole[1][:63], 1]
    assert tokenizer.lengths([CAPTION, LONG]) == [len(row) for row in whole]
    assert (
        tokenizer([CAPTION, LONG]).tolist() == ids.tolist()
    )  # counting does not change how it cuts
    reference = HFTokenizer(str(folder), context_length=64, clean="canonicalize")
    assert torch.equal(ids, reference([CAPTION, LONG]))
    assert tokenizer([]).shape == (0, 64)
    assert tokenizer.lengths([]) == []


def test_tokenizer_with_a_class_token(tmp_path: Path) -> None:
    """open_clip's mode ``clips``: start, end and class token; the class token stays last."""
    folder = tokenizer_folder(tmp_path / "t", "PreTrainedTokenizerFast")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "bos_token": "<s>", "cls_token": "<class>"})
    )
    text = {"context_length": 12, "hf_tokenizer_name": "some/where", "tokenizer_mode": "clips"}
    tokenizer = captions_to_ids.build_tokenizer("x", text, folder, 60)
    words = len(
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        .encode("joy z", add_special_tokens=False)
        .ids
    )
    assert words + 3 <= 12
    assert tokenizer.lengths(["joy z", LONG])[0] == words + 3
    assert tokenizer.lengths(["joy z", LONG])[1] > 12
    short, long = tokenizer(["joy z", LONG])
    assert (short != 0).sum() == words + 3
    assert (short[0], short[words + 1], short[-1]) == (long[0], long[-2], long[-1]) == (3, 1, 4)
    assert (long != 0).all()


def test_tokenizer_of_another_model(tmp_path: Path, no_hub: None) -> None:
    request = siglip_request(tmp_path)
    small = {**SIGLIP, "text_cfg": {**SIGLIP["text_cfg"], "vocab_size": 10}}
    path = write(built("ViT-B-16-SigLIP", small).state_dict(), tmp_path / "small.pth")
    loaded = load_model(
        ModelRequest("siglip_b16", small, weights=path, weights_folder=request.weights_folder)
    )
    with pytest.raises(ModelError, match="the model knows 10 tokens"):
        loaded.tokenizer([LONG])


def test_incomplete_folders_of_a_tokenizer(tmp_path: Path, no_hub: None) -> None:
    """transformers builds a T5 tokenizer without words from the settings alone."""
    request, folder = siglip_request(tmp_path), tmp_path / "ViT-B-16-SigLIP-tokenizer"
    kept = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    assert len(HFTokenizer(str(folder), context_length=64).tokenizer) < 6
    with pytest.raises(ModelError, match=rf"tokenizer in {folder} has no vocabulary"):
        load_model(request)
    (folder / "tokenizer.json").write_bytes(kept)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"could not be read(.|\n)*timm/ViT-B-16-SigLIP"):
        load_model(request)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="could not be read"):
        load_model(request)


def test_tokenizers_that_transformers_rebuilds_differently(tmp_path: Path) -> None:
    """The class of transformers for Gemma replaces the pre-tokenizer of the file."""
    text = {"context_length": 12, "hf_tokenizer_name": "some/where"}
    folder = tokenizer_folder(tmp_path / "t", "GemmaTokenizer")
    with pytest.raises(
        ModelError, match=r"transformers .* changes the tokenizer .*tokenizer_class"
    ):
        captions_to_ids.build_tokenizer("x", text, folder, 60)
    captions_to_ids.build_tokenizer("x", text, tokenizer_folder(tmp_path / "u"), 60)


def test_missing_tokenizer_says_repository_and_folder(
    tmp_path: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = siglip_request(tmp_path)
    (tmp_path / "ViT-B-16-SigLIP-tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ModelError, match=rf"timm/ViT-B-16-SigLIP(.|\n)*<model>-tokenizer in the folder {tmp_path}"
    ):
        load_model(request)
    text = open_clip.get_model_config("ViT-B-16-SigLIP")["text_cfg"]
    with pytest.raises(
        ModelError, match=r"timm/ViT-B-16-SigLIP; .*<folder of weights>/ViT-B-16-SigLIP-tokenizer"
    ):
        captions_to_ids.build_tokenizer("ViT-B-16-SigLIP", text, None, 32000)
    del text["hf_tokenizer_name"]
    with pytest.raises(ModelError, match="names no tokenizer"):
        captions_to_ids.build_tokenizer("ViT-B-16-SigLIP", text, None, 32000)


def test_download_tries_the_names_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    there = {"b.bin"}

    def fake(repo: str, file: str) -> str:
        asked.append(f"{repo}/{file}")
        if file not in there:
            raise RemoteEntryNotFoundError(
                "404", response=SimpleNamespace(headers={}, request=None)
            )
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    place = hub.Repository("o/r", ("a.safetensors", "b.bin"))
    assert hub.download(place, "weights of x") == tmp_path / "b.bin"
    assert asked == ["o/r/a.safetensors", "o/r/b.bin"]
    there.clear()
    with pytest.raises(
        ModelError, match=r"weights of x are not in .*o/r: no a.safetensors or b.bin"
    ):
        hub.download(place, "weights of x")

    def offline(repo: str, file: str) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        ModelError,
        match="weights of x could not be downloaded from the Hugging Face hub: no connection",
    ):
        hub.download(place, "weights of x")


def test_the_demos_tokenizer_counts_what_it_cuts() -> None:
    loaded = load_model(ModelRequest("demo_clip"))
    assert loaded.tokenizer is not None
    captions = ["a small three", "three " * 60]
    ids = loaded.tokenizer(captions)
    assert ids.shape == (2, loaded.context_length)
    assert loaded.tokenizer.lengths(captions) == [5, 62]
    assert [int((row > 0).sum()) for row in ids] == [5, loaded.context_length]
