"""Self-contained demo of the retrieval task: captioned scenes of handwritten digits and a tiny CLIP.

Everything the demo needs is either in the repository (the weights, the tokenizer's merges) or in a Python package (the
digits), so the whole quantization pipeline can be run and tested without any download.
"""
