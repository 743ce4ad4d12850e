"""Names of classifiers and what is missing of weights and data; imports nothing heavy for short and demo names."""

import json
import os
import socket
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from fimaq_core.errors import ModelError, suggest
from tasks.common.hashing import SUFFIXES, file_sha256
from tasks.common.imagenet import LAYOUT
from tasks.common.request import DataRequest, Missing, ModelRequest

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

#: What of a model can be quantized: always everything.
SCOPES: tuple[str, ...] = ()

DEMO_NAMES = ("demo_vit", "demo_deit", "demo_swin")

_DEMO_FOLDER = Path(__file__).parent / "demo" / "weights"


def full_name(name: str) -> str:
    """The full timm name: ``model.tag``, or untagged as given.

    Raises:
        ModelError: timm has no such model or tag.
    """
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [*SHORT_NAMES, *DEMO_NAMES, *timm.list_models(["vit*", "deit*", "swin*"])]
        close = suggest(name, known)
        raise ModelError(f"Unknown model '{name}'.{close if len(close) < 200 else ' See `models` for short names.'}")
    if tag and tag not in timm_tags(name):
        raise ModelError(f"timm has no weights '{tag}' for {architecture}.{suggest(tag, timm_tags(name))}")
    return name


def timm_tags(name: str) -> list[str]:
    """The tags of pretrained weights that timm knows of an architecture."""
    import timm

    return [found.partition(".")[2] for found in timm.list_pretrained(f"{name.split('.')[0]}.*")]


def local_weights(request: ModelRequest) -> Path | None:
    """The weights file to use: as asked for, or the one in the weights folder that is called after the model."""
    if request.weights is not None:
        return request.weights
    if request.weights_folder is not None and request.name not in DEMO_NAMES:
        for suffix in SUFFIXES:
            path = request.weights_folder / f"{full_name(request.name)}{suffix}"
            if path.is_file():
                return path
    return None


def model_tag(request: ModelRequest) -> str:
    """The identity of model and weights, ``model.tag``.

    Weights from a file keep the published tag only if the file is called after it; else the tag is ``local-`` and the
    beginning of the file's sha256.

    Raises:
        ModelError: unknown model, or a timm name that names no weights.
    """
    weights = local_weights(request)
    if weights is not None and not weights.is_file():
        raise ModelError(f"There is no weights file {weights}.")
    if request.name in DEMO_NAMES and weights is None:
        return f"{request.name}.{_demo_metadata(request.name)['tag']}"
    name = request.name if request.name in DEMO_NAMES else full_name(request.name)
    if weights is not None and weights.stem != name:
        return f"{name.split('.')[0]}.local-{file_sha256(weights)[:12]}"
    if weights is None and not name.partition(".")[2]:
        choices = " or ".join(f"{name}.{tag}" for tag in timm_tags(name)[:8]) or "a local file with --weights"
        raise ModelError(f"'{name}' names no weights, and untagged names have changed their meaning: choose {choices}.")
    return name


def weights_digest(request: ModelRequest) -> str | None:
    """The sha256 of weights that are a file here (demo weights: by their metadata); None for the hub's."""
    weights = local_weights(request)
    if weights is not None:
        return file_sha256(weights)
    if request.name in DEMO_NAMES:
        return str(_demo_metadata(request.name)["sha256"])
    return None


def _demo_metadata(name: str) -> dict[str, Any]:
    path = _DEMO_FOLDER / f"{name}.json"
    if not path.is_file():
        raise ModelError(f"There are no demo weights of {name}: run `python scripts/train_demo.py`.")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def preflight(model: ModelRequest, data: DataRequest) -> list[Missing]:
    """What is missing of data and weights. Downloads nothing."""
    found = [missing_data(data, model.name in DEMO_NAMES), missing_weights(model)]
    return [item for item in found if item is not None]


def missing_data(data: DataRequest, brings_data: bool) -> Missing | None:
    """The data, if it is not there."""
    if data.path is None:
        advice = f"Give its folder: IMAGENET=/path for make, --imagenet for a grid, --data for an adapter. {LAYOUT}."
        return None if brings_data else Missing("the data set ImageNet", advice)
    parts = ["val"] if data.calibration_list is not None else ["train", "val"]
    absent = [str(data.path / part) for part in parts if not (data.path / part).is_dir()]
    if not absent:
        return None
    return Missing(
        f"the folder {' and the folder '.join(absent)}",
        f"{LAYOUT}; ImageNet-1k (ILSVRC 2012) is to be had from its site after registration.",
    )


def missing_weights(request: ModelRequest) -> Missing | None:
    """The weights, if they are not here and the hub that has them does not answer."""
    if request.name in DEMO_NAMES and local_weights(request) is None:
        path = _DEMO_FOLDER / f"{request.name}.safetensors"
        advice = "They belong to the repository; `python scripts/train_demo.py` makes them anew."
        return None if path.is_file() else Missing(f"the weights of {request.name}", advice)
    tag, weights = model_tag(request), local_weights(request)
    if weights is not None or cached_weights(tag) is not None or hub_answers():
        return None
    folder = f"in the folder {request.weights_folder}, " if request.weights_folder is not None else ""
    return Missing(
        f"the weights of {tag}",
        f"Looked for {folder}in the Hugging Face cache and at its hub (timm/<name>), which does not answer. Run once with a "
        "network, or give a folder with <name>.safetensors: WEIGHTS=/path for make, --weights for a grid, --weights-folder for "
        "an adapter.",
    )


def cached_weights(tag: str) -> Path | None:
    """The checkpoint of ``model.tag`` in the local Hugging Face cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(f"timm/{tag}", file)
        if isinstance(found, str):
            return Path(found)
    return None


@lru_cache(maxsize=1)
def hub_answers(seconds: float = 5.0) -> bool:
    """Whether the Hugging Face hub can be reached: a connection is opened, nothing is asked or downloaded."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only a real request could tell
    address = urlparse(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or (443 if address.scheme == "https" else 80)), seconds):
            return True
    except OSError:
        return False
