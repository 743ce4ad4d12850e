"""A small timm ViT for the scenes, and its weights."""

from pathlib import Path

from tasks.common.demo.demo_models import DemoModels, DemoSpec
from tasks.deepfake.demo.scenes import SIDE

_SPEC = DemoSpec(
    "timm.models.vision_transformer",
    "VisionTransformer",
    {
        "img_size": SIDE, "patch_size": 6, "in_chans": 1, "num_classes": 2, "embed_dim": 64,
        "depth": 4, "num_heads": 4, "qkv_bias": True, "mlp_ratio": 4.0,
    },
)  # fmt: skip
DEMO = DemoModels({"demo_deepfake": _SPEC}, Path(__file__).parent / "weights")
