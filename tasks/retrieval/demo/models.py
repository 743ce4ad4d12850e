"""A small CLIP for the digit scenes, built from open_clip's own classes, and where its weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tasks.common.demo_models import DemoModels, DemoSpec
from tasks.retrieval.demo.scenes import CANVAS_SIZE
from tasks.retrieval.demo.tokens import CONTEXT_LENGTH, VOCAB_SIZE

_SPECS: dict[str, DemoSpec] = {
    # Vision: 6 x 6 patches and the class token, 37 tokens. Text: causal, read at the end of the text.
    "demo_clip": DemoSpec(
        module="open_clip.model",
        cls="CLIP",
        kwargs={
            "embed_dim": 64,
            "vision_cfg": {"image_size": CANVAS_SIZE, "patch_size": 8, "width": 64, "layers": 4, "head_width": 16},
            "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": VOCAB_SIZE, "width": 64, "heads": 4, "layers": 3},
        },
    ),
}

DEMO_MODELS: tuple[str, ...] = tuple(_SPECS)

_DEMO = DemoModels(_SPECS, Path(__file__).parent / "weights")


def demo_spec(name: str) -> DemoSpec:
    """Looks up how a demo model is built; a ValueError if there is no such model."""
    return _DEMO.spec(name)


def build_demo_model(name: str) -> nn.Module:
    """Builds a demo model with random weights, in eval mode.

    Args:
        name: One of `DEMO_MODELS`.

    Returns:
        The model: float32 images of shape ``(b, 3, 48, 48)`` and int64 token ids of shape ``(b, 28)`` to features of
        shape ``(b, 64)`` each and the scale of their products.

    Raises:
        ValueError: If there is no such model.
    """
    return _DEMO.build(name)


def demo_weights_path(name: str) -> Path:
    """Returns where the trained weights of a demo model are; a ValueError if there is no such model."""
    return _DEMO.weights_path(name)


def demo_weights_metadata(name: str) -> dict[str, Any]:
    """Reads what is recorded about the weights of a demo model, see `DemoModels.metadata`."""
    return _DEMO.metadata(name)
