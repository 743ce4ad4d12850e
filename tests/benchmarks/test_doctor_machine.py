"""The doctor's checks of packages, devices, disks and results find what is wrong."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks import doctor
from benchmarks.doctor import Finding, guarded, package_findings
from tasks.common.cell.machine import container_limits


def test_packages_are_compared_with_what_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bare-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = ["click>=8", "numpy==1.0; python_version >= '3'", "No_Such.Tool==3.0", "bare"]
    others = ["for-elsewhere==1.0; sys_platform == 'nowhere'", "other; extra == 'dev'"]
    python, *found = package_findings([*wanted, *others])
    assert (python.state, sys.executable in python.text) == ("ok", True)
    assert {(one.state, one.fix) for one in found} == {("problem", "make setup")}
    assert [one.text for one in found] == [
        f"numpy is {metadata.version('numpy')}; wanted: ==1.0",
        "No_Such.Tool is missing; wanted: ==3.0",
        "bare is missing; wanted: any",
    ]


def test_a_check_that_fails_keeps_what_it_found_before():
    def examine():
        yield Finding("ok", "fine")
        raise OSError("gone")

    found = guarded("disk", examine)
    assert [one.state for one in found] == ["ok", "problem"]
    assert found[1].text == "disk cannot be examined: OSError: gone"


FACTS = """Collecting environment information...
PyTorch version: 2.11.0+cu130
CUDA used to build PyTorch: 13.0
Is CUDA available: {available}
GPU models and configuration: {gpus}
Nvidia driver version: {driver}
"""


@pytest.mark.parametrize(
    ("available", "gpus", "driver", "state", "text"),
    [
        ("True", "GPU 0: NVIDIA H200", "580.65", "ok", "GPU 0: NVIDIA H200"),
        ("True", "\nGPU 0: NVIDIA A\nGPU 1: NVIDIA B", "580.65", "ok", "GPU 1: NVIDIA B"),
        ("False", "GPU 0: NVIDIA H200", "580.65", "note", "PyTorch sees no GPU"),
        ("False", "Could not collect", "Could not collect", "ok", "built for CUDA 13.0"),
    ],
)
def test_gpus_are_told(
    monkeypatch: pytest.MonkeyPatch, available: str, gpus: str, driver: str, state: str, text: str
):
    output = FACTS.format(available=available, gpus=gpus, driver=driver)
    done = subprocess.CompletedProcess((), 0, output)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    first, *found = doctor.torch_findings()
    assert first.text.startswith("PyTorch 2.11.0+cu130, built for CUDA 13.0, NVIDIA driver")
    last = found[-1] if found else first
    assert (last.state, text in last.text) == (state, True)


def test_pytorch_is_asked_in_a_process_that_may_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "torch").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    for content, words in (
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise ImportError('libcudart is gone')", "libcudart is gone"),
        ("import time\ntime.sleep(60)", "timed out after 1.0 seconds"),
    ):
        (tmp_path / "torch" / "__init__.py").write_text(content)
        (finding,) = doctor.torch_findings(seconds=1.0 if "sleep" in content else 60.0)
        assert (finding.state, finding.fix) == ("problem", "make setup")
        assert words in finding.text


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_limits_of_containers_are_read_of_both_kinds_of_groups(tmp_path: Path):
    proc, groups = tmp_path / "cgroup", tmp_path / "groups"
    assert container_limits(proc, groups) == {"memory": None, "cores": None}
    # Version 2: the tightest on the way up counts.
    proc.write_text("0::/pod/box\n")
    write(groups / "pod" / "box" / "memory.max", "max\n")
    write(groups / "pod" / "memory.max", "4000000000\n")
    write(groups / "pod" / "box" / "cpu.max", "150000 100000\n")
    write(groups / "cpu.max", "max 100000\n")
    assert container_limits(proc, groups) == {"memory": 4e9, "cores": 1.5}
    # Inside of a container the group's own path is not there: the top is the group.
    proc.write_text("0::/not/visible\n")
    write(groups / "memory.max", "3000000000\n")
    assert container_limits(proc, groups)["memory"] == 3e9
    # Version 1, where a huge number means none.
    other = tmp_path / "v1"
    proc.write_text("4:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/\n")
    write(other / "memory" / "box" / "memory.limit_in_bytes", "2000000000\n")
    write(other / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    write(other / "cpu" / "box" / "cpu.cfs_quota_us", "200000\n")
    write(other / "cpu" / "box" / "cpu.cfs_period_us", "100000\n")
    write(other / "cpu" / "cpu.cfs_quota_us", "-1\n")
    write(other / "cpu" / "cpu.cfs_period_us", "100000\n")
    assert container_limits(proc, other) == {"memory": 2e9, "cores": 2.0}
    found = [
        one
        for one in doctor.machine_findings(container_limits(proc, other))
        if "container" in one.text
    ]
    assert [(one.state, "2.0 GB of memory and 2 cores" in one.text) for one in found] == [
        ("note", True)
    ]


def test_processor_and_memory_are_told_without_pytorch():
    (found,) = doctor.machine_findings({"memory": None, "cores": None})
    assert f"{os.cpu_count()} cores" in found.text


def test_little_room_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = list(doctor.results_findings(tmp_path / "not" / "yet"))
    assert [one.state for one in found] == ["ok"] * 4
    monkeypatch.setattr(doctor, "LITTLE", 1e18)
    found = list(doctor.results_findings(tmp_path))[1:]
    assert {(one.state, one.fix) for one in found} == {("note", "free space there")}


def test_a_bare_results_folder_is_fine_and_stays_bare(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "new" / "one"):
        assert "can be written" in next(doctor.results_findings(folder)).text
    assert not list(tmp_path.iterdir())


def test_a_results_folder_that_cannot_be_written_is_a_problem(tmp_path: Path):
    (tmp_path / "file").touch()
    found = next(doctor.results_findings(tmp_path / "file" / "results"))
    assert (
        found.state,
        "cannot be written" in found.text,
        str(tmp_path / "file") in found.fix,
    ) == ("problem", True, True)
    # Nobody, not even root, makes files there.
    assert "cannot be written" in next(doctor.results_findings(Path("/proc/results"))).text
