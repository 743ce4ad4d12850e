"""Three small timm transformers for the digit pairs, and their weights."""

from pathlib import Path
from typing import Any

from tasks.classification.demo.digit_pairs import CANVAS_SIZE, NUM_CLASSES
from tasks.common.demo.demo_models import DemoModels, DemoSpec

_COMMON = {"img_size": CANVAS_SIZE, "in_chans": 1, "num_classes": NUM_CLASSES}
_SWIN = {"window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "drop_path_rate": 0.0}


def _spec(module: str, cls: str, patch_size: int, embed_dim: int, **arguments: Any) -> DemoSpec:
    own = {"patch_size": patch_size, "embed_dim": embed_dim, "qkv_bias": True, "mlp_ratio": 4.0}
    return DemoSpec(f"timm.models.{module}", cls, {**_COMMON, **own, **arguments})


_SPECS = {
    # 4 x 8 patches and the class token: 33 tokens.
    "demo_vit": _spec("vision_transformer", "VisionTransformer", 8, 80, depth=4, num_heads=4),
    # Narrower and deeper than demo_vit, with a distillation token: 34 tokens.
    "demo_deit": _spec("deit", "VisionTransformerDistilled", 8, 64, depth=5, num_heads=2),
    # 8 x 16 tokens in windows of 4 x 4, every second block shifted; merging leaves 4 x 8 tokens.
    "demo_swin": _spec("swin_transformer", "SwinTransformer", 4, 32, **_SWIN),
}

DEMO = DemoModels(_SPECS, Path(__file__).parent / "weights")
