"""State files of runners, and the command that shows them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import benchmark_fakes as fakes
import psutil
import pytest
import yaml
from click.testing import CliRunner, Result

from benchmarks.cells import RunOptions
from benchmarks.cli import cli
from benchmarks.display import Outcome
from benchmarks.grid import Filters, expand
from benchmarks.status.reader import read_states
from benchmarks.status.state import Counts, FailedCell, RunnerFacts, RunningCell, State
from benchmarks.status.writer import StateWriter
from fimaq_core.progress import Progress

CELLS = expand(fakes.plain_demo(), Filters(), RunOptions())[3:]


def folder_of(results: Path) -> Path:
    return results / "runs" / ".state"


def shown(results: Path, *args: str) -> Result:
    return CliRunner().invoke(cli, ["status", "--results", str(results), *args])


def writer(results: Path, said: list[str] | None = None, every: float = 0.0) -> StateWriter:
    return StateWriter(folder_of(results), (said if said is not None else []).append, "local", every)


def foreign(host: str = "elsewhere", heard: float = 0.0, **changes: object) -> State:
    now = time.time()
    facts = {"host": host, "pid": 7, "process_started": now, "started": now - 600, "heartbeat": now - heard, **changes}
    return State(runner=RunnerFacts.model_validate(facts), counts=Counts(done=1, running=0, failed=0, total=9))


def put(results: Path, name: str, content: str) -> Path:
    path = folder_of(results) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def test_nothing_ran(tmp_path: Path):
    result = shown(tmp_path)
    assert result.exit_code == 0
    assert "Nothing has run on" in result.output
    assert json.loads(shown(tmp_path, "--json").output)["runners"] == []
    assert not list(tmp_path.iterdir())


def test_a_runner_is_seen_from_its_beginning_to_its_end(tmp_path: Path):
    first, second = CELLS[:2]
    view = writer(tmp_path)
    view.begin(3, 10)
    view.started(first, 3, "worker 1")
    view.retried(first, "lost")
    view.started(first, 3, "worker 1")
    view.started(second, 3, "worker 2")
    view.progress(first, Progress("reconstruct", 5, 20, "blocks.1", float("inf")))
    view.progress(second, Progress("calibrate", 1, 2, loss=0.5))
    view.tick(90.0, {first.key: 30.0, second.key: None})
    (runner,) = json.loads(shown(tmp_path, "--json").output)["runners"]
    assert runner["alive"] is True
    assert runner["runner"]["pid"] == os.getpid()
    assert runner["runner"]["engine"] == "local"
    assert runner["counts"] == {"done": 3, "running": 2, "failed": 0, "total": 10}
    assert runner["left"] == 90.0
    mine, other = runner["running"]
    assert (mine["label"], mine["stage"], mine["block"], mine["done"], mine["total"]) == (
        first.label, "reconstruct", "blocks.1", 5, 20
    )  # fmt: skip
    assert (mine["attempts"], mine["loss"], mine["left"], mine["where"]) == (2, None, 30.0, "worker 1")
    assert (other["loss"], other["left"], other["attempts"]) == (0.5, None, 1)
    assert mine["key"]["method"] == first.method
    text = shown(tmp_path).output
    assert "Running on" in text
    assert f"{first.label} ×2" in text

    view.ended(first, Outcome("failed", "it broke", Path("/logs/error.log")), 4, 60.0)
    view.ended(second, Outcome("elsewhere", "measured by another"), 5, 60.0)
    view.close()
    (runner,) = json.loads(shown(tmp_path, "--json").output)["runners"]
    assert runner["alive"] is False
    assert runner["runner"]["finished"] is True
    assert runner["counts"] == {"done": 4, "running": 0, "failed": 1, "total": 10}
    assert runner["failed"] == [{"label": first.label, "message": "it broke", "log": "/logs/error.log"}]
    text = shown(tmp_path).output
    assert "Nothing runs on" in text
    assert "ended" in text
    assert "it broke (details: /logs/error.log)" in text


def test_the_file_is_written_once_in_a_while_and_at_every_end(tmp_path: Path):
    view = writer(tmp_path, every=3600.0)
    view.begin(0, 10)
    before = view.path.read_text()
    view.started(CELLS[0], 0, "")
    for step in range(20):
        view.progress(CELLS[0], Progress("reconstruct", step, 20))
    assert view.path.read_text() == before
    view.ended(CELLS[0], Outcome("finished", "top1 1.0"), 1, None)
    assert State.model_validate_json(view.path.read_bytes()).counts.done == 1


def test_a_file_that_cannot_be_written_costs_the_view_only_and_is_said_once(tmp_path: Path):
    said: list[str] = []
    view = writer(tmp_path, said)
    view.begin(0, 3)
    view.path.unlink()
    folder_of(tmp_path).rmdir()
    folder_of(tmp_path).write_text("in the way")
    for number, cell in enumerate(CELLS[:3]):
        view.started(cell, number, "")
        view.ended(cell, Outcome("finished", "top1 1.0"), number + 1, None)
    assert len(said) == 1
    assert f"Cannot write {view.path}" in said[0]
    folder_of(tmp_path).unlink()
    view.close()
    assert State.model_validate_json(view.path.read_bytes()).counts.done == 3
    assert [path.name for path in folder_of(tmp_path).iterdir()] == [view.path.name]


RUN = """
import sys
from benchmarks.cli import cli
import benchmark_fakes
if __name__ == "__main__":
    cli(sys.argv[1:], obj=benchmark_fakes.ADAPTER)
"""


def test_a_killed_runner_is_told_from_a_running_one(tmp_path: Path):
    grid = {
        "name": "small", "tasks": {"classification": {"dataset": "digit-pairs", "models": ["demo_vit"]}},
        "methods": ["fp", "fimaq"], "bits": ["w3a3"], "seeds": [1], "threads": 1,
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(grid))
    (tmp_path / "faults.json").write_text(json.dumps({"fimaq": "slow"}))
    (tmp_path / "main.py").write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(tmp_path / "main.py"), "run", "--profile", str(tmp_path / "small.yaml"), "--jobs", "1"]
    process = subprocess.Popen(
        [*command, "--results", str(tmp_path)], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        end, stage = time.monotonic() + 300, ""
        while stage != "evaluate" and time.monotonic() < end:
            time.sleep(0.1)
            seen, _ = read_states(folder_of(tmp_path))
            running = seen[0].state.running if seen else []
            stage = running[0].stage if running and "fimaq" in running[0].label else ""
        (runner,) = json.loads(shown(tmp_path, "--json").output)["runners"]
        assert runner["alive"] is True
        assert runner["runner"]["pid"] == process.pid
        assert runner["counts"] == {"done": 1, "running": 1, "failed": 0, "total": 2}
        assert [cell["label"] for cell in runner["running"]] == ["demo_vit fimaq w3a3 seed 1"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    # Killed and not waited for, it is still in the table of processes.
    end = time.monotonic() + 300
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.02)
    assert json.loads(shown(tmp_path, "--json").output)["runners"][0]["alive"] is False
    process.wait()
    assert "did not end by itself" in shown(tmp_path).output


def test_runners_elsewhere_go_by_their_heartbeat_and_those_here_by_their_process(tmp_path: Path):
    mine = psutil.Process()
    here = {"host": socket.gethostname(), "pid": mine.pid}
    files = {
        "a.json": foreign(heard=5),
        "b.json": foreign(heard=60),
        "c.json": foreign(finished=True),
        "d.json": foreign(**here, process_started=mine.create_time(), heard=3000),
        "e.json": foreign(**here, process_started=mine.create_time() - 500),
    }
    for name, state in files.items():
        put(tmp_path, name, state.model_dump_json())
    seen, problems = read_states(folder_of(tmp_path))
    assert not problems
    assert {item.path.name for item in seen if item.alive} == {"a.json", "d.json"}
    # all that are at work, and the last of the others
    assert len(json.loads(shown(tmp_path, "--json").output)["runners"]) == 3


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "\x00\x01", '{"schema_version": 2}',
        foreign().model_dump_json().replace('"pid":7', '"pid":-7'),
        foreign().model_dump_json().replace('"total":9', '"total":1e999'),
        foreign().model_dump_json().replace('"total":9', '"total":' + "9" * 5000),
        foreign().model_dump_json().replace('"elsewhere"', '"\\ud800"'),
        foreign().model_dump_json().replace('"counts"', '"more": 1, "counts"'),
        "[" * 100_000,
        " " * (5 << 20),
    ],
    ids=range(13),
)  # fmt: skip
def test_files_that_are_none_are_skipped_with_a_warning(tmp_path: Path, content: str):
    bad = put(tmp_path, "bad.json", content)
    put(tmp_path, "good.json", foreign(heard=1).model_dump_json())
    result = shown(tmp_path)
    assert result.exit_code == 0, result.output
    assert f"warning: Skipped {bad}" in result.output.replace("\n", "")
    assert "Running on elsewhere" in result.output
    found = json.loads(shown(tmp_path, "--json").output)
    assert len(found["runners"]) == len(found["warnings"]) == 1
    writer(tmp_path).begin(0, 1)
    assert bad.exists()


def test_nothing_in_a_file_reaches_the_terminal_as_more_than_text(tmp_path: Path):
    nasty = "\x1b[2J[bold red]模\u202e\x9b31m\n[/]"
    cell = RunningCell(
        label=nasty, where=nasty, stage=nasty, block=nasty,
        key={"section": nasty, "model": nasty, "scope": "", "method": "", "bits": "", "seed": 1, "point": ""},
    )  # fmt: skip
    state = foreign(nasty, engine=nasty).model_copy(
        update={"running": [cell], "failed": [FailedCell(label=nasty, message=nasty, log=nasty)]}
    )
    put(tmp_path, "x.json", state.model_dump_json())
    put(tmp_path, "\x1b[31mbad.json", "{")
    text = shown(tmp_path).output
    assert "[bold red]模" in text
    assert not any(character in text for character in "\x1b\x9b\u202e")
    json_text = shown(tmp_path, "--json").output
    assert json_text.isascii()
    assert "\x1b" not in json_text


def test_old_files_go_with_the_next_runner_and_those_of_running_ones_stay(tmp_path: Path):
    for number in range(12):
        put(tmp_path, f"old{number:02d}.json", foreign(finished=True, started=1e9 + number).model_dump_json())
    put(tmp_path, "running.json", foreign(started=1e9).model_dump_json())
    put(tmp_path, "bad.json", "{")
    half = put(tmp_path, ".gone.json.0123", "{")
    os.utime(half, (1e9, 1e9))
    fresh = put(tmp_path, ".other.json.4567", "{")
    view = writer(tmp_path)
    view.begin(0, 1)
    assert {path.name for path in folder_of(tmp_path).iterdir()} == {
        *(f"old{number:02d}.json" for number in range(7, 12)), "running.json", "bad.json", fresh.name, view.path.name
    }  # fmt: skip


@pytest.mark.parametrize(("args", "words"), [(["--watch"], "needs a terminal"), (["--watch", "--json"], "leave --watch out")])
def test_what_cannot_be_watched_is_said(tmp_path: Path, args: list[str], words: str):
    result = shown(tmp_path, *args)
    assert result.exit_code == 2
    assert words in result.output


def test_watching_goes_on_until_it_is_broken_off(tmp_path: Path):
    import pty
    import select

    put(tmp_path, "x.json", foreign(heard=1).model_dump_json())
    primary, secondary = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TERM": "xterm"}
    command = [sys.executable, "-m", "benchmarks", "status", "--watch", "--results", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=secondary, stderr=secondary, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    os.close(secondary)
    content, end, drawn = b"", time.monotonic() + 300, False
    while time.monotonic() < end:
        if not select.select([primary], [], [], 0.5)[0]:
            continue
        try:
            content += os.read(primary, 65536)
        except OSError:  # its other end is closed
            break
        if b"Running on elsewhere" in content and not drawn:
            drawn = True
            process.send_signal(signal.SIGINT)
    os.close(primary)
    assert process.wait(timeout=300) == 0, content
    assert drawn
    assert b"Traceback" not in content
