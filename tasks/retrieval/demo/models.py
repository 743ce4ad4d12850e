"""Demo model of the retrieval task: a small CLIP of open_clip for digit scenes, and its tokenizer.

The tokenizer has fewer merges than open_clip's: the embedding of 49,408 tokens would be thirty
times as large as the rest of the model. The merges come from byte pair encoding (Sennrich et al.,
ACL 2016, arXiv:1508.07909) on the captions of ``train``, until every word is one token.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.common.demo.demo_models import DemoModels, DemoSpec
from tasks.retrieval.demo.scenes import CANVAS_SIZE

CONTEXT_LENGTH = 28
#: 256 bytes, each inside and at the end of a word; the merges; start and end of the text.
VOCAB_SIZE = 564
MERGES_PATH = Path(__file__).parent / "merges.txt.gz"

# Vision: 6 x 6 patches and the class token, 37 tokens. Text: causal, pooled at the end of the text.
_VISION = {"image_size": CANVAS_SIZE, "patch_size": 8, "width": 64, "layers": 4, "head_width": 16}
_TEXT = {"context_length": CONTEXT_LENGTH, "vocab_size": VOCAB_SIZE}
_TEXT |= {"width": 64, "heads": 4, "layers": 3}
_CLIP = {"embed_dim": 64, "vision_cfg": _VISION, "text_cfg": _TEXT}

DEMO = DemoModels(
    {"demo_clip": DemoSpec("open_clip.model", "CLIP", _CLIP)}, Path(__file__).parent / "weights"
)


def demo_tokenizer() -> Callable[[list[str]], Any]:
    """Return a tokenizer of texts to int64 ids (n, 28); the end of the text has the largest id."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(bpe_path=str(MERGES_PATH), context_length=CONTEXT_LENGTH)
