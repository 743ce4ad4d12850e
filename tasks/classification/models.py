"""Loading classifiers: demo models, and any timm ViT, DeiT or Swin."""

import inspect
import sys
from typing import Any

import timm
from timm.data import create_transform, resolve_model_data_config
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg
from torch import nn

from fimaq_core.errors import ModelError
from tasks.classification.demo.digits import CANVAS_SIZE, eval_transform, train_transform
from tasks.classification.demo.models import DEMO
from tasks.classification.tags import CATALOGUE, DEMO_NAMES, full_name
from tasks.common.hashing import file_sha256
from tasks.common.request import ModelRequest, describe_missing
from tasks.common.task import LoadedModel
from tasks.common.weights import load_state, read_state, state_sha256


def load_model(request: ModelRequest) -> LoadedModel:
    """Load a classifier with its weights and transforms.

    Raises:
        ModelError: unknown name, missing or unfit weights, arguments the model does not take.
        NumericsError: NaN in the weights.
    """
    missing = CATALOGUE.missing_weights(request)
    if missing is not None:
        raise ModelError(describe_missing([missing]))
    tag, weights = CATALOGUE.model_tag(request), CATALOGUE.local_weights(request)
    if request.name in DEMO_NAMES:
        model, path = DEMO.load(request, weights)
        return LoadedModel(
            model,
            tag,
            f"file {path.name}",
            file_sha256(path),
            100,
            eval_transform(),
            train_transform(),
            "digit-pairs",
            (1, *CANVAS_SIZE),
        )
    path = weights or CATALOGUE.fetch(tag)
    model = _create(full_name(request.name), request.model_args)
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
        input_shape=_input_shape(model, config["input_size"]),
    )


def _input_shape(model: nn.Module, published: tuple[int, int, int]) -> tuple[int, int, int]:
    """(C, H, W) of the images a model takes: as its patch embedding was built (arguments may change it), else as published."""
    embed = getattr(model, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.img_size is None:
        return published
    height, width = embed.img_size
    return embed.proj.in_channels, height, width


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    # What timm takes for itself names weights, files and caches; nothing but --weights and the tag does that here.
    own = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters} - {"kwargs"}
    wrong = sorted(own & arguments.keys())
    if wrong:
        raise ModelError(f"--model-args are for the model's constructor, {', '.join(wrong)} are not: leave them out.")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError, AttributeError, ArithmeticError) as error:
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
