"""The Ray executor on a real cluster of two nodes, which are processes of this machine."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import engine_fakes
import psutil
import pytest
from benchmark_fakes import small_grid
from click.testing import CliRunner, Result
from engine_fakes import HANG, until

from benchmarks.cli import cli
from benchmarks.run import ray

pytestmark = pytest.mark.slow

STORE = 80 * 2**20
#: The command line of the benchmarks with cells that do no work.
DRIVER = """
import sys, engine_fakes
from benchmarks.cli import cli
cli(sys.argv[1:], obj=engine_fakes.ADAPTER)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start a head without slots and two nodes with one slot each."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    with engine_fakes.ray_folder() as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_TMPDIR", "TMPDIR"):  # killed workers leave files in TMPDIR
            patch.setenv(name, str(folder))
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=STORE)
        yield cluster
        cluster.shutdown()


def run(tmp_path: Path, address: str, *args: str) -> Result:
    command = ["run", "--profile", small_grid(tmp_path), "--results", str(tmp_path)]
    command += ["--engine", "ray", "--ray-address", address, *args]
    return CliRunner().invoke(cli, command, obj=engine_fakes.ADAPTER)


def test_a_grid_finishes_on_ray_whatever_is_killed(cluster: Any, tmp_path: Path):
    """The process of one cell is killed, and the Ray worker that started another."""
    plan = {"demo_vit rtn w3a3": ["kill"], "demo_vit fimaq w3a3": ["kill parent"]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    result = run(tmp_path, cluster.address)
    assert result.exit_code == 0, result.output
    assert "[6/6]" in result.output
    assert {engine_fakes.tries(tmp_path, name) for name in plan} == {2}
    assert engine_fakes.tries(tmp_path, "demo_swin fimaq w3a3") == 1
    assert engine_fakes.tries(tmp_path, "demo_swin rtn w3a3") == 1
    assert not list(tmp_path.glob("runs/.ray-*"))
    processes = {int(pid) for words in engine_fakes.attempts(tmp_path) for pid in words[:2]}
    until(lambda: not any(psutil.pid_exists(pid) for pid in processes))


def node_of(cluster: Any, pid: int) -> Any:
    """Return the node whose raylet is an ancestor of a process."""
    above = {process.pid for process in psutil.Process(pid).parents()}
    (found,) = [
        node
        for node in cluster.list_all_nodes()
        if node.all_processes["raylet"][0].process.pid in above
    ]
    return found


def test_nodes_come_and_go(cluster: Any, tmp_path: Path):
    """One node ends with its cell while the other is busy. A new node measures the cell."""
    (tmp_path / "plan.json").write_text(
        json.dumps({"demo_vit fp": ["sleep"], "demo_swin fp": ["flag"]})
    )
    options = ["--profile", small_grid(tmp_path), "--results", str(tmp_path)]
    options += ["--engine", "ray", "--ray-address", cluster.address]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command, pipes = (
        [sys.executable, "-c", DRIVER, "run", *options],
        {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    driver = subprocess.Popen(command, env=environment, text=True, **pipes)
    until(lambda: len(engine_fakes.attempts(tmp_path)) == 2)
    (pid,) = [int(words[0]) for words in engine_fakes.attempts(tmp_path) if words[2] == "demo_vit"]
    cluster.remove_node(node_of(cluster, pid), allow_graceful=False)
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    until(lambda: engine_fakes.tries(tmp_path, "demo_vit fp") == 2)
    (tmp_path / "flag").touch()
    output, _ = driver.communicate(timeout=HANG)
    assert driver.returncode == 0, output
    assert "[6/6]" in output
    assert "demo_vit fp: waits again: its process on " in output


def test_a_machine_that_does_not_see_the_results_is_named(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    @contextmanager
    def elsewhere(path: Path) -> Iterator[Path]:
        yield tmp_path / "elsewhere"

    monkeypatch.setattr("benchmarks.run.ray.replaced_whole", elsewhere)
    result = run(tmp_path, cluster.address)
    assert result.exit_code == 2
    assert f"does not see the results folder {tmp_path}/runs" in result.output
    assert "on a file system that all machines share" in result.output
    assert engine_fakes.attempts(tmp_path) == []


def test_one_machine_that_is_not_set_up_is_left_out(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, bad = ray._task(), cluster.list_all_nodes()[-1].node_id

    def cell(*arguments: Any) -> Any:
        from ray import get_runtime_context

        node = get_runtime_context().get_node_id()
        if node == bad:
            yield node, "second has no disk"
        else:
            yield from real(*arguments)

    monkeypatch.setattr(ray, "_task", lambda: cell)
    result = run(tmp_path, cluster.address)
    assert result.exit_code == 0, result.output
    assert "[6/6]" in result.output
    assert result.output.count("warning: The machine second has no disk: it is left out.") == 1
    assert len(engine_fakes.attempts(tmp_path)) == 6


@pytest.mark.parametrize(
    ("address", "args", "words"),
    [
        ("127.0.0.1:1", [], "error: No Ray cluster answers at 127.0.0.1:1"),
        ("head", [], "error: No Ray cluster answers at head (which is not host:port)"),
        ("ray://head:10001", [], "Give its address as host:port"),
        (
            "127.0.0.1:1",
            ["--device", "cuda:1"],
            "error: Device 'cuda:1': Ray gives each cell a GPU of its own",
        ),
        (
            "127.0.0.1:1",
            ["--engine", "local"],
            "error: A Ray address needs the Ray engine: add --engine ray",
        ),
    ],
)
def test_what_cannot_work_is_said_in_a_line(
    tmp_path: Path, address: str, args: list[str], words: str
):
    result = run(tmp_path, address, *args)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run(tmp_path, "127.0.0.1:1")
    assert result.exit_code == 2
    assert "pip install 'fimaq[cluster]'" in result.output


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Yield an environment that points Ray to a cluster and a GPU that do not exist."""
    with engine_fakes.ray_folder() as folder:
        (folder / "ray").mkdir()
        (folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        found = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        found |= {"RAY_TMPDIR": str(folder), "RAY_ADDRESS": "127.0.0.1:1", "HOME": str(tmp_path)}
        found |= {"CUDA_VISIBLE_DEVICES": "-1", "TMPDIR": str(folder)}
        yield found | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_no_address_is_this_machine_in_any_environment(alone: dict[str, str], tmp_path: Path):
    options = ["--profile", small_grid(tmp_path), "--engine", "ray", "--jobs", "1"]
    options += ["--device", "auto", "--methods", "fp", "--results", str(tmp_path)]
    command = [sys.executable, "-c", DRIVER, "run", *options]
    result = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[2/2]" in result.stdout
    assert "Device: cpu: no GPU is visible to PyTorch (CUDA_VISIBLE_DEVICES=-1)" in result.stdout
    assert "RAY_ADDRESS (127.0.0.1:1) in the environment is not used" in result.stderr
    assert not (tmp_path / ".ray").exists()
    assert not list(Path(alone["TMPDIR"]).glob("fimaq-*"))


def listening(process: psutil.Process) -> set[str]:
    """Return the addresses at which a process and all processes below it listen."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            sockets = one.net_connections(kind="inet")
            found |= {link.laddr.ip for link in sockets if link.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGHUP])
def test_a_cluster_of_its_own_is_private_and_leaves_nothing(
    alone: dict[str, str], tmp_path: Path, number: int | None
):
    """The run ends by itself, or is stopped while a cell runs."""
    folder = Path(alone["RAY_TMPDIR"])
    (tmp_path / "plan.json").write_text(json.dumps({"demo_vit fp": ["flag"]}))
    options = ["--profile", small_grid(tmp_path), "--engine", "ray", "--jobs", "1"]
    options += ["--device", "cpu", "--methods", "fp", "--results", str(tmp_path)]
    command = [sys.executable, "-c", DRIVER, "run", *options]
    restore = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    driver = subprocess.Popen(command, env=alone, text=True, preexec_fn=restore, **pipes)
    until(lambda: engine_fakes.attempts(tmp_path) or driver.poll() is not None)
    below = psutil.Process(driver.pid).children(recursive=True)
    assert listening(psutil.Process(driver.pid)) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    made = [path for path in folder.iterdir() if path.name != "ray"]
    assert made, "Ray uses another folder"
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in made)
    (cell,) = [int(words[0]) for words in engine_fakes.attempts(tmp_path)]
    token = psutil.Process(cell).environ()["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    assert not any(token in " ".join(one.cmdline()) for one in below if one.is_running())
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(token.encode() in text for text in texts)
    if number is None:
        (tmp_path / "flag").touch()
    else:
        driver.send_signal(number)
    output, _ = driver.communicate(timeout=HANG)
    assert driver.returncode == (130 if number else 0), output
    assert "Traceback" not in output
    until(lambda: not any(map(is_working, below)))
    assert [path.name for path in folder.iterdir()] == ["ray"]
    assert not (tmp_path / ".ray").exists()
    assert not list(tmp_path.rglob(".ray-*"))


def is_working(process: psutil.Process) -> bool:
    """Return True if a process has not ended."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "TMPDIR",
            "/any/" + 8 * "long-name/",
            "has 85 bytes; at most 28 leave room for the names of sockets",
        ),
        ("RAY_TMPDIR", "/any/" + 40 * "é", "has 85 bytes"),
        ("RAY_TMPDIR", "relative", "is not an absolute path"),
        ("RAY_TMPDIR", "", "is not an absolute path"),
        ("RAY_TMPDIR", "/dev/null", "is not writable (Not a directory)"),
        ("RAY_TMPDIR", "/proc/none", "is not writable (No such file or directory)"),
    ],
)
def test_a_folder_that_ray_cannot_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, value)
    result = run(tmp_path, "")
    assert result.exit_code == 2, result.output
    assert f"error: Ray cannot start: its folder {name}={value} {words}" in result.output
    assert "Set RAY_TMPDIR to the short absolute path" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], ""), (["RAY_ADDRESS="], ""), (["RAY_ADDRESS=b:1"], "--ray-address b:1")],
)
def test_make_takes_an_address_from_its_command_line_only(given: list[str], expected: str):
    command = ["make", "--dry-run", "--silent", "-C", str(Path(__file__).parents[3])]
    result = subprocess.run(
        [*command, "reproduce-table", "ENGINE=ray", *given],
        env={**os.environ, "RAY_ADDRESS": "a:1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--engine ray" in result.stdout
    assert expected in result.stdout
    assert ("--ray-address" in result.stdout) == bool(expected)
