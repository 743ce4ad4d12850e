"""The runner and the commands, with cells that measure nothing."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmark_fakes as fakes
import psutil
import pytest
import yaml
from benchmark_fakes import small_grid
from click.testing import CliRunner, Result
from diff_fakes import published_record
from engine_fakes import HANG, until

from benchmarks.cli import cli
from benchmarks.costs.estimate import Estimator, expected_cost
from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import load_grid
from benchmarks.run.local import default_jobs
from benchmarks.run.order import make_chains
from fimaq_core.terminal import printable
from tasks.common.cell.lease import acquire
from tasks.common.record import write_record


def invoke(tmp_path: Path, *args: str) -> Result:
    return CliRunner().invoke(cli, [*args, "--results", str(tmp_path)], obj=fakes.ADAPTER)


def measured(tmp_path: Path) -> list[str]:
    log = tmp_path / "log.txt"
    return [line.split(" ", 1)[1] for line in log.read_text().splitlines()] if log.exists() else []


def test_a_grid_runs_once_and_its_table_is_written(tmp_path: Path):
    grid = small_grid(tmp_path)
    first = invoke(tmp_path, "run", "--profile", grid, "--jobs", "2")
    assert first.exit_code == 0, first.output
    assert len(measured(tmp_path)) == 6
    assert "demo_swin fimaq w3a3 seed 1: top1" in first.output
    assert "[6/6]" in first.output
    assert "a library speaks" not in first.output
    lines = (tmp_path / "tables/small.csv").read_text().splitlines()
    assert len(lines) == 7
    assert "| fimaq" in (tmp_path / "tables/small.md").read_text()

    again = invoke(tmp_path, "run", "--profile", grid)
    assert again.exit_code == 0
    assert "All 6 cells are done already." in again.output
    assert len(measured(tmp_path)) == 6
    assert (tmp_path / "tables/small.csv").read_text().splitlines() == lines

    forced = invoke(
        tmp_path, "run", "--profile", grid, "--force", "--methods", "rtn", "--jobs", "1"
    )
    assert forced.exit_code == 0
    assert measured(tmp_path)[6:] == ["demo_vit rtn", "demo_swin rtn"]


def test_measuring_again_goes_on_without_force(tmp_path: Path):
    grid = small_grid(tmp_path)
    assert invoke(tmp_path, "run", "--profile", grid, "--jobs", "1").exit_code == 0
    (tmp_path / "faults.json").write_text(json.dumps({"fimaq": "user error"}))
    failed = invoke(
        tmp_path, "run", "--profile", grid, "--force", "--methods", "rtn,fimaq", "--jobs", "1"
    )
    assert failed.exit_code == 1
    assert "Without --force, the same command continues" in failed.output
    (tmp_path / "faults.json").unlink()
    done = len(measured(tmp_path))
    again = invoke(tmp_path, "run", "--profile", grid, "--methods", "rtn,fimaq", "--jobs", "1")
    assert again.exit_code == 0
    assert measured(tmp_path)[done:] == ["demo_vit fimaq", "demo_swin fimaq"]


def test_a_cell_that_another_process_measures_is_not_removed(tmp_path: Path):
    grid = small_grid(tmp_path)
    assert invoke(tmp_path, "run", "--profile", grid, "--jobs", "1").exit_code == 0
    records = sorted(tmp_path.rglob("result.json"))
    with acquire(records[-1]):
        refused = invoke(tmp_path, "run", "--profile", grid, "--force", "--jobs", "1")
    assert refused.exit_code == 2
    assert f"{records[-1]} is being made by process" in refused.output
    assert sorted(tmp_path.rglob("result.json")) == records


def test_failing_cells_do_not_stop_the_others(tmp_path: Path):
    grid = small_grid(tmp_path)
    (tmp_path / "faults.json").write_text(json.dumps({"fimaq": "error", "rtn": "user error"}))
    result = invoke(tmp_path, "run", "--profile", grid, "--jobs", "1")
    assert result.exit_code == 1
    assert "FAILED: ValueError: it broke" in result.output
    assert "FAILED: The weights do not fit." in result.output
    assert "4 of 6 cells failed" in result.output
    assert "repeat the command without --force: it skips finished cells." in result.output
    assert len((tmp_path / "tables/small.csv").read_text().splitlines()) == 3
    logs = list(tmp_path.rglob("error.log"))
    assert len(logs) == 4
    assert any("it broke" in log.read_text() and "Traceback" in log.read_text() for log in logs)

    (tmp_path / "faults.json").unlink()
    assert invoke(tmp_path, "run", "--profile", grid, "--jobs", "1").exit_code == 0
    assert not list(tmp_path.rglob("error.log"))


def test_a_worker_that_dies_fails_one_cell_only(tmp_path: Path):
    grid = small_grid(tmp_path)
    (tmp_path / "faults.json").write_text(json.dumps({"rtn": "crash"}))
    result = invoke(tmp_path, "run", "--profile", grid, "--jobs", "2")
    assert result.exit_code == 1
    assert "its process died (exit code 3)" in result.output
    assert "2 of 6 cells failed" in result.output
    assert sorted(measured(tmp_path)).count("demo_vit fimaq") == 1


def test_missing_data_is_said_once_before_anything_runs(tmp_path: Path):
    (tmp_path / "no-data").touch()
    result = invoke(tmp_path, "run", "--profile", small_grid(tmp_path))
    assert result.exit_code == 2
    assert result.output.count("error: Missing: the data. Fetch it.") == 1
    assert (
        result.output.count(
            "error: Missing: the weights of demo_vit, the weights of demo_swin. Train them."
        )
        == 1
    )
    assert measured(tmp_path) == []


def test_plan_lists_cells_and_runs_nothing(tmp_path: Path):
    (tmp_path / "no-data").touch()
    result = invoke(
        tmp_path, "run", "--profile", "paper", "--plan", "--models", "vit_small", "--bits", "w3a3"
    )
    assert result.exit_code == 0
    rows = [line.split() for line in result.output.splitlines()]
    (row,) = [row for row in rows if row[2:3] == ["fimaq"]]
    assert " ".join(row[:12]) == (
        "15 vit_small fimaq w3a3 3407 20000 - fisher_dplr 1024 32 train no"
    )
    assert "20 cells, 0 done, 20 to run." in result.output
    assert measured(tmp_path) == []


def test_filtered_runs_never_shrink_the_table(tmp_path: Path):
    grid = small_grid(tmp_path)
    invoke(tmp_path, "run", "--profile", grid, "--jobs", "1")
    result = invoke(
        tmp_path,
        "run",
        "--profile",
        grid,
        "--jobs",
        "1",
        "--models",
        "demo_vit",
        "--bits",
        "w2a4",
        "--methods",
        "rtn",
    )
    assert result.exit_code == 0, result.output
    table = (tmp_path / "tables/small.csv").read_text()
    assert len(table.splitlines()) == 1 + 6 + 1
    assert "demo_vit,rtn,demo,2,4,1" in table
    printed = result.output[result.output.index("# Profile") :]
    assert "demo_swin" not in printed
    assert "demo_vit w2a4" in printed


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "--profile", "dmeo"], "error: Unknown profile 'dmeo'. Did you mean 'demo'?"),
        (["run", "--methods", "fimac"], "error: Unknown method 'fimac'. Did you mean 'fimaq'?"),
        (
            ["run", "--device", "gpu", "--models", "demo_vit", "--methods", "fp"],
            "error: Unknown device 'gpu'",
        ),
        (["reference"], "error: Only 0 of 15 cells"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(tmp_path: Path, args: list[str], words: str):
    result = invoke(tmp_path, *args)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_failed_cells_are_listed_also_if_no_table_can_be_written(tmp_path: Path):
    (tmp_path / "faults.json").write_text(json.dumps({"rtn": "error"}))
    (tmp_path / "tables").write_text("a file where the folder would be")
    result = invoke(tmp_path, "run", "--profile", small_grid(tmp_path), "--jobs", "1")
    assert result.exit_code == 2
    assert "2 of 6 cells failed:\n  demo_vit rtn w3a3 seed 1: " in result.stderr
    assert "error: Cannot write" in result.stderr.splitlines()[-1]
    assert len(list(tmp_path.rglob("result.json"))) == 4


NASTY = "\x1b[2J\x1b]8;;http://x\x07L\x9b31m\r\u202e|x\u200b"


@pytest.mark.parametrize(
    "changes",
    [
        {"description": NASTY, "next": [NASTY]},
        {"name": NASTY},
        {NASTY: 1},
        {"tasks": {NASTY: {"task": "classification", "dataset": "d", "models": ["demo_vit"]}}},
        {"tasks": {"classification": {"dataset": NASTY, "models": [f"demo_vit{NASTY}"]}}},
        {"methods": [NASTY]},
        {"overrides": {NASTY: 3}},
        {"overrides": {"loss": NASTY}},
    ],
)
def test_no_text_of_a_grid_controls_the_terminal(tmp_path: Path, changes: dict[str, Any]):
    content = yaml.safe_load(Path(small_grid(tmp_path)).read_text())
    path = tmp_path / f"{NASTY.replace('/', '')}.yaml"
    path.write_text(yaml.safe_dump({**content, "methods": ["fp"], **changes}, allow_unicode=True))
    for command in (["run", "--jobs", "1"], ["run", "--plan"], ["tables"], ["diff"], ["status"]):
        profile = ["--profile", str(path)] if command[0] in ("run", "tables") else []
        result = invoke(tmp_path, *command, *profile)
        assert result.exit_code in (0, 1, 2)
        assert "Traceback" not in result.output
        assert "Unexpected error" not in result.output
        assert printable(result.output) == result.output
    for file in (tmp_path / "tables").glob("*"):
        text = file.read_text()
        assert printable(text) == text


@pytest.mark.parametrize("field", ["model", "method", "variant", "name", "notes"])
def test_no_text_of_a_record_controls_the_terminal(tmp_path: Path, field: str):
    record = fakes.make_record()
    for number in (1, 2):
        changes: dict[str, Any] = {field: [NASTY] if field == "notes" else f"={NASTY}"}
        if field == "name":
            changes = {"dataset": record.dataset.model_copy(update=changes)}
        write_record(record.model_copy(update=changes), tmp_path / f"runs/{number}")
    for command in (
        ["diff", "--all", "--results", tmp_path],
        ["compare", *tmp_path.glob("runs/*")],
    ):
        result = CliRunner().invoke(cli, list(map(str, command)), obj=fakes.ADAPTER)
        assert result.exit_code in (0, 2)
        assert "Unexpected error" not in result.output
        assert printable(result.output) == result.output


def test_diff_after_demo_numbers_alone_has_nothing_to_compare(tmp_path: Path):
    assert invoke(tmp_path, "diff").exit_code == 2
    invoke(tmp_path, "run", "--profile", small_grid(tmp_path), "--jobs", "1")
    result = invoke(tmp_path, "diff")
    assert result.exit_code == 2
    assert "Nothing is comparable yet" in result.output
    assert invoke(tmp_path, "diff", "--allow-nothing").exit_code == 0
    where = "digit-pairs (test, 2000 samples), on which nothing is published."
    assert f"6 measured values: measured on {where}" in result.output
    assert len((tmp_path / "tables/diff.csv").read_text().splitlines()) == 7


@pytest.mark.parametrize(
    ("value", "stderr", "code"), [(64.1, 0.2, 0), (60.0, 0.2, 1), (70.0, 0.2, 1), (64.1, 2.0, 1)]
)
def test_diff_exit_codes(tmp_path: Path, value: float, stderr: float, code: int):
    from fimaq_core.recipe import make_recipe
    from tasks.common.record import write_record

    recipe, model = make_recipe("fimaq", {"w_bits": 3, "a_bits": 3}), "vit_small_patch16_224"
    model += ".augreg_in21k_ft_in1k"
    record = published_record(recipe, model, value=value, stderr=stderr)
    write_record(record, tmp_path / "runs" / "x")
    assert invoke(tmp_path, "diff").exit_code == code
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "result.json").write_text("{")
    for arguments in (["diff"], ["diff", "--allow-nothing"]):
        result = invoke(tmp_path, *arguments)
        assert result.exit_code == 2
        assert "warning: The record" in result.stderr
        assert "Not compared: 1 record that cannot be read." in result.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupting_keeps_what_is_finished_and_leaves_no_process(tmp_path: Path, number: int):
    grid = small_grid(tmp_path)
    (tmp_path / "faults.json").write_text(json.dumps({"fimaq": "slow"}))
    code = (
        "import sys\nfrom benchmarks.cli import cli\nimport benchmark_fakes\n"
        "if __name__ == '__main__':\n    cli(sys.argv[1:], obj=benchmark_fakes.ADAPTER)\n"
    )
    script = tmp_path / "main.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [
        sys.executable,
        str(script),
        "run",
        "--profile",
        grid,
        "--results",
        str(tmp_path),
        "--jobs",
        "1",
    ]
    # Shells let background jobs ignore signals, and what such a job starts would ignore them too.
    restore = functools.partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore,
    )
    until(lambda: "demo_vit fimaq" in measured(tmp_path))
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 130, out + err
    assert "Finished cells are kept" in err
    assert "Traceback" not in err
    assert len(list(tmp_path.rglob("result.json"))) == 3
    until(lambda: not any(child.is_running() for child in below))


def test_chains_share_calibrations_and_start_with_full_precision_and_the_dearest():
    chains = make_chains(expand(fakes.plain_demo(), Filters(), RunOptions()))
    assert [len(chain) for chain in chains] == [1, 1, 1] + [4] * 12
    assert all(chain[0].method == "fp" for chain in chains[:3])
    for chain in chains:
        assert len({(cell.model, cell.bits, cell.seed) for cell in chain}) == 1
    demo = expand(load_grid("demo"), Filters(), RunOptions())
    costly = [cell for cell in demo if cell.method == "fimaq" and cell.model == "demo_swin"]
    uneven = make_chains([*(cell for cell in demo if cell.method == "rtn"), *costly])
    assert uneven[0][0].model == "demo_swin"


def test_chains_of_changed_models_come_before_what_uses_them():
    chains = make_chains(expand(load_grid("demo"), Filters(), RunOptions()))
    assert [chain[0].method for chain in chains[:11]] == ["fp"] * 7 + ["mlp-recon"] * 3 + ["rtn"]
    assert all(len(chain) == 1 for chain in chains[:10])


def test_jobs_follow_cores_and_threads():
    assert default_jobs(1, "cpu") >= 1
    assert default_jobs(10_000, "cpu") == 1
    assert default_jobs(None, "cpu") == 1
    assert default_jobs(1, "cuda") == 1


def test_time_left_uses_measured_seconds_by_method():
    cells = {cell.label: cell for cell in expand(fakes.plain_demo(), Filters(), RunOptions())}
    estimator = Estimator()
    fast, slow = cells["demo_vit rtn w3a3 seed 1"], cells["demo_vit fimaq w3a3 seed 1"]
    assert estimator.left([fast], {}, 1) is None
    estimator.add(fast, 2.0)
    assert estimator.left([slow], {}, 1) is None
    estimator.add(slow, 30.0)
    waiting = [
        cells["demo_vit rtn w3a3 seed 2"],
        cells["demo_swin fimaq w4a4 seed 1"],
        cells["demo_deit qdrop w4a4 seed 1"],
    ]
    running = cells["demo_vit fimaq w4a4 seed 2"]
    qdrop = 30 * expected_cost(waiting[2]) / expected_cost(slow)
    assert estimator.left(waiting, {running.key: (running, 10.0)}, 2) == pytest.approx(
        (2 + 30 + qdrop + 20) / 2
    )
    assert estimator.left([slow], {}, 8) == pytest.approx(30)
