"""A library that makes a host think that CUDA is in use."""

from benchmarks.engines import host

host.cuda_is_up = lambda: True
