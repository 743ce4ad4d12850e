"""Tokenizer of the demo: open_clip's class, with merges of the demo's own.

The embedding of open_clip's 49,408 tokens would be thirty times as large as the rest of the model.
Byte pair encoding: Sennrich et al., ACL 2016, arXiv:1508.07909. ``python -m
tasks.retrieval.demo.tokens`` learns new merges; afterwards the demo model must be trained again.
"""

import gzip
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
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


def learn_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair of symbols until every word (of a to z) is one token."""
    counts = Counter(word for text in texts for word in re.findall(r"[a-z]+", text))
    words = {word: " ".join(word) + "</w>" for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols.split()):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        # The pair itself breaks ties, so the order of the texts does not matter.
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        whole = re.compile(rf"(?<!\S){re.escape(' '.join(best))}(?!\S)")
        words = {word: whole.sub("".join(best), symbols) for word, symbols in words.items()}


def pack_merges(merges: list[tuple[str, str]]) -> bytes:
    """Return merges as open_clip reads them: a line that it skips, one line per merge, gzipped.

    There is no last newline, which would be one more merge, and no time, so equal merges give equal
    files.
    """
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    return gzip.compress("\n".join(lines).encode(), mtime=0)


if __name__ == "__main__":
    from tasks.retrieval.demo.scenes import DigitScenes

    MERGES_PATH.write_bytes(pack_merges(learn_merges(DigitScenes("train").captions)))
