"""Settings of all tests."""

import os

# Tests share the machine, and small tensors gain nothing from more threads: here, and in processes that tests start.
# Libraries read this when they are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """PyTorch's own number of threads, whatever the environment says."""
    torch.set_num_threads(1)
