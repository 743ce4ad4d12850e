"""Self-contained demo of the classification task: a 100-class digit-pair data set and three tiny transformers.

Everything the demo needs is either in the repository (the weights) or in a Python package (the digits), so the
whole quantization pipeline can be run and tested without any download.
"""
