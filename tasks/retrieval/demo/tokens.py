"""The demo's tokenizer: open_clip's own, with merges of its own.

With open_clip's 49,408 tokens the embedding would be thirty times as large as the rest of the demo model. Byte pair
encoding: Sennrich et al., ACL 2016, arXiv:1508.07909.
"""

from __future__ import annotations

import gzip
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CONTEXT_LENGTH = 28
VOCAB_SIZE = 564  # 256 bytes, each inside and at the end of a word, the merges, start and end of text
MERGES_PATH = Path(__file__).parent / "merges.txt.gz"

# open_clip marks the last symbol of a word so.
_END = "</w>"


def demo_tokenizer() -> Callable[[list[str]], Tensor]:
    """Builds the tokenizer: texts to int64 token ids of shape ``(n, 28)``; the end of text has the largest id."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(bpe_path=str(MERGES_PATH), context_length=CONTEXT_LENGTH)


def learn_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Learns merges until every word is one token: again and again the most frequent pair of neighbouring symbols.

    Args:
        texts: Lower-case texts of the letters a to z and punctuation; punctuation is not merged.

    Returns:
        The merges in the order in which they apply.
    """
    counts = Counter(word for text in texts for word in re.findall(r"[a-z]+", text))
    words = {word: [*word[:-1], word[-1] + _END] for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        # The pair itself decides ties, so the order of the texts does not matter.
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: _merge(symbols, best) for word, symbols in words.items()}


def pack_merges(merges: list[tuple[str, str]]) -> bytes:
    """Packs merges into the format that open_clip reads: a first line it skips, then one merge a line, gzipped."""
    text = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)])  # A last newline would be one merge more.
    buffer = io.BytesIO()
    # Without a name and a time, equal merges give equal files.
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(text.encode("utf-8"))
    return buffer.getvalue()


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged
