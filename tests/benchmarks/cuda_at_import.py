"""A library that makes processes forked after its import think that CUDA is in use."""

from benchmarks.run import child

child.cuda_is_up = lambda: True
