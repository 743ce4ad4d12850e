"""Loading CLIP models: the demo's, and any open_clip model whose text tower is open_clip's own."""

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import open_clip
from open_clip.convert import convert_state_dict
from open_clip.model import (
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from tasks.common.models.weights import StoredWeights, is_torchscript, load_state, read_weights
from tasks.common.preprocessing import Preprocessing
from tasks.common.request import ModelRequest, describe_missing
from tasks.common.task import LoadedModel
from tasks.retrieval.tags import (
    CATALOGUE,
    DEMO_NAMES,
    FILES,
    full_name,
    missing_tokenizer,
    published,
    repository,
    tokenizer_folder,
)
from tasks.retrieval.tokenizers import Tokenizer, build_tokenizer

#: Entries of older checkpoints that are no weights; open_clip drops them too.
_LEGACY = (
    "input_resolution",
    "context_length",
    "vocab_size",
    "text.transformer.embeddings.position_ids",
)

#: Entries of the state dicts that OpenAI published, and of none that open_clip trained.
_OPENAI = {"input_resolution", "context_length", "vocab_size"}


def load_model(request: ModelRequest) -> LoadedModel:
    """Load a CLIP model with weights, transforms and tokenizer. Raises ModelError."""
    missing = [
        item
        for item in (CATALOGUE.missing_weights(request), missing_tokenizer(request))
        if item is not None
    ]
    if missing:
        raise ModelError(describe_missing(missing))
    tag, weights = CATALOGUE.model_tag(request), CATALOGUE.local_weights(request)
    if request.name in DEMO_NAMES:
        return _demo(request, tag, weights)
    architecture, _, training = full_name(request.name).partition(".")
    config = _configuration(architecture, request.model_args)
    preprocess = _preprocess(architecture, training, request.preprocessing)
    path = weights or CATALOGUE.fetch(tag)
    _refuse_torchscript(path, f"{architecture}.{training}" if training else None)
    stored = read_weights(path, request.weights_entry)
    both = f"{architecture}-quickgelu" in open_clip.list_models()
    named = bool(training) or "quick_gelu" in request.model_args or not both
    told = None if named else _activation(stored)
    arguments = request.model_args if told is None else {**request.model_args, "quick_gelu": told}
    model = _create(architecture, arguments, {"quick_gelu": told, **config})
    vocabulary = int(open_clip.get_model_tokenize_cfg(model)["vocab_size"])
    tokenizer = build_tokenizer(
        architecture, config["text_cfg"], tokenizer_folder(request), vocabulary
    )
    load_state(
        model, _adapted(stored.state, model, request.model_args), str(path) if weights else tag
    )
    if not named and told is None:
        raise ModelError(
            f"The weights {path} do not say which activation they were trained with, and open_clip has {architecture} with two. "
            f"Give --model {architecture}-quickgelu if they come from weights with QuickGELU (OpenAI's, DFN's, MetaCLIP's), or "
            "--model-args '{\"quick_gelu\": false}' for the exact GELU. A name with a tag says it too, such as "
            f"{published(architecture)[0]}."
        )
    _resize_trunk(model, request.model_args)
    preprocess.size = _pair(model.visual.image_size)
    shape = _check_size(request.preprocessing, (3, *preprocess.size))
    origin = f"file {path.name}" if weights else f"hub {repository(tag).repo}"
    activation = "" if told is None else f" ({'QuickGELU' if told else 'GELU'}, as it says)"
    return LoadedModel(
        model.eval(),
        tag,
        origin + activation + tokenizer.origin,
        stored.sha256(model, altered=bool(arguments)),
        0,
        image_transform_v2(preprocess, is_train=False),
        image_transform_v2(preprocess, is_train=True),
        input_shape=shape,
        tokenizer=tokenizer,
        context_length=tokenizer.context_length,
        entry=stored.entry,
        entries=stored.entries,
        preprocessing=Preprocessing(
            input_size=shape,
            crop_mode=preprocess.resize_mode,
            mean=preprocess.mean,
            std=preprocess.std,
            interpolation=preprocess.interpolation,
        ),
    )


def _demo(request: ModelRequest, tag: str, weights: Path | None) -> LoadedModel:
    from tasks.retrieval.demo.models import DEMO
    from tasks.retrieval.demo.scenes import CANVAS_SIZE, eval_transform, train_transform
    from tasks.retrieval.demo.tokens import demo_tokenizer

    model, stored = DEMO.load(request, weights)
    length, digest = int(model.context_length), stored.sha256(model, altered=False)
    tokenizer = Tokenizer(demo_tokenizer(), length, int(model.vocab_size))
    facts = tag, f"file {stored.path.name}", digest, 0, eval_transform(), train_transform()
    own = "digit-scenes", (3, *CANVAS_SIZE), tokenizer, length
    return LoadedModel(model, *facts, *own, entry=stored.entry, entries=stored.entries)


def _activation(stored: StoredWeights) -> bool | None:
    """True if the file says that its weights are for QuickGELU, False for GELU, else None."""
    if stored.state.keys() >= _OPENAI:
        return True
    try:
        content = json.loads(
            (stored.path.parent / "open_clip_config.json").read_text(encoding="utf-8")
        )
        told = content["model_cfg"].get("quick_gelu", False)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    return told if stored.path.name in FILES and isinstance(told, bool) else None


def _configuration(architecture: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """open_clip's configuration with ``arguments``; a tower keeps its other settings."""
    config: dict[str, Any] = open_clip.get_model_config(architecture)
    wrong = sorted(
        arguments.keys()
        & {*inspect.signature(open_clip.create_model).parameters, "pretrained_hf", "cast_dtype"}
    )
    if wrong:
        raise ModelError(
            f"--model-args are for the model's constructor, {', '.join(wrong)} are not: give {', '.join(config)}."
        )
    if not isinstance(arguments.get("quick_gelu", False), bool):
        raise ModelError(
            f"--model-args: quick_gelu is true or false, without quotes, not {json.dumps(arguments['quick_gelu'])}."
        )
    for name, value in arguments.items():
        tower = name in ("vision_cfg", "text_cfg")
        if tower and not isinstance(value, dict):
            raise ModelError(f"--model-args: {name} takes an object of settings, not {value!r}.")
        config[name] = {**config[name], **value} if tower else value
    foreign = config["text_cfg"].get("hf_model_name")
    if foreign:
        raise ModelError(
            f"The text tower of {architecture} is a model of transformers ({foreign}), which open_clip would fetch by itself: "
            "choose a model with open_clip's own text tower."
        )
    if arguments.get("vision_cfg", {}).get("timm_model_pretrained"):
        raise ModelError(
            "--model-args cannot ask for a pretrained tower: weights come from --weights or the model's tag."
        )
    trunk = str(config["vision_cfg"].get("timm_model_name") or "")
    if ":" in trunk:
        raise ModelError(
            f"The vision tower '{trunk}' is an address, which timm would read or fetch: give the name of a model."
        )
    config["vision_cfg"].pop("timm_model_pretrained", None)
    return config


def _preprocess(architecture: str, training: str, given: dict[str, Any]) -> PreprocessCfg:
    """Image transforms of the named weights, or those that all of open_clip's share.

    Without any, they are open_clip's defaults. ``given`` mean, deviation and interpolation count
    first.
    """
    trainings = [training] if training else open_clip.list_pretrained_tags_by_model(architecture)
    overlay = {name: given[name] for name in ("mean", "std", "interpolation") if name in given}
    for name in overlay.keys() & {"mean", "std"}:
        values = overlay[name]
        if len(values) not in (1, 3):
            raise ModelError(f"--{name} has {len(values)} values: give one, or three for RGB.")
        overlay[name] = tuple(values if len(values) == 3 else values * 3)
    if overlay.get("interpolation", "bicubic") not in ("bicubic", "bilinear"):
        raise ModelError(
            f"--interpolation {given['interpolation']}: open_clip has bicubic and bilinear."
        )
    if "crop_pct" in given:
        raise ModelError(
            "--crop-pct is for timm's models: open_clip resizes to the input size itself."
        )
    known = [open_clip.get_pretrained_cfg(architecture, name) for name in trainings] or [{}]
    found = [merge_preprocess_dict(PreprocessCfg(), {**config, **overlay}) for config in known]
    if any(other != found[0] for other in found):
        raise ModelError(
            f"The weights that open_clip knows of {architecture} differ in mean, deviation or size of their images: name those "
            f"whose transforms yours were trained with, {' or '.join(published(architecture))}, or give --mean and --std."
        )
    return PreprocessCfg(**found[0])


def _check_size(given: dict[str, Any], own: tuple[int, int, int]) -> tuple[int, int, int]:
    """The model's own input size; another one is refused."""
    wanted = tuple(given.get("input_size", own))
    if wanted != own[-len(wanted) :]:
        raise ModelError(
            f"The model was built for inputs (C, H, W) of {own} and takes none of {wanted} (--input-size): build it for them "
            f'with "vision_cfg": {{"image_size": {list(wanted[-2:])}}} in --model-args.'
        )
    return own


def _create(architecture: str, arguments: dict[str, Any], config: dict[str, Any]) -> nn.Module:
    own = {name: config[name] for name in arguments}
    # open_clip warns of the random weights, which are replaced at once.
    logging.root.addFilter(_serious)
    try:
        own |= {"pretrained_image": False, "pretrained_text": False}
        model: nn.Module = open_clip.create_model(architecture, **own)
    except (
        TypeError,
        ValueError,
        AssertionError,
        RuntimeError,
        KeyError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise ModelError(
            f"open_clip cannot build {architecture} with {arguments}: {error}"
        ) from error
    finally:
        logging.root.removeFilter(_serious)
    return model


def _serious(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No pretrained weights loaded for model")


def _adapted(
    state: dict[str, Tensor], model: nn.Module, arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """Bring older layouts into the model's, by open_clip's own functions.

    Unlike open_clip, position embeddings are resized only where ``arguments`` ask for another size,
    and an absent ``logit_bias`` is not made up.
    """
    expected = model.state_dict()
    try:
        adapted: dict[str, Tensor] = convert_state_dict(model, dict(state))
        if "positional_embedding" in adapted and not hasattr(model, "positional_embedding"):
            adapted = convert_to_custom_text_state_dict(adapted)
        for name in ("logit_scale", "logit_bias"):  # a number, or a vector of one
            if name in adapted and name in expected and adapted[name].numel() == 1:
                adapted[name] = adapted[name].reshape(expected[name].shape)
        if "image_size" in arguments.get("vision_cfg", {}):
            resize_pos_embed(adapted, model)
        if "context_length" in arguments.get("text_cfg", {}):
            resize_text_pos_embed(adapted, model)
    except (KeyError, RuntimeError, ValueError, AssertionError, AttributeError, TypeError) as error:
        raise ModelError(f"The weights do not fit {type(model).__name__}: {error}") from error
    return {
        name: tensor for name, tensor in adapted.items() if name in expected or name not in _LEGACY
    }


def _resize_trunk(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Set the size of a timm vision tower, which is built in its own."""
    size = arguments.get("vision_cfg", {}).get("image_size")
    if size is None or not isinstance(model.visual, TimmModel):
        return
    if not hasattr(model.visual.trunk, "set_input_size"):
        raise ModelError(
            f"The vision tower {type(model.visual.trunk).__name__} takes images of its own size only."
        )
    try:
        model.visual.set_input_size(_pair(size))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ModelError(f"The vision tower takes no images of size {size}: {error}") from error


def _refuse_torchscript(path: Path, name: str | None) -> None:
    if not is_torchscript(path):
        return
    found = repository(name) if name is not None else None
    instead = (
        f"open_clip_model.safetensors of the Hugging Face repository {found.repo}"
        if found
        else "a safetensors file"
    )
    raise ModelError(
        f"The weights {path} are a TorchScript archive, as OpenAI publishes its models: a program with weights, which is not "
        f"run. Give {instead} instead."
    )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
