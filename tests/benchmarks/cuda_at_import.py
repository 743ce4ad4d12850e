"""A library that makes the fork server think that CUDA is in use."""

from benchmarks.run import child

child.uses_cuda = lambda: True
