"""Tables of scores: Markdown, LaTeX, ablations, expected orders."""
