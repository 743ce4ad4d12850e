"""The doctor's profiles: missing data and weights, memory, and the whole command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark_fakes as fakes
import pytest
import yaml
from click.testing import CliRunner

from benchmarks.cli import cli
from benchmarks.costs.sources import REFERENCE
from benchmarks.doctor import Finding, examine, guarded, profile_findings
from benchmarks.grid.cell import Adapter, Places, RunOptions, default_adapter
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.schema import GRIDS, load_grid
from fimaq_core.errors import ModelError
from tasks.common.record import write_record

pytestmark = pytest.mark.slow

DEMO_CELLS = 166
ROOT = Path(__file__).parents[2]


def offline(tmp_path: Path) -> dict[str, str]:
    """An environment without a hub and with an empty cache of it."""
    paths = os.pathsep.join([str(tmp_path / "fake"), str(ROOT)])
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "PYTHONPATH": paths,
    }


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "doctor",
        "--results",
        str(tmp_path / "results"),
        *arguments,
    ]
    return subprocess.run(
        command, capture_output=True, text=True, env=offline(tmp_path), cwd=tmp_path
    )


def findings(
    name: str,
    options: RunOptions,
    adapter: Adapter = fakes.ADAPTER,
    cuda: bool = False,
    memory: float = 1e12,
) -> list[Finding]:
    return guarded(name, profile_findings, name, options, adapter, cuda, memory)


def test_the_demo_profile_can_run_here(tmp_path: Path):
    result = CliRunner().invoke(
        cli,
        ["doctor", "--profile", "demo", "--results", str(tmp_path), "--json"],
        obj=fakes.ADAPTER,
    )
    content = json.loads(result.stdout)
    assert (result.exit_code, content["can_run"]) == (0, True), result.output
    assert set(content) == {"schema", "profile", "can_run", "findings"}
    titles = ["Python and packages", "Machine", "Results", "Profile"]
    assert list(content["findings"]) == titles
    for found in content["findings"].values():
        for finding in found:
            assert set(finding) == {"state", "text", "fix"}
            assert finding["state"] in ("ok", "note", "problem")
    assert content["findings"]["Profile"][0]["text"] == f"demo: can run ({DEMO_CELLS} cells)"
    assert not list(tmp_path.iterdir())


def test_what_the_paper_profile_lacks_is_said(tmp_path: Path):
    (tmp_path / "imagenet" / "val").mkdir(parents=True)
    (tmp_path / "imagenet" / "train").mkdir()
    done = run(tmp_path, "--profile", "paper", "--imagenet", str(tmp_path / "imagenet"), "--json")
    assert done.returncode == 1, done.stderr
    content = json.loads(done.stdout)
    assert not content["can_run"]
    paper = content["findings"]["Profile"]
    texts = [finding["text"] for finding in paper]
    assert not any("data set ImageNet" in text for text in texts)
    assert any(text.startswith("detection: ") and "COCO=/path" in text for text in texts)
    assert any(
        text.startswith("detection: ") and "SwinTransformer/storage" in text for text in texts
    )


def test_a_pytorch_that_crashes_is_a_finding(tmp_path: Path):
    (tmp_path / "fake" / "torch").mkdir(parents=True)
    (tmp_path / "fake" / "torch" / "__init__.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
    )
    done = run(tmp_path)
    assert done.returncode == 1, done.stderr
    assert "PROBLEM  PyTorch does not load: Command" in done.stdout
    assert "fix: make setup" in done.stdout
    assert "Profile quickstart cannot run" in done.stdout
    assert "Traceback" not in done.stderr


def test_missing_packages_and_results_keep_a_profile_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("benchmarks.doctor.metadata.requires", lambda _: ["no-such-thing>=1"])
    arguments = ["doctor", "--profile", "demo", "--results", str(tmp_path / "results")]
    result = CliRunner().invoke(cli, arguments, obj=fakes.ADAPTER)
    assert result.exit_code == 1
    assert f"demo: can run ({DEMO_CELLS} cells)" in result.output
    assert "PROBLEM  no-such-thing is missing" in result.output
    assert "Profile demo cannot run" in result.output
    (tmp_path / "file").touch()
    monkeypatch.undo()
    assert not examine("demo", RunOptions(results=tmp_path / "file"), fakes.ADAPTER)["can_run"]


def test_missing_data_of_one_section_leave_the_others(tmp_path: Path):
    def preflight(request):
        return fakes.preflight(request) if request.task == "retrieval" else []

    (tmp_path / "no-data").touch()
    adapter = Adapter(fakes.run_cell, fakes.planned_folder, preflight)
    found = [
        finding
        for finding in findings("demo", RunOptions(results=tmp_path), adapter)
        if finding.state == "problem"
    ]
    assert [finding.text for finding in found] == [
        "demo: cannot run: retrieval; can run: --tasks classification,detection,"
        "mixed-mean-4-bits,deepfake",
        "retrieval: Missing: the data. Fetch it.",
        "retrieval: Missing: the weights of demo_clip. Train them.",
    ]


def test_a_check_that_fails_is_a_reason(tmp_path: Path):
    def broken(request):
        raise ImportError("timm is half installed")

    def unknown(request):
        raise ModelError("Unknown model 'x'.")

    options = RunOptions(results=tmp_path)
    (found,) = findings("demo", options, Adapter(fakes.run_cell, fakes.planned_folder, broken))
    assert (found.state, found.text) == (
        "problem",
        "demo cannot be examined: ImportError: timm is half installed",
    )
    found = findings("demo", options, Adapter(fakes.run_cell, fakes.planned_folder, unknown))[1]
    sections = "classification, retrieval, detection, mixed-mean-4-bits, deepfake"
    assert found.text == f"{sections}: Unknown model 'x'."


def test_a_profile_that_cannot_be_read_and_one_that_wants_a_gpu(tmp_path: Path):
    content = yaml.safe_load((GRIDS / "quantizers.yaml").read_text(encoding="utf-8"))
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({**content, "device": "cuda"}))
    options = RunOptions(results=tmp_path)
    found = findings(str(own), options)[0]
    assert (found.state, "PyTorch sees no GPU" in found.text) == ("problem", True)
    assert findings(str(own), options, cuda=True)[0].state == "ok"
    own.write_text("methods: [")
    assert "is not YAML" in findings(str(own), options)[0].text


def test_data_and_weights_that_were_given_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tasks.common.models.hub.hub_answers", lambda: True)
    options = RunOptions(results=tmp_path, data=Places(imagenet=tmp_path / "nowhere"))
    found = findings("paper-ablation", options, default_adapter(), cuda=True)
    assert any(f"the folder {tmp_path / 'nowhere' / 'train'}" in one.text for one in found)
    # The hub answers: what is not here will be fetched, and is not missing.
    assert not any("Missing: the weights" in one.text for one in found)


def test_memory_is_that_of_records_where_there_are_any(tmp_path: Path):
    options = RunOptions(results=tmp_path)
    cell = expand(load_grid("demo"), Filters(), options)[0]
    record = fakes.record_of(cell.request, 50.0).model_copy(
        update={"peak_memory_bytes": 123 * 10**9}
    )
    write_record(record, fakes.planned_folder(cell.request))
    found = findings("demo", options, memory=100e9)[-1]
    assert (
        found.state,
        found.text.startswith("demo_vit fp takes 123.0 GB of memory (measured, "),
    ) == ("note", True)
    assert found.text.endswith(", and 100.0 GB may be used here")


def test_memory_of_real_sizes_comes_from_the_committed_rehearsal(tmp_path: Path):
    *_, gpu, memory = findings("paper", RunOptions(results=tmp_path))
    content = json.loads((REFERENCE / "rehearsal.json").read_text(encoding="utf-8"))
    largest = max(content["cells"], key=lambda row: row["peak_memory_bytes"])
    assert memory.text.startswith(f"{largest['model']} {largest['method']} {largest['bits']}")
    assert "rehearsed, " in memory.text
    assert "no GPU is visible" in gpu.text


def test_an_unknown_profile_is_an_error(tmp_path: Path):
    result = CliRunner().invoke(
        cli, ["doctor", "--profile", "dmo", "--results", str(tmp_path)], obj=fakes.ADAPTER
    )
    assert result.exit_code == 1
    assert "Did you mean 'demo'?" in result.output


@pytest.mark.parametrize("name", ["demo", "quantizers"])
def test_real_preflights_find_what_comes_along(tmp_path: Path, name: str):
    assert findings(name, RunOptions(results=tmp_path), default_adapter())[0].state == "ok"
