"""Three small transformers for the digit pairs, built from timm's own classes, and where their weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.classification.demo.digits import CANVAS_SIZE, NUM_CLASSES
from tasks.common.demo_models import DemoModels, DemoSpec

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

DEMO = DemoModels(_SPECS, Path(__file__).parent / "weights")
