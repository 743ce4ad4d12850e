"""Settings of all tests."""

import gc
import os
from collections.abc import Generator

# Tests share the machine, and small tensors gain nothing from more threads: here, and in processes that tests start.
# Libraries read this when they are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Keep what `torch.compile` makes in pytest's own cache: one place for all workers and runs."""
    if (cache := getattr(config, "cache", None)) is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.mkdir("inductor")))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import the tests without garbage collection, and look through what they import never again.

    Modules of three model libraries are millions of objects: each later collection would visit them all.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """PyTorch's own number of threads, whatever the environment says."""
    torch.set_num_threads(1)
