"""Settings of all tests."""

import gc
import multiprocessing.util
import os
import tempfile
from collections.abc import Generator, Iterator

# Tests share the machine, and small tensors gain nothing from more threads: here, and in processes
# that tests start. Waiting threads leave the processors to those that work. Libraries read both
# when they are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

#: One thread unless the environment says otherwise.
THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled kernels in pytest's cache, apart for each instruction set.

    PyTorch would mix up kernels of different sets. It fixes their folder during collection.
    """
    if hasattr(config, "cache"):
        capability = os.environ.get("ATEN_CPU_CAPABILITY", "native")
        folder = config.cache.mkdir(f"kernels-{capability}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Undo the option ``--threads`` of a test, since the number of threads changes the rounding."""
    yield
    torch.set_num_threads(THREADS)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import the tests without garbage collection, and look through what they import never again.

    Three model libraries make millions of objects, which each later collection would visit.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _temporary_files(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep temporary files of tests and of their processes in a folder that the session removes.

    Its path is short, since sockets with long paths cannot be opened.
    """
    # pytest's own folders stay where they would be without this fixture.
    request.getfixturevalue("tmp_path_factory").getbasetemp()
    multiprocessing.util.get_temp_dir()  # nor can that of sockets move: it lasts until the exit
    with (
        tempfile.TemporaryDirectory(prefix="fimaq-tests-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture
def in_float64() -> Iterator[None]:
    """New tensors are float64, so that only mistakes make a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
