"""A library that makes the fork server think that CUDA is in use."""

from benchmarks.run import preload

preload.cuda_is_up = lambda: True
