"""Settings of all tests."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests share the machine, and small tensors gain nothing from more threads."""
    torch.set_num_threads(1)
