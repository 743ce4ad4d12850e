"""Self-contained demo of the detection task: scenes of handwritten digits in COCO format and two tiny detectors.

Everything the demo needs is either in the repository (the weights) or in a Python package (the digits), so the whole
quantization pipeline can be run and tested without any download.
"""
