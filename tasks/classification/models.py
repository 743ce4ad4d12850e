"""Which classifiers there are, and loading them: short names, demo models, any timm ViT, DeiT or Swin."""

import sys
from pathlib import Path
from typing import Any

import timm
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from fimaq_core.errors import ModelError, suggest
from tasks.classification.demo.digits import eval_transform, train_transform
from tasks.classification.demo.models import DEMO_MODELS, build_demo_model, demo_weights_metadata, demo_weights_path
from tasks.common.request import ModelRequest
from tasks.common.task import LoadedModel
from tasks.common.weights import SUFFIXES, file_sha256, load_state, read_state, state_sha256

#: Short names and the published checkpoints they mean. Untagged timm names have moved over the years.
SHORT_NAMES = {
    "vit_tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_base": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_large": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "deit_tiny": "deit_tiny_patch16_224.fb_in1k",
    "deit_small": "deit_small_patch16_224.fb_in1k",
    "deit_base": "deit_base_patch16_224.fb_in1k",
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "swin_small_patch4_window7_224.ms_in1k",
    "swin_base": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_base_384": "swin_base_patch4_window12_384.ms_in22k_ft_in1k",
}


def timm_name(name: str) -> str:
    """The full timm name, ``model.tag`` or untagged as given.

    Raises:
        ModelError: no such model.
    """
    full = SHORT_NAMES.get(name, name)
    if not timm.is_model(full.split(".")[0]):
        known = [*SHORT_NAMES, *DEMO_MODELS, *timm.list_models(["vit*", "deit*", "swin*"])]
        raise ModelError(f"Unknown model '{name}'.{suggest(name, known) if len(name) > 3 else ''}")
    tag = full.partition(".")[2]
    tags = timm_tags(full)
    if tag and tag not in tags:
        raise ModelError(f"timm has no weights '{tag}' for {full.split('.')[0]}.{suggest(tag, tags)}")
    return full


def timm_tags(name: str) -> list[str]:
    """The tags of pretrained weights that timm knows of an architecture."""
    return [full.partition(".")[2] for full in timm.list_pretrained(f"{name.split('.')[0]}.*")]


def model_tag(request: ModelRequest) -> str:
    """The identity of model and weights, ``model.tag``.

    Weights from a file keep the published tag only if the file is called after it; else the tag is ``local-`` and the
    beginning of the file's sha256.
    """
    weights = local_weights(request)
    if request.name in DEMO_MODELS and weights is None:
        return f"{request.name}.{demo_weights_metadata(request.name)['tag']}"
    full = request.name if request.name in DEMO_MODELS else timm_name(request.name)
    if weights is not None and weights.stem != full:
        return f"{full.split('.')[0]}.local-{file_sha256(weights)[:12]}"
    if weights is None and not full.partition(".")[2]:
        tags = timm_tags(full)
        raise ModelError(
            f"'{request.name}' names no weights, and untagged names have changed their meaning: choose "
            f"{' or '.join(f'{full}.{tag}' for tag in tags[:8]) or 'a local file with --weights'}."
        )
    return full


def local_weights(request: ModelRequest) -> Path | None:
    """The weights file to use: as asked for, or the one in the weights folder that is called after the model."""
    if request.weights is not None:
        return request.weights
    if request.weights_folder is not None and request.name not in DEMO_MODELS:
        for suffix in SUFFIXES:
            path = request.weights_folder / f"{timm_name(request.name)}{suffix}"
            if path.is_file():
                return path
    return None


def missing_weights(request: ModelRequest) -> str | None:
    """None if the weights can be had, else what is missing, where it was looked for and how to get it."""
    weights = local_weights(request)
    if weights is not None:
        return None if weights.is_file() else f"There is no weights file {weights}."
    if request.name in DEMO_MODELS:
        path = demo_weights_path(request.name)
        return None if path.is_file() else f"There are no demo weights {path}: run `python scripts/train_demo.py`."
    name = model_tag(request)
    if _hub_file(name) is not None:
        return None
    folder = f"in the folder {request.weights_folder}, " if request.weights_folder is not None else ""
    return (
        f"The weights of {name} are missing. Looked for: {folder}in the Hugging Face cache, and at its hub (repository "
        f"timm/{name}), which could not be reached. Run once with a network, or give a folder with {name}.safetensors "
        "(WEIGHTS=/path for make, --weights-folder for an adapter) or one file (--weights)."
    )


def _hub_file(name: str) -> str | None:
    """Path of the checkpoint in the local cache, downloading it if the hub can be reached; None if it cannot."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    for file in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(f"timm/{name}", file)
        if isinstance(cached, str):
            return cached
    try:
        return hf_hub_download(f"timm/{name}", "model.safetensors", etag_timeout=10)
    except Exception:  # noqa: BLE001 - whatever the client raises, the answer is the same: the file cannot be had
        return None


def load_model(request: ModelRequest) -> LoadedModel:
    """Load a classifier with its weights and transforms.

    Raises:
        ModelError: unknown name, missing or unfit weights, arguments the model does not take.
        NumericsError: NaN in the weights.
    """
    missing = missing_weights(request)
    if missing is not None:
        raise ModelError(missing)
    tag, weights = model_tag(request), local_weights(request)
    if request.name in DEMO_MODELS:
        if request.model_args:
            raise ModelError("Demo models take no --model-args: their structure is fixed by their weights.")
        model, path = build_demo_model(request.name), weights or demo_weights_path(request.name)
        load_state(model, read_state(path), path.name)
        return LoadedModel(
            model.eval(), tag, f"file {path.name}", file_sha256(path), 100, eval_transform(), train_transform(), "digit-pairs"
        )
    path = weights or Path(str(_hub_file(tag)))
    model = _create(timm_name(request.name), request.model_args)
    load_state(model, _adapted(read_state(path), model), str(path) if weights else tag)
    config = resolve_model_data_config(model)
    digest = file_sha256(path) if not request.model_args else state_sha256(model)
    return LoadedModel(
        model.eval(),
        tag,
        f"file {path.name}" if weights else f"hub timm/{tag}",
        digest,
        int(getattr(model, "num_classes", 0)),
        create_transform(**config, is_training=False),
        create_transform(**config, is_training=True),
    )


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ModelError(f"timm cannot build {name} with {arguments}: {error}") from error
    return model


def _adapted(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Bring older checkpoint layouts into the model's, by timm's own function for its architecture."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        adapted: dict[str, Any] = convert(state, model)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"The weights do not fit {type(model).__name__}: {error}") from error
    return adapted
