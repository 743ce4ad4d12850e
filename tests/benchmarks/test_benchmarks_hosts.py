"""Hosts and the processes of cells: real ones, killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path

import benchmark_fakes as fakes
import engine_fakes
import psutil
import pytest
from engine_fakes import HANG, until

from benchmarks.cells import Cell, RunOptions
from benchmarks.engines.base import Failed, Finished, Message, Slot, make_job
from benchmarks.engines.child import measure
from benchmarks.engines.host import cuda_is_up
from benchmarks.engines.local import LocalEngine
from benchmarks.grid import Filters, expand
from fimaq_core.progress import Progress, Report
from tasks.common.request import CellRequest

pytestmark = pytest.mark.slow


def cells_of(tmp_path: Path) -> list[Cell]:
    return expand(fakes.plain_demo(), Filters(methods=("rtn",)), RunOptions(tmp_path))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine(1, 1, tmp_path / "logs")
    yield engine
    engine.close()


def start(engine: LocalEngine, cell: Cell, run_cell: Callable[[CellRequest, Report], Path] = engine_fakes.run_cell) -> Slot:
    (slot,) = engine.slots()
    slot.assign(make_job(run_cell, cell.request, fakes.planned_folder(cell.request) / "error.log", (), cell.label))
    return slot


def end(engine: LocalEngine) -> Message:
    """The message that ends the cell."""
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline:
        for _, message in engine.wait(0.5):
            if not isinstance(message, Progress):
                return message
    raise AssertionError("the cell did not end")


def plan(tmp_path: Path, cell: Cell, *faults: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({engine_fakes.name_of(cell.request): faults}))


def test_every_cell_has_a_process_of_its_own_and_one_host(engine: LocalEngine, tmp_path: Path):
    for cell in cells_of(tmp_path)[:3]:
        start(engine, cell)
        assert isinstance(end(engine), Finished)
    found = engine_fakes.attempts(tmp_path)
    assert len({words[0] for words in found}) == 3
    assert len({words[1] for words in found}) == 1
    assert [line for line in (tmp_path / "logs/worker-1.log").read_text().splitlines() if line.startswith("==")] == [
        f"== {cell.label}" for cell in cells_of(tmp_path)[:3]
    ]


def test_a_killed_process_fails_its_cell_only(engine: LocalEngine, tmp_path: Path):
    first, second = cells_of(tmp_path)[:2]
    plan(tmp_path, first, "kill")
    start(engine, first)
    message = end(engine)
    assert isinstance(message, Failed)
    assert message.kind == "died"
    assert "killed by the system" in message.message
    assert message.log == tmp_path / "logs/worker-1.log"
    start(engine, second)
    assert isinstance(end(engine), Finished)
    hosts = {words[1] for words in engine_fakes.attempts(tmp_path)}
    assert len(hosts) == 1


def test_a_killed_host_fails_its_cell_takes_the_process_along_and_is_replaced(engine: LocalEngine, tmp_path: Path):
    first, second = cells_of(tmp_path)[:2]
    plan(tmp_path, first, "kill host")
    start(engine, first)
    message = end(engine)
    assert isinstance(message, Failed)
    assert message.kind == "died"
    child = int(engine_fakes.attempts(tmp_path)[0][0])
    until(lambda: not psutil.pid_exists(child))
    start(engine, second)
    assert isinstance(end(engine), Finished)
    assert len({words[1] for words in engine_fakes.attempts(tmp_path)}) == 2


def test_closing_ends_a_process_at_work_and_leaves_no_files(engine: LocalEngine, tmp_path: Path):
    (cell,) = cells_of(tmp_path)[:1]
    plan(tmp_path, cell, "sleep")
    start(engine, cell)
    until(lambda: engine_fakes.attempts(tmp_path))
    child, host = map(int, engine_fakes.attempts(tmp_path)[0][:2])
    folder = Path(psutil.Process(host).cmdline()[-1])
    assert folder.is_dir()
    engine.close()
    assert not psutil.pid_exists(child)
    assert not psutil.pid_exists(host)
    assert not folder.parent.exists()


def test_nothing_outlives_a_killed_driver(tmp_path: Path):
    (cell,) = cells_of(tmp_path)[:1]
    plan(tmp_path, cell, "sleep")
    code = (
        "import sys, test_benchmarks_hosts as tests\nfrom pathlib import Path\nroot = Path(sys.argv[1])\n"
        "engine = tests.LocalEngine(1, 1, root / 'logs')\ntests.start(engine, tests.cells_of(root)[0])\ntests.end(engine)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    until(lambda: engine_fakes.attempts(tmp_path))
    child, host = map(int, engine_fakes.attempts(tmp_path)[0][:2])
    folder = Path(psutil.Process(host).cmdline()[-1]).parent
    assert folder.is_dir()
    driver.kill()
    driver.wait()
    until(lambda: not psutil.pid_exists(child) and not psutil.pid_exists(host) and not folder.exists())


def leave_a_file_and_a_process(request: CellRequest, report: Report) -> Path:
    """A cell that is killed with a temporary file and a process of its own at hand."""
    import tempfile

    sleeper = subprocess.Popen(["sleep", str(HANG)])
    with tempfile.NamedTemporaryFile(delete=False) as file:
        (request.results.parent / "left.txt").write_text(f"{file.name}\n{sleeper.pid}")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_what_a_killed_process_leaves_behind_is_removed(engine: LocalEngine, tmp_path: Path):
    start(engine, cells_of(tmp_path)[0], leave_a_file_and_a_process)
    assert isinstance(end(engine), Failed)
    file, process = (tmp_path / "left.txt").read_text().splitlines()
    assert not Path(file).exists()
    until(lambda: not psutil.pid_exists(int(process)))


def test_what_hosts_import_cannot_run_in_parallel_but_cells_can(tmp_path: Path):
    engine = LocalEngine(1, 2, tmp_path / "logs", ("torch", "parallel_at_import", "no_such_module"))
    try:
        start(engine, cells_of(tmp_path)[0], multiply)
        message = end(engine)
        assert isinstance(message, Finished), message
        assert message.path.read_text() == "True 2"
    finally:
        engine.close()


def multiply(request: CellRequest, report: Report) -> Path:
    """A cell that would wait for ever if the pool of threads had been at work before the fork."""
    imported = "parallel_at_import" in sys.modules
    torch = sys.modules["torch"]
    assert bool(torch.isfinite(torch.randn(512, 512) @ torch.randn(512, 512)).all())
    path = request.results.parent / "product.txt"
    path.write_text(f"{imported} {torch.get_num_threads()}")
    return path


def test_cuda_in_use_is_seen(tmp_path: Path):
    (tmp_path / "3").symlink_to("/dev/nvidiactl")
    (tmp_path / "4").symlink_to("socket:[1]")
    assert not cuda_is_up(tmp_path)
    (tmp_path / "5").symlink_to("/dev/nvidia-uvm")
    assert cuda_is_up(tmp_path)


def test_a_host_that_must_not_fork_measures_one_cell_itself(tmp_path: Path):
    """Importing a module here makes the host think that it has called CUDA."""
    engine = LocalEngine(1, 1, tmp_path / "logs", ("cuda_at_import",))
    try:
        (cell,) = cells_of(tmp_path)[:1]
        plan(tmp_path, cell, "", "kill")
        kinds = []
        for _ in range(3):
            (slot,) = engine.slots()
            slot.assign(make_job(engine_fakes.run_cell, cell.request, None, ("cuda_at_import",), cell.label))
            kinds.append(type(end(engine)))
        assert kinds == [Finished, Failed, Finished]
        hosts = [words[0] for words in engine_fakes.attempts(tmp_path)]
        assert len(set(hosts)) == 3
        assert {words[1] for words in engine_fakes.attempts(tmp_path)} == {str(os.getpid())}
        until(lambda: not any(psutil.pid_exists(int(host)) for host in hosts))
    finally:
        engine.close()


def fill_memory(request: CellRequest, report: Report) -> Path:
    """A cell for which PyTorch finds no memory."""
    import torch

    torch.empty(10**16)
    raise AssertionError


@pytest.mark.parametrize(("fault", "kind"), [("memory", "memory"), ("busy", "busy"), ("error", "error")])
def test_failures_have_a_kind(tmp_path: Path, fault: str, kind: str):
    cell = cells_of(tmp_path)[0]
    plan(tmp_path, cell, fault)
    log = tmp_path / "error.log"
    ours, theirs = Pipe()
    failed = measure(make_job(engine_fakes.run_cell, cell.request, log).work, theirs)
    assert isinstance(ours.recv(), Progress)
    assert isinstance(failed, Failed)
    assert failed.kind == kind
    assert log.exists() == (kind != "busy")


def test_memory_that_pytorch_does_not_find_is_told_apart_from_errors(tmp_path: Path):
    failed = measure(make_job(fill_memory, cells_of(tmp_path)[0].request, None).work, Pipe()[0])
    assert isinstance(failed, Failed)
    assert failed.kind == "memory"
