"""The doctor's checks of packages, devices, disks and results: each finds what is wrong, and survives it."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import benchmark_fakes as fakes
import pytest

from benchmarks import doctor
from benchmarks.doctor import Finding, guarded, package_findings, unmet
from fimaq_core.recipe import make_recipe
from tasks.common.lease import acquire
from tasks.common.machine import container_limits
from tasks.common.record import write_record

FACTS = {
    "version": "2.11.0+cu130", "cuda_build": "13.0", "cpu_capability": "AVX2", "driver": "580.65",
    "devices": [
        {"name": "Fine GPU", "memory": 80e9, "free": 60e9, "capability": "9.0", "error": ""},
    ],
}  # fmt: skip


def test_packages_are_compared_with_what_is_wanted(tmp_path: Path) -> None:
    click, numpy = metadata.version("click"), metadata.version("numpy")
    lock = tmp_path / "lock.txt"
    lock.write_text(
        f"# a comment\n-e .\nclick=={click}\nnumpy==1.0 ; python_version >= '3'  # old\n"
        "No_Such.Tool==3.0\nfor-elsewhere==1.0 ; sys_platform == 'nowhere'\n"
    )
    python, packages = package_findings(lock)
    assert (python.state, sys.executable in python.text) == ("ok", True)
    assert (packages.state, packages.fix) == ("note", "make setup")
    assert packages.text == (
        f"2 of 4 packages are as in lock.txt: numpy is {numpy}; wanted: ==1.0, No_Such.Tool is missing; wanted: ==3.0"
    )
    lock.write_text(f"click=={click}\n")
    assert [one.state for one in package_findings(lock)] == ["ok", "ok"]


def test_a_package_without_metadata_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bare-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert unmet(["bare", "click>=8", "other; extra == 'dev'"]) == ["bare is missing; wanted: any"]


def test_a_check_that_fails_keeps_what_it_found_before():
    def examine():
        yield Finding("first", "ok", "fine")
        raise OSError("gone")

    found = guarded("disk", examine)
    assert [one.state for one in found] == ["ok", "problem"]
    assert found[1].text == "disk cannot be examined: OSError: gone"


def test_what_pytorch_sees_is_said() -> None:
    torch, gpu = doctor.torch_findings(FACTS, "")
    assert torch.text == "PyTorch 2.11.0+cu130, built for CUDA 13.0"
    assert gpu.text == "cuda:0: Fine GPU, 80.0 GB (60.0 GB free), capability 9.0, driver 580.65"
    old = {**FACTS, "devices": [{**FACTS["devices"][0], "error": "no kernel image"}]}
    *_, gpu = doctor.torch_findings(old, "")
    assert (gpu.state, "PyTorch cannot use it: no kernel image" in gpu.text) == ("note", True)
    *_, gpu = doctor.torch_findings({**FACTS, "devices": []}, "")
    assert (gpu.state, "sees no GPU" in gpu.text) == ("note", True)
    (broken,) = doctor.torch_findings(None, "ImportError: no library")
    assert (broken.state, broken.fix) == ("problem", "make setup")


def test_pytorch_is_asked_in_a_process_that_may_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "torch").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    for content, words in (
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "ended with -11"),
        ("raise ImportError('libcudart is gone')", "libcudart is gone"),
        ("import time\ntime.sleep(60)", "no answer within 1 s"),
    ):
        (tmp_path / "torch" / "__init__.py").write_text(content)
        facts, problem = doctor.ask_torch(seconds=1.0 if "sleep" in content else 60.0)
        assert facts is None
        assert words in problem


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
    limits = container_limits(proc, other)
    tight = {one.check: one for one in doctor.machine_findings("AVX2", limits)}["container"]
    assert (tight.state, "2.0 GB of memory and 2 cores" in tight.text) == ("note", True)


def test_processor_and_memory_are_said_without_pytorch_too():
    import psutil

    found = {one.check: one for one in doctor.machine_findings("", container_limits())}
    assert found["cpu"].data["cores"] == len(os.sched_getaffinity(0))
    assert found["memory"].data["total"] == psutil.virtual_memory().total


def test_programs_that_are_not_there_are_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = {one.check: one for one in doctor.program_findings()}
    assert (found["compiler"].state, found["browser"].state) == ("note", "note")
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    assert next(one for one in doctor.program_findings() if one.check == "compiler").state == "ok"


def test_little_room_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = list(doctor.disk_findings(tmp_path / "not" / "yet"))
    assert [one.state for one in found] == ["ok", "ok", "ok"]
    monkeypatch.setattr(doctor, "LITTLE", 1e18)
    found = list(doctor.disk_findings(tmp_path))
    assert {(one.state, one.fix) for one in found} == {("note", "free space there")}


def results(folder: Path) -> dict[str, Finding]:
    records, damaged = doctor.read_results(folder)
    return {f"{one.check} {one.state}": one for one in guarded("results", doctor.results_findings, folder, len(records), damaged)}


def test_a_bare_results_folder_is_fine_and_stays_bare(tmp_path: Path):
    assert set(results(tmp_path)) == {"results ok", "records ok", "leases ok"}
    assert "can be made" in results(tmp_path / "new" / "one")["results ok"].text
    assert not list(tmp_path.iterdir())


def test_a_results_folder_that_cannot_be_written_is_a_problem(tmp_path: Path):
    (tmp_path / "file").touch()
    found = results(tmp_path / "file" / "results")["results problem"]
    assert ("cannot be written" in found.text, str(tmp_path / "file") in found.fix) == (True, True)
    # Nobody, not even root, makes files there.
    assert "cannot be written" in results(Path("/proc/results"))["results problem"].text


def test_records_are_counted_and_damaged_ones_named(tmp_path: Path):
    for seed in (1, 2, 3):
        record = fakes.make_record(recipe=make_recipe("rtn", {"w_bits": 4, "a_bits": 4, "seed": seed}))
        path = write_record(record, tmp_path / "runs" / str(seed))
    path.write_text(path.read_text().replace('"n": 2000', '"n": 2001'))
    (tmp_path / "runs" / "2" / "result.json").write_text("{")
    found = results(tmp_path)
    assert found["records ok"].data == {"count": 1}
    assert str(path) in found["record note"].text
    assert doctor.read_results(tmp_path)[0][0][0] == tmp_path / "runs" / "1" / "result.json"


def test_leases_of_the_living_and_of_the_dead_are_told_apart(tmp_path: Path):
    dead, alive = tmp_path / "runs" / "dead" / "result.json", tmp_path / "mlp" / "shared.safetensors"
    script = f"""if True:
        import os, pathlib
        from tasks.common.lease import acquire
        lease = acquire(pathlib.Path({str(dead)!r}))
        os._exit(0)
    """
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
    with acquire(alive):
        found = [one for one in doctor.results_findings(tmp_path, 0, []) if one.check == "leases"]
    held, left = found
    assert held.text.startswith(f"{alive} is being made by ")
    assert f"process {os.getpid()}" in held.text
    assert left.text.endswith(f"died: {dead}")
    assert "leases" not in {one.check for one in doctor.results_findings(tmp_path / "none", 0, []) if one.state == "note"}
