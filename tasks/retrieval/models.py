"""Loading of CLIP models: the demo model, and open_clip models with open_clip's own text tower."""

import logging
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import open_clip
from open_clip import convert
from open_clip import model as clip_model
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from pydantic import Field
from timm.layers import to_2tuple
from torch import Tensor, nn

from fimaq_core.documents import Strict, read_json
from fimaq_core.errors import ModelError
from tasks.common.models import building
from tasks.common.models.safe_reader import is_torchscript
from tasks.common.models.weights import StoredWeights, load_state, read_weights
from tasks.common.preprocessing import Preprocessing
from tasks.common.request import ModelRequest, describe_missing
from tasks.common.task import LoadedModel
from tasks.retrieval import tags
from tasks.retrieval.tags import CATALOGUE, published
from tasks.retrieval.tokenizers import Tokenizer, build_tokenizer

#: Entries that the state dicts of OpenAI have, and those of open_clip never.
_OPENAI = {"input_resolution", "context_length", "vocab_size"}
#: Entries of older checkpoints that hold no weights. open_clip drops these entries too.
_LEGACY = _OPENAI | {"text.transformer.embeddings.position_ids"}
#: Errors that open_clip and timm raise for settings or weights that do not fit.
_MISFIT = (
    TypeError, ValueError, AssertionError, RuntimeError, LookupError, AttributeError,
    ArithmeticError,
)  # fmt: skip


#: Settings of norms and activations.
_Settings = dict[
    Literal["eps", "elementwise_affine", "bias", "approximate"],
    building.Flag | building.Real | building.Word,
]


class VisionArguments(Strict):
    """Arguments of ``vision_cfg``: settings of open_clip's vision tower."""

    layers: building.Depths = [1]
    width: building.Count = 1
    head_width: building.Count = 1
    mlp_ratio: building.Positive = 1
    patch_size: building.Sides = [1]
    image_size: building.Sides = [1]
    ls_init_value: building.Real | None = None
    patch_dropout: building.Share = 0
    attentional_pool: building.Flag = False
    attn_pooler_queries: building.Count = 1
    attn_pooler_heads: building.Count = 1
    no_ln_pre: building.Flag = False
    pos_embed_type: building.Word = ""
    final_ln_after_pool: building.Flag = False
    pool_type: building.Word = ""
    output_tokens: building.Flag = False
    act_kwargs: _Settings | None = None
    norm_kwargs: _Settings | None = None
    timm_model_name: building.Word | None = None
    timm_pool: building.Word = ""
    timm_proj: building.Word | None = None
    timm_proj_bias: building.Flag = False
    timm_drop: building.Share = 0
    timm_drop_path: building.Share | None = None


class TextArguments(Strict):
    """Arguments of ``text_cfg``: settings of open_clip's own text tower.

    The tokenizer is that of the model. Another one would have to be fetched, so it has no argument.
    """

    context_length: Annotated[int, Field(strict=True, ge=1, le=8192)] = 1
    vocab_size: building.Count = 1
    width: building.Count = 1
    heads: building.Count = 1
    layers: building.Depth = 1
    mlp_ratio: building.Positive = 1
    ls_init_value: building.Real | None = None
    embed_cls: building.Flag = False
    pad_id: building.Number = 0
    eos_id: building.Number = 0
    no_causal_mask: building.Flag = False
    final_ln_after_pool: building.Flag = False
    pool_type: building.Word = ""
    proj_bias: building.Flag = False
    proj_type: Literal["linear", "none"] = "linear"
    output_tokens: building.Flag = False
    act_kwargs: _Settings | None = None
    norm_kwargs: _Settings | None = None


class ClipArguments(Strict):
    """Arguments of ``--model-args``: those of open_clip's CLIP models that JSON can hold."""

    embed_dim: building.Count = 1
    vision_cfg: VisionArguments = VisionArguments()
    text_cfg: TextArguments = TextArguments()
    quick_gelu: building.Flag = False
    init_logit_scale: building.Real = 0
    init_logit_bias: building.Real | None = None
    nonscalar_logit_scale: building.Flag = False


def load_model(request: ModelRequest) -> LoadedModel:
    """Load a CLIP model with weights, transforms and tokenizer. Raises ModelError."""
    missing = CATALOGUE.missing_weights(request), tags.missing_tokenizer(request)
    if problem := describe_missing(filter(None, missing)):
        raise ModelError(problem)
    tag, weights = CATALOGUE.model_tag(request), CATALOGUE.local_weights(request)
    if request.name in tags.DEMO_NAMES:
        return _demo(request, tag, weights)
    name, _, training = tags.full_name(request.name).partition(".")
    config = _configuration(name, request.model_args)
    preprocess = _preprocess(name, training, request.preprocessing)
    path = weights or CATALOGUE.fetch(tag)
    _refuse_torchscript(path, f"{name}.{training}" if training else None)
    stored = read_weights(path, request.weights_entry)
    # A name without tag can mean GELU or QuickGELU if open_clip has both configurations.
    ambiguous = f"{name}-quickgelu" in open_clip.list_models()
    ambiguous &= not training and "quick_gelu" not in request.model_args
    quick = _quick_gelu(stored) if ambiguous else None
    arguments = request.model_args if quick is None else {**request.model_args, "quick_gelu": quick}
    model = _create(name, arguments, {"quick_gelu": quick, **config}, path)
    vocabulary = int(open_clip.get_model_tokenize_cfg(model)["vocab_size"])
    folder = tags.tokenizer_folder(request)
    tokenizer = build_tokenizer(name, config["text_cfg"], folder, vocabulary, request.from_file)
    adapted = _adapted(stored.state, model, request.model_args)
    load_state(model, adapted, str(path) if weights else tag)
    if ambiguous and quick is None:
        raise ModelError(
            f"The weights {path} do not say which activation they were trained with, and open_clip "
            f"has {name} with two. Give --model {name}-quickgelu for QuickGELU (weights of OpenAI, "
            "DFN, MetaCLIP), or --model-args '{\"quick_gelu\": false}' for the exact GELU. A name "
            f"with a tag is also clear, such as {published(name)[0]}."
        )
    _resize_trunk(model, request.model_args)
    preprocess.size = to_2tuple(model.visual.image_size)
    shape = (3, *preprocess.size)
    wanted = tuple(request.preprocessing.get("input_size", shape))
    if wanted != shape[-len(wanted) :]:
        advice = f'"vision_cfg": {{"image_size": {list(wanted[-2:])}}} in --model-args'
        raise ModelError(
            f"The model was built for inputs (C, H, W) of {shape}, not {wanted} (--input-size): "
            f"build it for this size with {advice}."
        )
    origin = f"file {path.name}" if weights else f"hub {tags.repository(tag).repo}"
    activation = "" if quick is None else f" ({'QuickGELU' if quick else 'GELU'}, as it says)"
    own = {key: getattr(preprocess, key) for key in ("mean", "std", "interpolation")}
    return LoadedModel(
        model=model.eval(),
        tag=tag,
        source=origin + activation + tokenizer.origin,
        sha256=stored.sha256(model, altered=bool(arguments)),
        classes=0,
        eval_transform=image_transform_v2(preprocess, is_train=False),
        train_transform=image_transform_v2(preprocess, is_train=True),
        input_shape=shape,
        tokenizer=tokenizer,
        context_length=tokenizer.context_length,
        entry=stored.entry,
        entries=stored.entries,
        preprocessing=Preprocessing(input_size=shape, crop_mode=preprocess.resize_mode, **own),
        notes=stored.notes(),
    )


def _demo(request: ModelRequest, tag: str, weights: Path | None) -> LoadedModel:
    from tasks.retrieval.demo import scenes
    from tasks.retrieval.demo.models import DEMO, demo_tokenizer

    model, stored = DEMO.load(request, weights)
    tokenizer = Tokenizer(demo_tokenizer(), int(model.context_length), int(model.vocab_size))
    return LoadedModel(
        model=model,
        tag=tag,
        source=f"file {stored.path.name}",
        sha256=stored.sha256(model, altered=False),
        classes=0,
        eval_transform=scenes.eval_transform(),
        train_transform=scenes.train_transform(),
        data=tags.DEMO_DATA,
        input_shape=(3, *scenes.CANVAS_SIZE),
        tokenizer=tokenizer,
        context_length=tokenizer.context_length,
        entry=stored.entry,
        entries=stored.entries,
    )


def _quick_gelu(stored: StoredWeights) -> bool | None:
    """Return True for weights trained with QuickGELU, False for GELU, None if the file is unclear.

    The names of OpenAI's tensors, or open_clip's configuration beside the file, tell it. Raises
    ModelError: the configuration cannot be read.
    """
    if stored.state.keys() >= _OPENAI:
        return True
    path = stored.path.parent / "open_clip_config.json"
    if stored.path.name not in tags.FILES or not path.exists():
        return None
    content = read_json(path, ModelError, "configuration of the weights")
    config = content.get("model_cfg") if isinstance(content, dict) else None
    quick = config.get("quick_gelu", False) if isinstance(config, dict) else None
    return quick if isinstance(quick, bool) else None


def _configuration(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return open_clip's configuration of ``name``, changed by ``arguments`` (of --model-args).

    A tower keeps the settings that ``arguments`` do not name. Raises ModelError: arguments that are
    unknown or out of bounds, or a tower that open_clip would fetch by itself.
    """
    building.check_arguments(ClipArguments, arguments)
    config: dict[str, Any] = open_clip.get_model_config(name)
    for key, value in arguments.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    if foreign := config["text_cfg"].get("hf_model_name"):
        raise ModelError(
            f"The text tower of {name} is a model of transformers ({foreign}), which open_clip "
            "would fetch by itself: choose a model with open_clip's own text tower."
        )
    config["vision_cfg"].pop("timm_model_pretrained", None)
    return config


def _preprocess(name: str, training: str, given: dict[str, Any]) -> PreprocessCfg:
    """Return open_clip's image preprocessing of the weights ``training``.

    Without this name, it is the preprocessing that all published weights of the model share, or
    open_clip's default if there are none. ``given`` may replace mean, deviation and interpolation.
    Raises ModelError: a value is not possible, or the published weights differ.
    """
    overlay = {key: given[key] for key in ("mean", "std", "interpolation") if key in given}
    for key in overlay.keys() & {"mean", "std"}:
        values = overlay[key]
        if len(values) not in (1, 3):
            raise ModelError(f"--{key} has {len(values)} values: give one, or three for RGB.")
        overlay[key] = tuple(values if len(values) == 3 else values * 3)
    kind = overlay.get("interpolation", "bicubic")
    if kind not in ("bicubic", "bilinear"):
        raise ModelError(f"--interpolation {kind}: open_clip has bicubic and bilinear.")
    if "crop_pct" in given:
        raise ModelError("--crop-pct is for timm's models: open_clip resizes by itself.")
    trainings = [training] if training else open_clip.list_pretrained_tags_by_model(name)
    known = [open_clip.get_pretrained_cfg(name, one) for one in trainings] or [{}]
    found = [merge_preprocess_dict(PreprocessCfg(), {**config, **overlay}) for config in known]
    if any(other != found[0] for other in found):
        raise ModelError(
            f"The weights that open_clip knows of {name} differ in mean, deviation or size of "
            "their images: name the weights that were trained with the same transforms as yours, "
            f"{' or '.join(published(name))}, or give --mean and --std."
        )
    return PreprocessCfg(**found[0])


def _create(
    name: str, arguments: dict[str, Any], config: dict[str, Any], weights: Path
) -> nn.Module:
    own = {key: config[key] for key in arguments}
    own |= {"pretrained_image": False, "pretrained_text": False}

    def build(device: str) -> nn.Module:
        model: nn.Module = open_clip.create_model(name, device=device, **deepcopy(own))
        if device == "meta":  # so that the resized embeddings count
            _resize_trunk(model, arguments)
        return model

    # open_clip warns of random weights, but the caller replaces these weights at once.
    logging.root.addFilter(_serious)
    try:
        return building.build_bounded(build, weights)
    except _MISFIT as error:
        raise ModelError(f"open_clip cannot build {name} with {arguments}: {error}") from error
    finally:
        logging.root.removeFilter(_serious)


def _serious(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No pretrained weights loaded for model")


def _adapted(
    state: dict[str, Tensor], model: nn.Module, arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """Return ``state`` in the layout of the model, converted by functions of open_clip.

    Position embeddings are resized only if ``arguments`` give another size, and a missing
    ``logit_bias`` stays missing; open_clip would resize and add them silently.
    """
    expected = model.state_dict()
    building.check_resizable(state, model)
    try:
        adapted: dict[str, Tensor] = convert.convert_state_dict(model, dict(state))
        if "positional_embedding" in adapted and not hasattr(model, "positional_embedding"):
            if twice := next((name for name in adapted if f"text.{name}" in adapted), None):
                raise ModelError(f"The weights have {twice!r} twice, also as {f'text.{twice}'!r}.")
            adapted = clip_model.convert_to_custom_text_state_dict(adapted)
        for name in ("logit_scale", "logit_bias"):  # files store a number or a vector of one
            if name in adapted and name in expected and adapted[name].numel() == 1:
                adapted[name] = adapted[name].reshape(expected[name].shape)
        if "image_size" in arguments.get("vision_cfg", {}):
            clip_model.resize_pos_embed(adapted, model)
        if "context_length" in arguments.get("text_cfg", {}):
            clip_model.resize_text_pos_embed(adapted, model)
    except _MISFIT as error:
        raise ModelError(f"The weights do not fit {type(model).__name__}: {error}") from error
    return {name: one for name, one in adapted.items() if name in expected or name not in _LEGACY}


def _resize_trunk(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Give a timm vision tower the image size in ``arguments``; open_clip does not use it."""
    size = arguments.get("vision_cfg", {}).get("image_size")
    if size is None or not isinstance(model.visual, TimmModel):
        return
    trunk = model.visual.trunk
    if not hasattr(trunk, "set_input_size"):
        kind = type(trunk).__name__
        raise ModelError(f"The vision tower {kind} takes images of its own size only.")
    try:
        model.visual.set_input_size(to_2tuple(size))
    except _MISFIT as error:
        raise ModelError(f"The vision tower takes no images of size {size}: {error}") from error


def _refuse_torchscript(path: Path, name: str | None) -> None:
    if not is_torchscript(path):
        return
    found = tags.repository(name) if name is not None else None
    repo = f"open_clip_model.safetensors of the Hugging Face repository {found and found.repo}"
    raise ModelError(
        f"The weights {path} are a TorchScript archive, as OpenAI publishes its models. It "
        "contains a program, which is not run: give "
        f"{repo if found else 'a safetensors file'} instead."
    )
