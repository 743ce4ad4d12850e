"""A small CLIP for the digit scenes, of open_clip's own classes, and the place of its weights."""

from pathlib import Path

from tasks.common.demo.demo_models import DemoModels, DemoSpec
from tasks.retrieval.demo.scenes import CANVAS_SIZE
from tasks.retrieval.demo.tokens import CONTEXT_LENGTH, VOCAB_SIZE

# Vision: 6 x 6 patches and the class token, 37 tokens. Text: causal, pooled at the end of the text.
_VISION = {"image_size": CANVAS_SIZE, "patch_size": 8, "width": 64, "layers": 4, "head_width": 16}
_TEXT = {"context_length": CONTEXT_LENGTH, "vocab_size": VOCAB_SIZE}
_TEXT |= {"width": 64, "heads": 4, "layers": 3}
_CLIP = {"embed_dim": 64, "vision_cfg": _VISION, "text_cfg": _TEXT}

DEMO = DemoModels(
    {"demo_clip": DemoSpec("open_clip.model", "CLIP", _CLIP)}, Path(__file__).parent / "weights"
)
