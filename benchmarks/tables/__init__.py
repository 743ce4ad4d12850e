"""Tables of scores: Markdown, LaTeX, ablations, expected orders."""

from benchmarks.results.scores import Measured, collect, in_order, is_percent, unique, write_text

__all__ = ["Measured", "collect", "in_order", "is_percent", "unique", "write_text"]
