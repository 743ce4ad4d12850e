"""Three small transformers for the digit pairs, built from timm's own classes, and where their weights are."""

from __future__ import annotations

import difflib
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tasks.classification.demo.digits import CANVAS_SIZE, NUM_CLASSES

_WEIGHTS_DIR = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class DemoSpec:
    """How to build a demo model.

    Attributes:
        module: timm module that defines the class; imported only when a model is built.
        cls: Name of the class.
        kwargs: Its keyword arguments.
    """

    module: str
    cls: str
    kwargs: dict[str, Any]


_COMMON: dict[str, Any] = {"img_size": CANVAS_SIZE, "in_chans": 1, "num_classes": NUM_CLASSES, "qkv_bias": True}

_SPECS: dict[str, DemoSpec] = {
    # 4 x 8 patches and the class token: 33 tokens.
    "demo_vit": DemoSpec(
        module="timm.models.vision_transformer",
        cls="VisionTransformer",
        kwargs={**_COMMON, "patch_size": 8, "embed_dim": 80, "depth": 4, "num_heads": 4, "mlp_ratio": 4.0},
    ),
    # Narrower and deeper than demo_vit, with a distillation token: 34 tokens.
    "demo_deit": DemoSpec(
        module="timm.models.deit",
        cls="VisionTransformerDistilled",
        kwargs={**_COMMON, "patch_size": 8, "embed_dim": 64, "depth": 5, "num_heads": 2, "mlp_ratio": 4.0},
    ),
    # 8 x 16 tokens in windows of 4 x 4, every second block shifted; one patch merging to 4 x 8 tokens.
    "demo_swin": DemoSpec(
        module="timm.models.swin_transformer",
        cls="SwinTransformer",
        kwargs={
            **_COMMON,
            "patch_size": 4,
            "window_size": 4,
            "embed_dim": 32,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "mlp_ratio": 4.0,
            "drop_path_rate": 0.0,
        },
    ),
}

DEMO_MODELS: tuple[str, ...] = tuple(_SPECS)


def demo_spec(name: str) -> DemoSpec:
    """Looks up how a demo model is built.

    Args:
        name: One of `DEMO_MODELS`.

    Returns:
        The specification.

    Raises:
        ValueError: If there is no such model.
    """
    if name in _SPECS:
        return _SPECS[name]
    close = difflib.get_close_matches(name, DEMO_MODELS, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown demo model {name!r};{hint} available: {', '.join(DEMO_MODELS)}")


def build_demo_model(name: str) -> nn.Module:
    """Builds a demo model with random weights, in eval mode.

    Args:
        name: One of `DEMO_MODELS`.

    Returns:
        The model: float32 images of shape ``(b, 1, 32, 64)`` to logits of shape ``(b, 100)``.

    Raises:
        ValueError: If there is no such model.
    """
    spec = demo_spec(name)
    model: nn.Module = getattr(importlib.import_module(spec.module), spec.cls)(**spec.kwargs)
    return model.eval()


def demo_weights_path(name: str) -> Path:
    """Returns where the trained weights (safetensors, float32) of a demo model are.

    Args:
        name: One of `DEMO_MODELS`.

    Returns:
        The path of the safetensors file.

    Raises:
        ValueError: If there is no such model.
    """
    demo_spec(name)
    return _WEIGHTS_DIR / f"{name}.safetensors"


def demo_weights_metadata(name: str) -> dict[str, Any]:
    """Reads what is recorded about the weights: training settings, accuracies, versions and the file's sha256.

    Args:
        name: One of `DEMO_MODELS`.

    Returns:
        The metadata.

    Raises:
        ValueError: If there is no such model.
        FileNotFoundError: If the model has not been trained.
    """
    path = demo_weights_path(name).with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError(f"no metadata for {name}: train it with `python scripts/train_demo.py --models {name}`")
    return json.loads(path.read_text(encoding="utf-8"))
