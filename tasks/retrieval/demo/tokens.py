"""Tokenizer of the demo: open_clip's class, with merges of the demo's own.

The embedding of open_clip's 49,408 tokens would be thirty times as large as the rest of the model.
The merges are those of byte pair encoding (Sennrich et al., ACL 2016, arXiv:1508.07909) on the
captions of ``train``, until every word is one token. The test of this module learns them again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT_LENGTH = 28
#: 256 bytes, each inside and at the end of a word; the merges; start and end of the text.
VOCAB_SIZE = 564
MERGES_PATH = Path(__file__).parent / "merges.txt.gz"


def demo_tokenizer() -> Callable[[list[str]], Any]:
    """Return a tokenizer of texts to int64 ids (n, 28); the end of the text has the largest id."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(bpe_path=str(MERGES_PATH), context_length=CONTEXT_LENGTH)
