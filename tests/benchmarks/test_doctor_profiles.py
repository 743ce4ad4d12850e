"""The doctor's profiles: what is missing and which command gets it, what is known of needs, and the command as a whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark_fakes as fakes
import pytest
import yaml
from click.testing import CliRunner

from benchmarks.cells import Adapter, Places, RunOptions, default_adapter
from benchmarks.cli import cli
from benchmarks.costs import REFERENCE
from benchmarks.doctor import examine, examine_profile, lines
from benchmarks.grid import GRIDS
from fimaq_core.errors import ModelError
from fimaq_core.recipe import make_recipe
from tasks.common.record import write_record

pytestmark = pytest.mark.slow

DEMO_CELLS = 158
ROOT = Path(__file__).parents[2]


def offline(tmp_path: Path) -> dict[str, str]:
    """An environment without a hub and with an empty cache of it."""
    paths = os.pathsep.join([str(tmp_path / "fake"), str(ROOT)])
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": paths}


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "doctor", "--results", str(tmp_path / "results"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=offline(tmp_path), cwd=tmp_path)


def test_the_demo_profile_can_run_here(tmp_path: Path):
    result = CliRunner().invoke(cli, ["doctor", "--profile", "demo", "--results", str(tmp_path), "--json"], obj=fakes.ADAPTER)
    content = json.loads(result.stdout)
    assert (result.exit_code, content["can_run"]) == (0, True), result.output
    assert set(content) == {"schema", "profile", "can_run", "findings", "profiles"}
    assert set(content["findings"]) == {"python", "devices", "disk", "results"}
    for found in content["findings"].values():
        for finding in found:
            assert set(finding) == {"check", "state", "text", "fix", "data"}
            assert finding["state"] in ("ok", "note", "problem")
    checks = {finding["check"] for found in content["findings"].values() for finding in found}
    assert {
        "python",
        "packages",
        "torch",
        "gpu",
        "cpu",
        "memory",
        "container",
        "compiler",
        "ray",
        "browser",
        "disk",
        "results",
    } <= checks
    names = [profile["name"] for profile in content["profiles"]]
    assert names[0] == "demo"
    assert set(names) == {path.stem for path in GRIDS.glob("*.yaml")}
    demo = content["profiles"][0]
    assert set(demo) == {"name", "sections", "needs", "notes", "problem", "can_run"}
    assert sum(section["cells"] for section in demo["sections"]) == DEMO_CELLS
    assert not list(tmp_path.iterdir())


def test_what_the_paper_profile_lacks_is_said_with_commands(tmp_path: Path):
    (tmp_path / "imagenet" / "val").mkdir(parents=True)
    (tmp_path / "imagenet" / "train").mkdir()
    done = run(tmp_path, "--profile", "paper", "--imagenet", str(tmp_path / "imagenet"), "--json")
    assert done.returncode == 1, done.stderr
    content = json.loads(done.stdout)
    assert not content["can_run"]
    paper = {section["name"]: section for section in content["profiles"][0]["sections"]}
    assert not any("data set ImageNet" in message for message in paper["classification"]["missing"])
    assert "hf download timm/deit_tiny_patch16_224.fb_in1k model.safetensors" in paper["classification"]["fixes"]
    assert set(paper["classification"]["weights"].values()) == {"missing"}
    assert any("COCO=/path" in message for message in paper["detection"]["missing"])
    assert any("SwinTransformer/storage" in message for message in paper["detection"]["missing"])
    assert paper["detection"]["fixes"] == []
    # The others are told, and do not matter.
    others = {profile["name"]: profile["can_run"] for profile in content["profiles"]}
    assert (others["demo"], others["paper-ablation"]) == (True, False)


def test_a_pytorch_that_crashes_is_a_finding(tmp_path: Path):
    (tmp_path / "fake" / "torch").mkdir(parents=True)
    (tmp_path / "fake" / "torch" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    done = run(tmp_path)
    assert done.returncode == 1, done.stderr
    assert "PROBLEM  PyTorch does not load: its process ended with -11" in done.stdout
    assert "fix: make setup" in done.stdout
    assert "Profile quickstart cannot run" in done.stdout
    assert "Traceback" not in done.stderr


def test_missing_packages_and_results_keep_every_profile_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.doctor.metadata.requires", lambda _: ["no-such-thing>=1"])
    report = examine("demo", RunOptions(results=tmp_path / "results"), fakes.ADAPTER)
    assert report["profiles"][0]["can_run"]
    assert not report["can_run"]
    shown = "\n".join(text for _, text in lines(report))
    assert "no-such-thing is missing" in shown
    assert "Profile demo cannot run" in shown
    (tmp_path / "file").touch()
    monkeypatch.undo()
    report = examine("demo", RunOptions(results=tmp_path / "file"), fakes.ADAPTER)
    assert not report["can_run"]


def test_missing_data_of_one_section_leave_the_others(tmp_path: Path):
    def preflight(request):
        return fakes.preflight(request) if request.task == "retrieval" else []

    (tmp_path / "no-data").touch()
    adapter = Adapter(fakes.run_cell, fakes.planned_folder, preflight)
    found = examine_profile("demo", RunOptions(results=tmp_path), adapter, [], cuda=False)
    assert not found["can_run"]
    assert {section["name"]: section["missing"] for section in found["sections"]} == {
        "classification": [], "detection": [],
        "retrieval": ["Missing: the data. Fetch it.", "Missing: the weights of demo_clip. Train them."],
    }  # fmt: skip
    report = examine("demo", RunOptions(results=tmp_path), adapter)
    shown = [text for _, text in lines(report)]
    assert "  PROBLEM  demo: cannot run: retrieval; can run: --tasks classification,detection" in shown
    assert any(text.endswith("retrieval: Missing: the data. Fetch it.") for text in shown)


def test_a_check_that_fails_is_a_reason(tmp_path: Path):
    def broken(request):
        raise ImportError("timm is half installed")

    def unknown(request):
        raise ModelError("Unknown model 'x'.")

    options = RunOptions(results=tmp_path)
    found = examine_profile("demo", options, Adapter(fakes.run_cell, fakes.planned_folder, broken), [], cuda=False)
    assert (found["can_run"], found["problem"]) == (False, "it cannot be examined: ImportError: timm is half installed")
    found = examine_profile("demo", options, Adapter(fakes.run_cell, fakes.planned_folder, unknown), [], cuda=False)
    assert found["sections"][0]["missing"] == ["Unknown model 'x'."]


def test_a_profile_that_cannot_be_read_and_one_that_wants_a_gpu(tmp_path: Path):
    content = yaml.safe_load((GRIDS / "quantizers.yaml").read_text(encoding="utf-8"))
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({**content, "device": "cuda"}))
    options = RunOptions(results=tmp_path)
    assert "PyTorch sees no GPU" in examine_profile(str(own), options, fakes.ADAPTER, [], cuda=False)["problem"]
    assert examine_profile(str(own), options, fakes.ADAPTER, [], cuda=True)["can_run"]
    own.write_text("methods: [")
    assert "is not YAML" in examine_profile(str(own), options, fakes.ADAPTER, [], cuda=True)["problem"]


def test_data_and_weights_that_were_given_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tasks.common.hub.hub_answers", lambda: True)
    options = RunOptions(results=tmp_path, data=Places(imagenet=tmp_path / "nowhere"))
    found = examine_profile("paper-ablation", options, default_adapter(), [], cuda=True)
    assert any(f"the folder {tmp_path / 'nowhere' / 'train'}" in message for message in found["sections"][0]["missing"])
    # The hub answers: what is not here will be fetched, and is not missing.
    assert set(found["sections"][0]["weights"].values()) <= {
        "here", "timm/vit_small_patch16_224.augreg_in21k_ft_in1k", "timm/deit_tiny_patch16_224.fb_in1k",
        "timm/swin_small_patch4_window7_224.ms_in1k",
    }  # fmt: skip


def test_needs_are_those_of_records_where_there_are_any(tmp_path: Path):
    record = fakes.make_record(
        recipe=make_recipe("rtn", {"w_bits": 4, "a_bits": 4}), model="demo_vit", peak_memory_bytes=123_000_000
    )
    path = write_record(record, tmp_path / "runs" / "cell")
    (path.parent / "quantized.safetensors").write_bytes(bytes(1_000_000))
    found = examine_profile("demo", RunOptions(results=tmp_path), fakes.ADAPTER, [(path, record)], cuda=False, memory=100e6)
    (need,) = [need for need in found["needs"] if need["model"] == "demo_vit"]
    assert (need["model"], need["memory"]) == ("demo_vit", 123e6)
    assert need["disk"] is not None
    assert need["disk"] > 1e6
    assert "demo_vit took 123.0 MB of memory, 1.0 MB of disk per cell" in need["text"]
    assert any("100.0 MB may be used here" in note for note in found["notes"])


def test_needs_of_real_sizes_come_from_the_committed_measurements(tmp_path: Path):
    found = examine_profile("paper", RunOptions(results=tmp_path), fakes.ADAPTER, [], cuda=False)
    content = json.loads((REFERENCE / "rehearsal.json").read_text(encoding="utf-8"))
    sizes = [row["peak_memory_bytes"] for row in content["cells"] if row["model"] == "mask_rcnn_swin_tiny"]
    need = next(need for need in found["needs"] if need["model"] == "mask_rcnn_swin_tiny")
    assert need["memory"] == max(sizes)
    assert "rehearsal.json" in need["text"]
    assert "no GPU is visible" in found["notes"][0]
    assert not examine_profile("paper", RunOptions(results=tmp_path), fakes.ADAPTER, [], cuda=True)["notes"]


def test_an_unknown_profile_is_an_error(tmp_path: Path):
    result = CliRunner().invoke(cli, ["doctor", "--profile", "dmo", "--results", str(tmp_path)], obj=fakes.ADAPTER)
    assert result.exit_code == 1
    assert "Did you mean 'demo'?" in result.output


@pytest.mark.parametrize("name", ["demo", "quantizers"])
def test_real_preflights_find_what_comes_along(tmp_path: Path, name: str):
    assert examine_profile(name, RunOptions(results=tmp_path), default_adapter(), [], cuda=False)["can_run"]
