"""timm models with weights and transforms: any ViT, DeiT or Swin."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import ValidationError
from timm.data import create_transform, resolve_data_config
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torchvision.transforms import Compose, Grayscale

from fimaq_core.documents import Strict
from fimaq_core.errors import ModelError, first_problem
from tasks.common.models import building
from tasks.common.models.hub import Catalogue
from tasks.common.models.weights import load_state, read_weights
from tasks.common.preprocessing import Preprocessing
from tasks.common.request import ModelRequest
from tasks.common.task import LoadedModel

#: Exceptions that timm raises for arguments or weights that do not fit.
_REFUSALS = (
    *(TypeError, ValueError, AssertionError, RuntimeError),
    *(LookupError, AttributeError, ArithmeticError),
)


class TimmArguments(Strict):
    """Arguments of ``--model-args``: those of timm's ViT, DeiT and Swin that JSON can hold."""

    img_size: building.Sides = [1]
    patch_size: building.Sides = [1]
    in_chans: building.Count = 1
    num_classes: building.Number = 0
    embed_dim: building.Count = 1
    depth: building.Depth = 1
    depths: building.Depths = [1]
    num_heads: building.Counts = [1]
    head_dim: building.Count | None = None
    window_size: building.Sides = [1]
    reg_tokens: building.Number = 0
    mlp_ratio: building.Positive = 1
    init_values: building.Real | None = None
    global_pool: Literal["", "avg", "avgmax", "max", "token", "map", "prr"] = ""
    pos_embed: Literal["", "none", "learn"] = ""
    weight_init: Literal["skip", "reset", "jax", "jax_nlhb", "moco", "nlhb", ""] = ""
    norm_layer: building.Word | None = None
    act_layer: building.Word | None = None
    embed_norm_layer: building.Word | None = None
    fc_norm: building.Flag | None = None
    qkv_bias: building.Flag = False
    qk_norm: building.Flag = False
    scale_attn_norm: building.Flag = False
    scale_mlp_norm: building.Flag = False
    proj_bias: building.Flag = False
    class_token: building.Flag = False
    no_embed_class: building.Flag = False
    pre_norm: building.Flag = False
    final_norm: building.Flag = False
    pool_include_prefix: building.Flag = False
    dynamic_img_size: building.Flag = False
    dynamic_img_pad: building.Flag = False
    strict_img_size: building.Flag = False
    always_partition: building.Flag = False
    fix_init: building.Flag = False
    drop_rate: building.Share = 0
    pos_drop_rate: building.Share = 0
    patch_drop_rate: building.Share = 0
    proj_drop_rate: building.Share = 0
    attn_drop_rate: building.Share = 0
    drop_path_rate: building.Share = 0


def load_timm(request: ModelRequest, catalogue: Catalogue) -> LoadedModel:
    """Load a timm model with its weights and transforms. Raises ModelError, NumericsError."""
    tag, weights = catalogue.model_tag(request), catalogue.local_weights(request)
    path = weights or catalogue.fetch(tag)
    model = _create(catalogue.full_name(request.name), request.model_args, path)
    stored = read_weights(path, request.weights_entry)
    load_state(model, _adapted(stored.state, model), str(path) if weights else tag)
    preprocessing = _preprocessing(model.eval(), request.preprocessing)
    return LoadedModel(
        model,
        tag,
        f"file {path.name}" if weights else f"hub timm/{tag}",
        stored.sha256(model, altered=bool(request.model_args)),
        int(getattr(model, "num_classes", 0)),
        *(_transform(preprocessing, training) for training in (False, True)),
        input_shape=preprocessing.input_size,
        entry=stored.entry,
        entries=stored.entries,
        class_names=stored.class_names,
        preprocessing=preprocessing,
        notes=stored.notes(),
    )


def _preprocessing(model: nn.Module, given: dict[str, Any]) -> Preprocessing:
    """Return timm's preprocessing for the model, with the ``given`` fields. Raises ModelError."""
    published = resolve_data_config(model=model)
    channels, *size = published["input_size"]
    # --model-args may have changed the patch embedding.
    if isinstance(embed := getattr(model, "patch_embed", None), PatchEmbed):
        channels, size = embed.proj.in_channels, embed.img_size or size
    if channels not in (1, 3):
        raise ModelError(
            f"The model takes images of {channels} channels. Images are read as RGB (3) or grey "
            "(1): give another in_chans in --model-args."
        )
    own = (channels, *size)
    asked = tuple(given.get("input_size", own))
    wanted = own[: 3 - len(asked)] + asked
    if wanted != own:
        _check_size(model, wanted, own)
    arguments = {**given, "input_size": wanted}
    for name in ("mean", "std"):
        arguments[name] = _by_channel(name, given.get(name, published[name]), channels)
    try:
        return Preprocessing.model_validate(resolve_data_config(args=arguments, model=model))
    except ValidationError as error:
        raise ModelError(f"This preprocessing is not possible: {first_problem(error)}.") from error


def _by_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return one value per channel. One value, or equal values, fit any number of channels."""
    if len(values) == channels:
        return tuple(values)
    if len(set(values)) == 1:
        return (values[0],) * channels
    plural = "s" if channels > 1 else ""
    raise ModelError(
        f"The {name} of images has {len(values)} values, but the model takes {channels} "
        f"channel{plural}: give --{name} with {channels} value{plural}, as the model was trained "
        "with."
    )


def _check_size(model: nn.Module, size: tuple[int, ...], own: tuple[int, ...]) -> None:
    """Refuse an image size (C, H, W) that the model, built for ``own``, cannot take."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        arguments: dict[str, Any] = {"img_size": size[1:]}
        if size[0] != own[0]:
            arguments["in_chans"] = size[0]
        raise ModelError(
            f"The model takes inputs (C, H, W) of {own}, not of {size} (--input-size): build it "
            f"for this size with --model-args '{json.dumps(arguments)}'."
        ) from error


def _transform(preprocessing: Preprocessing, is_training: bool) -> Callable[[Any], Tensor]:
    """Return timm's transform; images become grey for a model of one channel."""
    transform = create_transform(**preprocessing.model_dump(), is_training=is_training)
    grey = preprocessing.input_size[0] == 1
    return Compose([Grayscale(), *transform.transforms]) if grey else transform


def _create(name: str, arguments: dict[str, Any], weights: Path) -> nn.Module:
    building.check_arguments(TimmArguments, arguments)
    try:
        return building.build_bounded(
            lambda device: timm.create_model(name, pretrained=False, **arguments), weights
        )
    except _REFUSALS as error:
        raise ModelError(f"timm cannot build {name} with {arguments}: {error}") from error


def _adapted(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Convert weights of older layouts with timm's function for the model's architecture."""
    building.check_resizable(state, model)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        return state if convert is None else convert(state, model)
    except _REFUSALS as error:
        raise ModelError(f"The weights do not fit {type(model).__name__}: {error}") from error
