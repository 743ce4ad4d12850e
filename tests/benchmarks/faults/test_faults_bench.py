"""Counts and kills of the fault bench, and two runners on one folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from click.testing import CliRunner

from benchmarks.faults import audit, kills
from benchmarks.faults.audit import Note
from benchmarks.faults.kills import main
from fimaq_core.progress import Progress, silent
from tasks.common.cell.lease import this_process
from tasks.common.record import read_record
from tasks.common.request import CellRequest, DataRequest, ModelRequest

pytestmark = pytest.mark.slow


def test_cells_measured_twice_or_by_two_at_a_time_are_doubled():
    seen = {"begun": "aad", "measured": "abbd", "overlap": "c"}
    notes = [Note(kind, cell, 1, 0.0) for kind, cells in seen.items() for cell in cells]
    assert audit.doubled(notes) == {"b", "c"}


def test_notes_tell_which_process_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    request = CellRequest(
        "classification", ModelRequest("demo_vit"), DataRequest(), None, results=tmp_path / "runs"
    )
    stages = ["evaluate"]
    monkeypatch.setattr(
        "tasks.common.cell.run.run_cell",
        lambda _, on_progress: [on_progress(Progress(stage, 0, 1)) for stage in stages],
    )
    told: list[Progress] = []
    audit.run_cell(request, told.append)
    assert [note.kind for note in audit.read_notes(tmp_path)] == ["begun", "measured"]
    stages[:] = []  # another measured it
    audit.run_cell(request, silent)
    assert len(audit.read_notes(tmp_path)) == 2
    stages[:] = ["wait for another", "calibrate", "evaluate"]

    def begun_by(pid: int, started: float) -> list[str]:
        """Return the kinds of the new notes if another process has begun the cell."""
        note = Note("begun", audit.read_notes(tmp_path)[0].cell, pid, started)
        with (tmp_path / "audit.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        before = len(audit.read_notes(tmp_path))
        audit.run_cell(request, silent)
        return [note.kind for note in audit.read_notes(tmp_path)[before:]]

    parent = psutil.Process(os.getppid())
    assert begun_by(parent.pid, parent.create_time()) == ["begun", "overlap", "measured"]
    # Another process had that id.
    assert begun_by(parent.pid, parent.create_time() - 1000) == ["begun", "measured"]
    assert audit.read_notes(tmp_path)[0].pid == this_process()[1]
    assert told[0].stage == "evaluate"


def test_two_runners_on_one_folder_measure_each_cell_once(tmp_path: Path):
    """Both start at the same time with two slots. Each cell holds its lease for a moment."""
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({
        "name": "twice", "tasks": {"classification": {"dataset": "none", "models": ["demo_vit"]}},
        "methods": ["rtn"], "bits": ["w4a4"], "seeds": list(range(10)), "threads": 1,
    }))  # fmt: skip
    results = tmp_path / "results"
    command = [sys.executable, "-m", "leased_cells", "run", "--profile", str(grid), "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    runners = [
        subprocess.Popen(
            [*command, "--results", str(results)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in "ab"
    ]
    said = [runner.communicate()[0] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0]
    notes = audit.read_notes(results)
    for kind in ("begun", "measured"):
        cells = [note.cell for note in notes if note.kind == kind]
        assert len(cells) == len(set(cells)) == 10, kind
    assert len({note.pid for note in notes}) == 10  # one process per cell
    for text in said:
        assert "[10/10]" in text
    assert all(read_record(path).n == 2000 for path in results.rglob("result.json"))
    assert len(list(results.rglob("result.json"))) == 10


def test_digests_do_not_depend_on_the_order_in_a_checkpoints_header(tmp_path: Path) -> None:
    for name, keys in (("one", "ab"), ("other", "ba"), ("third", "ac")):
        header = json.dumps(dict.fromkeys(keys, 0)).encode()
        (tmp_path / name).mkdir()
        content = len(header).to_bytes(8, "little") + header + b"tensors"
        (tmp_path / name / "quantized.safetensors").write_bytes(content)
    one, other, third = (kills.digests(tmp_path / name, "*") for name in ("one", "other", "third"))
    assert one == other != third
    assert list(one) == ["quantized.safetensors"]


def test_victims_are_found_among_this_process_s_children() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes = [subprocess.Popen([*sleep, word]) for word in (*kills.WORDS.values(), "ray::IDLE")]
    try:
        found = [[process.pid for process in kills.victims(kind)] for kind in kills.WORDS]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert found == [[process.pid] for process in processes[:-1]]


def test_the_bench_refuses_a_folder_that_ray_cannot_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_TMPDIR", "relative")
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert "error: Ray cannot start: its folder RAY_TMPDIR=relative" in result.output
