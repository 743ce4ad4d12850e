"""Real processes of cells and their fork server, some of which are killed."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import benchmark_fakes as fakes
import engine_fakes
import psutil
import pytest
from engine_fakes import HANG, until

from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.run.child import measure, uses_cuda
from benchmarks.run.executor import Failed, Finished, Message, Started
from benchmarks.run.local import LocalExecutor
from fimaq_core.progress import OnProgress, Progress
from tasks.common.request import CellRequest

pytestmark = pytest.mark.slow


def cells_of(tmp_path: Path) -> list[Cell]:
    return expand(fakes.plain_demo(), Filters(methods=("rtn",)), RunOptions(tmp_path))


def local(tmp_path: Path, threads: int = 1, imports: Sequence[str] = ()) -> LocalExecutor:
    return LocalExecutor({"worker 1": tmp_path / "logs/worker-1.log"}, threads, imports)


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[LocalExecutor]:
    executor = local(tmp_path)
    yield executor
    executor.close()


def start(
    executor: LocalExecutor,
    cell: Cell,
    run_cell: Callable[[CellRequest, OnProgress], Path] = engine_fakes.run_cell,
) -> None:
    log = fakes.planned_folder(cell.request) / "error.log"
    executor.start("worker 1", cell.label, pickle.dumps((run_cell, cell.request, log)))


def end(executor: LocalExecutor) -> Message:
    """Return the message that ends the cell."""
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline:
        for slot, message in executor.wait(0.5):
            assert slot == "worker 1"
            if isinstance(message, Finished | Failed):
                return message
    raise AssertionError("the cell did not end")


def plan(tmp_path: Path, cell: Cell, *faults: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({engine_fakes.name_of(cell.request): faults}))


def test_each_cell_has_its_own_process_of_one_fork_server(executor: LocalExecutor, tmp_path: Path):
    for cell in cells_of(tmp_path)[:3]:
        start(executor, cell)
        assert isinstance(end(executor), Finished)
    found = engine_fakes.attempts(tmp_path)
    assert len({words[0] for words in found}) == 3
    assert len({words[1] for words in found}) == 1
    lines = (tmp_path / "logs/worker-1.log").read_text().splitlines()
    assert [line for line in lines if line.startswith("==")] == [
        f"== {cell.label}" for cell in cells_of(tmp_path)[:3]
    ]


def test_a_cell_has_started_before_its_progress_is_told(executor: LocalExecutor, tmp_path: Path):
    start(executor, cells_of(tmp_path)[0])
    heard: list[Message] = []
    until(lambda: heard.extend(message for _, message in executor.wait(0.5)) or len(heard) == 3)
    assert heard[0] == Started("worker 1")
    assert isinstance(heard[1], Progress)
    assert isinstance(heard[2], Finished)


def test_a_full_disk_for_logs_hides_no_reason(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/worker-1.log").symlink_to("/dev/full")
    executor = local(tmp_path)
    first, second = cells_of(tmp_path)[:2]
    plan(tmp_path, first, "error")
    start(executor, first)
    failed = end(executor)
    start(executor, second)
    assert isinstance(end(executor), Finished)
    executor.close()
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.message) == ("error", "ValueError: it broke")


def test_a_killed_process_fails_its_cell_only(executor: LocalExecutor, tmp_path: Path):
    first, second = cells_of(tmp_path)[:2]
    plan(tmp_path, first, "kill")
    start(executor, first)
    message = end(executor)
    assert isinstance(message, Failed)
    assert message.kind == "died"
    assert "killed by the system" in message.message
    assert message.log == tmp_path / "logs/worker-1.log"
    start(executor, second)
    assert isinstance(end(executor), Finished)
    assert len({words[1] for words in engine_fakes.attempts(tmp_path)}) == 1


def test_a_killed_fork_server_fails_its_cell_takes_the_process_along_and_is_replaced(
    executor: LocalExecutor, tmp_path: Path
):
    first, second = cells_of(tmp_path)[:2]
    plan(tmp_path, first, "kill parent")
    start(executor, first)
    message = end(executor)
    assert isinstance(message, Failed)
    assert message.kind == "died"
    child = int(engine_fakes.attempts(tmp_path)[0][0])
    until(lambda: not psutil.pid_exists(child))
    start(executor, second)
    assert isinstance(end(executor), Finished)
    assert len({words[1] for words in engine_fakes.attempts(tmp_path)}) == 2


def name_the_temporary_folder(request: CellRequest, report: OnProgress) -> Path:
    """Write the temporary folder and the ids of this process and its parent; then hang."""
    import tempfile

    path = request.results.parent / "told.txt"
    path.with_suffix(".new").write_text(f"{tempfile.gettempdir()}\n{os.getpid()}\n{os.getppid()}")
    path.with_suffix(".new").rename(path)
    time.sleep(HANG)
    raise AssertionError


def test_closing_ends_a_process_at_work_and_leaves_no_files(
    executor: LocalExecutor, tmp_path: Path
):
    start(executor, cells_of(tmp_path)[0], name_the_temporary_folder)
    until((tmp_path / "told.txt").exists)
    folder, child, _ = (tmp_path / "told.txt").read_text().splitlines()
    assert Path(folder).is_dir()
    executor.close()
    assert not psutil.pid_exists(int(child))
    assert not Path(folder).exists()


def test_nothing_outlives_a_killed_runner(tmp_path: Path):
    code = (
        "import sys, test_processes as tests\nfrom pathlib import Path\nroot = Path(sys.argv[1])\n"
        "executor = tests.local(root)\n"
        "tests.start(executor, tests.cells_of(root)[0], tests.name_the_temporary_folder)\n"
        "tests.end(executor)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    runner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    until((tmp_path / "told.txt").exists)
    folder, *processes = (tmp_path / "told.txt").read_text().splitlines()
    assert Path(folder).is_dir()
    runner.kill()
    runner.wait()
    until(lambda: not any(psutil.pid_exists(int(process)) for process in processes))
    until(lambda: not Path(folder).exists())


def leave_a_file_and_a_process(request: CellRequest, report: OnProgress) -> Path:
    """Make a temporary file and a process; then kill this process."""
    import tempfile

    sleeper = subprocess.Popen(["sleep", str(HANG)])
    with tempfile.NamedTemporaryFile(delete=False) as file:
        (request.results.parent / "left.txt").write_text(f"{file.name}\n{sleeper.pid}")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_what_a_killed_process_leaves_behind_is_removed(executor: LocalExecutor, tmp_path: Path):
    start(executor, cells_of(tmp_path)[0], leave_a_file_and_a_process)
    assert isinstance(end(executor), Failed)
    file, process = (tmp_path / "left.txt").read_text().splitlines()
    assert not Path(file).exists()
    until(lambda: not psutil.pid_exists(int(process)))


def in_a_new_process(test: Callable[[Path], None], tmp_path: Path) -> None:
    """Run a test in a new process, since a process has one fork server that imports once."""
    code = "import sys, pathlib, test_processes as tests\n"
    code += f"tests.{test.__name__}(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_of_the_fork_server_cannot_run_in_parallel_but_cells_can(tmp_path: Path):
    in_a_new_process(parallel, tmp_path)


def parallel(tmp_path: Path) -> None:
    executor = local(tmp_path, 2, ("torch", "parallel_at_import", "no_such_module"))
    start(executor, cells_of(tmp_path)[0], multiply)
    message = end(executor)
    assert isinstance(message, Finished), message
    assert message.path.read_text() == "True 2"
    assert "No module named 'no_such_module'" in (tmp_path / "logs/imports.log").read_text()


def multiply(request: CellRequest, report: OnProgress) -> Path:
    """Compute in parallel; it hangs if the thread pool was used before the fork."""
    imported = "parallel_at_import" in sys.modules
    torch = sys.modules["torch"]
    assert bool(torch.isfinite(torch.randn(512, 512) @ torch.randn(512, 512)).all())
    path = request.results.parent / "product.txt"
    path.write_text(f"{imported} {torch.get_num_threads()}")
    return path


def test_cuda_in_use_is_seen(tmp_path: Path):
    (tmp_path / "3").symlink_to("/dev/nvidiactl")
    (tmp_path / "4").symlink_to("socket:[1]")
    assert not uses_cuda(tmp_path)
    (tmp_path / "5").symlink_to("/dev/nvidia-uvm")
    assert uses_cuda(tmp_path)


def test_a_cell_is_spawned_where_its_imports_use_cuda(tmp_path: Path):
    in_a_new_process(spawned, tmp_path)


def spawned(tmp_path: Path) -> None:
    executor = local(tmp_path, imports=("cuda_at_import",))
    (cell,) = cells_of(tmp_path)[:1]
    plan(tmp_path, cell, "", "kill")
    kinds = []
    for _ in range(3):
        start(executor, cell)
        kinds.append(type(end(executor)))
    assert kinds == [Finished, Failed, Finished]
    found = engine_fakes.attempts(tmp_path)
    assert len({words[0] for words in found}) == 3
    assert {words[1] for words in found} == {str(os.getpid())}
    assert not any(psutil.pid_exists(int(words[0])) for words in found)


def test_a_cell_is_spawned_where_the_fork_server_cannot_be_reached(tmp_path: Path):
    """The path of a socket may have at most 107 bytes."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        in_a_new_process(unreached, tmp_path)


def unreached(tmp_path: Path) -> None:
    executor = local(tmp_path)
    start(executor, cells_of(tmp_path)[0])
    assert isinstance(end(executor), Finished)
    assert engine_fakes.attempts(tmp_path)[0][1] == str(os.getpid())


def fill_memory(request: CellRequest, report: OnProgress) -> Path:
    """Ask PyTorch for more memory than there is."""
    import torch

    torch.empty(10**16)
    raise AssertionError


@pytest.mark.parametrize(
    ("fault", "kind"), [("memory", "memory"), ("busy", "busy"), ("error", "error")]
)
def test_failures_have_a_kind(tmp_path: Path, fault: str, kind: str):
    cell = cells_of(tmp_path)[0]
    plan(tmp_path, cell, fault)
    log = tmp_path / "error.log"
    told: list[Message] = []
    failed = measure(pickle.dumps((engine_fakes.run_cell, cell.request, log)), told.append)
    assert isinstance(told[0], Progress)
    assert isinstance(failed, Failed)
    assert failed.kind == kind
    assert log.exists() == (kind != "busy")


def test_memory_that_pytorch_does_not_find_is_told_apart_from_errors(tmp_path: Path):
    failed = measure(
        pickle.dumps((fill_memory, cells_of(tmp_path)[0].request, None)), lambda _: None
    )
    assert isinstance(failed, Failed)
    assert failed.kind == "memory"
