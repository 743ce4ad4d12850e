"""The stage clock: each stage has its own time and its own peak of memory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tasks.common.cell.environment import StageClock, peak_memory, reset_peak_memory

CPU = torch.device("cpu")
#: Beyond what the allocator keeps for itself, so that it goes back to the system at once.
LARGE = 256 * 2**20


def use(size: int = LARGE) -> None:
    torch.ones(size // 4)


def can_reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def test_a_stage_has_the_memory_it_took() -> None:
    clock = StageClock(CPU)
    clock.lap("before")
    use()
    clock.lap("large")
    clock.lap("after")
    assert list(clock.seconds) == list(clock.memory) == ["before", "large", "after"]
    assert clock.memory["large"] >= LARGE
    if can_reset():  # else a peak is that of the process so far
        for small in ("before", "after"):
            assert clock.memory["large"] - clock.memory[small] > 0.9 * LARGE
    else:
        assert clock.memory["before"] <= clock.memory["large"] <= clock.memory["after"]


@pytest.mark.skipif(not can_reset(), reason="this system does not reset the peak of a process")
def test_a_stage_that_comes_again_keeps_its_larger_peak() -> None:
    clock = StageClock(CPU)
    use()
    clock.lap("calibrate")
    first = dict(clock.memory)
    clock.lap("calibrate")
    assert clock.memory == first
    use()
    clock.lap("evaluate")
    clock.lap("load")
    assert clock.memory["calibrate"] - clock.memory["load"] > 0.9 * LARGE
    reset_peak_memory(CPU)
    use()
    assert peak_memory(CPU) - clock.memory["load"] > 0.9 * LARGE


def test_times_of_equal_stages_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((10.0, 13.0, 13.0, 20.0, 20.0, 24.0, 24.0, 34.0, 34.0))
    monkeypatch.setattr(
        "tasks.common.cell.environment.time", SimpleNamespace(monotonic=lambda: next(now))
    )
    clock = StageClock(CPU)
    clock.lap("load")
    clock.lap("calibrate")
    clock.lap("wait")
    clock.lap("load")
    assert clock.seconds == {"load": 3.0 + 10.0, "calibrate": 7.0, "wait": 4.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_stages_have_the_memory_of_their_tensors() -> None:
    device = torch.device("cuda")
    clock = StageClock(device)
    kept = torch.ones(LARGE // 4, device=device)
    clock.lap("kept")
    torch.ones(LARGE // 2, device=device)
    clock.lap("large")
    del kept
    clock.lap("after")
    assert clock.memory["kept"] >= LARGE
    assert clock.memory["large"] >= 3 * LARGE
    assert clock.memory["after"] < 2 * LARGE
