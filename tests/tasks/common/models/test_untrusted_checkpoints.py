"""Untrusted checkpoints: one clear message for any header; nothing runs, is fetched or written."""

import json
import os
import pickle
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fimaq_core.checkpoint import read_header
from fimaq_core.errors import CheckpointError, FimaqError, ModelError
from fimaq_core.progress import silent
from fimaq_core.recipe import make_recipe
from tasks.common.cell import stages
from tasks.common.models import hub
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.retrieval import tags, tokenizers
from tasks.retrieval.models import load_model as load_clip

QUICK: dict[str, Any] = {
    "calibration_images": 8, "range_images": 4, "range_candidates": 16, "range_rounds": 1,
    "steps": 1, "batch_size": 8,
}  # fmt: skip
DATA = DataRequest(limit=16)
RUN = CellRequest("classification", ModelRequest(), DATA, None, threads=1, eval_batch=16)
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrated") / "calibrated.safetensors"
    recipe = make_recipe("qdrop", QUICK)
    stages.calibrate_stage(
        CellRequest("classification", ModelRequest("demo_vit"), DATA, recipe), path, silent
    )
    return path


def with_header(source: Path, path: Path, change: Change) -> Path:
    """A copy of a checkpoint with another header; ``change`` gets facts and fingerprint."""
    raw = source.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    held = header["__metadata__"]
    parts = {name: json.loads(held[name]) for name in ("facts", "fingerprint")}
    change(parts)
    held.pop("sha256", None)  # whoever forges a file may leave it out
    for name, content in parts.items():
        held[name] = content if isinstance(content, str) else json.dumps(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return path


def refusals(path: Path, folder: Path, task: str = "classification") -> list[str]:
    """Messages of all stages that take a checkpoint. Fails if a stage takes it or writes a file."""
    before, texts = {entry: entry.read_bytes() for entry in folder.iterdir()}, []
    run, out = replace(RUN, task=task), folder / "out.safetensors"
    for stage in (
        lambda: stages.evaluate_stage(run, path, silent),
        lambda: stages.inspect_stage(run, path),
        lambda: stages.reconstruct_stage(run, path, out, {}, silent),
    ):
        with pytest.raises(FimaqError) as caught:
            stage()
        texts.append(str(caught.value))
    assert {entry: entry.read_bytes() for entry in folder.iterdir()} == before
    return texts


def set_fact(name: str, value: object) -> Change:
    return lambda parts: parts["facts"].__setitem__(name, value)


def test_the_checkpoint_itself_is_taken(calibrated: Path, tmp_path: Path) -> None:
    same = with_header(calibrated, tmp_path / "same.safetensors", lambda parts: None)
    assert stages.evaluate_stage(RUN, same, silent).n == 16
    assert stages.inspect_stage(RUN, same).stage == "calibrated"


ABSURD: dict[str, tuple[Change, str]] = {
    "facts that are a list": (
        lambda parts: parts.update(facts=[1, 2]),
        "facts in its header are no object",
    ),
    "facts that nest without end": (
        lambda parts: parts.update(facts="[" * 100_000),
        "not a checkpoint of this project",
    ),
    "facts that are no JSON": (
        lambda parts: parts.update(facts="{"),
        "not a checkpoint of this project",
    ),
    "a fingerprint that nests": (
        lambda parts: parts.update(fingerprint='{"a":' * 100_000),
        "not a checkpoint of this project",
    ),
    "an endless number": (
        lambda parts: parts.update(facts=f'{{"stage": {"9" * 5000}}}'),
        "not a checkpoint of this project",
    ),
    "an unknown field": (set_fact("surprise", 1), r"surprise: Extra inputs are not permitted"),
    "no stage": (lambda parts: parts["facts"].pop("stage"), "stage: Field required"),
    "a stage that is none": (set_fact("stage", ["calibrated"]), "does not name its model .stage"),
    "no model": (lambda parts: parts["facts"].pop("model"), "model: Field required"),
    "a model that is a list": (
        set_fact("model", ["demo_vit"]),
        "model: Input should be a valid string",
    ),
    "another task": (set_fact("task", "detection"), "is of task 'detection', not 'classification'"),
    "a task that is a module": (set_fact("task", "os.path"), "is of task 'os.path'"),
    "arguments that are a list": (
        set_fact("model_args", ["depth"]),
        "model_args: Input should be a valid dictionary",
    ),
    "a scope": (lambda parts: parts["fingerprint"]["recipe"].update(scope="../x"), "scope '../x'"),
    "a recipe's field": (
        lambda parts: parts["fingerprint"]["recipe"].update(run="x"),
        r"recipe.run: Extra inputs",
    ),
    "a recipe's value": (
        lambda parts: parts["fingerprint"]["recipe"].update(w_bits=10**30),
        r"recipe.w_bits",
    ),
    "characters for a terminal": (
        lambda parts: parts["fingerprint"].update(calibration="\x1b[2J"),
        "cannot be printed",
    ),
    "other weights": (lambda parts: parts["fingerprint"].update(weights="0" * 64), "other weights"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_headers_are_refused_with_one_message(
    case: str, calibrated: Path, tmp_path: Path
) -> None:
    change, message = ABSURD[case]
    path = with_header(calibrated, tmp_path / "absurd.safetensors", change)
    for text in refusals(path, tmp_path):
        assert "\n" not in text
        assert "\x1b" not in text
        assert str(path) in text
    with pytest.raises(CheckpointError, match=message):
        stages.inspect_stage(RUN, path)


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:some/where",
        "local-dir:/etc",
        "/etc/passwd",
        "../demo_vit",
        "a\\b",
        "os.system(1)",
        "",
    ],
)
def test_a_model_is_no_address(name: str, calibrated: Path, tmp_path: Path) -> None:
    path = with_header(calibrated, tmp_path / "named.safetensors", set_fact("model", name))
    assert all("which is not a valid name" in text for text in refusals(path, tmp_path))
    unknown = with_header(
        calibrated, tmp_path / "named.safetensors", set_fact("model", "vit_of_mine")
    )
    assert all("Unknown model 'vit_of_mine'" in text for text in refusals(unknown, tmp_path))


ADDRESSES: dict[str, dict[str, Any]] = {
    "a file": {"checkpoint_path": "/etc/passwd"},
    "a hub's address": {"vision_cfg": {"timm_model_name": "hf-hub:some/where"}},
    "a folder": {"vision_cfg": {"timm_model_name": "local-dir:."}},
    "a tokenizer": {"text_cfg": {"hf_tokenizer_name": "some/where"}},
    "a module": {"training": {"rpn": {"assigner": {"type": "os.mkdir", "path": "x"}}}},
    "a program": {"training": {"rpn_proposal": {"nms": {"type": "print(1)"}}}},
    "in a list": {"layers": [1, {"a": ["b.c"]}]},
    "in a key": {"a/b": 1},
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_arguments_of_a_checkpoint_name_nothing_elsewhere(
    case: str, calibrated: Path, tmp_path: Path
) -> None:
    for model in ("vit_tiny_patch16_224", "demo_vit"):

        def change(parts: dict[str, Any], model: str = model) -> None:
            parts["facts"].update(model=model, model_args=ADDRESSES[case])

        path = with_header(calibrated, tmp_path / "arguments.safetensors", change)
        assert all(
            "it may not name files, addresses or modules" in text
            for text in refusals(path, tmp_path)
        )


@pytest.fixture
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache, and a test fails if it opens a connection."""

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    for module in (hub, tags, tokenizers):
        monkeypatch.setattr(module, "cached_file", lambda repository: None)
    monkeypatch.setattr(socket, "create_connection", asked)
    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setattr(socket, "getaddrinfo", asked)


@pytest.mark.parametrize(
    ("task", "model", "arguments"),
    [
        ("classification", "vit_gigantic_patch14_clip_224.laion2b", {}),
        ("retrieval", "siglip_b16", {}),
        ("retrieval", "ViT-B-32.openai", {"text_cfg": {"hf_tokenizer_name": "gpt2"}}),
    ],
)
def test_a_checkpoint_makes_no_one_ask_the_hub(
    task: str,
    model: str,
    arguments: dict[str, Any],
    calibrated: Path,
    tmp_path: Path,
    nothing_asked: None,
) -> None:
    """The name of a published model is valid, but only the user's own command fetches it."""

    def change(parts: dict[str, Any]) -> None:
        parts["facts"].update(task=task, model=model, model_args=arguments)

    path = with_header(calibrated, tmp_path / "published.safetensors", change)
    for text in refusals(path, tmp_path, task):
        assert "A checkpoint names the model, so nothing is fetched" in text


def test_a_tokenizer_of_a_checkpoints_model_is_not_fetched(
    tmp_path: Path, nothing_asked: None
) -> None:
    """With weights at hand, the tokenizer is the last thing that the hub has."""
    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1)}, weights)
    request = ModelRequest("siglip_b16", weights=weights, from_file=True)
    with pytest.raises(ModelError, match=r"tokenizer of ViT-B-16-SigLIP .*nothing is fetched"):
        load_clip(request)
    text = {"context_length": 8, "hf_tokenizer_name": "gpt2"}
    with pytest.raises(ModelError, match="could not be read in the Hugging Face cache"):
        tokenizers.build_tokenizer("x", text, None, 60, local=True)


def test_code_does_not_run(calibrated: Path, tmp_path: Path) -> None:
    """A pickle under a checkpoint's name, and one of PyTorch's archives."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "it ran"),)

    path = tmp_path / "pickle.safetensors"
    path.write_bytes(pickle.dumps(Payload()))
    assert all("is damaged" in text for text in refusals(path, tmp_path))
    torch.save({"a": Payload()}, path)
    assert all("is damaged" in text for text in refusals(path, tmp_path))
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("length", [0, 7, 2**27, 2**40, 2**63, 2**64 - 1])
def test_headers_of_absurd_length(length: int, calibrated: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", length) + calibrated.read_bytes()[8:])
    assert all(
        "is damaged" in text or "not a checkpoint" in text for text in refusals(path, tmp_path)
    )


def test_a_large_header_of_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file(
        {"a": torch.ones(1)},
        path,
        metadata={"facts": '{"stage":"' + "x" * 20_000_000 + '"}', "fingerprint": "{}"},
    )
    assert all("not a checkpoint of this project" in text for text in refusals(path, tmp_path))


def test_tensors_that_are_not_the_models(calibrated: Path, tmp_path: Path) -> None:
    """Tensors of another shape or type, too many or too few give one message in every stage."""
    fingerprint, facts = read_header(calibrated)
    from safetensors.torch import load_file

    from fimaq_core.checkpoint import save_checkpoint

    state = load_file(calibrated)
    name = next(key for key in state if key.endswith("proj.weight"))
    path = tmp_path / "tensors.safetensors"
    for change in (
        {name: state[name].flatten()},
        {name: state[name][:1]},
        {"beyond": torch.ones(1)},
        dict.fromkeys(list(state)[:3]),
    ):
        kept = {key: tensor for key, tensor in {**state, **change}.items() if tensor is not None}
        save_checkpoint(path, kept, fingerprint, facts)
        with pytest.raises(CheckpointError, match=r"tensors.safetensors does not fit the model"):
            stages.inspect_stage(RUN, path)


def test_ranges_of_other_numbers_of_tokens_or_heads(calibrated: Path, tmp_path: Path) -> None:
    fingerprint, facts = read_header(calibrated)
    from safetensors.torch import load_file

    from fimaq_core.checkpoint import save_checkpoint

    state, path = load_file(calibrated), tmp_path / "ranges.safetensors"
    for end, shape in (("qkv.input_quantizer", (1, 5, 1)), ("b_quantizer", (1, 7, 1, 1))):
        name = next(key for key in state if key.endswith(f"{end}.scale"))
        zero = name.replace("scale", "zero_point")
        other = {name: torch.ones(shape), zero: torch.ones((1,) * len(shape))}
        save_checkpoint(path, {**state, **other}, fingerprint, facts)
        for command in (
            lambda: stages.inspect_stage(RUN, path),
            lambda: stages.evaluate_stage(RUN, path, silent),
            lambda: stages.reconstruct_stage(RUN, path, tmp_path / "out", {}, silent),
        ):
            with pytest.raises(CheckpointError, match=r"ranges.safetensors does not fit the model"):
                command()


@pytest.mark.parametrize(
    "given",
    [
        {"input_size": "huge"},
        {"input_size": [1, 2, 3, 4]},
        {"input_size": [3, 100_000, 100_000]},
        {"crop_pct": 1e-6},
        {"mean": [0.5] * 5000},
        {"mean": [float("inf")]},
        {"interpolation": "/x"},
        {"code": "x"},
        5,
    ],
)
def test_preprocessing_that_none_could_give_is_refused(
    calibrated: Path, tmp_path: Path, given: Any
) -> None:
    from safetensors.torch import load_file

    from fimaq_core.checkpoint import save_checkpoint

    fingerprint, facts = read_header(calibrated)
    path = tmp_path / "given.safetensors"
    save_checkpoint(path, load_file(calibrated), fingerprint, {**facts, "preprocessing": given})
    with pytest.raises(CheckpointError, match=r"given.safetensors"):
        stages.inspect_stage(RUN, path)


@pytest.mark.parametrize(
    "key",
    [
        "checkpoint_path",
        "cache_dir",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_strict",
    ],
)
def test_what_timm_takes_for_itself_is_no_argument_of_a_model(key: str, tmp_path: Path) -> None:
    """timm would read that file in spite of --weights, also from the command line."""
    from tasks.classification.models import load_model

    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1)}, weights)
    with pytest.raises(ModelError, match=f"Unknown key '{key}'"):
        load_model(
            ModelRequest("vit_tiny_patch16_224", {key: str(tmp_path / "x.pth")}, weights=weights)
        )


@pytest.mark.parametrize("name", ["hf-hub:some/where", "local-dir:/etc"])
def test_a_vision_tower_is_no_address(name: str, tmp_path: Path) -> None:
    from tasks.retrieval.models import load_model

    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1)}, weights)
    request = ModelRequest("ViT-B-32", {"vision_cfg": {"timm_model_name": name}}, weights=weights)
    with pytest.raises(ModelError, match=r"vision_cfg.timm_model_name: String should match"):
        load_model(request)


@pytest.mark.parametrize("kind", ["os.mkdir", "builtins.eval", "print('x')", 5, ["nms"]])
def test_training_of_detectors_names_no_modules(kind: object, tmp_path: Path) -> None:
    """mmengine imports and calls whatever a type names; mmcv evaluates the name of NMS."""
    from tasks.detection.models import load_model

    weights, ran = tmp_path / "weights.safetensors", tmp_path / "it ran"
    save_file({"a": torch.ones(1)}, weights)
    training = {"rpn": {"assigner": {"type": kind, "path": str(ran)}}}
    for name in ("training", "train_cfg"):
        with pytest.raises(ModelError, match=f"Unknown key '{name}'"):
            load_model(ModelRequest("mask_rcnn_swin_tiny", {name: training}, weights=weights))
    assert not ran.exists()
